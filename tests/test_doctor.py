"""What `gateway doctor` finds: of written values, of a machine without an engine, and of a real one."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from pydantic import SecretStr

from gateway import doctor
from gateway.catalog import Catalog, ModelSpec
from gateway.devices import Device
from gateway.doctor import EngineSeen, Finding, Machine, diagnose
from gateway.keys import add_key
from gateway.settings import Settings
from tests.docker_engine import ENGINE_URL
from tests.nvml_double import gpu, make, needs_compiler

pytestmark = pytest.mark.filterwarnings(  # the SDK leaves a socket open when no engine answers
    "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
)

IMAGE = "registry.test/tgi:1"
SETTINGS = Settings(port=8000)
ENGINE = EngineSeen(
    "unix:///var/run/docker.sock",
    version={"Version": "28.1.0", "ApiVersion": "1.49"},
    info={"Runtimes": {"runc": {}, "nvidia": {}}, "DockerRootDir": "/var/lib/docker"},
    images=frozenset({IMAGE}),
)
GPUS = (Device("0", 22 * 2**30, "GPU-4a", "NVIDIA A10"), Device("1", 22 * 2**30, "GPU-5b", "NVIDIA A10"))
MACHINE = Machine(devices=GPUS, gpu_free_bytes={"0": 2**30}, engine_free_bytes=500 * doctor.GB)
ABSENT = "no library of the NVIDIA driver is here"
SECRET = "hf_this_is_secret"


def tgi(id: str = "gpt-2", **more: Any) -> ModelSpec:  # noqa: A002
    return ModelSpec(**{"id": id, "hf_name": "gpt2", "image": IMAGE, **more})


def pinned(id: str, **more: Any) -> ModelSpec:  # noqa: A002
    return tgi(id, **{"hf_name": id, "pinned": True, **more})


def catalog(*specs: ModelSpec) -> Catalog:
    return Catalog(path=Path("models.yaml"), models={spec.id: spec for spec in specs})


def findings(
    *specs: ModelSpec, settings: Settings = SETTINGS, engine: EngineSeen = ENGINE, machine: Machine = MACHINE
) -> list[Finding]:
    return list(doctor.about_models(settings, catalog(*specs), engine, machine))


def bad(found: list[Finding]) -> dict[str, str]:
    """Return what is not ok: `level: words -> fix` by what it is about."""
    return {each.about: f"{each.level}: {each.words} -> {each.fix}" for each in found if each.level != "ok"}


def with_info(**info: Any) -> EngineSeen:
    return EngineSeen(ENGINE.url, version=ENGINE.version, info=info, images=ENGINE.images)


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Let what the SDK leaves be collected here, where it is known of."""
    yield
    gc.collect()


# ---- written values -------------------------------------------------------------------------------------------------


def test_where_all_is_well_nothing_is_to_be_done() -> None:
    found = findings(tgi(), settings=Settings(hf_token=SecretStr(SECRET)))

    assert bad(found) == {}
    abouts = ["catalog", "engine", "toolkit", "gpus", "disk", "images", "token", "ports"]
    assert [each.about for each in found] == abouts
    assert SECRET not in repr(found)


def test_an_engine_that_nothing_needs_may_be_absent(tmp_path: Path) -> None:
    weights = tmp_path / "tiny.gguf"
    weights.touch()
    local = ModelSpec(id="tiny", engine="llamacpp", weights=weights)

    found = findings(local, engine=EngineSeen("", "There is none. Install it"), machine=Machine())

    assert bad(found) == {}


@pytest.mark.parametrize(
    ("engine", "machine", "words"),
    [
        (EngineSeen("u", "It is down. Start it; `gateway doctor` looks closer."), MACHINE, "It is down -> Start it"),
        (EngineSeen("u", "You may not use it. usermod -aG docker"), MACHINE, "-> usermod -aG docker"),
        (EngineSeen("u", "You may not use it. usermod"), Machine(in_container=True), "DOCKER_GID=$(stat -c %g"),
        (EngineSeen("u", None, {"ApiVersion": "1.30"}), MACHINE, "too old -> Install one with API 1.40"),
    ],
)  # fmt: skip
def test_an_engine_that_cannot_be_used(engine: EngineSeen, machine: Machine, words: str) -> None:
    assert words in bad(findings(tgi(), engine=engine, machine=machine))["engine"]


def test_where_the_engine_is_silent_nothing_is_said_of_what_only_it_knows() -> None:
    found = findings(tgi(), engine=EngineSeen("u", "It is not running. Start it"))

    assert {each.about for each in found} == {"catalog", "engine", "ports"}
    hungry = findings(tgi(gpu_memory="80GiB"), engine=EngineSeen("u", "It is not running. Start it"))
    assert "it needs 1 GPU with 80 GiB each" in bad(hungry)["gpus"]


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([pinned("a"), pinned("b")], None),
        ([pinned("a", gpus=2), pinned("b", pinned=False)], None),
        (
            [pinned("a", gpus=2), pinned("b")],
            "b: it is pinned, and has no room beside what else is: a",
        ),
        ([pinned("b"), pinned("a", gpus=["0", "1"])], "b: it is pinned, and has no room"),
        ([pinned(name, gpu_memory="10GiB") for name in "abcd"], None),
        ([pinned(name, gpu_memory="12GiB") for name in "abc"], "c: it is pinned, and has no room beside"),
        ([pinned("a", gpu_memory="4GiB"), pinned("b"), pinned("c", gpus=["0"])], "a: it"),
        ([pinned("a", replicas=3)], "a: it is pinned, and there are not enough GPUs for its 3 replicas"),
        ([pinned("a", gpus=3), pinned("b")], None),  # that one can never run is told otherwise
    ],
)
def test_pinned_models_that_cannot_be_up_together(specs: list[ModelSpec], words: str | None) -> None:
    said = [
        f"{each.words} -> {each.fix}" for each in findings(*specs) if each.level == "warning" and each.about == "gpus"
    ]

    assert len(said) == (words is not None)
    assert not words or said[0].startswith(words)


@pytest.mark.parametrize(
    ("engine", "machine", "level"),
    [
        (with_info(Runtimes={"runc": {}, "nvidia": {}}), Machine(), None),
        (with_info(DiscoveredDevices=[{"Source": "cdi", "ID": "nvidia.com/gpu=0"}]), Machine(), None),
        (with_info(), Machine(programs=frozenset({"nvidia-container-runtime-hook"})), None),
        (with_info(), Machine(programs=frozenset({"nvidia-ctk"})), "problem"),
        (with_info(Runtimes={"runc": {}}), Machine(), "problem"),
        (with_info(), Machine(in_container=True), "warning"),
    ],
)
def test_the_gpu_toolkit(engine: EngineSeen, machine: Machine, level: str | None) -> None:
    said = bad(findings(tgi(), engine=engine, machine=machine)).get("toolkit")

    assert said is None if level is None else said and said.startswith(f"{level}: the engine shows no sign")
    if said:
        assert "nvidia-ctk runtime configure --runtime=docker" in said
        assert ("Install the package" in said) == (not machine.programs)


def test_a_model_without_gpus_needs_no_toolkit() -> None:
    found = findings(tgi(gpus=0), engine=with_info(), machine=Machine(engine_free_bytes=500 * doctor.GB))

    assert not {"toolkit", "gpus"} & {each.about for each in found}


@pytest.mark.parametrize(
    ("gpus", "declared", "seen", "words"),
    [
        (1, None, (), "warning: no GPU is in sight, and 1 models"),
        (3, None, GPUS, "problem: gpt-2: it can never run on the GPUs that are known: it needs 3 GPUs, and there"),
        (["1", "7"], None, GPUS, "problem: gpt-2: it can never run on the GPUs that are known: GPU 7 is not there"),
        (1, {"0": 1, "9": 1}, GPUS, "problem: GATEWAY_GPUS names GPUs that are not there: 9"),
        (["5"], {"0": 1}, (), "problem: gpt-2: it can never run on the GPUs that are known: GPU 5 is not there"),
        (2, {"0": 1, "1": 1}, (), None),
        (["0"], None, GPUS, None),
        (["GPU-4a", "MIG-5b", "0:1"], None, GPUS, None),
        (1, {"GPU-4a": 1}, GPUS, None),
        (["0"], {"GPU-4a": 1}, (), "problem: gpt-2: it can never run on the GPUs that are known: GPU 0 is not there"),
        (["0"], {"GPU-4a": 1}, GPUS, None),
        (["0", "GPU-4a"], None, GPUS, "problem: gpt-2: it can never run on the GPUs that are known: it names one GPU"),
        (1, {"GPU-4a": 1, "0": 1}, GPUS, "warning: GATEWAY_GPUS names GPU 0 twice, by both its names: GPU-4a, 0 -> L"),
        (1, {"0": 23 * 2**30}, GPUS, None),  # as it is sold
        (1, {"0": 24 * 2**30}, GPUS, "warning: GATEWAY_GPUS gives GPU 0 24 GiB, and it has 22 GiB -> Correct it: 0="),
        (1, {"GPU-5b": 2**40}, GPUS, "warning: GATEWAY_GPUS gives GPU GPU-5b 1.02e+03 GiB, and it has 22 GiB"),
    ],
)
def test_gpus(gpus: Any, declared: dict[str, int] | None, seen: tuple[Device, ...], words: str | None) -> None:
    found = findings(tgi(gpus=gpus), settings=Settings(gpus=declared), machine=Machine(devices=seen))

    said = bad(found).get("gpus")
    assert said is None if words is None else said and said.startswith(words)


def about_gpus(found: list[Finding]) -> list[tuple[str, str]]:
    return [(each.level, each.words) for each in found if each.about == "gpus"]


def test_gpus_are_listed_with_what_is_known_of_them_and_from_where() -> None:
    words = "0: NVIDIA A10, 22 GiB, 1 GiB free, GPU-4a; 1: NVIDIA A10, 22 GiB, GPU-5b (NVML)"
    assert about_gpus(findings(tgi())) == [("ok", words)]

    files = Machine(devices=[Device("0")], gpu_source="device files")
    assert about_gpus(findings(tgi(), machine=files)) == [("ok", "0: memory unknown (device files)")]

    named = findings(tgi(), settings=Settings(gpus={"0": 2**30}), machine=Machine())
    assert about_gpus(named) == [("ok", "0: 1 GiB (named by GATEWAY_GPUS)")]


@pytest.mark.parametrize(
    ("inside", "shared", "level", "fix"),
    [
        (False, False, "ok", "`nvidia-smi` asks the same library"),
        (False, True, "warning", "`nvidia-smi` asks the same library"),
        (True, True, "warning", "Give the gateway a view of them: docker compose up --detach --wait gateway-gpu"),
    ],
)
def test_where_nothing_can_be_measured_those_who_share_gpus_are_told(
    inside: bool, shared: bool, level: str, fix: str
) -> None:
    machine = Machine(devices=GPUS, gpu_silence=ABSENT, in_container=inside)

    found = findings(tgi(gpu_memory="3GiB" if shared else None), machine=machine)

    told = [each for each in found if each.about == "gpus"][1]
    assert (told.level, told.fix.startswith(fix)) == (level, True)
    assert told.words.startswith(f"what is free of the GPUs cannot be measured: {ABSENT}")
    assert ("for gpt-2 it is worked out" in told.words) == shared


def test_a_container_without_a_view_of_gpus_is_told_both_ways_to_have_some() -> None:
    said = bad(findings(tgi(), machine=Machine(gpu_silence=ABSENT, in_container=True)))["gpus"]

    assert said.startswith(f"warning: no GPU is in sight ({ABSENT}), and 1 models")
    assert "GATEWAY_GPUS=0=24GiB" in said
    assert "capability `utility`" in said


def test_a_full_disk_is_told_and_one_out_of_sight_too() -> None:
    full = findings(tgi(), machine=Machine(engine_free_bytes=3 * doctor.GB))
    assert "3 GB are free in /var/lib/docker" in bad(full)["disk"]

    unseen = [each for each in findings(tgi(), machine=Machine()) if each.about == "disk"]
    assert "cannot be seen from here" in unseen[0].words


def test_images_that_are_not_here() -> None:
    missing = findings(tgi("a", image="other"), tgi("b", image="other", hf_name="gpt2-large"))
    assert bad(missing)["images"].startswith("warning: other is not here: the first start pulls it")
    assert bad(missing)["images"].endswith("(for a, b) -> Pull it ahead: gateway pull a")

    never = findings(tgi("a", image="other", pull_policy="never"))
    assert bad(never)["images"].startswith(
        "problem: other is not here, and pull_policy is never for a -> docker pull other"
    )


def test_who_holds_the_gateways_port() -> None:
    held = Machine(holders={8000: "nginx (process 7)", 8080: "java (process 8)"})
    found = findings(tgi(), machine=held)

    assert (
        bad(found)["ports"]
        == "problem: 8000 is held by nginx (process 7) -> End that, or name another port: GATEWAY_PORT."
    )
    assert any("8080 is held by java (process 8): models get the next" in each.words for each in found)
    assert "ports" not in bad(findings(tgi(), machine=Machine(holders={8000: doctor.GATEWAY})))


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    gone = ModelSpec(id="gone", engine="llamacpp", weights=tmp_path / "gone.gguf")
    packed = ModelSpec(id="packed", engine="llamacpp", weights="package:no_such_package/x.gguf")  # type: ignore[arg-type]

    found = [each for each in findings(gone, packed, machine=Machine(has_llamacpp=False)) if each.about == "weights"]

    assert [each.level for each in found] == ["problem"] * 3
    assert "xllamacpp" in found[0].words
    assert found[1].words == f"gone: {tmp_path / 'gone.gguf'} cannot be read"
    assert found[2].fix.endswith("pip install --no-deps no-such-package")


# ---- the environment ------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text("models:\n  m: {hf_name: gpt2, gpus: 0}\n")
    return path


def test_everything_wrong_with_the_environment_is_told_at_once(tmp_path: Path, models: Path) -> None:
    environ = {
        "GATEWAY_CATALOG": str(models),
        "GATEWAY_TYPO": "1",
        "GATEWAY_API_KEY": "secret",
        "GATEWAY_STATE_DIR": str(tmp_path / "none"),
        "HF_TOKEN": SECRET,
        "DOCKER_HOST": "tcp://10.0.0.9:2376",
        "GATEWAY_PORT": "0",
    }

    found = diagnose(environ)

    said = bad(found)
    assert said["environment"].startswith("warning: GATEWAY_TYPO: nothing reads this variable")
    assert said["keys"].startswith("problem: GATEWAY_API_KEY: it would look like protection")
    assert "is no directory that can be written -> Make it" in said["state"]
    assert said["engine"].startswith("problem: DOCKER_HOST is tcp://10.0.0.9:2376: only an engine on this machine")
    assert "secret" not in repr(found)


def test_what_cannot_be_read_ends_the_questions(tmp_path: Path) -> None:
    assert [each.about for each in diagnose({"GATEWAY_PORT": "much"})] == ["environment"]
    assert "there is no such file" in bad(diagnose({"GATEWAY_CATALOG": str(tmp_path / "none")}))["catalog"]


def test_a_gateway_without_keys_for_everybody_is_warned_of(models: Path) -> None:
    environ = {"GATEWAY_HOST": "0.0.0.0", "GATEWAY_ALLOW_INSECURE": "true", "GATEWAY_CATALOG": str(models)}

    assert bad(diagnose(environ))["keys"].startswith("warning: anybody who reaches 0.0.0.0:8000")


def test_the_keys_are_named_and_never_shown(tmp_path: Path, models: Path) -> None:
    file = tmp_path / "keys.jsonl"
    environ = {"GATEWAY_API_KEYS_FILE": str(file), "GATEWAY_CATALOG": str(models), "GATEWAY_HOST": "0.0.0.0"}
    assert "there is no such file" in bad(diagnose(environ))["keys"]

    token = add_key(file, "alice", ["generate"])
    said = [each.words for each in diagnose(environ) if each.about == "keys"]
    assert said == [f"{file} has 1: alice"]
    assert token not in said[0]

    file.write_text("")
    assert bad(diagnose(environ))["keys"].startswith(f"warning: {file} has none")
    file.chmod(0o666)
    assert bad(diagnose(environ))["keys"].startswith(f"warning: {file} can be written by others")


def test_an_engine_that_is_not_there(tmp_path: Path) -> None:
    seen = doctor.look_at_engine(f"unix://{tmp_path}/none.sock", {IMAGE})

    assert seen.silence
    assert seen.silence.startswith("There is no Docker Engine at unix://")


# ---- the machine ----------------------------------------------------------------------------------------------------


@pytest.fixture
def somebody() -> Iterator[int]:
    """Listen on a port, and speak HTTP that is no gateway's."""

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_the_holder_of_a_port_is_named(models: Path, somebody: int) -> None:
    found = diagnose({"GATEWAY_CATALOG": str(models), "GATEWAY_PORT": str(somebody), "DOCKER_HOST": "unix:///none"})

    assert f"{somebody} is held by " in bad(found)["ports"]
    assert f"(process {os.getpid()})" in bad(found)["ports"]


def test_a_free_port_is_free(models: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    found = diagnose({"GATEWAY_CATALOG": str(models), "GATEWAY_PORT": str(port), "DOCKER_HOST": "unix:///none"})

    assert "ports" not in bad(found)


@pytest.mark.docker
def test_a_real_engine_is_well(models: Path) -> None:
    found = diagnose({"GATEWAY_CATALOG": str(models), "GATEWAY_PORT": "0", "DOCKER_HOST": ENGINE_URL})

    engine = next(each for each in found if each.about == "engine")
    assert (engine.level, engine.words.startswith("Docker Engine ")) == ("ok", True)
    assert {"disk", "images", "token"} <= {each.about for each in found}
    assert "problem" not in {each.level for each in found}


@needs_compiler
def test_the_gpus_of_the_driver_are_listed(models: Path, tmp_path: Path) -> None:
    nvml = make(tmp_path)
    nvml.tell(gpu("GPU-8e0d", 22 * 1024, used_mib=2048))
    program = "import sys; from gateway.doctor import look; from gateway.catalog_file import load_catalog\n"
    program += "from gateway.settings import Settings; from pathlib import Path; path = Path(sys.argv[1])\n"
    program += "_, machine = look(Settings(catalog=path), load_catalog(path, {}), {'DOCKER_HOST': 'unix:///none'})\n"
    program += "print(machine.devices, dict(machine.gpu_free_bytes), machine.gpu_source, machine.gpu_silence)"

    command = [sys.executable, "-c", program, str(models)]
    said = subprocess.run(command, env=nvml.environment, capture_output=True, text=True, check=True).stdout

    device = Device("0", 22 * 2**30, "GPU-8e0d", "NVIDIA A10")
    assert said == f"{[device]} {{'0': {20 * 2**30}}} NVML None\n"
