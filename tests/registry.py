"""A real registry of container images on loopback, and a funnel that lets its answers through bit by bit."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.runtimes.processes import wait_until

PROGRAM = "docker-registry"  # Debian's package of this name
CONFIG = """
version: 0.1
storage: {{filesystem: {{rootdirectory: {root}}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


@contextmanager
def registry_at(folder: Path) -> Iterator[int]:
    """Run a registry that keeps its images in `folder`; yield its port."""
    if shutil.which(PROGRAM) is None and not os.environ.get("NEED_DOCKER"):
        pytest.skip(f"the program {PROGRAM} is not installed (Debian: apt-get install {PROGRAM})")
    port, config = free_port(), folder / "config.yml"
    config.write_text(CONFIG.format(root=folder / "data", port=port))
    command = [PROGRAM, "serve", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers(port))
        yield port
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def answers(port: int) -> bool:
    with suppress(URLError, ConnectionError), urlopen(f"http://127.0.0.1:{port}/v2/") as answer:
        return bool(answer.status == 200)
    return False


class Funnel:
    """Stands before a registry and stalls each answer after so many bytes, until it is opened."""

    def __init__(self, port: int, stall_after_bytes: int) -> None:
        self._port = port
        self._stall_after_bytes = stall_after_bytes
        self._open = asyncio.Event()
        self.stalled = 0
        """How many answers are stalled now."""

    def open(self) -> None:
        self._open.set()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        """Yield its port."""
        tasks: set[asyncio.Task[None]] = set()

        async def come_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            await self._pass_on(reader, writer)

        server = await asyncio.start_server(come_in, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._port)
        there = asyncio.create_task(self._move(reader, to_writer))
        back = asyncio.create_task(self._move(to_reader, writer, stalls=True))
        try:
            await asyncio.wait([there, back], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (there, back):
                task.cancel()
            await asyncio.gather(there, back, return_exceptions=True)
            to_writer.transport.abort()
            writer.transport.abort()

    async def _move(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, stalls: bool = False) -> None:
        moved = 0
        while block := await source.read(1 << 16):
            moved += len(block)
            if stalls and moved > self._stall_after_bytes:
                await self._stall()
            target.write(block)
            await target.drain()

    async def _stall(self) -> None:
        self.stalled += 1
        try:
            await self._open.wait()
        finally:
            self.stalled -= 1
