"""What holds when the engine itself ends, crashes and comes back; and GPUs, on an engine that offers them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.runtimes.docker.runtime import DockerRuntime
from tests.own_engine import OwnEngine, needs_own_engine
from tests.runtimes.containers import COUNT, POLITE, Bench, import_image, play, start_and_hear
from tests.runtimes.processes import until

pytestmark = [pytest.mark.docker, needs_own_engine]

RESTART_S = 60.0
"""How long an engine may take to be back; what it then knows must be known here within `KNOWN_S`."""
KNOWN_S = 2.0


@pytest.fixture
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[OwnEngine]:
    with OwnEngine(tmp_path, **getattr(request, "param", {})) as engine:
        yield engine


@pytest.fixture
def bench(engine: OwnEngine) -> Iterator[Bench]:
    client = engine.client()
    yield Bench(client, import_image(client, "small:1"), "restarted")
    client.close()


@pytest.mark.parametrize("deed", ["restart", "kill"])
def test_an_engine_that_restarts_takes_its_servers_along_and_a_new_start_heals(
    engine: OwnEngine, bench: Bench, deed: str
) -> None:
    def crash() -> None:
        engine.kill()
        engine.start()

    deeds: dict[str, Callable[[], None]] = {"restart": engine.restart, "kill": crash}
    went = " (the Docker Engine went away meanwhile)"
    reasons = {"exit status 7", f"exit status 7{went}", f"killed by SIGKILL{went}"}  # it may be told before it goes

    async def scenario() -> None:
        runtime = DockerRuntime(bench.owner, base_url=engine.url, first_port=18580)
        handle, _ = await start_and_hear(runtime, bench.launch(POLITE))
        end = asyncio.create_task(runtime.ended(handle))
        await asyncio.to_thread(deeds[deed])
        async with asyncio.timeout(KNOWN_S):
            assert (await end).reason in reasons
        assert (await end).last_lines[0] == "up"
        again, _ = await start_and_hear(runtime, bench.launch(POLITE))
        await runtime.stop(again.name, grace_s=10)
        assert await runtime.find() == []
        await runtime.aclose()

    play(scenario())


@pytest.mark.parametrize("engine", [{"live_restore": True}], indirect=True)
def test_a_server_that_outlives_its_engine_goes_on_here_too(engine: OwnEngine, bench: Bench) -> None:
    async def scenario() -> None:
        runtime = DockerRuntime(bench.owner, base_url=engine.url)
        handle, ear = await start_and_hear(runtime, bench.launch(COUNT))
        end = asyncio.create_task(runtime.ended(handle))
        await asyncio.to_thread(engine.restart)
        heard = len(ear.lines)
        await until(lambda: len(ear.lines) > heard + 20)
        assert not end.done()
        await runtime.stop(handle.name, grace_s=0)
        await end
        numbers = [int(line) for line in ear.lines]
        assert numbers == sorted(set(numbers))
        await runtime.aclose()

    play(scenario())


@pytest.mark.parametrize("engine", [{"gpu_hook": True}], indirect=True)
def test_a_container_sees_the_gpus_it_was_given_and_no_others(engine: OwnEngine, bench: Bench) -> None:
    show = f"echo sees $NVIDIA_VISIBLE_DEVICES; {POLITE}"

    async def scenario() -> None:
        runtime = DockerRuntime(bench.owner, base_url=engine.url)
        for gpus, seen in ((("1", "3"), "sees 1,3"), (("GPU-abc",), "sees GPU-abc"), ((), "sees void")):
            handle, ear = await start_and_hear(
                runtime, bench.launch(show, gpus=gpus, env={"NVIDIA_VISIBLE_DEVICES": "all"})
            )
            assert ear.lines[0] == seen
            assert [found.gpus for found in await runtime.find()] == [gpus]
            await runtime.stop(handle.name, grace_s=10)
        await runtime.aclose()

    play(scenario())
