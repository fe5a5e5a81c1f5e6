"""The engine of a test's own: it works beside the machine's, bears what tests do to it, and leaves nothing."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import APIError
from docker.types import DeviceRequest

from tests import own_engine
from tests.own_engine import OwnEngine

pytestmark = [
    pytest.mark.docker,
    own_engine.needs_own_engine,
    pytest.mark.skipif(shutil.which("busybox") is None, reason="busybox-static is not installed"),
]
IMAGE = "own-engine-test:1"
GPU_ONE = DeviceRequest(driver="", count=0, device_ids=["1"], capabilities=[["gpu"]])


def busybox() -> bytes:
    """Return a file system with nothing but busybox."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(str(shutil.which("busybox")), "bin/busybox", filter=as_program)
        for name in ("sh", "sleep", "env", "httpd"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    return archive.getvalue()


def as_program(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.mode = 0o755
    return info


def make_image(client: docker.DockerClient) -> None:
    repository, _, tag = IMAGE.partition(":")
    client.api.import_image_from_data(busybox(), repository=repository, tag=tag)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnEngine]:
    with OwnEngine(tmp_path_factory.mktemp("engine"), gpu_hook=True) as engine:
        client = engine.client()
        make_image(client)
        client.close()
        yield engine


@pytest.fixture
def client(engine: OwnEngine) -> Iterator[docker.DockerClient]:
    client = engine.client()
    yield client
    client.close()


def run(client: docker.DockerClient, *command: str, **options: Any) -> Any:
    return client.containers.run(IMAGE, list(command), detach=True, **options)


def test_containers_reach_each_other_by_name_and_this_machine_reaches_their_ports(client: docker.DockerClient) -> None:
    network = client.networks.create("talk")
    server = run(
        client, "httpd", "-f", "-p", "80", name="server", network="talk", ports={"80/tcp": ("127.0.0.1", None)}
    )
    caller = run(client, "busybox", "ping", "-c", "1", "-W", "20", "server", network="talk")
    try:
        assert caller.wait(timeout=30)["StatusCode"] == 0
        server.reload()
        port = server.ports["80/tcp"][0]["HostPort"]
        answer = subprocess.run(["busybox", "wget", "-O", "-", f"http://127.0.0.1:{port}/none"], capture_output=True)
        assert b"404" in answer.stderr
    finally:
        for container in (caller, server):
            container.remove(force=True)
        network.remove()


def test_a_container_sees_the_gpu_it_was_given(client: docker.DockerClient) -> None:
    container = run(client, "env", device_requests=[GPU_ONE])

    assert container.wait()["StatusCode"] == 0
    assert b"NVIDIA_VISIBLE_DEVICES=1\n" in container.logs()


def test_a_restart_ends_its_containers(engine: OwnEngine, client: docker.DockerClient) -> None:
    container = run(client, "sleep", "1000", stop_signal="KILL")
    first = engine.pid

    engine.restart()

    container.reload()
    assert (container.status, engine.pid != first) == ("exited", True)


def test_with_live_restore_its_containers_outlive_even_a_crash(tmp_path: Path, engine: OwnEngine) -> None:
    with OwnEngine(tmp_path, live_restore=True) as other:
        other.copy_image(IMAGE, engine.url)
        client = other.client()
        container = run(client, "sleep", "1000")
        container.reload()
        pid = container.attrs["State"]["Pid"]
        for end in (other.stop, other.kill):
            end()
            assert Path(f"/proc/{pid}").exists()
            other.start()
            container.reload()
            assert (container.status, container.attrs["State"]["Pid"]) == ("running", pid)
        client.close()


def test_without_the_hook_no_gpu_can_be_had_and_nothing_is_left_even_of_a_killed_engine(
    tmp_path: Path, engine: OwnEngine
) -> None:
    before = footprint()
    with OwnEngine(tmp_path) as other:
        other.copy_image(IMAGE, engine.url)
        client = other.client()
        if shutil.which(own_engine.HOOK) is None:
            with pytest.raises(APIError, match="could not select device driver"):
                run(client, "env", device_requests=[GPU_ONE])
        client.networks.create("left")
        run(client, "sleep", "1000", network="left", stop_signal="KILL")
        client.close()
        assert footprint() != before
        other.kill()

    assert footprint() == before


def footprint() -> dict[str, list[str]]:
    """Return what an engine of a test's own may have left on this machine."""
    rules = subprocess.run(["iptables-save", "-t", "filter"], capture_output=True, text=True, check=True).stdout
    mounts = Path("/proc/self/mountinfo").read_text()
    return {
        "links": sorted(link.name for link in Path("/sys/class/net").iterdir() if not link.name.startswith("veth")),
        "rules": sorted(line for line in rules.splitlines() if "physdev" in line),
        "mounts": sorted(line.split()[4] for line in mounts.splitlines() if "own-engine-" in line),
        "folders": sorted(str(path) for path in Path(tempfile.gettempdir()).glob("own-engine-*")),
        "processes": sorted(entry.name for entry in Path("/proc").glob("[0-9]*") if "own-engine-" in command(entry)),
    }


def command(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:  # it has just ended
        return ""
