"""The witness of those who wait for GPUs (P3): nobody starves, and no server is switched for nothing.

What a claim may wait for follows from the policy:

- its own patience, which is half of its queue's time-out and never more than `PATIENCE_S`;
- older claims, until they have their GPUs;
- the turns of those who came first: of servers that had their place before the claim lost its patience, or took it as
  the older claim. A turn is the start, then `TURN_S` of serving (the minimum residency is no longer, for it ends with
  the claim's patience at the latest), and the way out. Each of these parts has a bound of its own (P5).

All that is excused, and there is an end to it: those who have a turn are ever fewer. What remains are servers whose
turn is over, and they are held, each time for twice as long as the time before with `HOLD_S` between, until they have
finished what they are doing: that takes no longer than the longest generation. Then they go. So nobody waits for longer
than that without an excuse, whoever else comes in the meantime.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from gateway.fleet.admission import STOP_MARGIN_S
from gateway.fleet.fleet import Fleet
from gateway.fleet.gpus import PATIENCE_S, demand_of
from gateway.fleet.placement import Place, place
from gateway.fleet.scheduling import HOLD_S, TURN_S
from gateway.lifecycle import SERVING, STARTING_UP, State
from tests.simulator.watched import Watched

MOST_IN_VAIN = 4
"""So often a model may make room while nobody at all is served: when its callers have left before it was ready."""


def bound_s(models: Iterable[Watched]) -> float:
    """Return how long anybody waits without an excuse."""
    specs = [each.spec for each in models]
    going_s = max(spec.stop_grace_s for spec in specs) + STOP_MARGIN_S
    return _held_s(max(spec.generation_timeout_s for spec in specs)) + going_s


def _held_s(work_s: float) -> float:
    """Return how long it takes until a server has gone that is held, if its work takes so long at most."""
    stretch_s, held_s = HOLD_S, 0.0
    while stretch_s < work_s:
        held_s += stretch_s + HOLD_S
        stretch_s *= 2
    return held_s + work_s


def starving(models: Collection[Watched], fleet: Fleet, now: float) -> list[Watched]:
    """Return the models that wait for GPUs now, and whose turn it is."""
    claims = [each for each in models if each.claims]
    return [each for each in claims if not _has_to_wait(each, models, fleet, now)]


def _has_to_wait(claim: Watched, models: Collection[Watched], fleet: Fleet, now: float) -> bool:
    if now < _patient_until(claim):
        return True
    return any(_goes_first(each, claim, fleet, now) for each in models if each is not claim)


def _goes_first(other: Watched, claim: Watched, fleet: Fleet, now: float) -> bool:
    if other.claims:
        return other.asked_at <= claim.asked_at
    if not fleet.gpus.of(other.spec.id):
        return False
    came_first = other.placed_at <= _patient_until(claim) or other.claimed_at <= claim.asked_at
    return came_first and (other.state not in SERVING or now < other.serving_since + TURN_S)


def _patient_until(claim: Watched) -> float:
    return claim.asked_at + min(PATIENCE_S, claim.spec.queue_timeout_s / 2)


def wrong_time(watched: Watched) -> str | None:
    """Return what is wrong with the time at which a model makes room, or None."""
    if watched.holding:
        return f"{watched.spec.id} makes room, and serves {len(watched.holding)}"
    left = [waiter for waiter in watched.owed if waiter in watched.waiting]
    if left and not watched.served:
        return f"{watched.spec.id} was started, and makes room before it has served any of the {len(left)} who wait"
    return None


def takes_from(claim: Watched, taker: Watched, models: Iterable[Watched], fleet: Fleet) -> bool:
    """Say whether a claim could have its GPUs at once if another had not just got its own."""
    others = [each for each in models if each is not taker]
    before = [*_held(others, fleet), *_unsettled(others, fleet)]
    had_room = _fits(claim, before, fleet)
    return had_room and not _fits(claim, [*before, fleet.gpus.place_of(taker.spec.id)], fleet)


def is_needless(claim: Watched, goes: Watched, models: Collection[Watched], fleet: Fleet) -> bool:
    """Say whether a model goes for the oldest claim although those who are leaving already suffice."""
    if any(each.claims and each.asked_at <= claim.asked_at for each in models if each is not claim):
        return False  # they leave for an older one
    stay = [each for each in models if each is goes or each.state is not State.STOPPING]
    starting = [each for each in stay if each.state in STARTING_UP]
    return _fits(claim, [*_held(stay, fleet), *_unsettled(starting, fleet)], fleet)


def _fits(claim: Watched, taken: Collection[Place], fleet: Fleet) -> bool:
    return place(demand_of(claim.spec), fleet.gpus.devices or (), taken) is not None


def _held(models: Iterable[Watched], fleet: Fleet) -> list[Place]:
    return [fleet.gpus.place_of(each.spec.id) for each in models]


def _unsettled(models: Iterable[Watched], fleet: Fleet) -> list[Place]:
    """Return the GPUs that nobody can start on now, because somebody comes there or goes."""
    moving = [each for each in models if each.state not in SERVING]
    return [Place((gpu,)) for each in moving for gpu in fleet.gpus.of(each.spec.id)]
