"""Work that blocks, in a thread that nobody has to wait for: a disk that hangs holds up no end of the gateway."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

T = TypeVar("T")


async def aside(work: Callable[[], T], name: str) -> T:
    """Return what `work` returns, or raise what it raises, in a thread of this name.

    Who is cancelled leaves it to itself; it does not keep the process from ending either.
    """
    answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def run() -> None:
        try:
            tell: Callable[[], None] = partial(answer.set_result, work())
        except Exception as error:  # whoever waits for the answer gets it
            tell = partial(answer.set_exception, error)
        with suppress(RuntimeError):  # the loop has ended, and nobody waits
            answer.get_loop().call_soon_threadsafe(_tell, answer, tell)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await answer


def _tell(answer: asyncio.Future[T], tell: Callable[[], None]) -> None:
    if not answer.done():
        tell()
