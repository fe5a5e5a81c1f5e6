"""Who waits how long: tables."""

from __future__ import annotations

import pytest

from gateway.fleet import refusals
from gateway.fleet.admission import (
    LONGEST_PAUSE_S,
    STOP_MARGIN_S,
    Bounds,
    call_off_at,
    pause_after_failure_s,
    queue_room,
    wait_ends_at,
)
from gateway.fleet.estimates import Estimate
from gateway.lifecycle import State
from tests.fleet.scenes import spec

BOUNDS = Bounds(queue_timeout_s=300, start_timeout_s=1200, drain_timeout_s=60, stop_grace_s=10, abandon_after_s=60)
LATEST = 100 + 60 + 10 + STOP_MARGIN_S + 1200 + 300


@pytest.mark.parametrize(
    ("state", "max_wait_s", "expected"),
    [
        (State.READY, None, 150 + 300),
        (State.READY, 5, 150 + 300),  # the caller's bound is for a cold model
        (State.UNHEALTHY, None, 150 + 300),
        (State.STOPPED, None, LATEST),
        (State.LOADING, None, LATEST),
        (State.DRAINING, None, LATEST),
        (State.LOADING, 5, 100 + 5),
        (State.STARTING, 0, 100),
        (State.STARTING, 99999, LATEST),
    ],
)
def test_a_wait_ends(state: State, max_wait_s: float | None, expected: float) -> None:
    assert wait_ends_at(state, BOUNDS, asked_at=100, now=150, max_wait_s=max_wait_s) == expected


def test_no_wait_goes_beyond_the_longest_whatever_the_model_does() -> None:
    assert wait_ends_at(State.READY, BOUNDS, asked_at=100, now=LATEST - 1, max_wait_s=None) == LATEST


@pytest.mark.parametrize(
    ("failures", "served", "expected"),
    [(1, True, 0), (2, True, 10), (1, False, 5), (2, False, 10), (3, False, 20), (7, False, 300), (9999, False, 300)],
)
def test_the_pause_after_a_failure_grows_to_a_limit(failures: int, served: bool, expected: float) -> None:
    assert pause_after_failure_s(failures, served=served) == expected <= LONGEST_PAUSE_S


@pytest.mark.parametrize(
    ("waiters", "kept", "promised_until", "expected"),
    [
        (0, False, 0, 160),
        (0, False, 500, 560),
        (1, False, 0, None),
        (0, True, 0, None),
        (3, True, 500, None),
    ],
)
def test_a_start_is_called_off_after_its_last_reason(
    waiters: int, kept: bool, promised_until: float, expected: float | None
) -> None:
    when = call_off_at(
        waiters=waiters, kept=kept, last_waiter_left_at=100, promised_until=promised_until, bounds=BOUNDS
    )

    assert when == expected


def test_a_cold_model_has_room_for_those_whom_its_slots_will_take() -> None:
    assert queue_room(State.READY, max_queue=0, slots=4) == 0
    assert queue_room(State.STOPPED, max_queue=0, slots=4) == 4
    assert queue_room(State.LOADING, max_queue=256, slots=4) == 260


@pytest.mark.parametrize(("ready", "told_s"), [(Estimate(12.0, 3), 12.0), (Estimate(2.0, 0), 5.0), (None, 5.0)])
def test_who_waited_longer_than_any_start_takes_is_told_when_to_come_back(
    ready: Estimate | None, told_s: float
) -> None:
    error = refusals.never_ready(spec(), State.LOADING, 900.0, ready)

    assert (error.status, error.code, error.retry_after_s) == (504, "START_TIMEOUT", told_s)
    assert "it was loading" in error.detail


@pytest.mark.parametrize(
    ("queue_timeout", "ready", "told_s"),
    [
        (300.0, Estimate(45.0, 3), 45.0),
        (300.0, Estimate(0.1, 3), 1.0),
        (300.0, Estimate(4000.0, 3), 300.0),
        (5.0, Estimate(4000.0, 3), 30.0),
        (900.0, Estimate(4000.0, 3), 600.0),
        (300.0, Estimate(2.0, 0), 30.0),
        (300.0, None, 30.0),
    ],
)
def test_who_got_no_gpus_is_told_a_sensible_time(queue_timeout: float, ready: Estimate | None, told_s: float) -> None:
    assert refusals.no_room(spec(queue_timeout=queue_timeout), "", 9.0, ready).retry_after_s == told_s
