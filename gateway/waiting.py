"""A request's wait for its model: it does not count against the limits of who asks, and is one of a bounded number.

Whoever lets a request in puts a `Standing` into its context; the errands in which the request calls models' servers
say there when they wait for a cold model and when they hold a lease, and the fleet says so when a model that was up
goes while they queue for it. It knows the gateway's `Room`, in which they wait.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Self

from gateway.errors import QueueFull

FULL_RETRY_S = 5.0


class Standing:
    """Whether a request is at work. It is from its arrival on, but while it waits for a model that is not up yet.

    A context: what is inside, and the tasks that it makes, know this as theirs. `count` is told of each change: 1 when
    it is at work, -1 when it is not any more. Whoever waits in it waits in `room`, if there is one.
    """

    def __init__(self, count: Callable[[int], None] = lambda _: None, room: Room | None = None) -> None:
        self.room = room
        self._count = count
        self._at_work = False
        self._leases = 0
        self._outer: Token[Standing | None]

    def __enter__(self) -> Self:
        self._outer = _OF_REQUEST.set(self)
        self._set(at_work=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._set(at_work=False)
        _OF_REQUEST.reset(self._outer)

    def rests(self) -> None:
        """Say that a part of the request waits for a cold model; it rests if no other part holds a lease."""
        if not self._leases:
            self._set(at_work=False)

    def works(self) -> None:
        """Say that a part of the request holds a lease. Nobody is refused here: the request was admitted."""
        self._leases += 1
        self._set(at_work=True)

    def worked(self) -> None:
        """Say that it holds it no longer."""
        self._leases -= 1

    def _set(self, *, at_work: bool) -> None:
        if at_work is not self._at_work:
            self._at_work = at_work
            self._count(1 if at_work else -1)


_OF_REQUEST: ContextVar[Standing | None] = ContextVar("standing", default=None)


def standing() -> Standing:
    """Return the one of the request that is being answered; one that counts for nobody if nobody counts."""
    return _OF_REQUEST.get() or Standing()


class Room:
    """Where all wait who wait for a model, whichever it is: at most so many."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting = 0

    def enter(self) -> None:
        """Count one more who waits.

        Raises:
            QueueFull: there is no room.
        """
        if self._waiting >= self._most:
            words = f"{self._most:,} requests wait for models already (GATEWAY_MAX_WAITING); send this one again later."
            raise QueueFull(words, retry_after_s=FULL_RETRY_S)
        self._waiting += 1

    def leave(self) -> None:
        self._waiting -= 1


class Wait:
    """A request's wait for one model."""

    def __init__(self, request: Standing) -> None:
        self._request = request
        self._room: Room | None = None

    def begin(self) -> None:
        """Be counted from now on.

        Raises:
            QueueFull: there is no room.
        """
        if room := self._request.room:
            room.enter()
            self._room = room

    def end(self) -> None:
        """Be counted no more; does nothing where that is so already."""
        room, self._room = self._room, None
        if room:
            room.leave()
