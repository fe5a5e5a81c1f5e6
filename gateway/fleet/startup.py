"""What is heard of a server while it comes up, and the bounds of that: a hard cap, and the longest silence."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from gateway.engines.base import Engine
from gateway.errors import StartTimeout
from gateway.fleet.estimates import Course
from gateway.runtimes.base import Progress


@dataclass(frozen=True, slots=True)
class Report:
    """How far a start has come. Times are readings of the loop's clock, in seconds."""

    progress: Progress
    since: float


class Startup:
    """One server's way up. A runtime's listener: every line and all progress are signs of life.

    One that is frozen from outside may be so for `pause_timeout_s`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        start_timeout_s: float,
        stall_timeout_s: float,
        on_progress: Callable[[Progress], None],
        pause_timeout_s: float = math.inf,
    ) -> None:
        self.report: Report | None = None
        self.course = Course()
        self._engine = engine
        self._on_progress = on_progress
        self._pause_timeout_s = pause_timeout_s
        self._start_timeout_s = start_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._loop = asyncio.get_running_loop()
        self._hard_stop_at = self._loop.time() + start_timeout_s
        self._silence_s = stall_timeout_s
        """How long it may show no progress, as things are."""
        self._stall: asyncio.Timeout | None = None

    def has_left(self, left_s: float) -> None:
        """Bound what is to come by `left_s` from now on, for a server that was begun before."""
        self._hard_stop_at = self._loop.time() + left_s

    def begin_again(self) -> None:
        """Count the hard cap from now on."""
        self.has_left(self._start_timeout_s)

    def line(self, text: str) -> None:
        """Hear a line of the server's output: a sign of life, and perhaps of progress."""
        self._not_stalled()
        if progress := self._engine.progress(text):
            self.progress(progress)

    def progress(self, progress: Progress) -> None:
        self._not_stalled()
        if self.report is None or self.report.progress != progress:
            self.report = Report(progress, self._loop.time())
            self.course.hear(progress, self.report.since)
            self._on_progress(progress)

    def paused(self, reason: str) -> None:
        """Hear that it was frozen, which it may be for as long as a server that does not answer."""
        self.progress(Progress(f"waiting: {reason}"))
        self._not_stalled(self._pause_timeout_s)

    @asynccontextmanager
    async def start_bounds(self) -> AsyncIterator[None]:
        """Bound what is done inside: by the start's hard cap, and by the time it may go without any progress.

        Raises:
            StartTimeout: one of the two has passed; the words say which, and what was going on.
        """
        try:
            async with asyncio.timeout(None) as self._stall:
                self.course.begin(self._loop.time())
                self._not_stalled(self._silence_s)
                yield
        except TimeoutError:
            raise self._too_slow() from None
        finally:
            self._stall = None

    def _not_stalled(self, silence_s: float = math.inf) -> None:
        """Allow as much silence from now on as a start may show, but no more than `silence_s`."""
        self._silence_s = min(self._stall_timeout_s, silence_s)
        if self._stall is not None and not self._stall.expired():
            self._stall.reschedule(min(self._loop.time() + self._silence_s, self._hard_stop_at))

    def _too_slow(self) -> StartTimeout:
        phase = self.report.progress.phase if self.report else "starting"
        if self._loop.time() >= self._hard_stop_at:
            rule = f"was not ready within start_timeout ({self._start_timeout_s:g} s)"
        elif self._silence_s < self._stall_timeout_s:
            rule = f"stayed paused for unhealthy_timeout ({self._silence_s:g} s)"
        else:
            rule = f"showed no progress for stall_timeout ({self._stall_timeout_s:g} s)"
        return StartTimeout(
            f"the server {rule}; it was {phase}. Raise that bound in models.yaml if the model needs longer, "
            "or read its log for what it waits for.",
            phase=phase,
        )
