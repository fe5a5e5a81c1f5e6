"""What a server says: bytes into lines, and the last lines of each server for those who ask later."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Sequence

KEPT_LINES = 500
LINE_BYTES = 64 * 1024
"""A traceback in JSON is one line, and what went wrong stands at its end."""

_LINE_END = re.compile(rb"\r?\n|\r(?!\n|\Z)")  # a lone \r too: progress bars end their lines so


class LineSplitter:
    """Turns chunks of output into lines, however they are cut. Of a line without end it keeps the start only."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[str]:
        """Return the lines that `chunk` completes; of a flood, only as many of the last ones as are kept anyway."""
        *lines, rest = _LINE_END.split(self._rest + chunk)
        self._rest = rest[: LINE_BYTES + 1]
        return [_text(line) for line in lines[-KEPT_LINES:]]

    def end(self) -> list[str]:
        """Return the last line if it has no line end."""
        rest, self._rest = self._rest.rstrip(b"\r"), b""
        return [_text(rest)] if rest else []


def _text(line: bytes) -> str:
    text = line[:LINE_BYTES].decode("utf-8", "replace")
    return text if len(line) <= LINE_BYTES else f"{text} [cut]"


class Log:
    """The last lines of one server's output, to be read while it runs and afterwards."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._count = 0
        self._ended = False
        self._news = asyncio.Event()

    def add(self, lines: Sequence[str]) -> None:
        self._lines.extend(lines)
        self._count += len(lines)
        self._tell()

    def end(self) -> None:
        self._ended = True
        self._tell()

    def last(self, count: int) -> tuple[str, ...]:
        """Return the last `count` lines, oldest first, or as many as are kept."""
        return tuple(self._lines)[-count:] if count > 0 else ()

    async def read(self, *, lines: int, follow: bool) -> AsyncIterator[str]:
        """Yield the last `lines` lines, and with `follow` the new ones until the server has ended.

        A reader who is slower than the server misses lines, and reads how many.
        """
        seen = self._count - len(self.last(lines))
        while True:
            news, new, seen = self._news, self._count - seen, self._count
            fresh = self.last(new)
            if new > len(fresh):
                yield f"[{new - len(fresh)} lines skipped]"
            for line in fresh:
                yield line
            if not follow or (self._ended and seen == self._count):
                return
            await news.wait()

    def _tell(self) -> None:
        """Wake the readers. Each waits for the event that was current when it last looked."""
        self._news.set()
        self._news = asyncio.Event()
