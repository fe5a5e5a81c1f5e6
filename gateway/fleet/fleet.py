"""All the models that this gateway may run, by name."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from gateway.catalog import Catalog, ModelSpec, deferred
from gateway.engines.base import Engine
from gateway.errors import GatewayError, ModelNotRunning, StartFailed
from gateway.fleet.health import Health, Probe, Rest, rest
from gateway.fleet.instance import Instance
from gateway.fleet.journal import Journal
from gateway.fleet.status import Status
from gateway.lifecycle import State
from gateway.runtimes.base import Runtime

log = logging.getLogger(__name__)


class Fleet:
    """One `Instance` for each model of the catalog, made when it is first asked for. Lives on one event loop."""

    def __init__(
        self,
        catalog: Catalog,
        engines: Mapping[str, Engine],
        runtimes: Mapping[str, Runtime],
        probe: Probe,
        journal: Journal,
        *,
        rest: Rest = rest,
        instance: type[Instance] = Instance,
    ) -> None:
        self.catalog = catalog
        self.journal = journal
        self._engines = engines
        self._runtimes = runtimes
        self._probe = probe
        self._rest = rest
        self._instance = instance
        self._instances: dict[str, Instance] = {}
        self._closing: asyncio.Future[None] | None = None

    @property
    def closing(self) -> asyncio.Future[None]:
        """Done as soon as the gateway begins to shut down; what never ends by itself ends then."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_future()
        return self._closing

    def get(self, spec: ModelSpec) -> Instance:
        """Return the one instance of this model.

        Raises:
            StartFailed: this version has no engine or runtime for it.
        """
        if spec.id not in self._instances:
            self._instances[spec.id] = self._make(spec)
        return self._instances[spec.id]

    def running(self, spec: ModelSpec) -> Instance:
        """Return the instance of a model that was started before.

        Raises:
            ModelNotRunning: it never was.
        """
        if spec.id not in self._instances:
            raise ModelNotRunning(f"{spec.id} is not running; there is nothing to stop.")
        return self._instances[spec.id]

    def statuses(self) -> list[Status]:
        """Return a snapshot of every model, in the order of the catalog."""
        return [self.status(spec) for spec in self.catalog.models.values()]

    def status(self, spec: ModelSpec) -> Status:
        instance = self._instances.get(spec.id)
        return instance.status if instance else _never_started(spec)

    async def preload(self) -> None:
        """Begin the start of every model that the catalog wants from the beginning; one that cannot is logged."""
        for spec in self.catalog.models.values():
            if spec.preload:
                try:
                    await self.get(spec).start(wait=False)
                except GatewayError as error:
                    log.error("%s: not preloaded: %s", server_name(spec), error.detail)

    def runtime_of(self, spec: ModelSpec) -> Runtime:
        """Return the runtime that has this model's output.

        Raises:
            ModelNotRunning: this version has no such runtime, so there is no output.
        """
        try:
            return self._runtimes[spec.runtime]
        except KeyError:
            raise ModelNotRunning(f"{spec.id} never ran; there is no log.") from None

    def close(self, *, force: bool = False) -> None:
        """Refuse all further requests, and let what runs finish within its drain limit, or (`force`) cut it off."""
        for instance in self._instances.values():
            instance.close(force=force)
        self.journal.close()
        if not self.closing.done():
            self.closing.set_result(None)

    async def aclose(self) -> None:
        """Return when no server of any model runs any more."""
        self.close()
        await asyncio.gather(*(instance.aclose() for instance in self._instances.values()))

    def _make(self, spec: ModelSpec) -> Instance:
        engine, runtime = self._parts(spec)
        for words in deferred(spec):
            log.warning("%s: %s", server_name(spec), words)
        health = Health(
            engine, self._probe, interval_s=spec.health_interval_s, failures=spec.health_failures, rest=self._rest
        )
        instance = self._instance(spec, server_name(spec), engine, runtime, health, self.journal)
        if self.closing.done():
            instance.close()
        return instance

    def _parts(self, spec: ModelSpec) -> tuple[Engine, Runtime]:
        engine, runtime = self._engines.get(spec.engine), self._runtimes.get(spec.runtime)
        if engine is None or runtime is None:
            cause, fix = "; ".join(deferred(spec)), "Ask for a model that this version runs; GET /models lists them."
            raise StartFailed(f"{spec.id} cannot be run: {cause}. {fix}", cause=cause, fix=fix)
        return engine, runtime


def server_name(spec: ModelSpec) -> str:
    """Return what the server of a model is called on every runtime."""
    return f"tgi-{spec.id}"


def _never_started(spec: ModelSpec) -> Status:
    return Status(spec, server_name(spec), State.STOPPED, 0.0, 0, 0, None, None, None, None, None, None)
