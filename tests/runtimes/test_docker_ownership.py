"""One live gateway per name and engine: whoever lives keeps the name, whoever is dead loses it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from gateway.errors import NameTaken
from gateway.runtimes.docker.ownership import HOLDER, LOCK, start_time, this_process
from gateway.runtimes.docker.runtime import DockerRuntime
from tests.runtimes.containers import POLITE, SLEEP, Bench, bench_of, opened, play, start_and_hear
from tests.runtimes.processes import Ear, until

pytestmark = pytest.mark.docker

OWN = """
import asyncio, sys
from gateway.runtimes.docker.runtime import DockerRuntime
async def own():
    await DockerRuntime(sys.argv[1]).find()
    print("owns", flush=True)
    await asyncio.sleep(600)
asyncio.run(own())
"""
NOBODY_PID = 2**22 + 1
"""No Linux gives a process such a number."""


@pytest.fixture(scope="module")
def module_bench() -> Iterator[Bench]:
    with bench_of() as bench:
        yield bench


@pytest.fixture
def bench(module_bench: Bench) -> Iterator[Bench]:
    yield module_bench
    module_bench.clear()


@contextmanager
def another_gateway(owner: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns this name. Killed in the end, as by `kill -9`."""
    process = subprocess.Popen([sys.executable, "-c", OWN, owner], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    with process.stdout:
        try:
            assert process.stdout.readline() == "owns\n"
            yield process
        finally:
            process.kill()
            process.wait()


def locks(bench: Bench) -> set[str]:
    return {each for each in bench.leftovers() if each.startswith("volume")}


def leave_lock(bench: Bench, holder: str) -> str:
    """Leave a lock as a gateway with this holder would; return the volume's name."""
    name = f"tgi-gateway-{bench.owner}-left"
    bench.client.volumes.create(name, labels={LOCK: bench.owner, HOLDER: holder})
    return name


def test_a_second_gateway_of_the_name_is_refused_and_the_first_not_disturbed(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as first:
            await first.find()
            held = locks(bench)
            second = bench.runtime()
            with pytest.raises(NameTaken, match="GATEWAY_NAME") as taken:
                await second.find()
            assert "docker volume rm" in taken.value.detail
            await second.aclose()
            assert await first.find() == []
            assert locks(bench) == held

    play(scenario())


def test_another_name_is_no_conflict(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench) as first:
            await first.find()
            other = DockerRuntime(f"{bench.owner}-2")
            assert await other.find() == []
            await other.aclose()

    play(scenario())


def test_a_name_that_was_given_back_can_be_taken(bench: Bench) -> None:
    async def scenario() -> None:
        for _ in range(2):
            async with opened(bench) as runtime:
                assert await runtime.find() == []
                assert len(locks(bench)) == 1
            assert locks(bench) == set()

    play(scenario())


def test_of_many_at_once_one_at_most_gets_the_name(bench: Bench) -> None:
    async def scenario() -> None:
        runtimes = [bench.runtime() for _ in range(4)]
        answers = await asyncio.gather(*(runtime.find() for runtime in runtimes), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, NameTaken)]
        assert len(refused) >= 3
        for runtime in runtimes:
            await runtime.aclose()
        assert locks(bench) == set()

    play(scenario())


def test_a_gateway_that_was_killed_loses_its_name_to_the_next(bench: Bench) -> None:
    async def refused() -> None:
        runtime = bench.runtime()
        with pytest.raises(NameTaken, match="process"):
            await runtime.find()
        await runtime.aclose()

    async def taken_over() -> None:
        async with opened(bench) as runtime:
            assert await runtime.find() == []
            assert len(locks(bench)) == 1

    with another_gateway(bench.owner):
        play(refused())
    assert len(locks(bench)) == 1
    play(taken_over())


def remove_lock(bench: Bench) -> None:
    """Do what `docker volume prune` does to the only lock there is."""
    (lock,) = bench.client.volumes.list(filters={"name": bench.owner})
    lock.remove()


def test_a_lock_that_was_pruned_is_made_again_and_keeps_the_name(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench, renew_s=0.1) as first:
            await first.find()
            held = locks(bench)
            remove_lock(bench)
            await until(lambda: locks(bench) == held)
            second = bench.runtime()
            with pytest.raises(NameTaken):
                await second.find()
            await second.aclose()
            assert await first.find() == []

    play(scenario())


def test_whoever_lost_the_lock_yields_to_another_that_took_the_name_meanwhile(bench: Bench) -> None:
    async def scenario() -> None:
        async with opened(bench, renew_s=0.1) as first:
            handle, _ = await start_and_hear(first, bench.launch(POLITE))
            (own,) = bench.client.volumes.list(filters={"name": bench.owner})
            other = leave_lock(bench, json.dumps(asdict(this_process(None))))
            assert [found.name for found in await first.find()] == [handle.name]  # it held the name first
            own.remove()
            await until_refused(first, other)
            for touch in (first.stop(handle.name, grace_s=0), first.start(bench.launch(POLITE), Ear())):
                with pytest.raises(NameTaken):
                    await touch
            bench.client.volumes.get(other).remove()
            await until(lambda: locks(bench))
            await first.stop(handle.name, grace_s=20)

    play(scenario())


async def until_refused(runtime: DockerRuntime, lock: str) -> None:
    """Return once the runtime says that the name is another's, whose lock this is."""
    async with asyncio.timeout(20):
        while (refused := await refusal(runtime)) is None:
            await asyncio.sleep(0.05)
    assert lock in refused.detail


async def refusal(runtime: DockerRuntime) -> NameTaken | None:
    try:
        await runtime.find()
    except NameTaken as refused:
        return refused
    return None


def test_a_process_that_proc_does_not_show_lives_as_long_as_it_can_be_signalled(tmp_path: Path) -> None:
    hidden = tmp_path / "proc"
    hidden.mkdir()
    assert start_time(os.getpid(), hidden) == ""
    assert start_time(NOBODY_PID, hidden) is None
    assert start_time(os.getpid())


def lives(bench: Bench, holder: str) -> bool:
    """Say whether a lock with this holder keeps the name from us."""
    left = leave_lock(bench, holder)
    refusals: list[NameTaken] = []

    async def scenario() -> None:
        runtime = bench.runtime()
        answers = await asyncio.gather(runtime.find(), return_exceptions=True)
        refusals.extend(answer for answer in answers if isinstance(answer, NameTaken))
        await runtime.aclose()

    play(scenario())
    assert all(left in refusal.detail for refusal in refusals)
    assert (left in {volume.name for volume in bench.client.volumes.list()}) is bool(refusals)
    return bool(refusals)


def test_who_cannot_be_judged_counts_as_alive_and_who_is_known_dead_does_not(bench: Bench) -> None:
    us = this_process(None)
    cases = {
        "us": (us, True),
        "a dead process": (replace(us, pid=NOBODY_PID), False),
        "another process with our number": (replace(us, start_time="1"), False),
        "one whose start is not known": (replace(us, start_time=""), True),
        "another boot": (replace(us, boot_id="other"), False),
        "another namespace": (replace(us, pid_namespace=1), True),
        "a container that is gone": (replace(us, pid_namespace=1, container_id="c" * 64), False),
    }
    for holder, alive in cases.values():
        assert lives(bench, json.dumps(asdict(holder))) is alive
        bench.clear()
    assert lives(bench, "unreadable")


def test_a_gateway_in_a_container_lives_as_long_as_that_container_runs(bench: Bench) -> None:
    container = bench.client.containers.run(bench.image, ["sh", "-c", SLEEP], name=bench.name(), detach=True)
    container.reload()
    started_at = container.attrs["State"]["StartedAt"]
    holder = replace(
        this_process(None), pid_namespace=1, container_id=str(container.id), container_started_at=started_at
    )
    said = json.dumps(asdict(holder))
    assert lives(bench, said)
    for volume in bench.client.volumes.list(filters={"name": bench.owner}):
        volume.remove()
    container.restart(timeout=0)
    assert not lives(bench, said)
    container.remove(force=True)
