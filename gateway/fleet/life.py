"""What one life of a model holds, from its start or adoption until nothing of it is left: server, leases, bounds."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from gateway.catalog import ModelSpec
from gateway.engines.base import Engine
from gateway.errors import GatewayError
from gateway.fleet.startup import Startup
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
    spec: ModelSpec
    """The model as the catalog had it when the lease was granted."""
    engine: Engine
    on_cut: Cut | None = None
    error: GatewayError | None = None
    """Why it was cut, if it was; also before its holder could know of it."""
    granted_at: float = 0.0
    give_back: Callable[[Lease], None] = field(kw_only=True)
    """Has whoever granted it take it back; never waits."""

    def cut(self, error: GatewayError) -> None:
        self.error = error
        if self.on_cut is not None:
            self.on_cut(error)


class Leasing:
    """A context that holds a lease: waits for it as it is entered, and gives it back as it is left."""

    def __init__(self, obtain: Callable[[], Awaitable[Lease]]) -> None:
        self._obtain = obtain
        self._lease: Lease

    async def __aenter__(self) -> Lease:
        self._lease = await self._obtain()
        return self._lease

    async def __aexit__(self, *_: object) -> None:
        self._lease.give_back(self._lease)


class Paused(Exception):
    """Somebody froze the server; the words say so."""


class Life(Startup):
    """One life. The instance that made it is the only one to change it, but for what the server itself says."""

    def __init__(
        self,
        engine: Engine,
        *,
        start_timeout_s: float,
        stall_timeout_s: float,
        kept: bool,
        on_progress: Callable[[Progress], None],
        pause_timeout_s: float,
        adopted: bool = False,
    ) -> None:
        super().__init__(
            engine,
            start_timeout_s=start_timeout_s,
            stall_timeout_s=stall_timeout_s,
            on_progress=on_progress,
            pause_timeout_s=pause_timeout_s,
        )
        self.secret = secrets.token_urlsafe(32)
        self.placed = adopted
        """Whether it has the GPUs that it needs."""
        self.handle: Handle | None = None
        self.leases: dict[Lease, None] = {}  # in the order in which they were granted
        self.kept = kept
        """Whether an operator, `preload` or `pinned` wants this start, so that it is not called off."""
        self.for_all = False
        """Whether it was begun for those who queue anywhere in the model, so that it goes on once it has its GPUs."""
        self.adopted = adopted
        """Whether its server was made by an earlier life of the gateway, which may have served with it, or ended it."""
        self.stays = False
        """Whether its server goes on when the gateway lets go of it."""
        self.ready_at: float | None = None
        self.failed = False
        self.left: GatewayError | None = None
        """Why it is not known whether its server is gone, when it is not."""
        self.serve: asyncio.Task[None]
        self.task: asyncio.Task[None]
        self._watch: asyncio.Timeout | None = None
        self._paused = ""

    @property
    def served(self) -> bool:
        return self.ready_at is not None or self.adopted

    def has_place(self) -> None:
        """Begin to count the time of the start: it has its GPUs."""
        self.placed = True
        self.begin_again()

    def progress(self, progress: Progress) -> None:
        if self.ready_at is None:  # what a server says while it serves is no progress of its start
            super().progress(progress)

    def paused(self, reason: str) -> None:
        self._paused = reason
        if self._watch is not None and not self._watch.expired():
            self._watch.reschedule(self._loop.time())
        elif self.ready_at is None:
            super().paused(reason)

    @asynccontextmanager
    async def until_paused(self) -> AsyncIterator[None]:
        """Let what is done inside go on until the server is paused.

        Raises:
            Paused: it was.
        """
        try:
            async with asyncio.timeout(None) as self._watch:
                yield
        except TimeoutError:
            raise Paused(self._paused) from None
        finally:
            self._watch = None
