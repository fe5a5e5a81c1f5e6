"""Getting a model's image and weights before anybody asks for it: one download, followed by any number of callers."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator

from gateway.catalog import ModelSpec
from gateway.engines.base import Engine
from gateway.errors import GatewayError, RuntimeUnavailable, StartFailed
from gateway.fleet import refusals
from gateway.fleet.admission import STOP_MARGIN_S
from gateway.fleet.estimates import told_s
from gateway.fleet.identity import launch_of, server_name
from gateway.fleet.journal import Journal
from gateway.fleet.startup import Startup
from gateway.fleet.status import describe, told
from gateway.runtimes.base import Launch, Progress, Runtime

log = logging.getLogger(__name__)


def download_name(spec: ModelSpec) -> str:
    """Return what the program that downloads is called on its runtime: no model's server, as ids are lower case."""
    return f"{server_name(spec)}.PULL"


class Fetch:
    """One download, from its beginning to its end, which no caller's departure changes.

    It ends by itself, by showing no progress for `stall_timeout`, or with the gateway.

    Raises:
        StartFailed: what the catalog names cannot be used.
    """

    def __init__(self, spec: ModelSpec, engine: Engine, runtime: Runtime, journal: Journal) -> None:
        self.spec = spec
        self.latest: Progress | None = None
        self._startup: Startup | None = None
        self._name = download_name(spec)
        self._engine = engine
        self._runtime = runtime
        self._journal = journal
        launch_of(engine, spec, secret="")
        self._launch = engine.download(spec, self._name)
        self._outcome: str | GatewayError | None = None
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    @property
    def eta_s(self) -> float | None:
        """How long the phase goes on in which it is, if its pace tells that."""
        return told_s(self._startup.course.left({}, self._loop.time())) if self._startup else None

    async def run(self) -> None:
        """Download, and leave nothing behind but what was downloaded. Those who follow are told how it ended."""
        try:
            self._end(await self._run(self._launch) if self._launch else "there is nothing to download")
        except GatewayError as error:
            self._end(error)
        finally:
            self._end(refusals.download_called_off(self.spec))

    async def follow(self) -> AsyncIterator[str]:
        """Yield how far it has come as often as that changes, and then what has come of it.

        Raises:
            StartFailed, StartTimeout, RuntimeUnavailable, ShuttingDown: nothing has; says why, and what to do.
        """
        last = None
        while self._outcome is None:
            news = self._news
            if self.latest and self.latest != last:
                last = self.latest
                yield told(last)
            if news is self._news:
                await news.wait()
        if isinstance(self._outcome, GatewayError):
            raise refusals.again(self._outcome, 0)
        yield f"done: {self._outcome}"

    async def _run(self, launch: Launch) -> str:
        startup = self._startup = Startup(
            self._engine,
            start_timeout_s=math.inf,
            stall_timeout_s=self.spec.stall_timeout_s,
            on_progress=self._progressed,
        )
        try:
            async with startup.start_bounds():
                handle = await self._runtime.start(launch, startup)
                end = await self._runtime.ended(handle)
        finally:
            await self._clear()
        if end.code != 0:
            found = self._engine.diagnose(end)
            words = f"{found.cause}. {found.fix}"
            raise StartFailed(words, cause=found.cause, fix=found.fix, evidence=list(found.evidence))
        return f"image and weights of {self.spec.id} are here"

    async def _clear(self) -> None:
        try:
            async with asyncio.timeout(STOP_MARGIN_S):
                await self._runtime.stop(self._name, grace_s=0)
        except (RuntimeUnavailable, TimeoutError) as error:
            log.warning("%s: not known to be gone: %s", self._name, error)

    def _progressed(self, progress: Progress) -> None:
        self.latest = progress
        self._journal.write("progress", model=self.spec.id, **(describe(progress, self.eta_s) or {}))
        self._tell()

    def _end(self, outcome: str | GatewayError) -> None:
        if self._outcome is None:
            self._outcome = outcome
            log.info("%s: %s", self._name, outcome.detail if isinstance(outcome, GatewayError) else outcome)
            self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
