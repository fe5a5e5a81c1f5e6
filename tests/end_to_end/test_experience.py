"""What a gateway has learned of starts, seen from outside: estimates, refusals that tell when, and another life."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.gateway import Gateway, serving

pytestmark = pytest.mark.embedded

ASK = {"prompt": "The capital of France is", "max_new_tokens": 2}
SLOWER = 100
"""How many times as long starts seem to have taken, once their record was touched."""


def cycle(gateway: Gateway) -> None:
    """Start the model and stop it again."""
    assert gateway.post("/models/m/start").status_code == 200
    assert gateway.post("/models/m/stop").status_code == 200


def estimates(gateway: Gateway, starts: int) -> list[list[float | None]]:
    """Return the estimates that events told of during each of so many starts, all of which are over."""
    found: list[list[float | None]] = [[]]
    with httpx.stream("GET", f"{gateway.url}/events", headers={"last-event-id": "0"}, timeout=20) as events:
        lines = events.iter_lines()
        for line in lines:
            data = json.loads(line[6:]) if line.startswith("data: ") else {}
            if "eta_s" in data:
                found[-1].append(data["eta_s"])
            if data.get("to") == "ready" and len(found) == starts:
                return found
            if data.get("to") == "ready":
                found.append([])
    return found


def remembered(folder: Path) -> dict[str, Any]:
    """Return the record of the one model that a gateway has left."""
    [record] = json.loads((folder / "experience-default.json").read_text())["models"]
    return dict(record)


def seem_slower(folder: Path) -> int:
    """Let the starts on record seem to have taken much longer; return how many seconds they seem to take."""
    path = folder / "experience-default.json"
    content = json.loads(path.read_text())
    [record] = content["models"]
    record["phases"] = {phase: [took * SLOWER for took in times] for phase, times in record["phases"].items()}
    path.write_text(json.dumps(content))
    return math.ceil(sum(float(times[0]) for times in record["phases"].values()))


def test_the_first_start_is_not_guessed_and_the_second_is_estimated(tmp_path: Path) -> None:
    with serving(tmp_path) as gateway:
        cycle(gateway)
        cycle(gateway)

        first, second = estimates(gateway, 2)

    assert first
    assert set(first) == {None}
    assert second
    assert all(eta_s is not None and eta_s > 0 for eta_s in second)


def test_what_starts_cost_outlasts_the_gateway_and_tells_who_waits_in_vain(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    environ = {"GATEWAY_STATE_DIR": str(state)}
    with serving(tmp_path, environ) as gateway:
        cycle(gateway)
    cost_s = seem_slower(state)

    with serving(tmp_path, environ) as gateway:
        refused = gateway.post("/generate", ASK, prefer="wait=1")
        answered = gateway.post("/generate", ASK)  # the start went on
        [told] = estimates(gateway, 1)
        starts = gateway.moves().count("starting")

    assert (refused.status_code, refused.json()["error_code"]) == (503, "MODEL_NOT_LOADED")
    assert refused.headers["retry-after"] == str(cost_s)
    assert f"takes about {cost_s} s more" in refused.json()["detail"]
    assert answered.status_code == 200
    assert starts == 1
    assert told
    assert told[0]
    assert told[0] > SLOWER / 100
    assert all(len(times) == 2 for times in remembered(state)["phases"].values())


def test_a_state_directory_that_is_not_there_costs_nothing_but_estimates(tmp_path: Path) -> None:
    with serving(tmp_path, {"GATEWAY_STATE_DIR": str(tmp_path / "none")}) as gateway:
        cycle(gateway)
        cycle(gateway)

        _, second = estimates(gateway, 2)

    assert all(second)
    assert any("Check GATEWAY_STATE_DIR" in line and "WARNING" in line for line in gateway.log)


def test_the_catalogs_of_two_names_share_a_directory(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with serving(tmp_path, {"GATEWAY_STATE_DIR": str(tmp_path), "GATEWAY_NAME": name}) as gateway:
            cycle(gateway)

    assert sorted(path.name for path in tmp_path.glob("experience*")) == ["experience-one.json", "experience-two.json"]
