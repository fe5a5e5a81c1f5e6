"""A request's wait for its model, which does not count against the limits of the one who asks.

Whoever counts requests puts a `Standing` into the request's context; the errands in which the request calls models'
servers say there when they wait for a cold model and when they hold a lease.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Standing:
    """Whether a request is at work. It is from its arrival on, but while it waits for a model that is not up yet.

    `count` is told of each change: 1 when it is at work, -1 when it is not any more.
    """

    def __init__(self, count: Callable[[int], None] = lambda _: None) -> None:
        self._count = count
        self._at_work = False
        self._leases = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """Have what is inside, and the tasks that it makes, know this as theirs."""
        token = _OF_REQUEST.set(self)
        self._set(at_work=True)
        try:
            yield
        finally:
            self._set(at_work=False)
            _OF_REQUEST.reset(token)

    def rests(self) -> None:
        """Say that a part of the request waits for a cold model; it rests if no other part holds a lease."""
        if not self._leases:
            self._set(at_work=False)

    @contextmanager
    def works(self) -> Iterator[None]:
        """Say that what is inside holds a lease. Nobody is refused here: the request was admitted."""
        self._leases += 1
        self._set(at_work=True)
        try:
            yield
        finally:
            self._leases -= 1

    def _set(self, *, at_work: bool) -> None:
        if at_work is not self._at_work:
            self._at_work = at_work
            self._count(1 if at_work else -1)


_OF_REQUEST: ContextVar[Standing | None] = ContextVar("standing", default=None)


def standing() -> Standing:
    """Return the one of the request that is being answered; one that counts for nobody if nobody counts."""
    return _OF_REQUEST.get() or Standing()
