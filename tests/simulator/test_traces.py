"""The replay of traffic: it tells policies apart, forgets nobody, and is the same for the same seed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.fleet import scheduling
from gateway.fleet.placement import Demand, Device
from tests.simulator import traces
from tests.simulator.traces import (
    MORE,
    POLICIES,
    SHAPES,
    STOP_S,
    Belady,
    Lru,
    Outcome,
    Replay,
    Request,
    Scenario,
    Setting,
    averaged,
    replay,
    scenario,
)

SEEDS = range(3)
ROOT = Path(__file__).parent.parent.parent
FEW = Setting(hours=3.0)


def mean_of(shape: str, policy: str) -> Outcome:
    return averaged(replay(shape, policy, seed, FEW) for seed in SEEDS)


def day(asked: str, *, apart_s: float = 300.0, room: int = 1) -> Scenario:
    """Return a day on which the models that are the letters of `asked` are asked for, one after the other."""
    return Scenario(
        seed=0,
        devices=[Device(str(number)) for number in range(room)],
        demands=dict.fromkeys(sorted(set(asked)), Demand(1)),
        load_s=dict.fromkeys(asked, 30.0),
        requests=[Request(number * apart_s, model, 5.0) for number, model in enumerate(asked)],
    )


@pytest.mark.parametrize("shape", sorted(set(SHAPES) - {"day-and-night"}))
def test_ours_switches_less_than_lru_and_the_optimum_least(shape: str) -> None:
    fcfs, lru, ours, optimum = (mean_of(shape, policy) for policy in POLICIES)

    assert optimum.switching_s <= ours.switching_s <= 1.05 * lru.switching_s <= 1.2 * fcfs.switching_s
    assert ours.wait_p99_s <= 1.25 * lru.wait_p99_s


def test_alternating_requests_are_served_together() -> None:
    fcfs, lru, ours, optimum = (mean_of("interleaved", policy) for policy in POLICIES)

    assert ours.switching_s <= 1.25 * optimum.switching_s
    assert ours.switching_s < 0.9 * lru.switching_s
    assert ours.wait_p99_s < 0.5 * fcfs.wait_p99_s


def test_ours_is_the_policy_of_the_gateway_itself() -> None:
    busy = scenario("balanced", 0, FEW)

    assert vars(traces)["decide"] is scheduling.decide
    assert POLICIES["ours"](busy) == Replay(busy, scheduling.OURS).run()
    assert type(scheduling.OURS) is scheduling.Rules


def test_what_a_simple_day_costs() -> None:
    outcome = Replay(day("aab"), scheduling.OURS).run()

    assert outcome.cold_starts == 2
    assert outcome.switching_s == pytest.approx(2 * 30.0 + STOP_S, rel=0.1)
    assert 27.0 <= outcome.wait_p99_s <= 33.0 + STOP_S


def test_lru_sends_away_whom_a_cycle_needs_next_and_belady_does_not() -> None:
    cycle = day("abc" * 8, apart_s=600.0, room=2)

    assert Replay(cycle, Lru()).run().cold_starts == 24
    assert Replay(cycle, Belady(cycle, by_cost=False)).run().cold_starts == 13
    assert Replay(cycle, scheduling.OURS).run().cold_starts < 20


def test_the_same_seed_gives_the_same_day_and_another_another() -> None:
    assert replay("bursty", "ours", 1, FEW) == replay("bursty", "ours", 1, FEW)
    assert scenario("bursty", 1, FEW) != scenario("bursty", 2, FEW)


@pytest.mark.parametrize("policy", [*POLICIES, *MORE])
def test_nobody_is_forgotten_whatever_the_sizes_and_however_many_come(policy: str) -> None:
    crowded = Setting(models=12, gpus=3, gap_s=12.0, hours=0.25, mixed=True)

    assert replay("balanced", policy, 0, crowded).cold_starts > 12


def test_the_figures_are_the_mean_of_the_seeds() -> None:
    assert averaged([Outcome(1, 2, 3, 4), Outcome(3, 4, 5, 6)]) == Outcome(2, 3, 4, 5)


def told(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.simulator", "traces", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_prints_one_json_object() -> None:
    figures = json.loads(told("--seeds", "1", "--gap", "240", "--json").stdout)

    assert list(figures) == ["balanced", "dominant", "interleaved", "bursty", "day-and-night"]
    for row in figures.values():
        assert list(row) == ["fcfs", "lru", "ours", "optimum"]
        for each in row.values():
            assert list(each) == ["cold_starts", "wait_p50_s", "wait_p99_s", "switching_s"]
            assert each["cold_starts"] > 0


def test_the_command_prints_a_table() -> None:
    lines = told("--seeds", "1", "--gap", "240", "--more").stdout.splitlines()

    assert lines[0].startswith("| shape | policy | cold starts |")
    assert len(lines) == 2 + 5 * 6


@pytest.mark.parametrize("options", [["--seeds", "0"], ["--models", "1"], ["--gap", "0"], ["--load", "90", "20"]])
def test_what_makes_no_sense_is_refused_in_words(options: list[str]) -> None:
    refused = told(*options)

    assert refused.returncode == 2
    assert "Invalid value" in refused.stderr


def test_the_help_tells_the_scenario() -> None:
    words = told("--help").stdout

    assert "Belady" in words
    assert "20 to 90 s" in " ".join(words.split())
