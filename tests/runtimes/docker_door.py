"""A door to the Docker Engine that can be shut, left unanswered, or lose an answer: an engine with bad manners."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from tests.docker_engine import ENGINE_URL

BLOCK_BYTES = 1 << 16


class Door:
    """Passes connections on to the engine. Belongs to one event loop."""

    def __init__(self, path: Path) -> None:
        self.url = f"unix://{path}"
        self.lost = 0
        """How many answers were lost so far."""
        self._path = path
        self._moves = asyncio.Event()
        self._moves.set()
        self._shut = False
        self._to_lose: re.Pattern[bytes] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def shut(self) -> None:
        """Break all connections, and take no more, as an engine that goes away."""
        self._shut = True
        for task in self._tasks:
            task.cancel()

    def open(self) -> None:
        self._shut = False

    def hang(self) -> None:
        """Take what comes and pass nothing on, in either direction, as an engine that hangs."""
        self._moves.clear()

    def wake(self) -> None:
        self._moves.set()

    def lose_answer_to(self, request: str) -> None:
        """Pass on the next request that begins with this pattern, and never its answer."""
        self._to_lose = re.compile(request.encode())

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Door]:
        server = await asyncio.start_unix_server(self._come_in, self._path)
        try:
            yield self
        finally:
            server.close()
            self.shut()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _come_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            if not self._shut:
                await self._pass_on(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        engine_reader, engine_writer = await asyncio.open_unix_connection(ENGINE_URL.removeprefix("unix://"))
        loses = asyncio.Event()
        ways = (self._move(reader, engine_writer, loses), self._move(engine_reader, writer, loses, back=True))
        tasks = [asyncio.create_task(way) for way in ways]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            engine_writer.transport.abort()  # first: what follows may be cancelled
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _move(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, loses: asyncio.Event, *, back: bool = False
    ) -> None:
        while block := await source.read(BLOCK_BYTES):
            await self._moves.wait()
            if not back and self._to_lose and self._to_lose.match(block):
                self._to_lose, self.lost = None, self.lost + 1
                loses.set()
            if back and loses.is_set():
                continue
            target.write(block)
            with suppress(ConnectionError):
                await target.drain()
