"""Three models and room for one, on a real engine, under mixed traffic: what its own events say of it afterwards.

`TRAFFIC_S` is how long it lasts: two minutes by hand (with --log-cli-level INFO it tells the switches), less in CI.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from pathlib import Path
from random import Random

import httpx
import pytest

from tests.end_to_end.containers import Site, serving, site
from tests.end_to_end.gateway import Gateway
from tests.own_engine import OwnEngine, needs_own_engine

pytestmark = [pytest.mark.docker, needs_own_engine]

log = logging.getLogger(__name__)

TRAFFIC_S = float(os.environ.get("TRAFFIC_S", "15"))
MODELS = ("a", "b", "c")
CALLERS = 6
QUEUE_S = 30.0
START_S = 60.0
REFUSED_IN_BOUND = {"NO_CAPACITY", "QUEUE_FULL"}


class Traffic:
    """Callers who ask one model after another, each by a seed of its own, until the time is over."""

    def __init__(self, place: Site, gateway: Gateway) -> None:
        self.outcomes: Counter[str] = Counter()
        self.slowest_s = 0.0
        self._place = place
        self._gateway = gateway
        self._until = time.monotonic() + TRAFFIC_S
        self._lock = threading.Lock()
        callers = [threading.Thread(target=self._call, args=(Random(seed),)) for seed in range(CALLERS)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()

    def _call(self, random: Random) -> None:
        with httpx.Client(base_url=self._gateway.url, timeout=240) as client:
            while time.monotonic() < self._until:
                body = {
                    "model_id": self._place.named(random.choice(MODELS)),
                    "prompt": "go round and",
                    "max_new_tokens": 5,
                }
                began = time.monotonic()
                outcome = _outcome(client.post("/generate", json={**body, "stream": random.random() < 0.5}))
                with self._lock:
                    self.outcomes[outcome] += 1
                    self.slowest_s = max(self.slowest_s, time.monotonic() - began)


def _outcome(answer: httpx.Response) -> str:
    if answer.status_code == 200:
        return "GENERATION_FAILED" if '"error_code"' in answer.text else "answered"
    return str(answer.json()["error_code"])


def residents(place: Site, since: int) -> tuple[int, Counter[str]]:
    """Return how many servers ran at once, at most, and how often each was started, as the engine itself tells."""
    told = place.client.events(
        since=since, until=int(time.time()) + 1, decode=True, filters={"type": "container", "event": ["start", "die"]}
    )
    alive, most, starts = set[str](), 0, Counter[str]()
    for event in told:
        attributes = event["Actor"]["Attributes"]
        if attributes.get("tgi-gateway.gpus") != "0":
            continue
        if event["Action"] == "start":
            alive.add(event["id"])
            starts[attributes["name"]] += 1
        else:
            alive.discard(event["id"])
        most = max(most, len(alive))
    return most, starts


@pytest.mark.timeout(TRAFFIC_S + 120)
def test_every_request_ends_in_bound_and_never_are_two_models_resident(tmp_path: Path) -> None:
    with OwnEngine(tmp_path, gpu_hook=True) as engine, site(tmp_path, engine.url) as place:
        models = {
            name: place.model(
                hf_name=f"org/{name}",
                gpus=1,
                queue_timeout=f"{QUEUE_S}s",
                env={"DOUBLE_SHARD_S": 1, "DOUBLE_CACHED": 1},
            )
            for name in MODELS
        }
        began = int(time.time())
        with serving(place, {"GATEWAY_GPUS": "0=24GiB"}, all_of=models) as gateway:
            traffic = Traffic(place, gateway)
            left = [model for model in gateway.get("/models").json()["models"] if model["in_flight"] or model["queued"]]
        most, starts = residents(place, began)

    log.info("%d switches, %s, the slowest took %.1f s", starts.total(), dict(traffic.outcomes), traffic.slowest_s)
    assert set(traffic.outcomes) <= {"answered", *REFUSED_IN_BOUND}
    assert traffic.outcomes["answered"]
    assert left == []
    assert traffic.slowest_s < 2 * QUEUE_S + START_S, "a wait for the GPU, a start, a wait for a slot"
    assert most == 1
    assert set(starts) == {f"tgi-{place.named(name)}" for name in MODELS}, "each had its turn"
