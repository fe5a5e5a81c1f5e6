"""Several servers of one model, behind what callers know of one `Instance`. Each goes its own way through its life.

Who asks is sent to the least loaded one. Whoever queues for one of them is served by the first that has a slot free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from gateway.catalog import ModelSpec
from gateway.engines.base import Engine
from gateway.errors import (
    ModelNotRunning,
    ModelUnhealthy,
    NoCapacity,
    RuntimeUnavailable,
    StartFailed,
    StartTimeout,
    UnknownModel,
)
from gateway.fleet.figures import Figures
from gateway.fleet.instance import CLOCK_S, Entry, Instance
from gateway.fleet.life import Lease, Leasing
from gateway.fleet.queue import Among, SentAway
from gateway.fleet.status import Status
from gateway.lifecycle import DOWN, STARTING_UP, State
from gateway.runtimes.base import Handle

_BEST_FIRST = (
    State.READY,
    State.UNHEALTHY,
    State.DRAINING,
    State.LOADING,
    State.STARTING,
    State.STOPPING,
    State.FAILED,
    State.STOPPED,
)
"""Of several replicas' states, the first of these is the model's: what it can do for a caller."""
_NEAREST_FIRST = (
    State.READY,
    State.LOADING,
    State.STARTING,
    State.STOPPED,
    State.FAILED,
    State.STOPPING,
    State.DRAINING,
    State.UNHEALTHY,
)
"""How near a replica is to serving a newcomer: one that is down is started by him, one that leaves must go first."""
_FAILURES = (StartFailed, StartTimeout, RuntimeUnavailable, ModelUnhealthy, NoCapacity)
"""What says of one replica alone that it cannot serve: another one may."""


def least_loaded(replicas: Sequence[Status]) -> int:
    """Return which of a model's replicas a newcomer is sent to.

    Of those that are ready, it is the one with the fewest requests; else the one that is the nearest to be. One that
    rests after a failure, or takes no new requests because it makes room, comes last. Ties go to the lowest number.
    """

    def rank(n: int) -> tuple[bool, int, int, int]:
        one = replicas[n]
        nearness = _NEAREST_FIRST.index(one.state)
        return not _is_open(one), nearness, one.in_flight + one.queued, n

    return min(range(len(replicas)), key=rank)


def _is_open(one: Status) -> bool:
    """Say whether a replica lets newcomers in: at once, or when it is up."""
    rests = one.retry_after_s is not None
    return not rests and one.state is not State.UNHEALTHY and one.held_for is None


def to_wake(replicas: Sequence[Status]) -> list[int]:
    """Return which replicas a newcomer has started, were they down and free to start.

    Where none is ready, that is all of them; where those that are ready are full, one more, if none is coming already.
    """
    down = [n for n, one in enumerate(replicas) if one.state in DOWN and one.retry_after_s is None]
    ready = [one for one in replicas if one.state is State.READY]
    if not ready:
        return down
    full = not any(_free_slots(one) for one in ready)
    coming = any(one.state in STARTING_UP for one in replicas)
    return down[:1] if full and not coming else []


def as_one(replicas: Sequence[Status], wanted: int | None = None) -> Status:
    """Return what is told of a model as a whole: state, name and handle of its best replica, and the sums of all.

    Those beyond the number that is `wanted` are on their way out: one is the best only where all others are down.
    """
    coming = [one for one in replicas[:wanted] if one.state not in DOWN]
    best = min(coming or replicas, key=lambda one: (_BEST_FIRST.index(one.state), one.held_for is not None))
    failed = [one for one in replicas if one.failure]
    last = max(failed, key=lambda one: one.failure.at if one.failure else 0.0, default=best)
    idle = [one.idle_s for one in replicas if one.idle_s is not None]
    stops = [one.last_stop for one in replicas if one.last_stop]
    in_flight = sum(one.in_flight for one in replicas)
    return replace(
        best,
        in_flight=in_flight,
        queued=sum(one.queued for one in replicas),
        idle_s=min(idle, default=None) if not in_flight else None,
        failure=last.failure,
        retry_after_s=last.retry_after_s,
        gpus=tuple(dict.fromkeys(gpu for one in replicas for gpu in one.gpus)),
        waits_for=next((one.waits_for for one in replicas if one.waits_for), None),
        last_stop=max(stops, key=lambda stop: stop.at, default=None),
        replicas=tuple(replicas),
    )


class Replicas:
    """The servers of one model, in the order of their numbers. Those beyond `count` are on their way out."""

    def __init__(self, make: Callable[[int], Instance], count: int) -> None:
        """Take what makes the replica of a number, and how many the catalog wants."""
        self._make = make
        self._members: list[Instance] = []
        self._count = 0
        self._loop = asyncio.get_running_loop()
        self._resize(count)

    @property
    def members(self) -> Sequence[Instance]:
        """All that there are, the ones on their way out included."""
        return tuple(self._members)

    @property
    def served(self) -> Served:
        """What callers ask: the replicas, or the one server itself where there are no more."""
        if len(self._members) == 1 or (self._count == 1 and not any(one.has_its_name for one in self._members[1:])):
            return self._members[0]
        return self

    # What is known of the model

    @property
    def spec(self) -> ModelSpec:
        return self._members[0].spec

    @property
    def name(self) -> str:
        return self._members[0].name

    @property
    def engine(self) -> Engine:
        return self._members[0].engine

    @property
    def figures(self) -> Figures:
        return self._members[0].figures

    @property
    def status(self) -> Status:
        """A snapshot of all of them as one, for reports only."""
        if len(self._members) == 1:
            return self._members[0].status
        told = [one.status for n, one in enumerate(self._members) if n < self._count or one.runs]
        return as_one(told, self._count) if len(told) > 1 else told[0]

    # What callers ask for

    @property
    def grants_at_once(self) -> bool:
        """Whether who asks for a lease now does not wait for it."""
        return any(one.grants_at_once for one in self._wanted())

    def lease(self, *, max_wait_s: float | None = None, admitted: bool = False) -> Leasing:
        """Hold the right to send one request to the least loaded replica, as `Instance.lease` does.

        Where none is ready all are started, and where those that are ready are full one more. Should the one that he
        waits for fail, or get no GPUs, a caller goes to another one, once, unless he has waited for `queue_timeout`.
        The queues of all of them together hold `max_queue`.

        Raises: as `Instance.lease`, but for SentAway.
        """
        return Leasing(partial(self.obtain, max_wait_s, admitted=admitted))

    def lease_at_once(self) -> Lease | None:
        """Return a lease as `lease` has it, which is to be given back; None where whoever asks has to wait for it."""
        free = [one for one in self._wanted() if one.grants_at_once]
        return min(free, key=lambda one: one.in_flight).lease_at_once() if free else None

    async def obtain(self, max_wait_s: float | None, *, admitted: bool) -> Lease:
        """Return a lease as `lease` has it, which is to be given back. Nothing is awaited once it is granted."""
        among, had_failed = Among(self._loop.time()), False
        while True:
            one = self._choose()
            among.queued_elsewhere = sum(other.queued for other in self._wanted()) - one.queued
            try:
                return await one.obtain(max_wait_s, admitted=admitted, among=among)
            except SentAway:
                admitted = True
            except _FAILURES:
                if had_failed or self._has_waited_enough(among) or not self._has_another(one):
                    raise
                had_failed = admitted = True

    def _choose(self) -> Instance:
        """Return the replica that a newcomer goes to; wake those that he, and the next ones, will need."""
        free = [one for one in self._wanted() if one.grants_at_once]
        if free:  # the same as below, without snapshots, and nobody is to be woken: as it is for nearly everybody
            return min(free, key=lambda one: one.in_flight)
        statuses = [one.status for one in self._wanted()]
        chosen = least_loaded(statuses)
        for n in to_wake(statuses):
            if n != chosen:
                self._members[n].wake()
        return self._members[chosen]

    def _has_waited_enough(self, among: Among) -> bool:
        return among.spent_s >= self.spec.queue_timeout_s - CLOCK_S

    def _has_another(self, failed: Instance) -> bool:
        others = [one.status for one in self._wanted() if one is not failed]
        return any(_is_open(one) and one.state in (State.READY, *STARTING_UP) for one in others)

    async def start(self, *, wait: bool = True) -> Handle | None:
        """Start those that are down; return the first one's handle once all are ready, or with `wait=False` None.

        Raises: as `Instance.start`, for the first that cannot be started, when the others are or cannot be either.
        """
        first, *others = self._wanted()
        orders = [first.start(wait=wait), *(_while_wanted(partial(one.start, wait=wait)) for one in others)]
        return (await _all(orders))[0]

    async def stop(self, *, force: bool = False) -> None:
        """Drain and stop all, clear what is perhaps left of those that failed, and return when they are gone.

        Raises:
            ModelNotRunning: all are down, and nothing is left.
            StopFailed: it is not known whether one of them is gone.
        """
        there = self._refuse_if_none([one for one in self._members if one.has_its_name])
        await _all(_stop_if_it_runs(one, force=force) for one in there)

    async def restart(self, *, force: bool = False) -> Handle | None:
        """Stop those that run, start all, and return the first one's handle once all are ready.

        Raises: as `start`, and ModelNotRunning.
        """
        running = self._refuse_if_none([one for one in self._members if one.runs])

        async def anew(one: Instance) -> Handle | None:
            return await (one.restart(force=force) if one in running else one.start())

        first, *others = self._wanted()
        return (await _all([anew(first), *(_while_wanted(partial(anew, one)) for one in others)]))[0]

    def _refuse_if_none(self, members: list[Instance]) -> list[Instance]:
        if not members:
            raise ModelNotRunning(f"{self.spec.id} is not running; there is nothing to stop.")
        return members

    # What the fleet asks for

    def change(self, entry: Callable[[], Entry], count: int) -> None:
        """Go on by a changed entry of the catalog, with `count` replicas: the last ones are added or drained."""
        for one in self._members[:count]:
            one.change(entry())
        self._resize(count)
        if any(one.queued for one in self._wanted()):
            self._choose()  # who queues already may need one more as a newcomer would

    def remove(self) -> None:
        """Refuse everybody, drain and stop."""
        for one in self._members:
            one.remove()

    def _resize(self, count: int) -> None:
        self._count = count
        self._members += [self._make(n) for n in range(len(self._members), count)]
        for one in self._members[count:]:
            one.send_away()
            one.remove()
        for one in self._members if len(self._members) > 1 else ():
            one.next_in_line = self._next_in_line

    def _next_in_line(self) -> Instance:
        """Return the replica for which the one queues who came first, whatever becomes of it."""
        return min(self._members, key=lambda one: one.queued_since)

    def _wanted(self) -> Sequence[Instance]:
        """Return those that the catalog wants."""
        return self._members[: self._count]


Result = TypeVar("Result")
Served = Instance | Replicas
"""A model as those see it who send it requests."""


def _free_slots(one: Status) -> int:
    serves = one.state is State.READY and one.held_for is None and not one.queued
    return max(one.spec.max_concurrency - one.in_flight, 0) if serves else 0


async def _all(orders: Iterable[Awaitable[Result]]) -> list[Result]:
    """Carry out orders side by side, all of them whatever comes of one; return what they return.

    Raises:
        GatewayError: the first error, when all are over.
    """
    results = await asyncio.gather(*orders, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


async def _while_wanted(order: Callable[[], Awaitable[Handle | None]]) -> Handle | None:
    """Carry out the order of a replica that is not the first: whether the model itself is gone, the first one says.

    Without it, the model has fewer replicas by now. It begins in here: its caller may leave before this does.
    """
    try:
        return await order()
    except UnknownModel:
        return None


async def _stop_if_it_runs(one: Instance, *, force: bool) -> None:
    """Stop one that may have ended by itself in the meantime."""
    try:
        await one.stop(force=force)
    except ModelNotRunning:
        return
