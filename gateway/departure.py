"""Ending what is done for a caller when there is a reason to, above all when the caller has gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive


class Departed(Exception):
    """The caller has gone: nobody is there to be answered."""


class Interrupt:
    """Ends the task that runs inside `interruptible` with a reason. Only the first one counts, and none afterwards."""

    def __init__(self, task: asyncio.Task[object]) -> None:
        self._task = task
        self.reason: Exception | None = None
        self.over = False

    def fire(self, reason: Exception) -> None:
        if self.reason is None and not self.over:
            self.reason = reason
            self._task.cancel()


@asynccontextmanager
async def interruptible() -> AsyncIterator[Interrupt]:
    """Run what is inside until it ends or is interrupted; then raise the reason.

    A cancellation from elsewhere stays a cancellation. `fire` must be called from another task or a callback.
    """
    task = asyncio.current_task()
    assert task is not None  # coroutines run in tasks
    cancelling = task.cancelling()
    interrupt = Interrupt(task)
    try:
        yield interrupt
    except asyncio.CancelledError:
        if interrupt.reason is None or task.uncancel() > cancelling:
            raise
        raise interrupt.reason from None
    finally:
        interrupt.over = True


@asynccontextmanager
async def until_departure(receive: Receive) -> AsyncIterator[Interrupt]:
    """As `interruptible`, and interrupted when the caller's connection closes.

    Raises:
        Departed: it did. Whatever is inside was ended at its next await.
    """
    async with interruptible() as interrupt:
        watcher = asyncio.create_task(_watch(receive, interrupt), name="departure")
        try:
            yield interrupt
        finally:
            watcher.cancel()


async def _watch(receive: Receive, interrupt: Interrupt) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    interrupt.fire(Departed())
