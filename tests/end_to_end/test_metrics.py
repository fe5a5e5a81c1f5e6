"""`/metrics` of a real gateway: what it tells, to whom, and that Prometheus itself can read it."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as families_of

from gateway.keys import add_key
from tests.end_to_end.addresses import ADDRESSES, CHATS, EVERY, PUT_THROUGH, Caller, models_at
from tests.end_to_end.gateway import EMBEDDED, Gateway, serving
from tests.numbered_server import Numbers, tgi
from tests.runtimes.processes import wait_until
from tests.scripted_server import HEAD, Conversation, Script, scripted
from tests.tgi_double.process import answers, free_port

DASHBOARD = Path(__file__).parent.parent.parent / "scripts" / "grafana-dashboard.json"
IDLE = {"engine": "openai", "runtime": "external", "url": "http://127.0.0.1:9"}
SECRET_PROMPT = "caller-1 counts SECRET-PROMPT"
TOKENS = 3
STREAMS_OF_TGI = [each for each in EVERY if each.name in ("generate_stream", "tgi, streamed")]
"""One that is translated, and one that is put through."""

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="Prometheus is not on this machine: Debian's package `prometheus` has both it and promtool",
)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def figures_of(page: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families_of(page)
        for sample in family.samples
    }


def figure(page: str, name: str, **labels: str) -> float:
    """Return the sum of what a page says under this name and these labels."""
    return sum(
        value for (each, said), value in figures_of(page).items() if each == name and labels.items() <= set(said)
    )


def with_servers(folder: Path, act: Callable[[Gateway], None], script: Script | None = None, **environ: str) -> None:
    """Do something with a gateway before a server that counts, or plays a script of the test's own."""

    def run(url: str) -> None:
        with serving(folder, environ, idle=IDLE, **models_at(url)) as gateway:
            act(gateway)

    async def scene() -> None:
        async with scripted(script or Numbers()) as (_, port):
            await asyncio.to_thread(run, f"http://127.0.0.1:{port}")

    asyncio.run(scene())


def ask_everywhere(gateway: Gateway, **headers: str) -> None:
    for address in (*ADDRESSES, *PUT_THROUGH[1:2]):
        body = address.body("by-tgi", SECRET_PROMPT, TOKENS)
        assert gateway.post(address.path.format(model="by-tgi"), body, **headers).status_code == 200, address
    for address in CHATS[1:2]:
        body = address.body("by-openai", SECRET_PROMPT, TOKENS)
        assert gateway.post(address.path, body, **headers).status_code == 200, address


def test_every_request_is_counted_and_nothing_of_it_is_told(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    alice = add_key(file, "alice", ["generate"])

    def act(gateway: Gateway) -> None:
        mine = {**bearer(alice), "x-request-id": "SECRET-ID"}
        ask_everywhere(gateway, **mine)
        for number in range(20):
            gateway.get(f"/SECRET-PATH-{number}", **mine)
            gateway.post("/generate", {"model_id": f"SECRET-MODEL-{number}", "prompt": "x"}, **mine)
        gateway.post("/v1/completions", {"model": "by-tgi", "prompt": ""}, **mine)
        gateway.post("/generate", {"model_id": "idle", "prompt": "x"}, prefer="wait=0", **mine)
        gateway.get("/models", **bearer("SECRET-KEY"))
        page = gateway.get("/metrics", **mine).text

        asked = (*ADDRESSES, *PUT_THROUGH[1:2])
        calls = sum(each.asks for each in asked)
        assert figure(page, "gateway_calls_total", model="by-tgi", outcome="ok") == calls
        assert figure(page, "gateway_queue_wait_seconds_count", model="by-tgi") == calls
        streams = sum(each.streams for each in asked)
        assert figure(page, "gateway_time_to_first_token_seconds_count", model="by-tgi") == streams
        assert figure(page, "gateway_generated_tokens_total", model="by-tgi") == calls * TOKENS
        assert figure(page, "gateway_generated_tokens_total", model="by-openai") == TOKENS
        assert figure(page, "gateway_prompt_tokens_total", model="by-openai") == 3
        assert figure(page, "gateway_starts_total", model="by-tgi", result="ok") == 1
        assert figure(page, "gateway_model_state", model="by-tgi", state="ready") == 1
        assert figure(page, "gateway_model_state", model="by-tgi") == 1
        assert figure(page, "gateway_requests_total", api="other", outcome="NOT_FOUND") == 20
        assert figure(page, "gateway_requests_total", api="generate", outcome="MODEL_NOT_FOUND") == 20
        assert figure(page, "gateway_requests_total", api="generate", outcome="MODEL_NOT_LOADED") == 1
        assert figure(page, "gateway_requests_total", api="openai", outcome="EMPTY_PROMPT") == 1
        assert figure(page, "gateway_requests_total", api="models", outcome="UNAUTHORIZED") == 1
        assert figure(page, "gateway_requests_total", outcome="ok") == len(asked) + 1
        assert figure(page, "gateway_request_duration_seconds_count") == figure(page, "gateway_requests_total")
        assert figure(page, "process_resident_memory_bytes") > 1e6
        assert "SECRET" not in page
        assert alice not in page
        labels = {each for _, said in figures_of(page) for each in said}
        assert {model for name, model in labels if name == "model"} == {"idle", "by-tgi", "by-openai"}

    with_servers(tmp_path, act, GATEWAY_API_KEYS_FILE=str(file), GATEWAY_GPUS="0=24GiB,1=24GiB")


def test_a_stream_that_fails_and_a_caller_who_leaves_are_no_good_requests(tmp_path: Path) -> None:
    async def one_token(conversation: Conversation) -> None:
        await conversation.say(HEAD + b"data: " + json.dumps(tgi(" a", 1, False, 0)).encode() + b"\n\n")
        if b"wait" in conversation.body:
            await asyncio.Event().wait()

    def act(gateway: Gateway) -> None:
        for address in STREAMS_OF_TGI:
            path = address.path.format(model="by-tgi")
            broken = gateway.post(path, address.body("by-tgi", "break off", TOKENS))
            assert (broken.status_code, "GENERATION_FAILED" in broken.text) == (200, True), address
            leaver = Caller(gateway.port, address.request("by-tgi", "wait", TOKENS))
            leaver.hear(b'" a"')
            leaver.close()

        def told(outcome: str) -> float:
            return figure(gateway.get("/metrics").text, "gateway_requests_total", outcome=outcome)

        wait_until(lambda: told("left") == len(STREAMS_OF_TGI))
        assert told("GENERATION_FAILED") == len(STREAMS_OF_TGI)
        page = gateway.get("/metrics").text
        for outcome in ("cancelled", "GENERATION_FAILED"):
            assert figure(page, "gateway_calls_total", model="by-tgi", outcome=outcome) == len(STREAMS_OF_TGI)
        assert figure(page, "gateway_in_flight_calls") == figure(page, "gateway_generated_tokens_total") == 0

    with_servers(tmp_path, act, one_token)


def test_with_keys_it_asks_for_one(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    alice, operator = add_key(file, "alice", ["generate"]), add_key(file, "operator", ["manage"])
    with serving(tmp_path, {"GATEWAY_API_KEYS_FILE": str(file)}, m=IDLE) as gateway:
        for path in ("/metrics", "/metrics/"):
            answered = [
                gateway.get(path),
                gateway.get(path, **bearer("gw_wrong")),
                gateway.get(path, **bearer(operator)),
            ]
            assert [(each.status_code, each.json()["error_code"]) for each in answered] == [
                (401, "UNAUTHORIZED"),
                (401, "UNAUTHORIZED"),
                (403, "FORBIDDEN"),
            ]
            assert "gateway_build_info" not in "".join(each.text for each in answered)
            assert "gateway_build_info{" in gateway.get(path, **bearer(alice)).text


@pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
def test_it_is_prometheus_text_and_wakes_nobody(tmp_path: Path, path: str) -> None:
    with serving(tmp_path, {"GATEWAY_GPUS": "0=24GiB,7=80GiB"}, m=IDLE) as gateway:
        answer = gateway.get(path, accept="application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5")
        head = httpx.head(gateway.url + path)

        assert answer.status_code == head.status_code == 200
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert head.content == b""
        assert figure(answer.text, "gateway_gpu_memory_bytes", gpu="0") == 24 * 2**30
        assert figure(answer.text, "gateway_gpu_models") == 0
        assert gateway.model()["state"] == "stopped"
        assert gateway.moves() == []


@pytest.mark.embedded
def test_a_start_its_phases_and_a_stop_are_told(tmp_path: Path) -> None:
    with serving(tmp_path, m=EMBEDDED) as gateway:
        gateway.post("/generate", {"prompt": "Once", "max_new_tokens": 2}).raise_for_status()
        gateway.post("/models/m/stop").raise_for_status()
        page = gateway.get("/metrics").text

        assert figure(page, "gateway_starts_total", model="m", result="ok") == 1
        assert figure(page, "gateway_start_duration_seconds_count", model="m") == 1
        assert figure(page, "gateway_start_phase_duration_seconds_sum", phase="loading") > 0
        spent_s = figure(page, "gateway_start_phase_duration_seconds_sum")
        assert spent_s == pytest.approx(figure(page, "gateway_start_duration_seconds_sum"))
        assert figure(page, "gateway_stops_total", model="m", reason="operator") == 1
        assert figure(page, "gateway_stops_total") == 1
        assert figure(page, "gateway_generated_tokens_total", model="m") == 2
        assert figure(page, "gateway_model_state", model="m", state="stopped") == 1


# ---- the dashboard ----


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    """Return every PromQL expression of the dashboard, with its variables as Grafana fills them in."""
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    return [re.sub(r"\$(instance|model)\b", ".*", each).replace("$__rate_interval", "1m") for each in found]


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    everything = dashboard["panels"]

    assert len({panel["id"] for panel in everything}) == len(everything) > 10
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    for panel in panels():
        assert panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert panel["targets"], panel["title"]
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"]), panel["title"]
        names = set(re.findall(r"\$(\w+)", " ".join(target["expr"] for target in panel["targets"])))
        assert names - {"__rate_interval"} <= variables.keys(), panel["title"]
    used = [(each["gridPos"]["x"], each["gridPos"]["y"]) for each in everything]
    assert len(set(used)) == len(used)
    assert all(each["gridPos"]["x"] + each["gridPos"]["w"] <= 24 for each in everything)


def test_every_figure_of_the_dashboard_is_told_and_all_that_is_told_is_shown(tmp_path: Path) -> None:
    shown = set(re.findall(r"\b(?:gateway|process)_\w+", " ".join(expressions())))

    with serving(tmp_path, m=IDLE) as gateway:
        page = gateway.get("/metrics").text

    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE))
    parts = {"histogram": ("_bucket", "_sum", "_count")}
    told = {name + part: name for name, kind in kinds.items() for part in parts.get(kind, ("",))}
    assert shown <= told.keys()
    assert {name for name in kinds if name.startswith("gateway_")} <= {told[each] for each in shown}


# ---- Prometheus ----


class Prometheus:
    """Prometheus itself, asked over its HTTP API."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def is_ready(self) -> bool:
        try:
            return httpx.get(self._url.removesuffix("/api/v1") + "/-/ready", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series that an expression yields now."""
        answer = httpx.get(f"{self._url}/query", params={"query": expression}, timeout=10)
        assert answer.status_code == 200, (expression, answer.text)
        return list(answer.json()["data"]["result"])

    def value(self, expression: str) -> float | None:
        found = self.query(expression)
        return float(found[0]["value"][1]) if found else None


def scrape_config(port: int, key_file: Path) -> str:
    """Return what Prometheus is told of a gateway on this port, which it asks with a key."""
    return f"""\
global: {{scrape_interval: 200ms, scrape_timeout: 200ms}}
scrape_configs:
  - job_name: tgi-gateway
    authorization: {{credentials_file: {key_file}}}
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


@contextmanager
def prometheus(folder: Path, gateway_port: int, key: str) -> Iterator[Prometheus]:
    """Run a Prometheus that asks the gateway at this port, with nothing outside `folder`."""
    port, config, key_file = free_port(), folder / "prometheus.yml", folder / "scrape.key"
    key_file.write_text(key)
    config.write_text(scrape_config(gateway_port, key_file))
    log = folder / "prometheus.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            cwd=folder,
            stdout=output,
            stderr=output,
        )
    try:
        wait_until(lambda: answers(port) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait(20)


@needs_prometheus
def test_prometheus_reads_it_and_every_expression_of_the_dashboard_works_there(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    key = add_key(file, "prometheus", ["generate"])

    def act(gateway: Gateway) -> None:
        with prometheus(tmp_path, gateway.port, key) as monitor:
            wait_until(lambda: monitor.is_ready() and monitor.value('up{job="tgi-gateway"}') == 1)
            ask_everywhere(gateway, **bearer(key))
            calls = sum(each.asks for each in (*ADDRESSES, *PUT_THROUGH[1:2]))
            wait_until(lambda: monitor.value('gateway_calls_total{model="by-tgi", outcome="ok"}') == calls)

            assert monitor.value('gateway_model_state{model="by-tgi", state="ready"}') == 1
            assert monitor.value("sum(gateway_model_state)") == 3
            for expression in expressions():
                monitor.query(expression)
            targets = monitor.query("up")
            assert [each["value"][1] for each in targets] == ["1"]

    with_servers(tmp_path, act, GATEWAY_API_KEYS_FILE=str(file))


@needs_prometheus
def test_promtool_finds_no_fault(tmp_path: Path) -> None:
    def act(gateway: Gateway) -> None:
        ask_everywhere(gateway)
        gateway.post("/models/by-tgi/stop")
        page = gateway.get("/metrics").text
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=page, capture_output=True, text=True, timeout=60, check=False
        )

        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")

    with_servers(tmp_path, act, GATEWAY_GPUS="0=24GiB")
