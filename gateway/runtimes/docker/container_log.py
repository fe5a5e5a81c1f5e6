"""Follows what one container says, whatever happens to the connection, without losing or repeating a line.

Every entry comes with the engine's time stamp: after a break the log is asked for from the last one on.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime

from gateway.errors import RuntimeUnavailable
from gateway.runtimes.docker.engine import Engine
from gateway.runtimes.output import KEPT_LINES, LineSplitter, Log

CATCH_UP_S = 2.0
"""How long the last lines of an ended container are waited for."""
AGAIN_S = 0.3


class ContainerLog:
    """The output of one container: kept in `log`, and told to `hear` line by line."""

    def __init__(self, engine: Engine, container_id: str, hear: Callable[[str], None]) -> None:
        self.log = Log()
        self._engine = engine
        self._container_id = container_id
        self._hear = hear
        self._last = ""  # the time stamp of the last entry
        self._splitters: dict[int, LineSplitter] = {}
        self._task = asyncio.create_task(self._follow(), name=f"log of {container_id[:12]}")

    async def finish(self) -> None:
        """Take what an ended container said last, as far as the engine still has it, and end the log."""
        await self.aclose()
        with suppress(RuntimeUnavailable, TimeoutError):
            async with asyncio.timeout(CATCH_UP_S):
                await self._read(follow=False)
        for splitter in self._splitters.values():
            self._add(splitter.end())
        self.log.end()

    async def aclose(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _follow(self) -> None:
        """Follow for ever: whoever knows that the container has ended calls `finish`."""
        while True:
            with suppress(RuntimeUnavailable):
                await self._read(follow=True)
            await asyncio.sleep(AGAIN_S)

    async def _read(self, *, follow: bool) -> None:
        start = {"since": unix_time(self._last)} if self._last else {"tail": str(KEPT_LINES)}
        params = {"stdout": "1", "stderr": "1", "timestamps": "1", "follow": str(int(follow)), **start}
        seen, frames = self._last, Frames()
        async with self._engine.stream("GET", f"/containers/{self._container_id}/logs", params) as answer:
            async for chunk in answer.iter_any():
                for channel, entry in frames.feed(chunk):
                    stamp, _, text = entry.partition(b" ")
                    self._take(channel, stamp.decode("ascii", "replace"), text, seen)

    def _take(self, channel: int, stamp: str, text: bytes, seen: str) -> None:
        if stamp > seen:  # of one length each, so that they compare as text
            self._last = max(stamp, self._last)
            self._add(self._splitters.setdefault(channel, LineSplitter()).feed(text))

    def _add(self, lines: list[str]) -> None:
        self.log.add(lines)
        for line in lines:
            self._hear(line)


class Frames:
    """Takes the engine's log stream apart: before each entry come its channel and its length, in 8 bytes."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[tuple[int, bytes]]:
        """Return the channel (1 output, 2 errors) and content of each entry that `chunk` completes."""
        data, at, entries = self._rest + chunk, 0, []
        while len(data) >= at + 8:
            channel, length = struct.unpack_from(">BxxxL", data, at)
            if len(data) < at + 8 + length:
                break
            entries.append((channel, data[at + 8 : at + 8 + length]))
            at += 8 + length
        self._rest = data[at:]
        return entries


def unix_time(stamp: str) -> str:
    """Return `2026-01-02T03:04:05.000000006Z` as `1767323045.000000006`, as the engine wants it."""
    seconds, _, rest = stamp.rstrip("Z").partition(".")
    return f"{int(datetime.fromisoformat(f'{seconds}+00:00').timestamp())}.{rest or '0'}"
