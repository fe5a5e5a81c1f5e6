"""A model with two servers, seen from outside: as processes, and as containers of TGI's double."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.end_to_end import containers
from tests.end_to_end.containers import Site, site
from tests.end_to_end.gateway import EMBEDDED, Gateway, catalog, serving
from tests.end_to_end.test_containers import ask, frames_of
from tests.runtimes.processes import wait_until


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as one:
        yield one


def told(gateway: Gateway, model: str, key: str) -> list[object]:
    return [replica[key] for replica in gateway.model(model)["replicas"]]


def generate(gateway: Gateway, tokens: int) -> httpx.Response:
    return gateway.post("/generate", {"prompt": "Once upon a time", "max_new_tokens": tokens, "temperature": 0})


def test_two_processes_share_the_requests_of_one_model(tmp_path: Path) -> None:
    with serving(tmp_path, m={**EMBEDDED, "replicas": 2, "max_concurrency": 1}) as gateway:
        assert told(gateway, "m", "state") == ["stopped", "stopped"]
        started = gateway.post("/models/m/start").json()
        assert started["container_name"] == "tgi-m"
        assert told(gateway, "m", "container_name") == ["tgi-m", "tgi-m-1"]
        assert told(gateway, "m", "state") == ["ready", "ready"]
        ports = told(gateway, "m", "port")
        assert len({*ports}) == 2
        assert gateway.model()["port"] == started["port"] == ports[0]
        assert len(gateway.children()) == 2

        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(generate, gateway, 300) for _ in range(3)]
            wait_until(lambda: gateway.model()["in_flight"] == 2 and told(gateway, "m", "in_flight") == [1, 1])
            answers = [each.result() for each in asked]
        assert [answer.status_code for answer in answers] == [200] * 3
        assert len({answer.json()["generated_text"] for answer in answers}) == 1

        assert gateway.get("/models/m/logs?replica=1").text
        assert gateway.get("/models/m/logs?replica=2").json()["error_code"] == "NOT_FOUND"
        figures = gateway.get("/metrics").text
        assert 'gateway_starts_total{model="m",result="ok"} 2.0' in figures
        assert gateway.post("/models/m/stop").status_code == 200
        assert gateway.children() == []
        assert gateway.post("/models/m/stop").json()["error_code"] == "MODEL_NOT_RUNNING"


@pytest.mark.docker
def test_two_containers_are_adopted_by_the_next_life_and_their_number_changes_while_they_stream(place: Site) -> None:
    m = place.named("m")
    keys = {"env": {"DOUBLE_TOKEN_S": 0.02}, "max_concurrency": 1, "idle_timeout": "never"}
    gateway = place.gateway(m=place.model(**keys, replicas=2))
    try:
        started = gateway.post(f"/models/{m}/start").json()
        assert started["port"] == told(gateway, m, "port")[0]
        before = place.ids()
        assert before.keys() == {f"tgi-{m}", f"tgi-{m}-1"}
    finally:
        gateway.end(signal.SIGKILL)

    with containers.serving(place, m=place.model(**keys, replicas=2)) as gateway, ThreadPoolExecutor(2) as pool:
        wait_until(lambda: told(gateway, m, "state") == ["ready", "ready"])
        assert place.ids() == before

        streams = [pool.submit(frames_of, gateway, m, 150) for _ in range(2)]
        wait_until(lambda: told(gateway, m, "in_flight") == [1, 1])
        catalog(place.folder, **{m: place.model(**keys)})
        wait_until(lambda: told(gateway, m, "state") == ["ready", "draining"])
        assert [len(each.result()) for each in streams] == [150, 150]
        wait_until(lambda: place.ids().keys() == {f"tgi-{m}"})
        assert place.ids()[f"tgi-{m}"] == before[f"tgi-{m}"]

        stream = pool.submit(frames_of, gateway, m, 500)
        wait_until(lambda: gateway.model(m)["in_flight"] == 1)
        catalog(place.folder, **{m: place.model(**keys, replicas=2)})
        wait_until(lambda: told(gateway, m, "state") == ["ready", "stopped"])
        assert ask(gateway, m).status_code == 200
        assert len(stream.result()) == 500
        assert place.ids()[f"tgi-{m}"] == before[f"tgi-{m}"]
        assert place.ids().keys() == {f"tgi-{m}", f"tgi-{m}-1"}
