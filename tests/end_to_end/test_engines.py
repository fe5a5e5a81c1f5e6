"""Gateways before engines in every condition: with GPUs, without, restarted; and images that come from a registry."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.containers import Site, serving, site
from tests.end_to_end.gateway import Gateway
from tests.own_engine import OwnEngine, needs_own_engine
from tests.registry import Funnel, free_port, registry_at
from tests.runtimes.processes import until, wait_until

pytestmark = [pytest.mark.docker, needs_own_engine]

GPUS = {"GATEWAY_GPUS": "0=24GiB,1=24GiB"}


def ask(gateway: Gateway, model: str) -> httpx.Response:
    return gateway.post("/generate", {"model_id": model, "prompt": "go round and", "max_new_tokens": 3})


def test_each_model_sees_exactly_the_gpus_it_was_given(tmp_path: Path) -> None:
    def seen(place: Site, name: str) -> str:
        return str(place.container(name).exec_run(["cat", "/proc/1/environ"]).output)

    with OwnEngine(tmp_path, gpu_hook=True) as engine, site(tmp_path, engine.url) as place:
        models = {
            name: place.model(hf_name=f"org/{name}", gpus=gpus, pinned=name in "ab")
            for name, gpus in {"a": 1, "b": 1, "c": 1, "named": ["1"], "none": 0}.items()
        }
        with serving(place, GPUS, all_of=models) as gateway:
            for name in ("a", "b", "none"):
                assert ask(gateway, place.named(name)).status_code == 200

            assert "NVIDIA_VISIBLE_DEVICES=0\\x00" in seen(place, "a")
            assert "NVIDIA_VISIBLE_DEVICES=1\\x00" in seen(place, "b")
            assert "NVIDIA_VISIBLE_DEVICES=void\\x00" in seen(place, "none")

            for name in ("c", "named"):
                refused = ask(gateway, place.named(name))
                assert (refused.status_code, refused.json()["error_code"]) == (503, "NO_CAPACITY")
                assert place.named("b") in refused.json()["detail"]
                assert refused.headers["retry-after"]

            gateway.post(f"/models/{place.named('b')}/stop")
            assert gateway.post(f"/models/{place.named('named')}/start").status_code == 200
            assert "NVIDIA_VISIBLE_DEVICES=1\\x00" in seen(place, "named")


def test_a_gpu_stays_reserved_over_a_kill_of_the_gateway(tmp_path: Path) -> None:
    with OwnEngine(tmp_path, gpu_hook=True) as engine, site(tmp_path, engine.url) as place:
        models = {name: place.model(hf_name=f"org/{name}", gpus=1) for name in ("a", "b")}
        gateway = place.gateway(GPUS, **models)
        gateway.post(f"/models/{place.named('b')}/start")
        gateway.process.kill()
        gateway.wait()

        with serving(place, GPUS, all_of=models) as gateway:
            gateway.post(f"/models/{place.named('a')}/start")
            gpu_of = {name: place.container(name).labels["tgi-gateway.gpus"] for name in models}

    assert gpu_of == {"b": "0", "a": "1"}


def test_models_that_swap_their_gpus_between_two_lives_both_come_up(tmp_path: Path) -> None:
    def swapped(place: Site, gpus: dict[str, str]) -> dict[str, dict[str, Any]]:
        return {
            name: place.model(hf_name=f"org/{name}", gpus=[gpu], preload=True, env={"DOUBLE_STOP_S": pause_s})
            for (name, gpu), pause_s in zip(gpus.items(), (0, 1), strict=True)
        }

    def all_ready(gateway: Gateway) -> bool:
        states = {str(model["state"]) for model in gateway.get("/models").json()["models"]}
        return states == {"ready"}

    with OwnEngine(tmp_path, gpu_hook=True) as engine, site(tmp_path, engine.url) as place:
        gateway = place.gateway(GPUS, **swapped(place, {"a": "0", "b": "1"}))
        wait_until(lambda: all_ready(gateway))
        gateway.process.kill()
        gateway.wait()

        with serving(place, GPUS, all_of=swapped(place, {"a": "1", "b": "0"})) as gateway:
            wait_until(lambda: all_ready(gateway))
            assert {name: place.container(name).labels["tgi-gateway.gpus"] for name in "ab"} == {"a": "1", "b": "0"}


def test_the_gpu_of_a_model_that_left_the_catalog_is_given_away_when_it_is_gone(tmp_path: Path) -> None:
    one_gpu = {"GATEWAY_GPUS": "0=24GiB"}
    with OwnEngine(tmp_path, gpu_hook=True) as engine, site(tmp_path, engine.url) as place:
        stubborn = {"DOUBLE_IGNORES_SIGTERM": 1}
        gateway = place.gateway(one_gpu, old=place.model(gpus=1, env=stubborn))
        gateway.post(f"/models/{place.named('old')}/start")
        gateway.process.kill()
        gateway.wait()

        with serving(place, one_gpu, new=place.model(hf_name="org/new", gpus=1, preload=True)) as gateway:
            seen: list[set[str]] = []

            def new_is_ready() -> bool:
                seen.append({name for name, each in place.containers().items() if each.status == "running"})
                return bool(gateway.model(place.named("new"))["state"] == "ready")

            wait_until(new_is_ready, 40)

        assert {f"tgi-{place.named('old')}"} in seen
        assert all(len(names) <= 1 for names in seen), "two models had one GPU"


def test_an_engine_without_the_toolkit_is_told_what_to_install(tmp_path: Path) -> None:
    with (
        OwnEngine(tmp_path) as engine,
        site(tmp_path, engine.url) as place,
        serving(place, m=place.model(gpus=1)) as gateway,
    ):
        refused = ask(gateway, place.named("m"))

    body = refused.json()
    assert (refused.status_code, body["error_code"]) == (503, "START_FAILED")
    assert "nvidia-container-toolkit" in body["detail"]
    assert "could not select device driver" in " ".join(body["evidence"])


def test_an_engine_that_restarts_is_noticed_and_the_next_request_heals_it(tmp_path: Path) -> None:
    with OwnEngine(tmp_path) as engine, site(tmp_path, engine.url) as place:
        m = place.named("m")
        with serving(place, m=place.model(health_interval="1h")) as gateway:
            assert ask(gateway, m).status_code == 200
            first = place.container("m").id
            engine.restart()

            wait_until(lambda: gateway.model(m)["last_error"])
            assert gateway.model(m)["state"] != "ready"
            assert ask(gateway, m).status_code == 200
            assert place.container("m").id != first


def test_an_engine_that_comes_later_is_found_with_what_runs_on_it(tmp_path: Path) -> None:
    with OwnEngine(tmp_path, live_restore=True) as engine, site(tmp_path, engine.url) as place:
        m = place.named("m")
        with serving(place, keep=True, m=place.model()) as gateway:
            gateway.post(f"/models/{m}/start")
        first = place.ids()
        engine.stop()
        gateway = place.gateway({"GATEWAY_ON_EXIT": "stop"}, m=place.model())
        try:
            assert ask(gateway, m).json()["error_code"] == "RUNTIME_UNAVAILABLE"
            engine.start()
            wait_until(lambda: gateway.model(m)["state"] == "ready")

            assert ask(gateway, m).status_code == 200
            assert place.ids() == first
        finally:
            assert gateway.end() == 0


def test_a_pull_shows_its_progress_and_what_cannot_be_pulled_is_told_at_once(tmp_path: Path) -> None:
    async def pull(gateway: Gateway, m: str, funnel: Funnel) -> None:
        start = asyncio.create_task(asyncio.to_thread(gateway.post, f"/models/{m}/start"))
        progress: dict[str, Any] = {}

        async def shows() -> bool:
            model = await asyncio.to_thread(gateway.model, m)
            progress.update(model["progress"] or {})
            return bool(progress.get("done") and progress.get("total"))

        await until(lambda: funnel.stalled)
        while not await shows():
            await asyncio.sleep(0.05)
        assert (progress["phase"], progress["unit"]) == ("pulling", "bytes")
        assert 0 < progress["done"] < progress["total"]
        funnel.open()
        assert (await start).status_code == 200

    async def scenario(place: Site, registry: int) -> None:
        funnel = Funnel(registry, 8 << 20)
        async with funnel.serving() as port:
            image = f"127.0.0.1:{port}/{place.owner}:1"
            models = {
                "m": place.model(image=image),
                "tag": place.model(image=f"{image}-nope", hf_name="org/tag"),
                "down": place.model(image=f"127.0.0.1:{free_port()}/x:1", hf_name="org/down"),
            }
            with serving(place, all_of=models) as gateway:
                await pull(gateway, place.named("m"), funnel)
                for name, words in {"tag": f"{image}-nope", "down": "cannot be reached"}.items():
                    refused = await asyncio.to_thread(ask, gateway, place.named(name))
                    assert (refused.status_code, refused.json()["error_code"]) == (503, "START_FAILED")
                    assert words in refused.json()["cause"]
                told = await asyncio.to_thread(progress_of, gateway)
            dones = [each["done"] for each in told if each["phase"] == "pulling" and each["done"] is not None]
            assert len(dones) > 1
            assert dones == sorted(dones)
            extracted = [each for each in told if each["phase"] == "extracting"][-1]
            assert extracted["done"] == extracted["total"] > dones[-1]

    with (
        registry_at(tmp_path) as registry,
        OwnEngine(tmp_path) as fresh,  # it has no layer of the image yet
        site(tmp_path, fresh.url) as place,
        site(tmp_path) as source,
    ):
        pushed = f"127.0.0.1:{registry}/{place.owner}:1"
        source.client.images.get(source.image).tag(pushed)
        source.client.images.push(pushed)
        source.client.images.remove(pushed)
        place.client.images.remove(place.image)
        asyncio.run(scenario(place, registry))


def progress_of(gateway: Gateway) -> list[dict[str, Any]]:
    """Return the progress that the events told of until a model was ready."""
    told = []
    with httpx.stream("GET", gateway.url + "/events", headers={"last-event-id": "0"}, timeout=60) as events:
        for line in events.iter_lines():
            if line.startswith("data:") and "phase" in line:
                told.append(json.loads(line[5:]))
            if '"to":"ready"' in line:
                return told
    return []
