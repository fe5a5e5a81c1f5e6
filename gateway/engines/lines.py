"""Cuts a stream of server-sent events into its lines, however it comes in chunks. Pure."""

from __future__ import annotations

from gateway.errors import GenerationFailed

MOST_LINE_BYTES = 16 * 2**20
"""Far more than a token with its 50 likeliest takes. llama.cpp's last event repeats the whole prompt."""


class EventLines:
    """Reads the lines of server-sent events. They are cut as bytes, so characters never are."""

    def __init__(self) -> None:
        self._unread = bytearray()

    def feed(self, chunk: bytes) -> list[tuple[bytes, bytes]]:
        """Return the field and the value of each line that `chunk` completes, without the spaces around them.

        Empty lines, and comments, which keep a connection alive, are left out.

        Raises:
            GenerationFailed: a line has no end within `MOST_LINE_BYTES`.
        """
        usual = self._usual(chunk)
        return self._lines(chunk) if usual is None else [(b"data", value.strip()) for value in usual]

    def data(self, chunk: bytes) -> list[bytes]:
        """Return the values of the lines named `data` that `chunk` completes; spaces may be around them.

        Raises:
            GenerationFailed: a line has no end within `MOST_LINE_BYTES`.
        """
        usual = self._usual(chunk)
        return [value for field, value in self._lines(chunk) if field == b"data"] if usual is None else usual

    def _usual(self, chunk: bytes) -> list[bytes] | None:
        """Return the values if `chunk` is whole events of a line of `data` each, as nearly all are; else None."""
        if self._unread or chunk[:5] != b"data:" or chunk[-2:] != b"\n\n":
            return None
        values = chunk[5:-2].split(b"\n\ndata:")
        return values if chunk.count(b"\n") == 2 * len(values) else None  # more of them: other lines are among them

    def _lines(self, chunk: bytes) -> list[tuple[bytes, bytes]]:
        if len(self._unread) > MOST_LINE_BYTES:
            raise GenerationFailed("The model's server sent a line without end, which is no protocol; see its log.")
        if b"\n" not in chunk:  # what is unread is looked at once, however small its pieces are
            self._unread += chunk
            return []
        *lines, unread = (bytes(self._unread) + chunk if self._unread else chunk).split(b"\n")
        if unread or self._unread:
            self._unread = bytearray(unread)
        cut = [line.partition(b":") for line in lines if line]
        return [(name, value.strip()) for field, _, value in cut if (name := field.strip())]
