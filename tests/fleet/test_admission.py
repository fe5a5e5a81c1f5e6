"""Who waits how long: tables."""

import pytest

from gateway.fleet.admission import (
    LONGEST_PAUSE_S,
    STOP_MARGIN_S,
    Bounds,
    call_off_at,
    pause_after_failure_s,
    queue_room,
    wait_ends_at,
)
from gateway.lifecycle import State

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
