"""Pulls from a real registry on loopback: with progress, called off, and failing in words."""

from __future__ import annotations

import asyncio
import random
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from urllib.error import URLError
from urllib.request import urlopen

import docker
import pytest
from docker.errors import ImageNotFound

from gateway.errors import StartFailed
from gateway.runtimes.base import PullPolicy
from tests.docker_engine import connect
from tests.runtimes.containers import POLITE, Bench, bench_of, import_image, opened, play
from tests.runtimes.processes import Ear, until, wait_until

pytestmark = pytest.mark.docker

PROGRAM = "docker-registry"  # Debian's package of this name
BALLAST_BYTES = 24 << 20
CONFIG = """
version: 0.1
storage: {{filesystem: {{rootdirectory: {root}}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


@dataclass(frozen=True)
class Registry:
    port: int
    image: str
    """Pushed there, and nowhere on this machine."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


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
    if shutil.which(PROGRAM) is None:
        pytest.skip(f"the program {PROGRAM} is not installed (Debian: apt-get install {PROGRAM})")
    root, port = tmp_path_factory.mktemp("registry"), free_port()
    config = root / "config.yml"
    config.write_text(CONFIG.format(root=root / "data", port=port))
    command = [PROGRAM, "serve", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers(port))
        yield Registry(port, push(module_bench.client, f"127.0.0.1:{port}/{module_bench.owner}:1"))
    finally:
        process.kill()
        process.wait()


def answers(port: int) -> bool:
    with suppress(URLError, ConnectionError), urlopen(f"http://127.0.0.1:{port}/v2/") as answer:
        return bool(answer.status == 200)
    return False


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


def test_a_pull_that_is_cancelled_ends_at_once_at_the_registry_too(bench: Bench, registry: Registry) -> None:
    async def scenario() -> None:
        funnel = Funnel(registry.port, BALLAST_BYTES // 2)
        async with funnel.serving() as port, opened(bench) as runtime:
            image = registry.image.replace(str(registry.port), str(port))
            start = asyncio.create_task(runtime.start(bench.launch(POLITE, image=image), Ear()))
            await until(lambda: funnel.stalled)
            start.cancel()
            async with asyncio.timeout(2):
                await asyncio.wait([start])
            assert start.cancelled()
            await until(lambda: not funnel.stalled)
            await runtime.stop(bench.name(), grace_s=0)

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
            assert reports[2] == ["pulling"]
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


@pytest.mark.parametrize("wrong", ["{image}-nope", "127.0.0.1:{port}/no/such/image:1", "127.0.0.1:{port}/Upper:1"])
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
