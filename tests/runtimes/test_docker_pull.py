"""Pulls from a real registry on loopback: with progress, called off, and failing in words."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import docker
import pytest
from docker.errors import ImageNotFound

from gateway.errors import StartFailed
from gateway.runtimes.base import PullPolicy
from tests.docker_engine import connect
from tests.registry import Funnel, free_port, registry_at
from tests.runtimes.containers import POLITE, Bench, bench_of, import_image, opened, play
from tests.runtimes.processes import Ear, until

pytestmark = pytest.mark.docker

BALLAST_BYTES = 24 << 20


@dataclass(frozen=True)
class Registry:
    port: int
    image: str
    """Pushed there, and nowhere on this machine."""


@pytest.fixture(scope="module")
def module_bench() -> Iterator[Bench]:
    with bench_of() as bench:
        yield bench


@pytest.fixture
def bench(module_bench: Bench) -> Iterator[Bench]:
    yield module_bench
    module_bench.clear()


@pytest.fixture(scope="module")
def registry(module_bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registry_at(tmp_path_factory.mktemp("registry")) as port:
        yield Registry(port, push(module_bench.client, f"127.0.0.1:{port}/{module_bench.owner}:1"))


def push(client: docker.DockerClient, image: str) -> str:
    import_image(client, image, ballast=random.Random(1).randbytes(BALLAST_BYTES))
    client.images.push(image)
    client.images.remove(image)
    return image


def forget(image: str) -> None:
    client = connect()
    with suppress(ImageNotFound):
        client.images.remove(image, force=True)
    client.close()


async def why_not_started(bench: Bench, image: str, policy: PullPolicy = "missing") -> StartFailed:
    async with opened(bench) as runtime:
        with pytest.raises(StartFailed) as failed:
            await runtime.start(bench.launch(POLITE, image=image, pull_policy=policy), Ear())
    return failed.value


def test_a_pull_shows_how_far_it_has_come_and_a_stalled_one_shows_nothing(bench: Bench, registry: Registry) -> None:
    async def scenario() -> None:
        funnel, ear = Funnel(registry.port, BALLAST_BYTES // 2), Ear()
        async with funnel.serving() as port, opened(bench) as runtime:
            image = registry.image.replace(str(registry.port), str(port))
            start = asyncio.create_task(runtime.start(bench.launch(POLITE, image=image), ear))
            await until(lambda: funnel.stalled and ear.reports and (ear.reports[-1].done or 0) > 0)
            seen = ear.reports[-1]
            assert (seen.phase, seen.unit) == ("pulling", "bytes")
            assert seen.total is not None
            assert seen.total > BALLAST_BYTES
            assert seen.done is not None
            assert 0 < seen.done < seen.total
            funnel.open()
            handle = await start
            assert ear.reports[-1].phase == "extracting"
            assert ear.reports[-1].done == ear.reports[-1].total == seen.total
            dones = [report.done or 0 for report in ear.reports if report.phase == "pulling"]
            assert dones == sorted(dones)
            await runtime.stop(handle.name, grace_s=0)
            forget(image)

    play(scenario())


ENOUGH_PULLS = 10
"""Docker Engine 20.10 itself sometimes goes on with a layer though nobody asks for it any more: one time in three on a
busy machine."""


def test_a_pull_that_is_cancelled_ends_at_once_at_the_registry_too(bench: Bench, registry: Registry) -> None:
    async def is_called_off() -> bool:
        funnel = Funnel(registry.port, BALLAST_BYTES // 2)
        async with funnel.serving() as port, opened(bench) as runtime:
            image = registry.image.replace(str(registry.port), str(port))
            start = asyncio.create_task(runtime.start(bench.launch(POLITE, image=image), Ear()))
            await until(lambda: funnel.stalled)
            start.cancel()
            async with asyncio.timeout(2):
                await asyncio.wait([start])
            assert start.cancelled()
            with suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await until(lambda: not funnel.stalled)
            called_off = not funnel.stalled
            await runtime.stop(bench.name(), grace_s=0)
        return called_off

    async def scenario() -> None:
        for _ in range(ENOUGH_PULLS):
            if await is_called_off():
                return
        raise AssertionError(f"{ENOUGH_PULLS} pulls went on though nobody waited for them")

    play(scenario())


def test_an_image_that_is_here_is_not_pulled_again_unless_always(bench: Bench, registry: Registry) -> None:
    async def scenario() -> None:
        async with opened(bench) as runtime:
            reports = []
            for policy in ("missing", "missing", "always"):
                ear = Ear()
                await runtime.start(bench.launch(POLITE, image=registry.image, pull_policy=policy), ear)
                reports.append([report.phase for report in ear.reports])
            assert reports[0][-1] == "extracting"
            assert reports[1] == []
            assert set(reports[2]) == {"pulling"}
            await runtime.stop(bench.name(), grace_s=0)
            forget(registry.image)

    play(scenario())


def test_an_image_is_pulled_by_digest(bench: Bench, registry: Registry) -> None:
    digest = bench.client.images.get_registry_data(registry.image).id
    image = f"{registry.image.rpartition(':')[0]}@{digest}"

    async def scenario() -> None:
        async with opened(bench) as runtime:
            handle = await runtime.start(bench.launch(POLITE, image=image), Ear())
            await runtime.stop(handle.name, grace_s=0)
            forget(image)

    play(scenario())


def test_an_image_without_a_tag_is_the_latest_and_no_other(bench: Bench, registry: Registry) -> None:
    image = registry.image.rpartition(":")[0]

    async def scenario() -> None:
        failed = await why_not_started(bench, image)
        assert "latest" in failed.detail
        assert "tag or its name is wrong" in failed.detail

    play(scenario())
    assert bench.client.images.list(name=image) == []


@pytest.mark.parametrize(
    "wrong",
    [
        "{image}-nope",
        "127.0.0.1:{port}/no/such/image:1",
        "127.0.0.1:{port}/Upper:1",
        "UPPER",
        "x/../../y",
        "http://127.0.0.1:{port}/x",
    ],
)
def test_an_image_that_the_registry_does_not_have_is_named(bench: Bench, registry: Registry, wrong: str) -> None:
    image = wrong.format(image=registry.image, port=registry.port)

    async def scenario() -> None:
        failed = await why_not_started(bench, image)
        assert image in failed.extra["cause"]
        assert "models.yaml" in failed.extra["fix"]

    play(scenario())


def test_a_registry_that_is_down_is_told_in_seconds(bench: Bench) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(20):
            failed = await why_not_started(bench, f"127.0.0.1:{free_port()}/x:1")
        assert "cannot be reached" in failed.extra["cause"]

    play(scenario())


def test_never_pulls_never(bench: Bench, registry: Registry) -> None:
    async def scenario() -> None:
        failed = await why_not_started(bench, registry.image, "never")
        assert "pull_policy is never" in failed.extra["cause"]

    play(scenario())
