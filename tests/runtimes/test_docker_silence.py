"""What holds while the engine is silent, goes away and comes back, or loses an answer. Not knowing is not dead."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway.errors import RuntimeUnavailable
from gateway.runtimes.docker.runtime import DockerRuntime
from tests.runtimes.containers import COUNT, HTTP, POLITE, Bench, bench_of, opened, play, start_and_hear
from tests.runtimes.docker_door import Door
from tests.runtimes.processes import Ear, until

pytestmark = pytest.mark.docker

ASK_AND_LEAVE = """
import asyncio, sys
from gateway.runtimes.docker.runtime import DockerRuntime
async def leave():
    runtime = DockerRuntime("nobody", base_url=sys.argv[1], timeout_s=600)
    asked = asyncio.create_task(runtime.find())
    await asyncio.sleep(0.2)
    await runtime.aclose()
    await asyncio.wait([asked])
asyncio.run(leave())
"""


@pytest.fixture(scope="module")
def module_bench() -> Iterator[Bench]:
    with bench_of() as bench:
        yield bench


@pytest.fixture
def bench(module_bench: Bench) -> Iterator[Bench]:
    yield module_bench
    module_bench.clear()


@asynccontextmanager
async def behind_a_door(bench: Bench, tmp_path: Path) -> AsyncIterator[tuple[DockerRuntime, Door]]:
    """Yield a runtime that has to go through a door to reach the engine, and is not patient with it."""
    async with (
        Door(tmp_path / "door.sock").serving() as door,
        opened(bench, base_url=door.url, timeout_s=1.0, patience_s=2.0) as runtime,
    ):
        await runtime.find()
        yield runtime, door


@pytest.mark.parametrize("path", ["create", "[0-9a-f]{64}/start"])
def test_a_start_whose_answer_is_lost_finds_what_it_made(bench: Bench, tmp_path: Path, path: str) -> None:
    async def scenario() -> None:
        async with behind_a_door(bench, tmp_path) as (runtime, door):
            door.lose_answer_to(rf"POST /v[0-9.]+/containers/{path}")
            handle, _ = await start_and_hear(runtime, bench.launch(HTTP, port=80))
            assert door.lost == 1
            assert [each.name for each in await runtime.find()] == [handle.name]
            assert bench.container().short_id == handle.ref

    play(scenario())


def test_what_ends_while_the_engine_is_away_is_known_when_it_is_back(bench: Bench, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with behind_a_door(bench, tmp_path) as (runtime, door):
            handle, _ = await start_and_hear(runtime, bench.launch(POLITE))
            end = asyncio.create_task(runtime.ended(handle))
            door.shut()
            bench.container().kill()
            with pytest.raises(RuntimeUnavailable):
                await runtime.find()
            assert not end.done()
            door.open()
            async with asyncio.timeout(2):
                assert (await end).reason == "killed by SIGKILL (the Docker Engine went away meanwhile)"
            assert (await end).last_lines == ("up",)

    play(scenario())


def test_a_server_outlives_the_engines_absence(bench: Bench, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with behind_a_door(bench, tmp_path) as (runtime, door):
            handle, _ = await start_and_hear(runtime, bench.launch(POLITE))
            end = asyncio.create_task(runtime.ended(handle))
            door.shut()
            with pytest.raises(RuntimeUnavailable):
                await runtime.stop(handle.name, grace_s=0.1)
            door.open()
            assert [found.runs for found in await runtime.find()] == [True]
            assert not end.done()
            await runtime.stop(handle.name, grace_s=20)
            assert (await end).code == 7

    play(scenario())


def test_an_engine_that_hangs_ends_nothing_and_refuses_in_time(bench: Bench, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with behind_a_door(bench, tmp_path) as (runtime, door):
            handle, ear = await start_and_hear(runtime, bench.launch(POLITE))
            end = asyncio.create_task(runtime.ended(handle))
            door.hang()
            bench.container().pause()
            with pytest.raises(RuntimeUnavailable, match="not answered"):
                await runtime.start(bench.launch(POLITE, "other"), Ear())
            assert not end.done()
            assert ear.pauses == []
            door.wake()
            await until(lambda: ear.pauses)
            await runtime.stop(handle.name, grace_s=20)
            await end

    play(scenario())


def test_a_log_is_followed_over_breaks_without_losing_or_repeating_a_line(bench: Bench, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with behind_a_door(bench, tmp_path) as (runtime, door):
            handle, ear = await start_and_hear(runtime, bench.launch(COUNT))
            for _ in range(3):
                heard = len(ear.lines)
                await until(lambda heard=heard: len(ear.lines) > heard + 10)  # type: ignore[misc]
                door.shut()
                await asyncio.sleep(0)
                door.open()
            await runtime.stop(handle.name, grace_s=0)
            assert ear.lines == [str(number) for number in range(1, len(ear.lines) + 1)]
            assert len(ear.lines) > 30

    play(scenario())


def test_a_cancelled_start_on_a_silent_engine_is_known_before_it_ends(bench: Bench, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with behind_a_door(bench, tmp_path) as (runtime, door):
            start = asyncio.create_task(runtime.start(bench.launch(POLITE), Ear()))
            await asyncio.sleep(0.05)
            door.hang()
            start.cancel()
            await asyncio.wait([start])
            assert start.cancelled()
            door.wake()
            await runtime.stop(bench.name(), grace_s=20)
            assert await runtime.find() == []

    play(scenario())


@pytest.mark.parametrize("busy", ["idle", "find", "start", "stop"])
def test_a_gateway_leaves_in_seconds_while_the_engine_hangs(bench: Bench, tmp_path: Path, busy: str) -> None:
    deeds: dict[str, Callable[[DockerRuntime], Awaitable[object]]] = {
        "idle": lambda _: asyncio.sleep(0),
        "find": lambda runtime: runtime.find(),
        "start": lambda runtime: runtime.start(bench.launch(POLITE, "other"), Ear()),
        "stop": lambda runtime: runtime.stop(bench.name(), grace_s=60),
    }

    async def scenario() -> None:
        async with Door(tmp_path / "door.sock").serving() as door:
            runtime = bench.runtime(base_url=door.url, timeout_s=600)
            await start_and_hear(runtime, bench.launch(POLITE))
            door.hang()
            work = asyncio.ensure_future(deeds[busy](runtime))
            await asyncio.wait([work], timeout=0.2)
            async with asyncio.timeout(10):
                await runtime.aclose()
                await asyncio.gather(work, return_exceptions=True)

    play(scenario())


def test_a_process_ends_while_a_call_hangs(bench: Bench, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Door(tmp_path / "door.sock").serving() as door:
            door.hang()
            program = await asyncio.create_subprocess_exec(sys.executable, "-c", ASK_AND_LEAVE, door.url)
            async with asyncio.timeout(30):
                assert await program.wait() == 0

    play(scenario())


def test_many_different_questions_keep_few_connections_open(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            await runtime.find()
            before = open_files()
            for number in range(30):
                await runtime.stop(f"never heard of {number}", grace_s=0)
            assert open_files() <= before + 2

    play(scenario())


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
