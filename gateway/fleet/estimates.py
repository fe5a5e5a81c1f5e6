"""How long a start still takes, from how long earlier ones took and how far this one is: pure, no clock of its own.

What is not known is None and never a guess. An estimate that has been overrun is never 0: the longer a phase has lasted
beyond its time, the longer it is taken to go on.

All times are seconds; `now` is a reading of one monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from statistics import median

from gateway.runtimes.base import Progress

KEPT = 7
"""Of how many of the last durations the median is taken: one that was out of the way does not move it far."""
LEAST_S, LONGEST_S = 0.1, 1e6
OVERRUN = 0.2
"""What has lasted longer than it usually does is taken to go on for another fifth of that."""
BEGINNING = "beginning"
"""What a start does before it tells of any phase."""
FETCHING = frozenset({"pulling", "extracting", "downloading", "converting", "verifying"})
"""Phases in which something is fetched or checked that will be there the next time."""
MOST_PHASES, LONGEST_NAME = 16, 64

Durations = tuple[float, ...]
"""How long something took, each of the last times, the newest last."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """So many seconds are left. `samples` is how often what it comes from was measured; 0: this start's own pace."""

    seconds: float
    samples: int


def told_s(estimate: Estimate | None) -> float | None:
    """Return an estimate as it is told: in tenths of a second."""
    return None if estimate is None else round(estimate.seconds, 1)


def lengthened(durations: Durations, seconds: float) -> Durations:
    """Return what is kept with one more measurement; one that is no duration changes nothing."""
    if not 0 <= seconds < math.inf:  # nor is it a number then
        return durations
    return (*durations, round(min(seconds, LONGEST_S), 3))[-KEPT:]


@lru_cache
def usual(durations: Durations) -> Estimate | None:
    """Return how long something takes that took so long before."""
    return Estimate(_sane(_middle(durations)), len(durations)) if durations else None


def in_turn(*estimates: Estimate | None) -> Estimate | None:
    """Return how long all of it takes, one after the other; None if part of it is not known."""
    known = [each for each in estimates if each is not None]
    if not known or len(known) < len(estimates):
        return None
    samples = min((each.samples for each in known if each.samples), default=0)
    return Estimate(_sane(sum(each.seconds for each in known)), samples)


def left_of(durations: Durations, spent_s: float) -> Estimate | None:
    """Return how long something goes on that has lasted for `spent_s`."""
    if not durations:
        return None
    return Estimate(_sane(max(_middle(durations) - spent_s, OVERRUN * spent_s)), len(durations))


@lru_cache
def _middle(durations: Durations) -> float:
    return median(durations)


def _sane(seconds: float) -> float:
    return min(max(seconds, LEAST_S), LONGEST_S)


@dataclass(frozen=True, slots=True)
class Pace:
    """What was counted in a phase: `gained` of `done` in the last `over_s` seconds, the last of it `quiet_s` ago."""

    done: float
    total: float
    gained: float
    over_s: float
    quiet_s: float

    @property
    def share(self) -> float:
        """How much of the whole is done, from 0 to 1."""
        return min(max(self.done / self.total, 0.0), 1.0) if self.total > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """How long the rest takes at this pace, if that can be told yet."""
        if not (self.gained > 0 and self.over_s > 0):
            return None
        left_s = max((self.total - self.done) / self.gained * self.over_s, OVERRUN * self.quiet_s)
        return left_s if math.isfinite(left_s) else None


def phase_left(spent_s: float, durations: Durations, pace: Pace | None) -> Estimate | None:
    """Return how long a phase goes on that has lasted for `spent_s`.

    Its pace counts for more the further it is; how long it took before, for less.
    """
    before = left_of(durations, spent_s)
    by_pace = pace.left_s if pace else None
    if pace is None or by_pace is None:
        return before
    if before is None:
        return Estimate(_sane(by_pace), 0)
    return Estimate(_sane(pace.share * by_pace + (1 - pace.share) * before.seconds), before.samples)


def whole(phases: Mapping[str, Durations]) -> Estimate | None:
    """Return how long a start takes from its beginning, when there is nothing to fetch."""
    return in_turn(*map(usual, phases.values()))


class Course:
    """How one start goes: what it spent in which phase so far. Whoever owns it tells it the time."""

    def __init__(self) -> None:
        self.phase = BEGINNING
        self.began = False
        self.waited = False
        """Whether it ever stood still for a reason of somebody else's: then its times tell nothing."""
        self.fetched: set[str] = set()
        """The phases in which it had something to fetch."""
        self._since = 0.0
        self._spent_s: dict[str, float] = {}
        self._first: tuple[float, float] | None = None
        """What was counted first in this phase, and when."""
        self._last: tuple[float, float, float] | None = None
        """What was counted last, of how much, and when."""

    @property
    def waits(self) -> bool:
        """Whether it waits now, for GPUs or until somebody thaws it: nobody knows how long."""
        return not self.began or self.phase.startswith("waiting")

    def begin(self, now: float) -> None:
        """Begin to measure, unless that was begun."""
        if not self.began:
            self.began = True
            self.phase, self._since = BEGINNING, now

    def hear(self, progress: Progress, now: float) -> None:
        """Note how far it is."""
        if progress.phase != self.phase:
            self._enter(progress.phase, now)
        done, of_all = progress.done, progress.total
        if done is not None and of_all is not None and 0 <= done <= of_all < math.inf and of_all > 0:
            self._count(done, of_all, now)

    def _enter(self, phase: str, now: float) -> None:
        self._spent_s = self.spent(now)
        self.phase, self._since = phase, now
        self._first = self._last = None
        self.waited = self.waited or (self.began and self.waits)

    def _count(self, done: float, of_all: float, now: float) -> None:
        self._first = self._first or (done, now)
        self._last = (done, of_all, now)
        if self.phase in FETCHING:
            self.fetched.add(self.phase)

    def spent(self, now: float) -> dict[str, float]:
        """Return how long it has been in each phase."""
        here_s = self._spent_s.get(self.phase, 0.0) + max(now - self._since, 0.0)
        return {**self._spent_s, self.phase: here_s} if self.began else {}

    def pace(self, now: float) -> Pace | None:
        """Return how fast the phase goes in which it is, if that can be counted."""
        if not self._first or not self._last:
            return None
        (first, first_at), (done, of_all, last_at) = self._first, self._last
        return Pace(done, of_all, done - first, max(now - first_at, 0.0), max(now - last_at, 0.0))

    def left(self, phases: Mapping[str, Durations], now: float) -> Estimate | None:
        """Return how long it goes on, `phases` being how long each took before. A wait is not counted in.

        Where nothing is known of what is to come: how long the present phase goes on, if its pace tells that.
        """
        spent_s = self.spent(now)
        to_come = [usual(durations) for phase, durations in phases.items() if phase not in spent_s]
        if self.waits:
            return in_turn(*to_come)
        before = () if self.phase in self.fetched else phases.get(self.phase, ())
        return in_turn(phase_left(spent_s[self.phase], before, self.pace(now)), *to_come)


def learned(phases: Mapping[str, Durations], course: Course, now: float) -> Mapping[str, Durations]:
    """Return what is known of the phases of a start once this one, which is over, has been seen.

    One that waited tells nothing; and what was fetched will be there the next time.
    """
    if course.waited or not course.began:
        return phases
    spent_s = course.spent(now)
    names = [phase for phase in {**phases, **spent_s} if len(phase) <= LONGEST_NAME]
    seen = [phase for phase in names if phase not in course.fetched]
    newer = {phase: lengthened(phases.get(phase, ()), spent_s.get(phase, 0.0)) for phase in seen}
    return dict(islice({**phases, **newer}.items(), MOST_PHASES))
