"""Who is let in, who waits how long, and who is told to come back: pure functions, no clock of their own.

All times are seconds; `now` and every `*_at` are readings of one monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.catalog import ModelSpec
from gateway.fleet.estimates import Estimate
from gateway.lifecycle import SERVING, State

FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0
STOP_MARGIN_S = 20.0
"""How long a runtime may take, beyond the grace, to say that a server is gone."""
SOONEST_S, LATEST_S = 1.0, 600.0
"""The least and the most that anybody is told to wait before he comes back, where that is estimated."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The waits of one model, from its catalog entry."""

    queue_timeout_s: float
    start_timeout_s: float
    drain_timeout_s: float
    stop_grace_s: float
    abandon_after_s: float

    @classmethod
    def of(cls, spec: ModelSpec) -> Bounds:
        return cls(
            queue_timeout_s=spec.queue_timeout_s,
            start_timeout_s=spec.start_timeout_s,
            drain_timeout_s=spec.drain_timeout_s,
            stop_grace_s=spec.stop_grace_s,
            abandon_after_s=spec.abandon_after_s,
        )

    @property
    def longest_wait_s(self) -> float:
        """The most that any caller waits: an old server goes, a new one comes, and a slot gets free."""
        leaving_s = self.drain_timeout_s + self.stop_grace_s + STOP_MARGIN_S
        return leaving_s + self.start_timeout_s + self.queue_timeout_s


def queue_room(state: State, max_queue: int, slots: int) -> int:
    """Return how many may wait: `max_queue`, and while no server runs yet also those whom its slots will take."""
    return max_queue if state in SERVING else max_queue + slots


def wait_ends_at(
    state: State,
    bounds: Bounds,
    *,
    asked_at: float,
    now: float,
    max_wait_s: float | None,
    for_gpus: bool = False,
    spent_s: float = 0.0,
) -> float:
    """Return when a caller who waits for a lease is to be refused.

    A model that runs bounds the wait by its queue's time-out, counted from the caller's arrival or from the moment it
    became ready; one that waits `for_gpus` likewise. `spent_s` of it was used up before, under an earlier server. One
    whose start is under way is bounded by that (it has deadlines of its own). What the caller is willing to wait
    bounds all but the wait for one that runs.
    """
    latest = asked_at + bounds.longest_wait_s
    if state in SERVING or for_gpus:
        latest = min(now + max(bounds.queue_timeout_s - spent_s, 0.0), latest)
    return latest if max_wait_s is None or state in SERVING else min(asked_at + max_wait_s, latest)


def pause_after_failure_s(failures: int, *, served: bool) -> float:
    """Return how long a model that failed `failures` times in a row is left alone.

    A server that had served and then died may come back at once, the first time; whatever fails again
    rests for twice as long as before, up to five minutes.
    """
    if served and failures == 1:
        return 0.0
    return min(FIRST_PAUSE_S * 2.0 ** min(failures - 1, 10), LONGEST_PAUSE_S)


def call_off_at(
    *, waiters: int, kept: bool, last_waiter_left_at: float, promised_until: float, bounds: Bounds
) -> float | None:
    """Return when a start that nobody wants any more is called off, or None while it has a reason.

    A reason is a waiter; `kept`: an operator's start, `preload` or `pinned`; or a promise: somebody was
    told to come back later, less than twice that long ago (promise P8).
    """
    if waiters or kept:
        return None
    return max(last_waiter_left_at, promised_until) + bounds.abandon_after_s


def is_hopeless(ready: Estimate, max_wait_s: float) -> bool:
    """Say whether a caller who waits for no longer than `max_wait_s` would wait in vain for a start.

    Only what was measured says so: each start that he leaves going on is measured too, and corrects it.
    """
    return ready.samples > 0 and ready.seconds > max_wait_s


def retry_after_s(estimate: Estimate | None, otherwise_s: float) -> float:
    """Return when somebody is told to come back: as estimated, within bounds; `otherwise_s` where nothing is known."""
    if estimate is None:
        return otherwise_s
    seconds = estimate.seconds if estimate.samples else max(estimate.seconds, otherwise_s)
    return min(max(seconds, SOONEST_S), LATEST_S)
