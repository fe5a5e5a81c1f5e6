"""Getting image and weights ahead of time, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import ClassVar

import pytest

from gateway.catalog import ModelSpec
from gateway.errors import GatewayError, StartFailed, StartTimeout
from gateway.fleet.fetch import Fetch
from gateway.fleet.journal import Journal
from gateway.runtimes.base import Exit, Found, Handle, Launch, Listener, Progress
from tests.fleet.scenes import play, spec
from tests.simulator.servers import SimulatedEngine


class Downloads(SimulatedEngine):
    """An engine whose weights take a program to get."""

    def download(self, spec: ModelSpec, name: str) -> Launch | None:
        return Launch(name, command=("download", spec.id))


class OneProgram:
    """A runtime that runs one program: it shows progress every ten seconds, and ends as the test says."""

    name: ClassVar[str] = "process"
    outlives: ClassVar[bool] = False

    def __init__(self, reports: list[Progress], end: Exit | None) -> None:
        self.reports = reports
        self.end = end
        self.running: list[str] = []
        self.started: list[str] = []

    async def find(self) -> list[Found]:
        return []

    async def adopt(self, found: Found, listener: Listener) -> Handle:
        raise StartFailed("nothing is ever found")

    async def check(self, launch: Launch) -> None:
        pass

    async def start(self, launch: Launch, listener: Listener) -> Handle:
        self.started.append(launch.name)
        self.running.append(launch.name)
        for report in self.reports:
            await asyncio.sleep(10)
            listener.progress(report)
        return Handle(launch.name, "", None, "1")

    async def ended(self, handle: Handle) -> Exit:
        if self.end is None:
            await asyncio.get_running_loop().create_future()
        await asyncio.sleep(10)
        assert self.end
        return self.end

    async def stop(self, name: str, *, grace_s: float) -> None:
        self.running.remove(name)

    async def logs(self, name: str, *, lines: int, follow: bool) -> AsyncIterator[str]:
        yield ""

    async def aclose(self) -> None:
        pass


FILES = [Progress("downloading", done, 2, "files") for done in (1, 2)]


async def told(fetch: Fetch) -> list[str]:
    lines: list[str] = []
    try:
        lines.extend([line async for line in fetch.follow()])
    except GatewayError as error:
        lines.append(error.code)
    return lines


def test_all_who_ask_follow_one_download_to_its_end() -> None:
    async def scene() -> None:
        runtime = OneProgram(FILES, Exit(0, "exit status 0"))
        fetch = Fetch(spec(), Downloads(), runtime, Journal(asyncio.get_running_loop().time))

        first, second, _ = await asyncio.gather(told(fetch), told(fetch), fetch.run())

        assert first == second == ["downloading, 1 of 2 files", "downloading, 2 of 2 files", first[-1]]
        assert first[-1] == "done: image and weights of m are here"
        assert runtime.started == ["tgi-m.PULL"]
        assert runtime.running == []

    play(scene)


def test_a_download_that_fails_says_why_and_leaves_nothing() -> None:
    async def scene() -> None:
        runtime = OneProgram([], Exit(1, "exit status 1"))
        fetch = Fetch(spec(), Downloads(), runtime, Journal(asyncio.get_running_loop().time))

        await fetch.run()

        with pytest.raises(StartFailed, match=r"it ended with 1\. Try again\."):
            await anext(fetch.follow())
        assert runtime.running == []

    play(scene)


def test_a_download_that_stands_still_is_ended() -> None:
    async def scene() -> None:
        runtime = OneProgram(FILES, None)
        fetch = Fetch(spec(stall_timeout=15), Downloads(), runtime, Journal(asyncio.get_running_loop().time))

        await fetch.run()

        with pytest.raises(StartTimeout, match=r"stall_timeout \(15 s\); it was downloading"):
            [line async for line in fetch.follow()]
        assert asyncio.get_running_loop().time() == 35
        assert runtime.running == []

    play(scene)


def test_a_download_ends_with_the_gateway() -> None:
    async def scene() -> None:
        runtime = OneProgram(FILES, None)
        fetch = Fetch(spec(), Downloads(), runtime, Journal(asyncio.get_running_loop().time))
        running = asyncio.create_task(fetch.run())
        await asyncio.sleep(30)

        running.cancel()
        await asyncio.wait([running])

        assert await told(fetch) == ["MODEL_NOT_LOADED"]
        assert runtime.running == []

    play(scene)


def test_where_there_is_nothing_to_download_it_is_done_at_once() -> None:
    async def scene() -> None:
        runtime = OneProgram([], None)
        fetch = Fetch(spec(), SimulatedEngine(), runtime, Journal(asyncio.get_running_loop().time))

        await fetch.run()

        assert await told(fetch) == ["done: there is nothing to download"]
        assert runtime.started == []

    play(scene)
