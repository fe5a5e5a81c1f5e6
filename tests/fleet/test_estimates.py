"""How long a start still takes: tables, and what holds whatever is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.fleet.estimates import (
    BEGINNING,
    KEPT,
    LEAST_S,
    LONGEST_S,
    MOST_PHASES,
    OVERRUN,
    Course,
    Durations,
    Estimate,
    Pace,
    in_turn,
    learned,
    left_of,
    lengthened,
    phase_left,
    usual,
    whole,
)
from gateway.runtimes.base import Progress

HOSTILE = [math.nan, math.inf, -math.inf, -1.0]
SECONDS = st.floats(0, LONGEST_S)
DURATIONS = st.lists(SECONDS, min_size=1, max_size=KEPT).map(tuple)


def course(*heard: tuple[float, Progress], began_at: float = 0.0) -> Course:
    """Return a start that began at `began_at` and told of its progress at these times."""
    made = Course()
    made.begin(began_at)
    for at, progress in heard:
        made.hear(progress, at)
    return made


# ---- durations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("durations", "expected"),
    [
        ((), None),
        ((40.0,), Estimate(40.0, 1)),
        ((40.0, 50.0), Estimate(45.0, 2)),
        ((40.0, 50.0, 900.0), Estimate(50.0, 3)),  # one that was out of the way moves nothing
        ((0.0, 0.0), Estimate(LEAST_S, 2)),
    ],
)
def test_what_is_usual_is_the_middle_of_what_was_measured(durations: Durations, expected: Estimate | None) -> None:
    assert usual(durations) == expected


def test_only_the_last_measurements_are_kept_so_that_a_lasting_change_is_learned() -> None:
    durations: Durations = ()
    for seconds in [10.0] * KEPT + [90.0] * (KEPT // 2 + 1):
        durations = lengthened(durations, seconds)

    assert len(durations) == KEPT
    assert usual(durations) == Estimate(90.0, KEPT)


@pytest.mark.parametrize("seconds", HOSTILE)
def test_what_is_no_duration_is_not_learned(seconds: float) -> None:
    assert lengthened((1.0,), seconds) == (1.0,)


def test_a_duration_beyond_all_measure_is_cut() -> None:
    assert lengthened((), 1e300) == (LONGEST_S,)


@pytest.mark.parametrize(
    ("estimates", "expected"),
    [
        ((), None),
        ((None,), None),
        ((Estimate(2, 3), None), None),
        ((Estimate(2, 3), Estimate(5, 1)), Estimate(7, 1)),
        ((Estimate(2, 0), Estimate(5, 4)), Estimate(7, 4)),  # its own pace is measured, too
        ((Estimate(2, 0),), Estimate(2, 0)),
    ],
)
def test_one_after_the_other_is_known_if_each_is(
    estimates: tuple[Estimate | None, ...], expected: Estimate | None
) -> None:
    assert in_turn(*estimates) == expected


# ---- one phase ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spent_s", "durations", "pace", "expected"),
    [
        (5, (), None, None),  # nothing is known
        (5, (), Pace(0, 100, 0, 5, 5), None),  # nothing was counted yet
        (5, (), Pace(50, 100, 0, 5, 5), None),  # what was there before tells no pace
        (10, (), Pace(25, 100, 25, 10, 0), Estimate(30, 0)),
        (10, (), Pace(75, 100, 25, 10, 0), Estimate(10, 0)),  # resumed: only what was gained makes the pace
        (0, (40,), None, Estimate(40, 1)),
        (30, (40,), None, Estimate(10, 1)),
        (40, (40,), None, Estimate(40 * OVERRUN, 1)),
        (400, (40,), None, Estimate(400 * OVERRUN, 1)),
        (10, (40, 40), Pace(50, 100, 50, 10, 0), Estimate(0.5 * 10 + 0.5 * 30, 2)),
        (10, (40,), Pace(0, 100, 0, 10, 0), Estimate(30, 1)),
        (90, (), Pace(100, 100, 50, 40, 50), Estimate(50 * OVERRUN, 0)),  # all is counted, and it goes on
        (1e9, (40,), None, Estimate(LONGEST_S, 1)),
        (5, (), Pace(5, math.nan, 5, 5, 0), None),
        (5, (), Pace(5, math.inf, 5, 5, 0), None),
        (5, (40,), Pace(math.nan, 50, 5, 5, 0), Estimate(35, 1)),
        (5, (40,), Pace(5, 0, 5, 5, 0), Estimate(35, 1)),
    ],
)
def test_a_phase_goes_on_for(
    spent_s: float, durations: Durations, pace: Pace | None, expected: Estimate | None
) -> None:
    assert phase_left(spent_s, durations, pace) == expected


@given(DURATIONS, st.floats(1, 1000), st.floats(1, 1000))
def test_what_is_overrun_is_never_nearly_over_and_grows(durations: Durations, over_s: float, more_s: float) -> None:
    spent_s = max(durations) + over_s

    soon, later = left_of(durations, spent_s), left_of(durations, spent_s + more_s)

    assert soon
    assert later
    assert LEAST_S <= soon.seconds <= later.seconds
    assert soon.seconds >= min(spent_s * OVERRUN, LONGEST_S)


NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


@given(st.floats(0, 1e300), st.lists(SECONDS, max_size=KEPT).map(tuple), st.tuples(*[NUMBERS] * 5))
def test_no_pace_however_hostile_makes_an_estimate_that_cannot_be_told(
    spent_s: float, durations: Durations, numbers: tuple[float, float, float, float, float]
) -> None:
    estimate = phase_left(spent_s, durations, Pace(*numbers))

    assert estimate is None or LEAST_S <= estimate.seconds <= LONGEST_S


# ---- a start --------------------------------------------------------------------------------------------------------

USUAL: Mapping[str, Durations] = {BEGINNING: (1.0,), "loading": (30.0, 30.0), "warming up": (10.0, 10.0)}
LOADING, WARMING_UP = Progress("loading"), Progress("warming up")


def pulled(done: float, total: float | None = 100.0) -> Progress:
    return Progress("pulling", done, total, "bytes")


@pytest.mark.parametrize(
    ("start", "now", "expected"),
    [
        (course(), 0, Estimate(41, 1)),
        (course((1, LOADING)), 11, Estimate(30, 2)),
        (course((1, LOADING), (31, WARMING_UP)), 36, Estimate(5, 2)),
        (course((1, LOADING), (31, WARMING_UP), (33, LOADING)), 33, Estimate(30 * OVERRUN, 2)),  # back again
        (course((1, WARMING_UP)), 6, Estimate(35, 2)),  # in another order: loading is still to come
        (course((1, Progress("thinking"))), 2, None),  # nobody knows how long that takes
        (course((1, pulled(0)), (11, pulled(50))), 11, Estimate(10 + 40, 2)),
        (course((1, pulled(0))), 2, None),
        (course((1, pulled(20, None))), 2, None),
        (course((1, LOADING), (5, Progress("waiting: the container is paused"))), 900, Estimate(10, 2)),
    ],
)
def test_a_start_goes_on_for(start: Course, now: float, expected: Estimate | None) -> None:
    assert start.left(USUAL, now) == expected


@pytest.mark.parametrize(
    ("start", "now", "expected"),
    [
        (course(), 5, None),
        (course((1, LOADING)), 5, None),
        (course((1, pulled(0)), (11, pulled(50))), 11, Estimate(10, 0)),
        (course((1, pulled(0)), (11, pulled(50))), 31, Estimate(30, 0)),  # the longer nothing comes, the slower it is
    ],
)
def test_without_any_history_only_its_own_pace_tells(start: Course, now: float, expected: Estimate | None) -> None:
    assert start.left({}, now) == expected


@pytest.mark.parametrize("hostile", [*HOSTILE, 101.0])
def test_counts_that_cannot_be_are_not_counted(hostile: float) -> None:
    assert course((1, pulled(0)), (2, pulled(hostile))).left({}, 3) is None
    assert course((1, pulled(0, hostile if hostile != 101 else 0)), (2, pulled(5, hostile - 200))).left({}, 3) is None


def test_before_it_begins_a_start_takes_as_long_as_all_of_it_and_the_wait_is_not_measured() -> None:
    start = Course()
    start.hear(Progress("waiting for GPUs"), 5)

    waited = start.waits
    assert start.left(USUAL, 900) == whole(USUAL) == Estimate(41, 1)

    start.begin(1000)
    start.begin(2000)
    start.hear(LOADING, 1002)

    assert (waited, start.waits) == (True, False)
    assert learned({}, start, 1010) == {BEGINNING: (2.0,), "loading": (8.0,)}


# ---- what is learned ------------------------------------------------------------------------------------------------


def test_a_start_teaches_how_long_each_phase_took_all_together() -> None:
    start = course((1, LOADING), (6, WARMING_UP), (8, LOADING), began_at=0.5)

    assert learned({}, start, 9) == {BEGINNING: (0.5,), "loading": (6.0,), "warming up": (2.0,)}


def test_a_phase_that_did_not_come_this_time_took_no_time() -> None:
    assert learned({"loading": (5.0,), "tuning": (9.0,)}, course((0, LOADING)), 5) == {
        BEGINNING: (0.0,),
        "loading": (5.0, 5.0),
        "tuning": (9.0, 0.0),
    }


def test_what_was_fetched_is_no_part_of_the_next_start() -> None:
    files = Progress("downloading", 1, 5, "files")
    cold = course((1, Progress("downloading")), (2, files), (300, LOADING))
    warm = course((1, Progress("downloading")), (3, LOADING))

    after_cold = learned({}, cold, 310)
    after_both = learned(after_cold, warm, 13)

    assert after_cold == {BEGINNING: (1.0,), "loading": (10.0,)}
    assert after_both == {BEGINNING: (1.0, 1.0), "loading": (10.0, 10.0), "downloading": (2.0,)}
    assert learned(after_both, cold, 310)["downloading"] == (2.0,)


@pytest.mark.parametrize("start", [Course(), course((1, LOADING), (2, Progress("waiting: paused")), (99, LOADING))])
def test_a_start_that_stood_still_or_never_began_teaches_nothing(start: Course) -> None:
    assert learned(USUAL, start, 100) is USUAL


def test_phases_without_end_are_not_all_kept() -> None:
    start = course(*((float(number), Progress(f"phase {number}")) for number in range(100)), (100, Progress("x" * 65)))

    phases = learned({}, start, 101)

    assert len(phases) == MOST_PHASES
    assert BEGINNING in phases
    assert "x" * 65 not in learned({}, course((1, Progress("x" * 65))), 2)


HEARD = st.lists(
    st.tuples(
        st.floats(0, 1e4),
        st.builds(
            Progress,
            st.sampled_from(["loading", "pulling", "waiting: frozen", "ready", ""]),
            st.none() | st.floats(),
            st.none() | st.floats(),
        ),
    ),
    max_size=20,
)


@given(
    HEARD, st.dictionaries(st.sampled_from([BEGINNING, "loading", "pulling", "ready"]), DURATIONS), st.floats(0, 1e5)
)
def test_whatever_a_start_tells_its_estimate_can_be_told_and_its_lesson_kept(
    heard: list[tuple[float, Progress]], phases: dict[str, Durations], after_s: float
) -> None:
    heard.sort(key=lambda each: each[0])
    start, now = course(*heard), (heard[-1][0] if heard else 0) + after_s

    estimate, lesson = start.left(phases, now), learned(phases, start, now)

    assert estimate is None or LEAST_S <= estimate.seconds <= LONGEST_S
    for durations in lesson.values():
        assert 0 < len(durations) <= KEPT
        assert all(0 <= seconds <= LONGEST_S for seconds in durations)
