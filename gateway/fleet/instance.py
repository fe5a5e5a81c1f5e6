"""One model's life (or that of one of its replicas): the only writer of its state.

Callers say what they want (`lease`, `start`, `stop`) and never look at the state first: each decision is
taken in here, between two awaits, where nothing can change. Two tasks make a life: `_serve` starts, loads
and watches the server, and ends only by raising or being cancelled; `_live` waits for it and clears up
after it, and nobody ever cancels `_live`. So whatever ends a life, what it made is removed, once.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from gateway.catalog import ModelSpec
from gateway.engines.base import Engine
from gateway.errors import GatewayError, ModelNotRunning, NoCapacity, RuntimeUnavailable, StopFailed
from gateway.fleet import refusals
from gateway.fleet.admission import (
    STOP_MARGIN_S,
    Bounds,
    call_off_at,
    is_hopeless,
    pause_after_failure_s,
    queue_room,
    wait_ends_at,
)
from gateway.fleet.estimates import Estimate, in_turn
from gateway.fleet.experience import Experience, Past
from gateway.fleet.figures import Figures, Silent
from gateway.fleet.gpus import Gpus, Occupancy, demand_of, place_of
from gateway.fleet.health import Health
from gateway.fleet.identity import launch_of, same_server, server_key, server_name
from gateway.fleet.journal import Journal
from gateway.fleet.life import Lease, Leasing, Life, Paused
from gateway.fleet.placement import Place
from gateway.fleet.queue import Among, Grant, Queue, Ticket
from gateway.fleet.scheduling import Phase, Usage
from gateway.fleet.status import Failure, Status, Stop, describe
from gateway.lifecycle import DOWN, MADE, SERVING, STARTING_UP, Event, State, after
from gateway.runtimes.base import Found, Handle, Progress, Runtime
from gateway.waiting import Standing, standing

log = logging.getLogger(__name__)

WANTED = frozenset({*STARTING_UP, *SERVING, State.FAILED})
"""Nobody stops a model that is in one of these: what the catalog wants to run shall, whatever changes."""
GOING_ON = frozenset({*STARTING_UP, State.READY, State.UNHEALTHY})
"""What leaves these begins to go down."""
CHANGED, REMOVED = "changed in the catalog", "removed from the catalog"
"""Why a server goes when the catalog has changed."""
ASK_AGAIN_S = 2.0
"""When a runtime that did not answer is asked again to adopt a server."""
CLEAR_AGAIN_S = 15.0
"""When a server that is perhaps left of a failed life is looked for again."""
CLOCK_S = 0.001
"""A timer may fire this much before its time."""
SERVED_LONG_S = 60.0
"""A server that was ready for this long forgives the failures before it."""
IDLE = "idle"
BESIDE_S = 5.0
"""When an idle server is looked at again that must not go while another starts on its GPU."""
_PHASES = {
    **dict.fromkeys(STARTING_UP, Phase.STARTING),
    **dict.fromkeys(SERVING, Phase.UP),
    **dict.fromkeys(DOWN, Phase.STUCK),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """What one entry of the catalog comes to: the model, and the parts that run it."""

    spec: ModelSpec
    engine: Engine
    runtime: Runtime
    health: Health
    past: Past
    outlives: bool = False
    """Whether its server goes on when the gateway ends."""


class Instance:
    """A model, or one of its replicas, that may be up or down, and knows how to get from one to the other."""

    def __init__(
        self,
        spec: ModelSpec,
        engine: Engine,
        runtime: Runtime,
        health: Health,
        journal: Journal,
        gpus: Gpus,
        *,
        outlives: bool = False,
        past: Past | None = None,
        replica: int = 0,
    ) -> None:
        """Take what it needs. With `outlives` its server goes on when the gateway ends."""
        self.spec = spec
        self.replica = replica
        self.key = server_key(spec, replica)
        self.name = server_name(spec, replica)
        self.next_in_line: Callable[[], Instance] = lambda: self
        """Says for which replica of the model the one queues whose turn it is when a slot is free here."""
        self.figures: Figures = Silent()
        self.engine = engine
        self._runtime = runtime
        self._health = health
        self._journal = journal
        self._gpus = gpus
        self._outlives = outlives
        self._past = past or Experience().of(spec, engine)
        self._bounds = Bounds.of(spec)
        self._loop = asyncio.get_running_loop()
        self._state = State.STOPPED
        self._since = self._loop.time()
        self._life: Life | None = None
        self._queue = Queue()
        self._standings: dict[Ticket, Standing] = {}  # of those who wait for a lease
        self._failure: Failure | None = None
        self._last_stop: Stop | None = None
        self._left: GatewayError | None = None  # why it is not known whether the last server is gone, if it is not
        self._failures = 0  # lives in a row that failed before they had served for long
        self._cool_until = 0.0
        self._wanted = False  # an operator wants it up, and it is not up yet
        self._ailment = ""  # why it is UNHEALTHY, when it is
        self._stops = 0  # how many stops were ordered so far
        self._closing = False
        self._usage = Usage()
        self._held_for: str | None = None  # the model that waits for this one's GPUs, and has waited long enough
        self._removed = False  # the catalog has it no more
        self._next: Entry | None = None  # what the catalog says of it by now, once the present server has gone
        self._promised_until = 0.0
        self._last_use = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Instance {self.name} {self._state} in_flight={self._in_flight} queued={len(self._queue)}>"

    # What callers ask for

    @property
    def status(self) -> Status:
        """A snapshot, for reports only."""
        now = self._loop.time()
        life = self._life
        report = life.report if life and self._state in STARTING_UP else None
        idle = self._state is State.READY and not self._in_flight
        return Status(
            spec=self.spec,
            name=self.name,
            state=self._state,
            state_s=now - self._since,
            in_flight=self._in_flight,
            queued=self._queue.requests,
            idle_s=now - self._last_use if idle else None,
            handle=life.handle if life else None,
            progress=report.progress if report else None,
            progress_s=now - report.since if report else None,
            failure=self._failure,
            retry_after_s=self._cooling_s() or None,
            gpus=self._gpus.of(self.key),
            waits_for=self._gpus.why(self.key) or None,
            held_for=self._held_for,
            last_stop=self._last_stop,
            estimate=partial(self._past.eta_s, self._state, life, now),
        )

    @property
    def runs(self) -> bool:
        """Whether it has a server, or is about to have one, or is not rid of it yet."""
        return self._life is not None

    @property
    def has_its_name(self) -> bool:
        """Whether a server of its name is there, or is about to be, or is perhaps left of a life that ended."""
        return self.runs or self._left is not None

    @property
    def in_flight(self) -> int:
        """How many leases are held."""
        return self._in_flight

    @property
    def queued(self) -> int:
        """How many wait for a lease."""
        return self._queue.requests

    @property
    def queued_since(self) -> float:
        """When the one came who has waited the longest for a lease; without end where nobody waits."""
        oldest = self._queue.oldest
        return oldest.asked_at if oldest else math.inf

    @property
    def grants_at_once(self) -> bool:
        """Whether who asks for a lease now does not wait for it."""
        return self._has_slot() and not self._queue

    def lease_at_once(self) -> Lease | None:
        """Return a lease as `lease` has it, which is to be given back; None where whoever asks has to wait for it."""
        if not self.grants_at_once:
            return None
        lease = self._new_lease()
        self._usage = self._usage.asked(lease.granted_at)
        return lease

    def lease(self, *, max_wait_s: float | None = None, admitted: bool = False) -> Leasing:
        """Hold the right to send one request, starting the model first if it is down.

        Waits for the start, then for a free slot, in the order of arrival. `max_wait_s` bounds the wait for
        a model that is not running yet; the start goes on without the caller who gave up. `admitted`: it is for
        a further part of a request that was let in, so a full queue does not turn it away.

        Raises:
            StartFailed, StartTimeout: the model could not be started, or failed recently and cools down.
            ModelNotLoaded: `max_wait_s` has passed, or an operator called the start off.
            ModelUnhealthy, NoCapacity, QueueFull, ShuttingDown: come back later.
        """
        return Leasing(partial(self.obtain, max_wait_s, admitted=admitted))

    async def obtain(self, max_wait_s: float | None, *, admitted: bool, among: Among | None = None) -> Lease:
        """Return a lease as `lease` has it, which is to be given back. Nothing is awaited once it is granted.

        `among`: there are other replicas, and the caller may be sent away to them.

        Raises: as `lease`, and
            SentAway: only `among` others: this one takes no part any more.
        """
        if lease := self.lease_at_once():
            return lease
        self._usage = self._usage.asked(self._loop.time())
        self._refuse_newcomer(among, admitted=admitted)
        granted = await self._wait(lease=True, max_wait_s=max_wait_s, among=among)
        assert isinstance(granted, Lease)  # a ticket for a lease is never granted anything else
        if granted.error:  # cut in the very tick in which it was granted
            granted.give_back(granted)
            raise granted.error
        return granted

    async def start(self, *, wait: bool = True) -> Handle | None:
        """Start the model if it is down, cooling down or not; return its handle once it is ready.

        With `wait=False` return None at once; the start goes on. A caller who leaves does not end it either.

        Raises: as `lease`, but for the queue's errors.
        """
        self._refuse_when_closing()
        self._refuse_when_unhealthy()
        if self._state is State.READY and self._life:
            return self._life.handle
        self._wanted = True
        if self._life:
            self._life.kept = True
        if self._state in DOWN:
            self._start("operator")
        self._rearm()
        if not wait:
            return None
        handle = await self._wait(lease=False)
        assert isinstance(handle, Handle)  # a ticket without a lease is granted the handle
        return handle

    def wake(self) -> None:
        """Begin to start it, if it is down and does not rest after a failure, though nobody waits for it yet.

        Nothing happens where pinned models hold all the GPUs that would do.

        It goes on once it has its GPUs, though whoever waited was served by others, and is not started again should it
        fail. While it waits for GPUs it is called off as any start is, when nobody queues anywhere in the model.
        """
        closed = self._closing or self._removed or self._is_held_up
        if self._state not in DOWN or closed or self._cooling_s():
            return
        with suppress(NoCapacity):
            self._gpus.refuse_in_vain(self)
            self._start("request")
            self._last_use = self._loop.time()
            self._goes_on_for_all()

    async def stop(self, *, force: bool = False) -> None:
        """Drain the model, stop it, and return when it is gone; a start is called off, `force` cuts what runs.

        Those who queue are refused; who asks later starts it afresh.

        Raises:
            ModelNotRunning: it is down.
            StopFailed: it is not known whether its server is gone.
        """
        if self._left and not self._life:
            self._clear_again()
        life = self._running_life()
        self._wanted = False
        self._stops += 1
        self._refuse_queue(lambda: refusals.called_off(self.spec))
        await self._take_down(life, "operator", force=force)

    async def restart(self, *, force: bool = False) -> Handle | None:
        """Stop the model as `stop` does, start it again, and return its handle once it is ready. The queue waits.

        What a stop may have left behind is cleared by the start.

        Raises: as `start`, and ModelNotRunning.
        """
        life, stops = self._running_life(), self._stops
        self._refuse_when_closing()
        self._wanted = True
        with suppress(StopFailed):
            await self._take_down(life, "restart", force=force)
        if self._stops != stops:  # an operator's stop came later, and has the last word
            raise self._promised(refusals.called_off(self.spec))
        return await self.start()

    def adopt(self, found: Found) -> None:
        """Take over the running server of an earlier life of the gateway: it is ready when a health check passes.

        What it has left of `start_timeout` it has for that, but no less than a server that fell silent would have.
        Only for a model that was never started.
        """
        self._gpus.hold(self.key, place_of(found), self)
        life = self._begin(adopted=True)
        self._move(Event.ADOPT, "found running")
        self._run(life, found)

    def discard(self, found: Found) -> asyncio.Task[None]:
        """Remove the server of an earlier life of the gateway; requests wait until it is gone, and start it afresh.

        The task that is returned ends when that is over, however it ended; it is not to be cancelled.
        """
        self._gpus.hold(self.key, place_of(found), self)
        life = self._begin(adopted=True)
        self._move(Event.ADOPT, "found")
        self._run(life, found)
        self._end(life, "the catalog asks for another server" if found.runs else "it had ended")
        return life.task

    def change(self, entry: Entry) -> None:
        """Go on by a changed entry of the catalog, and as a model that has never failed.

        What concerns the gateway alone holds at once, but for the bounds of a start that is under way. Where the entry
        asks for another server, the present one drains and stops: nobody new gets to it, those who wait do so for the
        next one, and so does a start that has a reason.
        """
        self._removed, self._next = False, entry
        self._failures, self._cool_until = 0, 0.0
        life = self._life
        if not life or same_server(self.engine, self.spec, entry.spec):
            self._follow()
        if self._next and (self._state in WANTED or (life and life.failed)):
            self._wanted = self._wanted or entry.spec.preload or entry.spec.pinned
            self._lead_down(CHANGED)

    def send_away(self) -> None:
        """Let those who wait for a lease queue for another replica, each with his place there by when he came.

        Not for the first replica: who came when there was no other cannot be sent away.
        """
        self._queue.send_away()
        self._last_use = self._loop.time()
        self._rearm()

    def remove(self) -> None:
        """Refuse everybody, drain and stop: the catalog has this server no more. `change` brings it back."""
        self._removed, self._next = True, None
        self._wanted = False
        self._refuse_queue(lambda: refusals.removed(self.spec))
        self._lead_down(REMOVED)

    # What the GPUs ask for

    def occupancy(self) -> Occupancy:
        """Return how it uses its GPUs, or wants them."""
        oldest, ready_at = self._queue.oldest, self._life.ready_at if self._life else None
        return Occupancy(
            phase=_PHASES.get(self._state, Phase.LEAVING),
            in_flight=0 if self._state is State.STOPPING else self._in_flight,  # they are cut
            queued=self._queue.requests,
            since=self._since if ready_at is None else ready_at,
            last_use_at=self._last_use,
            asked_at=min(oldest.asked_at, self._since) if oldest else self._since,
            cost_s=self._past.cost_s,
            usage=self._usage,
            owes=bool(oldest and ready_at is not None and oldest.asked_at <= ready_at),
            wanted=bool(self._life and self._life.kept),
        )

    def leaves_in(self) -> Estimate | None:
        """Return in how long it has gone, were it held for others now."""
        if self.spec.pinned:
            return None
        now, requests = self._loop.time(), self._in_flight + self._queue.requests
        return self._past.gone_in(self._state, requests, now - self._since, self._life, now)

    def starts_in(self) -> Estimate | None:
        """Return how long a start takes, from its beginning."""
        return self._past.ready_in(State.STOPPED, None, self._loop.time())

    def waits(self) -> None:
        """Tell those who watch the start that it waits for GPUs."""
        if self._life:
            self._life.progress(Progress("waiting for GPUs"))

    def make_room(self, claimant: str) -> None:
        """Go at once, for another model that waits for its GPUs: nothing is in flight.

        Who queues is served later. It was his model's turn until now, so he waits for the next one from now on: else
        one who came before the claimant did would take the GPUs from it again.
        """
        assert not self._in_flight  # whoever decided so looked a moment ago, and nothing was awaited since
        if self._life and self._state in SERVING:
            self._end(self._life, f"makes room for {claimant}")

    def hold(self, claimant: str | None) -> None:
        """Grant no more leases, so that `claimant` gets the GPUs when those that are out have ended; None: do again."""
        self._held_for = claimant
        if claimant:
            self._let_rest()
        self._grant()

    def close(self, *, force: bool = False) -> None:
        """Refuse all further requests and those that queue, and drain or (`force`) cut; `aclose` waits for the end.

        A server that outlives the gateway goes on afterwards, but for one that is on its way down already.
        """
        self._closing = True
        self._wanted = False
        self._refuse_queue(refusals.shutting_down)
        if self._life:
            self._life.stays = self._life.stays or (self._outlives and self._state in MADE)
            self._lead_down("shutdown", force=force)

    async def aclose(self) -> None:
        """Return when nothing runs any more: within the drain limit, the grace and the runtime's margin."""
        self.close()
        while self._life:
            await asyncio.wait([self._life.task])

    # The queue

    @property
    def _in_flight(self) -> int:
        return len(self._life.leases) if self._life else 0

    async def _wait(self, *, lease: bool, max_wait_s: float | None = None, among: Among | None = None) -> Grant:
        among = among or Among(self._loop.time())
        try:
            async with asyncio.timeout(None) as bound:
                granted = self._loop.create_future()
                ticket = Ticket(granted, bound, among.came_at, lease, max_wait_s, among.spent_s)
                self._queue.join(ticket)
                if lease:
                    self._standings[ticket] = standing()
                try:
                    self._enqueued(ticket)
                    return await ticket.granted
                except BaseException:
                    among.spent_s = ticket.spend(self._loop.time(), goes_on=False)
                    self._withdraw(ticket)
                    raise
                finally:
                    self._standings.pop(ticket, None)
        except TimeoutError:
            raise self._waited_too_long(ticket) from None

    def _enqueued(self, ticket: Ticket) -> None:
        self._bound(ticket)
        if self._state in DOWN:
            self._start("request")
        self._grant()
        self._rearm()
        self._refuse_hopeless(ticket)

    def _let_rest(self) -> None:
        """Have nobody's wait count against him who came while it was up, and waits for its next start now."""
        for request in self._standings.values():
            request.rests()

    def _bound_all(self) -> None:
        for ticket in self._queue:
            self._bound(ticket)

    def _bound(self, ticket: Ticket) -> None:
        now, for_gpus = self._loop.time(), self._waits_for_gpus
        when = wait_ends_at(
            self._state,
            self._bounds,
            asked_at=ticket.asked_at,
            now=now,
            max_wait_s=ticket.max_wait_s,
            for_gpus=for_gpus,
            spent_s=ticket.spend(now, goes_on=for_gpus or self._state in SERVING),
        )
        ticket.wait_until(when)

    @property
    def _waits_for_gpus(self) -> bool:
        """Whether a start is under way that has no GPUs yet, and needs some."""
        has_place = self._life is None or self._life.placed or not demand_of(self.spec).count
        return self._state is State.STARTING and not has_place

    def _grant(self) -> None:
        """Give whoever waits what there is, in the order of arrival, wherever in the model they queue."""
        if self._state is not State.READY or not self._life or not self._life.handle:
            return
        for ticket in self._queue if self._queue else ():
            if not ticket.wants_lease:
                self._queue.grant(ticket, self._life.handle)
        while self._has_slot() and self._serve_next():
            pass

    def _serve_next(self) -> bool:
        """Grant a slot to the one whose turn it is; return False if nobody waits."""
        one = self.next_in_line()
        ticket = one._queue.oldest
        if not ticket:
            return False
        one._hand_over(ticket, self._new_lease())
        if one is not self:
            one._served_elsewhere()
        return True

    def _served_elsewhere(self) -> None:
        """Go on without one who queued here. A start that he began goes on for those who come after him."""
        self._last_use = self._loop.time()
        self._gpus.changed()
        self._goes_on_for_all()

    def _goes_on_for_all(self) -> None:
        if self._life:
            self._life.for_all = True
        self._rearm()

    def _has_slot(self) -> bool:
        if self._state is not State.READY or self._held_for is not None or self._life is None:
            return False
        return len(self._life.leases) < self.spec.max_concurrency

    def _hand_over(self, ticket: Ticket, lease: Lease) -> None:
        if not self._queue.grant(ticket, lease):
            lease.life.leases.pop(lease, None)

    def _new_lease(self) -> Lease:
        life = self._life
        assert life is not None  # a READY model has a life with a handle
        assert life.handle is not None
        now = self._loop.time()
        lease = Lease(life.handle, life.secret, life, self.spec, self.engine, granted_at=now, give_back=self._give_back)
        life.leases[lease] = None
        self._disarm()  # a model that works is not idle
        return lease

    def _withdraw(self, ticket: Ticket) -> None:
        """Take back a ticket whose caller leaves, and whatever it was granted in the same tick."""
        grant = self._queue.leave(ticket)
        if isinstance(grant, Lease):
            grant.give_back(grant)
        self._last_use = self._loop.time()
        self._gpus.changed()
        self._rearm()

    def _give_back(self, lease: Lease) -> None:
        """Let go of a lease; never waits."""
        lease.on_cut = None
        lease.life.leases.pop(lease, None)
        self._last_use = self._loop.time()
        self._past.answered(self._last_use - lease.granted_at)
        if lease.life is not self._life:
            return
        if self._state is State.DRAINING and not lease.life.leases:
            self._end(lease.life, "drained")
        self._grant()
        if not self._in_flight:
            self._gpus.changed()
        self._rearm()

    def _refuse_queue(self, error: Callable[[], GatewayError]) -> None:
        self._queue.refuse_all(lambda: self._promised(error()))
        self._rearm()

    # Refusals

    def _refuse_newcomer(self, among: Among | None, *, admitted: bool) -> None:
        self._refuse_when_closing()
        self._refuse_when_unhealthy()
        self._refuse_while_cooling()
        if self._state in DOWN:
            self._refuse_in_vain()
        queued = self._queue.requests + (among.queued_elsewhere if among else 0)
        if not admitted and queued >= queue_room(self._state, self.spec.max_queue, self.spec.max_concurrency):
            raise self._promised(refusals.queue_full(self.spec, self._served_in()))

    def _refuse_hopeless(self, ticket: Ticket) -> None:
        """Refuse who would wait in vain for the start that is under way, and now goes on without him."""
        ready = self._past.ready_in(self._state, self._life, self._loop.time())
        if ready and ticket.max_wait_s is not None and is_hopeless(ready, ticket.max_wait_s):
            raise self._promised(refusals.not_loaded_in_time(self.status, ticket.max_wait_s, ready))

    def _served_in(self) -> Estimate | None:
        """Return in how long those who wait for a slot have been answered, once there are slots."""
        served = self._past.served_in(self._queue.requests)
        has_slots = self._state in SERVING and not self._held_for
        return served if has_slots else in_turn(self._come_back_in(), served)

    def _come_back_in(self) -> Estimate | None:
        if self._state in SERVING and self._held_for:  # it goes, the other one starts, and then it does
            return in_turn(self._gpus.serves_in(self._held_for), self.starts_in())
        now = self._loop.time()
        return self._past.come_back_in(self._state, now - self._since, self._life, now)

    def _refuse_in_vain(self) -> None:
        try:
            self._gpus.refuse_in_vain(self)
        except NoCapacity as error:
            self._promised(error)
            raise

    def _refuse_when_closing(self) -> None:
        if self._closing:
            raise refusals.shutting_down()
        if self._removed:
            raise refusals.removed(self.spec)
        if self._is_held_up:
            raise self._held_up()

    def _refuse_when_unhealthy(self) -> None:
        if self._state is State.UNHEALTHY:
            left_s = self._since + self.spec.unhealthy_timeout_s - self._loop.time()
            raise self._promised(refusals.unhealthy(self.spec, self._ailment, left_s))

    def _refuse_while_cooling(self) -> None:
        if not self._wanted and self._failure and self._cooling_s():
            raise self._promised(refusals.rests(self.spec, self._failure.error, self._cooling_s()))

    def _cooling_s(self) -> float:
        """How long the model still rests after a failure; 0 when it does not."""
        resting = self._state in (State.FAILED, State.STOPPING)
        return max(self._cool_until - self._loop.time(), 0.0) if resting else 0.0

    def _waited_too_long(self, ticket: Ticket) -> GatewayError:
        waited_s = self._loop.time() - ticket.asked_at
        if self._waits_for_gpus and (ticket.max_wait_s is None or waited_s < ticket.max_wait_s - CLOCK_S):
            why, ready = self._gpus.why(self.key), self._gpus.serves_in(self.key)
            return self._promised(refusals.no_room(self.spec, why, waited_s, ready))
        if self._state in SERVING and waited_s >= self.spec.queue_timeout_s - CLOCK_S:
            if self._held_for:
                return self._promised(refusals.held(self.spec, self._held_for, waited_s, self._come_back_in()))
            return self._promised(refusals.no_slot(self.spec, waited_s, self._served_in()))
        if ticket.max_wait_s is None:
            return self._promised(refusals.never_ready(self.spec, self._state, waited_s, self._come_back_in()))
        return self._promised(refusals.not_loaded(self.status, ticket.max_wait_s, self._come_back_in()))

    def _promised(self, error: GatewayError) -> GatewayError:
        """Keep a start for those who are told to come back: for twice the time they are told (P8)."""
        until = self._loop.time() + 2 * (error.retry_after_s or 0.0)
        self._promised_until = max(self._promised_until, until)
        self._rearm()
        return error

    # A life

    def _start(self, reason: str) -> None:
        life = self._begin(adopted=False)
        self._move(Event.START, reason)
        self._run(life, None)

    def _begin(self, *, adopted: bool) -> Life:
        self._life = Life(
            self.engine,
            start_timeout_s=self.spec.start_timeout_s,
            stall_timeout_s=self.spec.stall_timeout_s,
            kept=self._wanted or self.spec.preload or self.spec.pinned or adopted,
            on_progress=self._progressed,
            pause_timeout_s=self.spec.unhealthy_timeout_s,
            adopted=adopted,
        )
        self._left = self._held_for = None
        return self._life

    def _run(self, life: Life, found: Found | None) -> None:
        life.serve = self._loop.create_task(self._serve(life, found), name=f"serve {self.name}")
        life.task = self._loop.create_task(self._live(life), name=f"live {self.name}")

    async def _serve(self, life: Life, found: Found | None) -> None:
        """Start, load and watch the server. Ends only by raising why it must go, or by being cancelled."""
        life.handle = handle = await (self._adopt(life, found) if found else self._make(life))
        if not found:
            self._move(Event.LAUNCHED, "server made")
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._until_ended(life, handle), name=f"exit of {self.name}")
                async with life.start_bounds():
                    await self._health.until_ready(handle)
                self._became_ready(life)
                await self._watch(life, handle)
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None

    async def _make(self, life: Life) -> Handle:
        launch = launch_of(self.engine, self.spec, life.secret, self.replica)
        self._gpus.refuse_misfit(self.spec)
        await self._runtime.check(launch)  # else others would make room for one that cannot start
        await self._leave_former_place()
        place = await self._place(life)
        async with life.start_bounds():
            fitted = await self._gpus.fitted(launch, self.engine, self.key, place)
            return await self._runtime.start(fitted, life)

    async def _leave_former_place(self) -> None:
        """Give up what a former server has, of which something is perhaps left, if this one cannot start there.

        Raises:
            RuntimeUnavailable: it is not known yet whether that server is gone, so its GPUs cannot be given to others.
        """
        if not self._gpus.is_misplaced(self):
            return
        if left := await self._clear():
            raise refusals.former_server_left(self.spec, left, CLEAR_AGAIN_S)
        self._gpus.give_back(self.key)

    async def _place(self, life: Life) -> Place:
        """Wait for GPUs; the bounds of the start begin when it has them.

        Whoever waits for it is bounded until then, and an operator's wish counts for as long as a start may take; and
        again once it has them.
        """
        kept = life.kept
        try:
            async with asyncio.timeout(self.spec.start_timeout_s):
                place = await self._gpus.take(self)
        except TimeoutError:
            self._kept_long_enough(life)
            place = await self._gpus.take(self)
        life.has_place()
        life.kept = life.kept or kept
        self._bound_all()
        self._rearm()
        return place

    def _kept_long_enough(self, life: Life) -> None:
        if life.kept:
            life.kept = self._wanted = False
            self._last_use = self._loop.time()
            self._rearm()

    async def _adopt(self, life: Life, found: Found) -> Handle:
        """Take over what was found. Its bounds begin when its runtime says where it is: not knowing is not dead."""
        while True:
            try:
                handle = await self._runtime.adopt(found, life)
            except RuntimeUnavailable as error:
                log.warning("%s: not adopted yet: %s", self.name, error.detail)
                await asyncio.sleep(ASK_AGAIN_S)
            else:
                age_s = max(self._journal.now() - found.made_at, 0.0)
                life.has_left(max(self.spec.start_timeout_s - age_s, self.spec.unhealthy_timeout_s))
                return handle

    async def _watch(self, life: Life, handle: Handle) -> None:
        while True:
            self._ailment = await self._until_ailing(life, handle)
            self._move(Event.LOSE, self._ailment)
            try:
                async with asyncio.timeout(self.spec.unhealthy_timeout_s):
                    await self._health.until_back(handle)
            except TimeoutError:
                raise refusals.unhealthy_too_long(self.spec, self._ailment) from None
            self._move(Event.PASS, "health check passed")

    async def _until_ailing(self, life: Life, handle: Handle) -> str:
        """Return why the server cannot be counted on, once it cannot: it missed its checks, or was paused."""
        try:
            async with life.until_paused():
                await self._health.until_lost(handle)
        except Paused as paused:
            return str(paused)
        return f"it missed its last {self.spec.health_failures} health checks"

    async def _until_ended(self, life: Life, handle: Handle) -> None:
        end = await self._runtime.ended(handle)
        diagnosis = self.engine.diagnose(end)
        raise refusals.ended(self.spec, end, diagnosis, served=life.served)

    def _became_ready(self, life: Life) -> None:
        life.ready_at = self._last_use = self._loop.time()
        self._wanted = False
        self._cool_until = 0.0
        self._move(Event.PASS, "health check passed")

    async def _live(self, life: Life) -> None:
        """Wait for the end of `_serve`, clear up after it, and go on with whoever still waits."""
        await asyncio.wait([life.serve])
        error = self._why_ended(life.serve)
        if self._state is State.STOPPED:  # the gateway ends, and the server does not
            self._life = None
            return
        if self._state is not State.STOPPING:
            self._fail(life, error or refusals.our_fault(self.spec, None))
        life.left = await self._clear()
        self._went_down(life)

    def _why_ended(self, serve: asyncio.Task[None]) -> GatewayError | None:
        if serve.cancelled():
            return None
        error = serve.exception()
        if isinstance(error, GatewayError):
            return error
        log.error("%s: the gateway itself failed", self.name, exc_info=error)
        return refusals.our_fault(self.spec, error)

    def _fail(self, life: Life, error: GatewayError) -> None:
        """Begin the way down of a life that ended in an error."""
        if self._state is State.DRAINING:  # it was to go anyway
            self._move(Event.STOP, error.detail)
        else:
            self._move(Event.FAIL, f"{error.code}: {error.detail}")
            self._remember(error, life)
        self._cut(life, error)
        if not life.served:
            self._wanted = False
            self._refuse_queue(lambda: refusals.again(error, self._cooling_s() or error.retry_after_s or 0.0))

    def _remember(self, error: GatewayError, life: Life) -> None:
        life.failed = True
        # to try again costs nothing where nothing is started, and a provider's long outage is not to be outlasted
        forgiven = self._served_long(life) or self.spec.runtime == "external"
        self._failure = Failure(error, self._journal.now())
        if isinstance(error, NoCapacity) and not life.placed:  # which says nothing of this model
            return
        self._failures = 1 if forgiven else self._failures + 1
        self._cool_until = self._loop.time() + pause_after_failure_s(self._failures, served=life.served)

    def _served_long(self, life: Life) -> bool:
        return life.ready_at is not None and self._loop.time() - life.ready_at >= SERVED_LONG_S

    async def _clear(self) -> GatewayError | None:
        """Remove what the life made; return the error if that is not known to have worked."""
        grace_s = self.spec.stop_grace_s
        try:
            async with asyncio.timeout(grace_s + STOP_MARGIN_S):
                await self._runtime.stop(self.name, grace_s=grace_s)
        except (RuntimeUnavailable, TimeoutError) as error:
            return refusals.perhaps_left(self.spec, str(error) or "no answer in time")
        except Exception as error:
            log.exception("%s: the runtime failed while it removed the server", self.name)
            return refusals.perhaps_left(self.spec, type(error).__name__)
        return None

    # Another entry of the catalog

    def _follow(self) -> None:
        """Take the changed entry, if there is one. It waits for a server that only the former runtime can clear."""
        entry = self._next
        if not entry or self._is_held_up:
            return
        self._next = None
        self.spec, self.engine, self._runtime = entry.spec, entry.engine, entry.runtime
        self._past, self._outlives = entry.past, entry.outlives
        if self._life:
            self._health.change(entry.health)
            self._life.kept = self._wanted or entry.spec.preload or entry.spec.pinned or self._life.adopted
        else:
            self._health = entry.health
        self._change_bounds(Bounds.of(entry.spec))
        self._grant()
        self._gpus.changed()
        self._rearm()

    def _change_bounds(self, bounds: Bounds) -> None:
        """Bound every wait anew, from now on, if there is anything new about the bounds."""
        if bounds == self._bounds:
            return
        self._bounds = bounds
        self._bound_all()

    @property
    def _is_held_up(self) -> bool:
        """Whether nothing can be started by the changed entry yet: what is perhaps left is on another runtime."""
        return bool(self._left and self._next and self._next.runtime is not self._runtime)

    def _held_up(self) -> GatewayError:
        assert self._left is not None  # that is what holds it up
        return self._promised(refusals.former_server_left(self.spec, self._left, CLEAR_AGAIN_S))

    def _went_down(self, life: Life) -> None:
        if life.left and not life.failed:  # else what it failed of says more than that it could not be cleared
            self._remember(life.left, life)
        elif self._served_long(life):
            self._failures = 0
        self._left = life.left
        if not life.left:
            self._gpus.give_back(self.key)
        self._life = None
        self._move(Event.GAVE_UP if life.failed else Event.CLEARED, life.left.detail if life.left else "nothing left")
        self._follow()
        self._go_on()

    def _go_on(self) -> None:
        """Start again for those who still wait, unless the model rests after a failure."""
        if self._is_held_up:
            self._refuse_queue(self._held_up)
        elif self._wanted and not self._closing:
            self._start("operator")
        elif self._queue and self._failure and self._cooling_s():
            error = self._failure.error
            self._refuse_queue(lambda: refusals.rests(self.spec, error, self._cooling_s()))
        elif self._queue:
            self._start("request")

    # The way down

    def _running_life(self) -> Life:
        if not self._life:
            raise ModelNotRunning(f"{self.spec.id} is not running; there is nothing to stop.")
        return self._life

    async def _take_down(self, life: Life, reason: str, *, force: bool) -> None:
        self._lead_down(reason, force=force)
        await asyncio.wait([life.task])
        if life.left:
            raise refusals.again(life.left, 0)

    def _lead_down(self, reason: str, *, force: bool = False) -> None:
        """Drain, or stop at once if nothing runs or `force` says so."""
        life = self._life
        if not life or self._state is State.STOPPING or self._state in DOWN:
            return
        if force or not life.leases:
            self._end(life, reason)
        elif self._state is not State.DRAINING:
            self._move(Event.DRAIN, reason)
            self._rearm()

    def _clear_again(self) -> None:
        """Look once more for the server of a life that failed, and remove it."""
        life = self._begin(adopted=False)
        life.failed = True  # which is remembered: this is only its end
        self._move(Event.STOP, "it is not known whether its server is gone")
        self._run(life, None)
        life.serve.cancel()

    def _end(self, life: Life, reason: str) -> None:
        self._move(Event.KEEP if life.stays else Event.STOP, reason)
        self._cut(life, refusals.let_go(self.spec) if life.stays else refusals.stopped(self.spec, reason))
        life.serve.cancel()

    def _cut(self, life: Life, error: GatewayError) -> None:
        for lease in list(life.leases):
            lease.cut(error)

    # State and timer

    def _move(self, event: Event, reason: str) -> None:
        before, self._state = self._state, after(self._state, event)
        if before is self._state:
            return
        now = self._loop.time()
        self._past.moved(before, self._state, now - self._since, self._life, now)
        self._since = now
        if before in GOING_ON and self._state not in GOING_ON:
            self._last_stop = Stop(reason, self._journal.now())
        log.info("%s: %s -> %s (%s)", self.name, before, self._state, reason)
        self._journal.write(
            "state",
            **self._who,
            **{"from": before.value, "to": self._state.value},
            at=self._journal.now(),
            reason=reason,
        )
        if self._state is not State.READY:
            self._let_rest()
        if (before in SERVING) is not (self._state in SERVING) or event is Event.START:
            self._bound_all()
        self._grant()
        self._gpus.changed()
        self._rearm()

    @property
    def _who(self) -> dict[str, object]:
        """Whom its entries in the journal are about."""
        return {"model": self.spec.id} | ({"replica": self.replica} if self.replica else {})

    def _progressed(self, progress: Progress) -> None:
        eta_s = self._past.eta_s(self._state, self._life, self._loop.time())
        self._journal.write("progress", **self._who, **(describe(progress, eta_s) or {}))

    def _rearm(self) -> None:
        """Set the one timer that this state has: a start to call off, an idle server to stop, a drain to end."""
        self._disarm()
        if (due := self._due()) is not None:
            when, reason = due
            self._timer = self._loop.call_at(when, self._time_is_up, self._life, reason)

    def _disarm(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> tuple[float, str] | None:
        match self._state:
            case State.STARTING | State.LOADING:
                when = self._call_off_at()
                return None if when is None else (when, "nobody waits for it any more")
            case State.READY if not self._in_flight and not self._queue:
                idle_s = self.spec.idle_timeout_s
                keep = idle_s is None or self.spec.pinned
                return None if keep or idle_s is None else (self._last_use + idle_s, IDLE)
            case State.DRAINING:
                return (self._since + self.spec.drain_timeout_s, "drain_timeout")
            case State.FAILED if self._left and not self._closing:
                return (self._since + CLEAR_AGAIN_S, "perhaps left")
            case _:
                return None

    def _call_off_at(self) -> float | None:
        life = self._life
        return call_off_at(
            waiters=len(self._queue),
            kept=bool(life and (life.kept or (life.for_all and not self._waits_for_gpus))),
            last_waiter_left_at=self._last_use,
            promised_until=self._promised_until,
            bounds=self._bounds,
        )

    def _time_is_up(self, life: Life | None, reason: str) -> None:
        if self._left and not self._life:
            self._clear_again()
        elif reason == IDLE and self._gpus.starts_beside(self.key):
            self._timer = self._loop.call_later(BESIDE_S, self._time_is_up, life, reason)
        elif self._state in STARTING_UP and self.next_in_line().queued:  # whom the first that is up will serve
            self._last_use = self._loop.time()
            self._rearm()
        elif life and life is self._life:
            self._end(life, reason)
