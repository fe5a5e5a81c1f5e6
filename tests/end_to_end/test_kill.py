"""`kill -9` of the gateway, again and again, at random moments: what runs is what ran (P6)."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.containers import Site, serving, site
from tests.end_to_end.gateway import Gateway
from tests.runtimes.processes import wait_until

pytestmark = [pytest.mark.docker, pytest.mark.timeout(400)]

KILLS = 20
MODELS = ("quick", "slow", "busy", "often")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path) as one:
        yield one


def models_of(place: Site) -> dict[str, dict[str, object]]:
    slow = {"DOUBLE_SHARD_S": 3, "DOUBLE_WARMUP_S": 1}
    return {
        "quick": place.model(),
        "slow": place.model(env=slow, hf_name="org/slow"),
        "busy": place.model(env={"DOUBLE_TOKEN_S": 0.01}, hf_name="org/busy"),
        "often": place.model(hf_name="org/often"),
    }


def stream(gateway: Gateway, model: str, tokens: int = 20) -> list[dict[str, object]]:
    """Return the frames of a whole stream; raises if it breaks off or is refused."""
    body = {"model_id": model, "prompt": "go round and", "max_new_tokens": tokens, "temperature": 0}
    with httpx.stream("POST", gateway.url + "/generate_stream", json=body, timeout=60) as answer:
        frames = [json.loads(line[5:]) for line in answer.iter_lines() if line.startswith("data:")]
        assert answer.status_code == 200, frames
    assert frames[-1].get("generated_text") is not None, frames[-1]
    return frames


class Traffic:
    """Callers and an operator who do not care whether the gateway lives."""

    def __init__(self, gateway: Gateway, place: Site, seed: int) -> None:
        self._gateway = gateway
        self._place = place
        self._random = random.Random(seed)
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(3)]
        self._threads.append(threading.Thread(target=self._operate))
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _call(self) -> None:
        while not self._over.is_set():
            try:
                stream(self._gateway, self._place.named(self._random.choice(MODELS)), tokens=50)
            except (httpx.HTTPError, AssertionError, LookupError, ValueError):  # cut off, in the midst of a line even
                self._over.wait(0.05)

    def _operate(self) -> None:
        while not self._over.wait(self._random.uniform(0.1, 0.6)):
            verb = self._random.choice(["start?wait=false", "stop", "stop?force=true", "restart"])
            try:
                self._gateway.post(f"/models/{self._place.named('often')}/{verb}")
            except httpx.HTTPError:
                continue


def running(place: Site) -> dict[str, str]:
    """Return the ids of the running containers by name."""
    return {name: str(each.id) for name, each in place.containers().items() if each.status == "running"}


def when_settled(place: Site) -> dict[str, str]:
    """Return what runs once the engine has done what the dead gateway asked for last."""
    seen: list[dict[str, str]] = [{}, running(place)]
    while seen[-1] != seen[-2]:
        time.sleep(0.3)
        seen.append(running(place))
    return seen[-1]


def test_twenty_kills_at_random_moments_lose_and_leave_nothing(place: Site) -> None:
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    often = f"tgi-{place.named('often')}"  # the one that an operator stops now and then: it may be on its way out
    for number in range(KILLS):
        gateway = place.gateway(None, **models_of(place))
        traffic = Traffic(gateway, place, chance.randrange(10**6))
        time.sleep(chance.uniform(0.1, 2.0))
        gateway.process.kill()
        gateway.wait()
        traffic.end()
        at_the_kill = when_settled(place)

        again = place.gateway(None, **models_of(place))
        try:
            wait_until(lambda: place.containers().keys() == running(place).keys())
            after = running(place)
            words = f"seed {seed}, kill {number}: {at_the_kill} became {after}"
            assert after.items() <= at_the_kill.items(), words
            assert at_the_kill.keys() - after.keys() <= {often}, words
            for name in MODELS:
                stream(again, place.named(name))
            now = running(place)
            assert {name: now.get(name) for name in after if name != often}.items() <= after.items(), words
        finally:
            again.process.kill()
            again.wait()


def test_a_container_that_is_not_asked_for_any_more_is_removed_and_a_changed_one_replaced(place: Site) -> None:
    changed, same = place.model(hf_name="org/changed"), place.model(hf_name="org/same")
    before = {"gone": place.model(hf_name="org/gone"), "changed": changed, "same": same}
    with serving(place, keep=True, all_of=before) as gateway:
        for name in before:
            gateway.post(f"/models/{place.named(name)}/start")
    first = place.ids()
    foreign = place.client.containers.create(
        place.image, name=f"foreign-{place.owner}", labels={"tgi-gateway.owner": "other"}
    )
    try:
        after = {"changed": {**changed, "args": {"max-input-tokens": 100}}, "same": same}
        with serving(place, all_of=after) as gateway:
            wait_until(lambda: set(place.ids()) == {f"tgi-{place.named('same')}"})
            assert place.ids() == {name: first[name] for name in place.ids()}
            stream(gateway, place.named("changed"))
            stream(gateway, place.named("same"))
            assert place.ids()[f"tgi-{place.named('same')}"] == first[f"tgi-{place.named('same')}"]
        assert place.client.containers.get(str(foreign.id)).status == "created"
    finally:
        foreign.remove(force=True, v=True)


def test_one_that_was_still_loading_is_adopted_with_what_is_left_of_its_time(place: Site) -> None:
    m = place.named("m")
    endless = place.model(env={"DOUBLE_ENDLESS": 1}, start_timeout="8s", unhealthy_timeout="1s")
    began = time.monotonic()
    with serving(place, keep=True, m=endless) as gateway:
        gateway.post(f"/models/{m}/start?wait=false")
        wait_until(lambda: gateway.model(m)["state"] == "loading")
    container = place.container("m").id
    with serving(place, m=endless) as gateway:
        wait_until(lambda: gateway.model(m)["state"] == "loading")
        assert place.container("m").id == container
        wait_until(lambda: gateway.model(m)["last_error"])

        assert gateway.model(m)["last_error"]["error_code"] == "START_TIMEOUT"
        assert time.monotonic() - began < 8 + 8, "it had the time of a new start"


def test_a_gateway_that_ends_in_peace_leaves_its_containers_serving(place: Site) -> None:
    m = place.named("m")
    with serving(place, keep=True, m=place.model()) as gateway:
        stream(gateway, m)
    first = place.ids()

    with serving(place, m=place.model()) as gateway:
        stream(gateway, m)
        assert place.ids() == first
        assert not any("starting" in move for move in gateway.moves())
