"""Those who wait for one model, in the order of their arrival. Nothing in here waits; each ticket has one owner."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gateway.errors import GatewayError
from gateway.fleet.life import Lease
from gateway.runtimes.base import Handle

Grant = Lease | Handle


@dataclass(slots=True)
class Among:
    """A caller of a model with several replicas: what goes with him from one to the other."""

    came_at: float
    queued_elsewhere: int = 0
    """How many queue for the other replicas."""
    spent_s: float = 0.0
    """How much of the queue's time-out he has used up for those that he waited for before."""


class SentAway(Exception):
    """This replica takes no part any more: ask another one."""


@dataclass(eq=False, slots=True)
class Ticket:
    """One caller's place. `wants_lease` is False for one who only waits until the model is ready."""

    granted: asyncio.Future[Grant]
    bound: asyncio.Timeout
    """When the caller gives up waiting. Belongs to the caller's task; whoever owns the queue moves it."""
    asked_at: float
    wants_lease: bool
    max_wait_s: float | None
    spent_s: float = 0.0
    """How much of the queue's time-out it has used up so far."""
    spends_since: float | None = None
    """Since when it uses it up, if it does now: while the model runs, or waits for GPUs."""

    def spend(self, now: float, *, goes_on: bool) -> float:
        """Return how much of the queue's time-out is used up by `now`, and note whether it is from now on."""
        if self.spends_since is not None:
            self.spent_s += now - self.spends_since
        self.spends_since = now if goes_on else None
        return self.spent_s

    def wait_until(self, when: float) -> None:
        if not self.bound.expired():
            self.bound.reschedule(when)


class Queue:
    """The tickets of one model."""

    def __init__(self) -> None:
        self._tickets: deque[Ticket] = deque()

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(list(self._tickets))

    @property
    def oldest(self) -> Ticket | None:
        """Return the first one that waits for a lease."""
        if not self._tickets:  # as mostly, when a lease is given back
            return None
        return next((ticket for ticket in self._tickets if ticket.wants_lease), None)

    @property
    def requests(self) -> int:
        """How many wait for a lease."""
        return sum(ticket.wants_lease for ticket in self._tickets) if self._tickets else 0

    def join(self, ticket: Ticket) -> None:
        """Let it take its place: one who was sent here from elsewhere is before those who came after him."""
        place = len(self._tickets)
        while place and self._tickets[place - 1].asked_at > ticket.asked_at:
            place -= 1
        self._tickets.insert(place, ticket)

    def grant(self, ticket: Ticket, grant: Grant) -> bool:
        """Hand `grant` to the ticket and let it go; False if its caller is leaving in this very tick."""
        self._tickets.remove(ticket)
        if ticket.granted.done():
            return False
        ticket.granted.set_result(grant)
        return True

    def leave(self, ticket: Ticket) -> Grant | None:
        """Let a caller go who does not wait any more; return what it was granted in the same tick, if anything."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)
        granted = ticket.granted
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            return granted.result()
        return None

    def send_away(self) -> None:
        """Let those who wait for a lease ask again, elsewhere."""
        for ticket in [ticket for ticket in self._tickets if ticket.wants_lease]:
            self._tickets.remove(ticket)
            if not ticket.granted.done():
                ticket.granted.set_exception(SentAway())

    def refuse_all(self, error: Callable[[], GatewayError]) -> None:
        """Give every ticket an error of its own: one exception object must not be raised in two places."""
        for ticket in self._tickets:
            if not ticket.granted.done():
                ticket.granted.set_exception(error())
        self._tickets.clear()
