from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from docker.models.containers import Container

from tests.docker_engine import connect
from tests.tgi_double import image

pytestmark = pytest.mark.docker
BOUND_S = 30.0
HARDENED: dict[str, Any] = {
    "read_only": True,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "init": True,
    "pids_limit": 64,
    "mem_limit": "256m",
    "labels": {"tgi-gateway-double": "test"},
}


@pytest.fixture(scope="module")
def tag() -> str:
    return image.build()


@pytest.fixture
def engine() -> Iterator[Any]:
    client = connect()
    yield client
    for left in client.containers.list(all=True, filters={"label": "tgi-gateway-double=test"}):
        left.remove(force=True)
    client.close()


def served(container: Container) -> str:
    """Return where the container is reached, once it answers."""
    container.reload()
    ports: Any = container.ports
    url = f"http://127.0.0.1:{ports['80/tcp'][0]['HostPort']}"
    deadline = time.monotonic() + BOUND_S
    while True:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return url
        except httpx.TransportError:
            assert time.monotonic() < deadline, container.logs().decode()
            time.sleep(0.02)


def test_it_serves_in_a_hardened_container_and_stops_when_asked(engine: Any, tag: str) -> None:
    command = ["--model-id", "org/toy", "--num-shard", "1", "--json-output"]
    container = engine.containers.run(tag, command, detach=True, ports={"80/tcp": ("127.0.0.1", None)}, **HARDENED)
    url = served(container)
    answer = httpx.post(f"{url}/generate", json={"inputs": "say good", "parameters": {}})
    assert answer.json() == {"generated_text": " bye."}
    assert "Invalid hostname, defaulting to 0.0.0.0" in container.logs().decode()
    container.stop(timeout=20)
    assert container.wait()["StatusCode"] == 0


def test_it_downloads_as_the_other_program_and_finds_it_again_in_the_volume(engine: Any, tag: str) -> None:
    volume = engine.volumes.create(labels={"tgi-gateway-double": "test"})
    try:
        mounted = {**HARDENED, "volumes": {volume.name: {"bind": "/data"}}, "remove": True}
        command = ["download-weights", "org/toy"]
        first, second = (
            engine.containers.run(tag, command, entrypoint="text-generation-server", **mounted).decode()
            for _ in range(2)
        )
    finally:
        volume.remove(force=True)
    assert first.endswith("Download: [2/2] -- ETA: 0\n")
    assert second == "Files are already present on the host. Skipping download.\n"


def test_a_double_killed_by_the_host_leaves_status_137_with_and_without_an_init(engine: Any, tag: str) -> None:
    for init in (True, False):
        env = {"DOUBLE_FAILS": "killed"}
        container = engine.containers.run(tag, environment=env, detach=True, **{**HARDENED, "init": init})
        assert container.wait()["StatusCode"] == 137


def test_it_is_labelled_as_one_for_a_read_only_root_and_is_small(engine: Any, tag: str) -> None:
    found = engine.images.get(tag)
    assert found.labels["tgi-gateway.read-only"] == "true"
    assert found.attrs["Size"] < 100_000_000


def test_an_image_that_is_up_to_date_is_not_built_again(engine: Any, tag: str) -> None:
    before = engine.images.get(tag).id
    assert image.build() == tag
    assert engine.images.get(tag).id == before
