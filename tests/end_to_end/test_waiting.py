"""A real gateway that lets only so many wait for models, whichever model that is."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.end_to_end.addresses import ADDRESSES, Address
from tests.end_to_end.gateway import Gateway, serving
from tests.numbered_server import Numbers
from tests.runtimes.processes import wait_until
from tests.scripted_server import WELL, ScriptedServer, refused, scripted

BATCH = next(address for address in ADDRESSES if address.asks > 2)


def ask(gateway: Gateway, model: str, address: Address = ADDRESSES[0]) -> httpx.Response:
    return gateway.post(address.path.format(model=model), address.body(model, "caller-1 counts", 3))


def codes_of(answers: list[httpx.Response]) -> list[tuple[int, str]]:
    return [(answer.status_code, answer.json().get("error_code", "")) for answer in answers]


def test_so_many_wait_for_models_in_all_and_who_need_not_wait_is_served(tmp_path: Path) -> None:
    def play(cold: ScriptedServer, urls: list[str]) -> None:
        model: dict[str, Any] = {"engine": "tgi", "runtime": "external"}
        at = {"cold": urls[0], "warm": urls[1], "another": urls[0]}
        models = {name: {**model, "hf_name": f"hub/{name}", "url": url} for name, url in at.items()}
        models["warm"]["max_concurrency"] = 1
        with serving(tmp_path, {"GATEWAY_MAX_WAITING": "2"}, **models) as gateway, ThreadPoolExecutor(2) as callers:
            assert ask(gateway, "warm").status_code == 200
            assert codes_of([ask(gateway, "cold", BATCH)]) == [(503, "QUEUE_FULL")]
            wait_until(lambda: gateway.model("cold")["queued"] == 0)
            waiting = [callers.submit(ask, gateway, model) for model in ("cold", "another")]
            wait_until(lambda: gateway.model("cold")["queued"] == gateway.model("another")["queued"] == 1)
            too_many = [ask(gateway, "cold"), ask(gateway, "another")]
            assert codes_of(too_many) == [(503, "QUEUE_FULL")] * 2
            assert [int(answer.headers["retry-after"]) for answer in too_many] == [5, 5]
            assert "GATEWAY_MAX_WAITING" in too_many[0].json()["detail"]
            assert ask(gateway, "warm").status_code == 200
            # its first part need not wait, and its others are parts of a request that was let in
            assert BATCH.text_of(ask(gateway, "warm", BATCH).text) == " 1.1 1.2 1.3"
            cold.well = WELL
            assert [each.result().status_code for each in waiting] == [200, 200]
            assert ask(gateway, "cold").status_code == 200

    async def scene() -> None:
        async with scripted(Numbers()) as (cold, cold_port), scripted(Numbers()) as (_, warm_port):
            cold.well = refused(503, "loading")
            await asyncio.to_thread(play, cold, [f"http://127.0.0.1:{port}" for port in (cold_port, warm_port)])

    asyncio.run(scene())
