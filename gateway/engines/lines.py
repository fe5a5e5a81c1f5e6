"""Cuts a stream of server-sent events into its lines, however it comes in chunks. Pure."""

from __future__ import annotations


class EventLines:
    """Reads the lines of server-sent events. They are cut as bytes, so characters never are."""

    def __init__(self) -> None:
        self._unread = b""

    def feed(self, chunk: bytes) -> list[tuple[bytes, bytes]]:
        """Return the field and the value of each line that `chunk` completes, without the spaces around them.

        Empty lines, and comments, which keep a connection alive, are left out.
        """
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        cut = (line.partition(b":") for line in lines)
        return [(name, value.strip()) for field, _, value in cut if (name := field.strip())]
