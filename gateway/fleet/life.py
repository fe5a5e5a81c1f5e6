"""What one life of a model holds, from its start until nothing of it is left: server, leases, progress, bounds."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from gateway.engines.base import Engine
from gateway.errors import GatewayError, StartTimeout
from gateway.runtimes.base import Handle, Progress

Cut = Callable[[GatewayError], None]


@dataclass(eq=False, slots=True)
class Lease:
    """One request's right to use a model's server.

    Whoever holds it hangs `on_cut` on it before anything is awaited, and is told there, once, if the server
    goes before the lease is given back. It must then let go of the server at once.
    """

    handle: Handle
    secret: str
    life: Life
    on_cut: Cut | None = None
    error: GatewayError | None = None
    """Why it was cut, if it was; also before its holder could know of it."""

    def cut(self, error: GatewayError) -> None:
        self.error = error
        if self.on_cut is not None:
            self.on_cut(error)


@dataclass(frozen=True, slots=True)
class Report:
    """How far a start has come. Times are readings of the loop's clock, in seconds."""

    progress: Progress
    since: float


class Life:
    """One life. The instance that made it is the only one to change it, but for what the server itself says."""

    def __init__(
        self,
        engine: Engine,
        *,
        start_timeout_s: float,
        stall_timeout_s: float,
        kept: bool,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.secret = secrets.token_urlsafe(32)
        self.handle: Handle | None = None
        self.leases: dict[Lease, None] = {}  # in the order in which they were granted
        self.kept = kept
        """Whether an operator, `preload` or `pinned` wants this start, so that it is not called off."""
        self.ready_at: float | None = None
        self.failed = False
        self.left: GatewayError | None = None
        """Why it is not known whether its server is gone, when it is not."""
        self.serve: asyncio.Task[None]
        self.task: asyncio.Task[None]
        self.report: Report | None = None
        self._engine = engine
        self._on_progress = on_progress
        self._start_timeout_s = start_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._hard_stop_at = asyncio.get_running_loop().time() + start_timeout_s
        self._stall: asyncio.Timeout | None = None

    # A runtime's listener

    def line(self, text: str) -> None:
        """Hear a line of the server's output: a sign of life, and perhaps of progress."""
        self._not_stalled()
        if progress := self._engine.progress(text):
            self.progress(progress)

    def progress(self, progress: Progress) -> None:
        self._not_stalled()
        if self.report is None or self.report.progress != progress:
            self.report = Report(progress, asyncio.get_running_loop().time())
            self._on_progress(progress)

    # The bounds of its start

    @asynccontextmanager
    async def start_bounds(self) -> AsyncIterator[None]:
        """Bound what is done inside: by the start's hard cap, and by the time it may go without any progress.

        Raises:
            StartTimeout: one of the two has passed; the words say which, and what was going on.
        """
        try:
            async with asyncio.timeout_at(min(self._next_stall(), self._hard_stop_at)) as self._stall:
                yield
        except TimeoutError:
            raise self._too_slow() from None
        finally:
            self._stall = None

    def _next_stall(self) -> float:
        return asyncio.get_running_loop().time() + self._stall_timeout_s

    def _not_stalled(self) -> None:
        if self._stall is not None and not self._stall.expired():
            self._stall.reschedule(min(self._next_stall(), self._hard_stop_at))

    def _too_slow(self) -> StartTimeout:
        phase = self.report.progress.phase if self.report else "starting"
        if asyncio.get_running_loop().time() >= self._hard_stop_at:
            rule = f"was not ready within start_timeout ({self._start_timeout_s:g} s)"
        else:
            rule = f"showed no progress for stall_timeout ({self._stall_timeout_s:g} s)"
        return StartTimeout(
            f"the server {rule}; it was {phase}. Raise that bound in models.yaml if the model needs longer, "
            "or read its log for what it waits for.",
            phase=phase,
        )
