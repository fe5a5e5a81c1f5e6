"""Ending what is done for a caller when there is a reason to, above all when the caller has gone.

A server that says at once when a connection is lost puts a `Departure` into the state of the connection's requests
(`gateway.connection` does). With any other one `receive` has to be listened to, in a task of its own.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from starlette.types import Receive, Scope


class Departed(Exception):
    """The caller has gone: nobody is there to be answered."""


class Interrupt:
    """A context whose inside can be ended with a reason. Only the first one counts, and none afterwards.

    It is entered and left in a task, and left by raising the reason.
    """

    reason: Exception | None = None
    over = False
    _task: asyncio.Task[object]
    _cancelling: int

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None  # coroutines run in tasks
        self._task, self._cancelling = task, task.cancelling()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over = True
        if not isinstance(error, asyncio.CancelledError) or self.reason is None:
            return
        if self._task.uncancel() <= self._cancelling:
            raise self.reason from None

    def fire(self, reason: Exception) -> None:
        if self.reason is None and not self.over:
            self.reason = reason
            self._task.cancel()


def interruptible() -> Interrupt:
    """Run what is inside until it ends or is interrupted; then raise the reason.

    A cancellation from elsewhere stays a cancellation. `fire` must be called from another task or a callback.
    """
    return Interrupt()


class Departure:
    """A connection's end, told to whoever works for its caller by then."""

    KEY = "departure"
    """Under which it is in a request's state."""

    def __init__(self) -> None:
        self.has_come = False
        self._watchers: dict[Interrupt, None] = {}  # in the order in which they came

    def watch(self, interrupt: Interrupt) -> None:
        """Have it fired when the caller goes, or in a moment if he has gone."""
        self._watchers[interrupt] = None
        if self.has_come:
            asyncio.get_running_loop().call_soon(interrupt.fire, Departed())

    def forget(self, interrupt: Interrupt) -> None:
        self._watchers.pop(interrupt, None)

    def comes(self) -> None:
        """Say that the connection is lost."""
        self.has_come = True
        for each in self._watchers:
            each.fire(Departed())


def until_departure(scope: Scope, receive: Receive) -> Interrupt:
    """As `interruptible`, and interrupted when the caller's connection closes.

    Raises:
        Departed: it did. Whatever is inside was ended at its next await.
    """
    departure = scope.get("state", {}).get(Departure.KEY)
    return _UntilDeparture(departure) if departure else until_disconnect(receive)


def until_disconnect(receive: Receive) -> Interrupt:
    """As `until_departure`, for those who have not read the request's body: what comes of it is thrown away."""
    return _UntilDisconnect(receive)


class _UntilDeparture(Interrupt):
    def __init__(self, departure: Departure) -> None:
        self._departure = departure

    def __enter__(self) -> Self:
        super().__enter__()
        self._departure.watch(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._departure.forget(self)
        super().__exit__(kind, error, trace)


class _UntilDisconnect(Interrupt):
    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._watcher: asyncio.Task[None]

    def __enter__(self) -> Self:
        super().__enter__()
        self._watcher = asyncio.create_task(self._watch(), name="departure")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.cancel()
        super().__exit__(kind, error, trace)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.fire(Departed())
