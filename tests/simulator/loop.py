"""An event loop without a clock: time jumps to the next timer, and what is ready runs in an order drawn by seed."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from random import Random


class Deadlock(Exception):
    """Nothing is ready and no timer is set: whoever waits now would wait for ever."""


class NeverBlocks(selectors.SelectSelector):
    """Instead of waiting for sockets, of which there are none, lets virtual time pass."""

    loop: SimulatedLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock
        if timeout > 0:
            self.loop.before_time_passes(timeout)
            self.loop.now += timeout
        self.loop.shuffle()
        return []


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Runs real code in virtual time. The same seed gives the same run, step for step."""

    def __init__(self, seed: int, after_step: Callable[[], None] = lambda: None) -> None:
        selector = NeverBlocks()
        super().__init__(selector)
        selector.loop = self
        self.now = 0.0
        self.random = Random(seed)
        self.after_step = after_step
        self.before_time_passes: Callable[[float], None] = lambda _: None

    def time(self) -> float:
        return self.now

    def shuffle(self) -> None:
        ready = self._ready  # type: ignore[attr-defined]
        if len(ready) > 1:
            order = list(ready)
            self.random.shuffle(order)
            ready.clear()
            ready.extend(order)

    def _run_once(self) -> None:
        super()._run_once()  # type: ignore[misc]
        try:
            self.after_step()
        except Exception:  # the run is over; closing the loop takes more steps, unwatched
            self.after_step = lambda: None
            raise

    def timers(self) -> list[float]:
        """Return when the timers are due that are set now."""
        return [handle.when() for handle in self._scheduled if not handle.cancelled()]  # type: ignore[attr-defined]
