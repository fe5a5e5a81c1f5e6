"""What tests of runtime `docker` share: an image of a few programs, a runtime on it, and a look at the engine itself.

The names here are prefixed, so that what a test leaves is found; `leftovers` must be empty after each.
"""

from __future__ import annotations

import asyncio
import io
import secrets
import tarfile
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import uvloop
from docker.models.containers import Container as EngineContainer

from gateway.runtimes.base import Container, Handle, Launch
from gateway.runtimes.docker.runtime import DockerRuntime
from tests.docker_engine import connect, everything
from tests.runtimes.processes import Ear, until, wait_until

BUSYBOX = Path("/bin/busybox")  # Debian's package busybox-static
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}

SLEEP = "while :; do sleep 0.05; done"
POLITE = f"trap 'echo goodbye; exit 7' TERM; echo up; {SLEEP}"
STUBBORN = f"trap '' TERM; echo up; {SLEEP}"
COUNT = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done"
HTTP = "echo up; mkdir -p /tmp/www && echo hello > /tmp/www/index.html && exec httpd -f -p 80 -h /tmp/www"


@dataclass(frozen=True)
class Bench:
    """An engine, an image on it, and an owner whose name nobody else has."""

    client: docker.DockerClient
    image: str
    owner: str

    def name(self, suffix: str = "model") -> str:
        return f"{self.owner}-{suffix}"

    def launch(self, script: str, suffix: str = "model", **more: Any) -> Launch:
        """Return a launch of a shell script. What a container takes goes into `more` too."""
        of_launch = {key: more.pop(key) for key in ("env", "gpus", "model", "fingerprint", "command") if key in more}
        container = Container(**{"image": self.image, "entrypoint": ("sh", "-c", script), **more})
        return Launch(self.name(suffix), container=container, **of_launch)

    def runtime(self, **more: Any) -> DockerRuntime:
        return DockerRuntime(self.owner, **more)

    def container(self, suffix: str = "model") -> EngineContainer:
        return self.client.containers.get(self.name(suffix))

    def leftovers(self) -> set[str]:
        return {each for each in everything() if self.owner in each}

    def clear(self) -> None:
        """Remove whatever carries the owner's name, but for images."""
        for container in self.client.containers.list(all=True, filters={"name": self.owner}, ignore_removed=True):
            container.remove(force=True, v=True)
        for volume in self.client.volumes.list(filters={"name": self.owner}):
            volume.remove(force=True)


@contextmanager
def bench_of(prefix: str = "tgi-test") -> Iterator[Bench]:
    """Yield a bench; remove its image, and whatever carries its owner's name, afterwards."""
    client = connect()
    owner = f"{prefix}-{secrets.token_hex(4)}"
    image = import_image(client, f"{owner}:1")
    bench = Bench(client, image, owner)
    try:
        yield bench
    finally:
        bench.clear()
        for found in client.images.list(filters={"reference": f"{owner}*"}):
            client.images.remove(str(found.id), force=True)
        client.close()


def import_image(
    client: docker.DockerClient, tag: str, *, labels: dict[str, str] | None = None, ballast: bytes = b""
) -> str:
    """Make an image of busybox alone, with no registry; return its tag."""
    repository, _, version = tag.rpartition(":")
    changes = [f"LABEL {label}={value}" for label, value in (labels or {}).items()]
    client.api.import_image_from_data(_filesystem(ballast), repository=repository, tag=version, changes=changes)
    return tag


def _filesystem(ballast: bytes) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(BUSYBOX, "bin/busybox")
        for directory in ("etc", "tmp"):
            tar.addfile(_entry(directory, type=tarfile.DIRTYPE, mode=0o1777))
        for applet in ("sh", "sleep", "httpd", "echo", "cat", "mkdir", "id", "stat", "dd", "tail", "head", "touch"):
            tar.addfile(_entry(f"bin/{applet}", type=tarfile.SYMTYPE, linkname="busybox"))
        tar.addfile(_entry("ballast", size=len(ballast)), io.BytesIO(ballast))
    return archive.getvalue()


def _entry(name: str, **more: Any) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    for key, value in more.items():
        setattr(entry, key, value)
    return entry


def play(scenario: Coroutine[Any, Any, None], loop: str = "asyncio") -> None:
    """Run a scenario, and see that it leaves no task behind."""

    async def watched() -> None:
        await scenario
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(watched())


@asynccontextmanager
async def opened(bench: Bench, **more: Any) -> AsyncIterator[DockerRuntime]:
    """Yield a runtime; afterwards stop what it has, let go of it, and see that nothing is left."""
    runtime = bench.runtime(**more)
    try:
        yield runtime
        for found in await runtime.find():
            await runtime.stop(found.name, grace_s=0)
    finally:
        await runtime.aclose()
    wait_until(lambda: not bench.leftovers())


async def start_and_hear(runtime: DockerRuntime, launch: Launch) -> tuple[Handle, Ear]:
    """Start a server and return once it has said something."""
    ear = Ear()
    handle = await runtime.start(launch, ear)
    await until(lambda: ear.lines)
    return handle, ear


async def fetch(handle: Handle) -> bytes:
    """Return what the server answers to a GET."""
    reader, writer = await asyncio.open_connection("127.0.0.1", handle.port)
    try:
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()
