"""Ending what is done for a caller when there is a reason to, above all when the caller has gone."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from starlette.types import Receive


class Departed(Exception):
    """The caller has gone: nobody is there to be answered."""


class Interrupt:
    """A context whose inside can be ended with a reason. Only the first one counts, and none afterwards."""

    def __init__(self) -> None:
        self.reason: Exception | None = None
        self.over = False
        self._task: asyncio.Task[object]
        self._cancelling = 0

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None  # coroutines run in tasks
        self._task, self._cancelling = task, task.cancelling()
        return self

    async def __aexit__(
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


def until_departure(receive: Receive) -> Interrupt:
    """As `interruptible`, and interrupted when the caller's connection closes.

    Raises:
        Departed: it did. Whatever is inside was ended at its next await.
    """
    return _UntilDeparture(receive)


class _UntilDeparture(Interrupt):
    def __init__(self, receive: Receive) -> None:
        super().__init__()
        self._receive = receive
        self._watcher: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self._watcher = asyncio.create_task(self._watch(), name="departure")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.cancel()
        await super().__aexit__(kind, error, trace)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.fire(Departed())
