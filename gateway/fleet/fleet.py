"""All the models that this gateway may run, by name."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from gateway.catalog import Catalog, ModelSpec, deferred
from gateway.engines.base import Engine
from gateway.engines.keys import authorization
from gateway.errors import CatalogError, GatewayError, ModelNotRunning, NameTaken, RuntimeUnavailable, StartFailed
from gateway.fleet import refusals
from gateway.fleet.changes import Changes, changes_between, known_by_sight
from gateway.fleet.experience import Experience
from gateway.fleet.fetch import Fetch
from gateway.fleet.figures import FiguresOf, silent
from gateway.fleet.gpus import Gpus, place_of
from gateway.fleet.health import Health, Probe, Rest, rest
from gateway.fleet.identity import fingerprint, same_server, server_key, server_name
from gateway.fleet.instance import Entry, Instance
from gateway.fleet.journal import Journal
from gateway.fleet.replicas import Replicas, Served, as_one
from gateway.fleet.status import Failure, Status
from gateway.lifecycle import State
from gateway.runtimes.base import Found, Runtime

FIRST_LOOK_S = 10.0
"""How long the gateway's start waits for a runtime to say what runs there."""
LOOK_AGAIN_S = 2.0
ASK_AGAIN_S = 15.0
"""When it is asked again whether what was left of a removed model is gone."""
STRANGER_GRACE_S = 10.0
"""How long a server of ours that the catalog knows nothing of may take to leave."""
LEAVING_S = 30.0
"""How long those are waited for that have to go before models are preloaded."""

log = logging.getLogger(__name__)


class Fleet:
    """One `Instance` for each replica of each model of the catalog, made when the model is first asked for.

    Lives on one event loop.
    """

    def __init__(
        self,
        catalog: Catalog,
        engines: Mapping[str, Engine],
        runtimes: Mapping[str, Runtime],
        probe: Probe,
        journal: Journal,
        *,
        gpus: Gpus | None = None,
        experience: Experience | None = None,
        figures: FiguresOf = silent,
        keep_servers: bool = True,
        rest: Rest = rest,
        instance: type[Instance] = Instance,
    ) -> None:
        self.catalog = catalog
        self.journal = journal
        self._engines = engines
        self._runtimes = runtimes
        self._probe = probe
        self.gpus = gpus or Gpus(None)
        self.experience = experience or Experience()
        self._figures = figures
        self.keeps = keep_servers
        """Whether servers that can outlive the gateway do so."""
        self.unknown: dict[str, RuntimeUnavailable] = {}
        """The runtimes of which it is not known what they run, and why."""
        self.catalog_error: CatalogError | None = None
        """Why the file that the catalog comes from cannot be used as it is now, if so; `catalog` is what it was."""
        self._looked_at: set[str] = set()
        self._strangers: dict[tuple[str, str], tuple[Found, asyncio.Task[None]]] = {}
        self._errands: set[asyncio.Task[None]] = set()
        self._fetches: dict[str, Fetch] = {}
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._rest = rest
        self._instance_type = instance
        self._models: dict[str, Replicas] = {}
        self._downs: dict[str, Status] = {}
        self._closing: asyncio.Future[None] | None = None

    @property
    def closing(self) -> asyncio.Future[None]:
        """Done as soon as the gateway begins to shut down; what never ends by itself ends then."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_future()
        return self._closing

    def get(self, spec: ModelSpec) -> Served:
        """Return the one instance of this model, or its replicas.

        Raises:
            UnknownModel: the catalog had it when it was looked up, and has it no more.
            StartFailed: this version has no engine or runtime for it.
            RuntimeUnavailable: it is not known yet whether it runs already: its runtime does not answer.
        """
        if (known := self.catalog.models.get(spec.id)) is None:
            raise refusals.removed(spec)
        self._refuse_while_unknown(known)
        return self._model(known).served

    def _refuse_while_unknown(self, spec: ModelSpec) -> None:
        if (why := self.unknown.get(spec.runtime)) is not None:
            raise refusals.again(why, why.retry_after_s or LOOK_AGAIN_S)

    def running(self, spec: ModelSpec) -> Served:
        """Return a model that was started before, to stop it.

        Raises:
            ModelNotRunning: it never was, or others run its server.
            RuntimeUnavailable: it is not known whether it runs: its runtime does not answer.
        """
        self._refuse_while_unknown(spec)
        if spec.runtime == "external":
            raise refusals.not_ours(spec)
        if spec.id not in self._models:
            raise ModelNotRunning(f"{spec.id} is not running; there is nothing to stop.")
        return self._models[spec.id].served

    async def stop(self, spec: ModelSpec, *, force: bool = False) -> None:
        """Stop a model as `Instance.stop` does, and call its download off, if one is under way.

        Raises: as `running` and `Instance.stop`.
        """
        errand = self._fetching.get(spec.id)
        if errand:
            errand.cancel()
            await asyncio.wait([errand])
        try:
            await self.running(spec).stop(force=force)
        except ModelNotRunning:
            if not errand:
                raise

    def statuses(self) -> list[Status]:
        """Return a snapshot of every model, in the order of the catalog."""
        return [self.status(spec) for spec in self.catalog.models.values()]

    def _never_started(self, spec: ModelSpec) -> Status:
        """Return what is known of a model that was never started: always the same snapshot, for most are just that."""
        status = self._downs.get(spec.id)
        if status is None or status.spec is not spec:
            status = self._downs[spec.id] = _down(spec)
        return status

    def status(self, spec: ModelSpec) -> Status:
        model = self._models.get(spec.id)
        status = model.status if model else self._never_started(spec)
        if status.spec is not spec:  # the server before a change has not gone yet
            status = replace(status, spec=spec)
        if (why := self.unknown.get(spec.runtime)) is not None:
            status = replace(status, failure=Failure(why, self.journal.now()))
        fetch = self._fetches.get(spec.id)
        if not fetch or status.progress:
            return status
        return replace(status, progress=fetch.latest, estimate=lambda: fetch.eta_s)

    def fetch(self, spec: ModelSpec) -> Fetch:
        """Return the download of this model's image and weights, under way: begun here if it was not before.

        Raises:
            StartFailed: there is nothing that could be downloaded.
            RuntimeUnavailable: its runtime does not answer.
        """
        self._refuse_while_unknown(spec)
        if spec.id not in self._fetches:
            engine, runtime = self._parts(spec)
            fetch = self._fetches[spec.id] = Fetch(spec, engine, runtime, self.journal)
            self._fetching[spec.id] = self._errand(self._until_fetched(fetch), f"fetch {spec.id}")
        return self._fetches[spec.id]

    async def begin(self) -> None:
        """Take over what an earlier life of the gateway left running, remove what does not fit, and preload.

        A runtime that does not answer is asked again and again; its models cannot be used until it does.

        Raises:
            NameTaken: another gateway of the same name lives.
        """
        lasting = self._not_looked_at()
        self._preload(spec for spec in self.catalog.models.values() if spec.preload)
        for name in lasting:
            await self._look_first(name)

    def change(self, catalog: Catalog) -> None:
        """Go on by a changed catalog, which touches only the models whose entry changed (promise P9).

        What becomes of each is decided at once; that its server drains and goes takes its time, and so does the start
        of another one. A model that is added again while its former server leaves goes on as the same model.

        Raises:
            CatalogError: a server would have the name of one that still runs, and is another model's.
        """
        if self.closing.done():
            return
        if contended := list(self._contended(catalog)):
            raise CatalogError([f"{catalog.path.name}: {words}" for words in contended])
        before = self.catalog.models
        self.catalog = catalog.model_copy(update={"models": known_by_sight(before, catalog.models)})
        self._downs.clear()
        changes = changes_between(before, self.catalog.models)
        self._tell(changes)
        for name in self._not_looked_at():
            self._errand(self._look_late(name), f"look at {name} late")
        for spec in changes.removed:
            self._remove_model(spec)
        for spec in changes.added + changes.changed:
            self._change_model(spec, before.get(spec.id))

    def refuse(self, error: CatalogError) -> None:
        """Tell everybody that the catalog's file cannot be used as it is now. Nothing else changes."""
        self.catalog_error = error
        for complaint in error.complaints:
            log.warning("the changed catalog cannot be used, the one before stays in force: %s", complaint)
        self._journal_catalog()

    @property
    def longest_drain_s(self) -> float:
        """The most that any model may take to finish its requests."""
        specs = [*self.catalog.models.values(), *(instance.spec for instance in self._instances())]
        return max((spec.drain_timeout_s for spec in specs), default=0.0)

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
        if not self.closing.done():
            self.closing.set_result(None)
        for instance in self._instances():
            instance.close(force=force)
        self.gpus.close()
        self.journal.close()

    async def aclose(self) -> None:
        """Return when no server of any model runs any more, but for those that outlive the gateway."""
        self.close()
        for errand in self._errands:
            errand.cancel()
        await asyncio.gather(*self._errands, return_exceptions=True)
        await asyncio.gather(*(instance.aclose() for instance in self._instances()))
        await self.gpus.aclose()

    # What a changed catalog touches

    def _tell(self, changes: Changes) -> None:
        mended, self.catalog_error = self.catalog_error is not None, None
        for word, models in changes.ids().items():
            for model in models:
                log.info("tgi-%s: %s, by the catalog", model, word)
        if mended:
            log.info("the catalog can be used again")
        if changes or mended:
            self._journal_catalog(**changes.ids())

    def _journal_catalog(self, **ids: list[str]) -> None:
        complaints = list(self.catalog_error.complaints) if self.catalog_error else None
        said = {"added": [], "changed": [], "removed": [], **ids}
        self.journal.write("catalog", **said, catalog_error=complaints, at=self.journal.now())

    def _remove_model(self, spec: ModelSpec) -> None:
        self._call_off_fetch(spec)
        if model := self._models.get(spec.id):
            model.remove()
            self._errand(self._forget(spec, model), f"forget {spec.id}")

    def _change_model(self, spec: ModelSpec, before: ModelSpec | None) -> None:
        """Let a model go on by its new entry, and start it if that says so, or mends it."""
        if before and not same_server(self._engines[before.engine], before, spec):
            self._call_off_fetch(before)
        model = self._models.get(spec.id)
        had_failed = model is not None and any(one.status.state is State.FAILED for one in model.members)
        if model:
            _warn_of_idle_keys(spec)
            for one in model.members:
                one.figures = self._figures(spec.id)  # those of a model that was gone may be forgotten
            model.change(lambda: self._entry(spec), spec.replicas)
        self._take_back(spec)
        newly_preloaded = spec.preload and not (before and before.preload and before.replicas >= spec.replicas)
        if newly_preloaded or (had_failed and (spec.preload or spec.pinned)):
            self._preload([spec])

    def _contended(self, catalog: Catalog) -> Iterator[str]:
        """Yield in words which servers would have a name that another one still has."""
        owners = {one.key: one for one in self._instances() if one.has_its_name}
        begun = {one.key for one in self._instances() if one.status.state is not State.STOPPED}
        for spec in catalog.models.values():
            for key, name in ((server_key(spec, n), server_name(spec, n)) for n in range(spec.replicas)):
                owner = owners.get(key)
                if owner and owner.spec.id != spec.id:
                    there = "still there" if owner.runs else "perhaps still there"
                    yield _wait_for(spec, f"the server {name} of the model {owner.spec.id} is {there}")
                elif key in begun and (spec.runtime, name) in self._strangers:  # it cannot take over what is found
                    yield _wait_for(spec, f"an earlier server {name} is still there on runtime {spec.runtime}")

    async def _forget(self, spec: ModelSpec, model: Replicas) -> None:
        """Drop a removed model when nothing is left of it; until then it is the one that goes on, should it be back."""
        while spec.id not in self.catalog.models and self._models.get(spec.id) is model:
            try:
                await model.stop()
            except ModelNotRunning:
                del self._models[spec.id]
                return
            except GatewayError:  # it is not known whether its server is gone
                await asyncio.sleep(ASK_AGAIN_S)

    def _call_off_fetch(self, spec: ModelSpec) -> None:
        if errand := self._fetching.get(spec.id):
            errand.cancel()

    def _take_back(self, spec: ModelSpec) -> None:
        """Let a model whose server is being removed as nobody's see to that itself, so that a start waits for it.

        One that starts already has its GPUs for its own: it removes what is there of its name.
        """
        for replica in range(spec.replicas):
            found, errand = self._strangers.pop((spec.runtime, server_name(spec, replica)), (None, None))
            if not (found and errand):
                continue
            errand.cancel()
            self.gpus.give_back(_stranger(spec.runtime, found.name))
            instance = self._instance(spec, replica)
            if instance.status.state is State.STOPPED:
                instance.discard(found)
            else:
                self.gpus.hold(instance.key, place_of(found), instance)

    # What an earlier life has left

    def _not_looked_at(self) -> list[str]:
        """Return the runtimes of the catalog that keep servers and were never asked for them.

        From now on their models cannot be used until they have been.
        """
        used = {spec.runtime for spec in self.catalog.models.values()} - self._looked_at
        lasting: list[str] = [name for name, runtime in self._runtimes.items() if runtime.outlives and name in used]
        self._looked_at.update(lasting)
        self.unknown.update({name: refusals.not_known_yet(name) for name in lasting})
        return lasting

    async def _look_late(self, name: str) -> None:
        """Ask a runtime that a changed catalog is the first to use; another gateway of our name may have it."""
        await self._look_until_known(name, asyncio.create_task(self._look(name), name=f"look at {name}"))

    async def _look_first(self, name: str) -> None:
        look = asyncio.create_task(self._look(name), name=f"look at {name}")
        done, _ = await asyncio.wait([look], timeout=FIRST_LOOK_S)
        if done and isinstance(look.exception(), NameTaken):
            look.result()
        if name in self.unknown:
            log.warning("runtime %s: %s", name, self.unknown[name].detail)
            self._errand(self._look_until_known(name, look), f"look at {name} until it answers")

    async def _look_until_known(self, name: str, look: asyncio.Task[None]) -> None:
        """Ask a runtime what runs there until it says so."""
        try:
            while True:
                await asyncio.wait([look])
                if look.exception() is None:
                    log.info("runtime %s: it answers", name)
                    return
                await asyncio.sleep(LOOK_AGAIN_S)
                look = asyncio.create_task(self._look(name), name=f"look at {name}")
        finally:
            look.cancel()
            await asyncio.gather(look, return_exceptions=True)

    async def _look(self, name: str) -> None:
        try:
            found = await self._runtimes[name].find()
        except RuntimeUnavailable as error:
            self.unknown[name] = error
            raise
        leaving = [task for each in found if (task := self._settle(name, each))]
        del self.unknown[name]
        self._errand(self._preload_after(leaving, name), f"preload {name}")

    def _settle(self, runtime: str, found: Found) -> asyncio.Task[None] | None:
        """Adopt a server that was found, if it is still what the catalog asks for; or else return its removal."""
        spec, replica = self._named(found.name)
        if spec is None or spec.runtime != runtime:
            self.gpus.hold(_stranger(runtime, found.name), place_of(found))
            errand = self._errand(self._remove(runtime, found.name), f"remove {found.name}")
            self._strangers[runtime, found.name] = found, errand
            return errand
        if self._instance(spec, replica).status.state is not State.STOPPED:
            return None  # it comes from another runtime; its next start removes what is here of that name
        if found.runs and self._fits(spec, found) and self.gpus.has_room(place_of(found)):
            self._instance(spec, replica).adopt(found)
            return None
        return self._instance(spec, replica).discard(found)

    async def _remove(self, runtime: str, name: str) -> None:
        """Remove a server that no model of the catalog has, and try until it is gone."""
        while True:
            try:
                await self._runtimes[runtime].stop(name, grace_s=STRANGER_GRACE_S)
            except RuntimeUnavailable as error:
                log.warning("%s: not removed yet: %s", name, error.detail)
                self.gpus.stays(_stranger(runtime, name))
                await asyncio.sleep(LOOK_AGAIN_S)
            else:
                self.gpus.give_back(_stranger(runtime, name))
                self._strangers.pop((runtime, name), None)
                log.info("%s: removed, because no model of the catalog has it", name)
                return

    async def _preload_after(self, leaving: list[asyncio.Task[None]], runtime: str) -> None:
        """Preload once those that had to go have made room, or do not go: there may be room beside them."""
        if leaving:
            await asyncio.wait(leaving, timeout=LEAVING_S)
        self._preload(spec for spec in self.catalog.models.values() if spec.preload and spec.runtime == runtime)

    def _named(self, name: str) -> tuple[ModelSpec | None, int]:
        """Return whose server has this name, and which of its replicas it is."""
        for spec in self.catalog.models.values():
            for replica in range(spec.replicas):
                if server_name(spec, replica) == name:
                    return spec, replica
        return None, 0

    def _fits(self, spec: ModelSpec, found: Found) -> bool:
        try:
            return fingerprint(self._engines[spec.engine], spec) == found.fingerprint
        except GatewayError:  # what the catalog asks for cannot even be launched
            return False

    def _preload(self, specs: Iterable[ModelSpec]) -> None:
        """Begin the start of models that the catalog wants to run; one that cannot is logged.

        Those of a runtime of which it is not known yet what runs there follow when it is.
        """
        for spec in specs:
            if spec.runtime not in self.unknown:
                self._errand(self._preload_one(spec), f"preload {spec.id}")

    async def _preload_one(self, spec: ModelSpec) -> None:
        now = self.catalog.models.get(spec.id)
        if not (now and (now.preload or now.pinned)):  # another change came in between
            return
        try:
            await self.get(spec).start(wait=False)
        except GatewayError as error:
            log.warning("%s: not preloaded: %s", server_name(spec), error.detail)

    def _errand(self, what: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        errand = asyncio.create_task(what, name=name)
        self._errands.add(errand)
        errand.add_done_callback(self._errands.discard)
        return errand

    async def _until_fetched(self, fetch: Fetch) -> None:
        try:
            await fetch.run()
        finally:
            del self._fetches[fetch.spec.id], self._fetching[fetch.spec.id]

    # Making instances

    def _model(self, spec: ModelSpec) -> Replicas:
        if spec.id not in self._models:
            _warn_of_idle_keys(spec)
            self._models[spec.id] = Replicas(partial(self._make, spec.id), spec.replicas)
        return self._models[spec.id]

    def _instance(self, spec: ModelSpec, replica: int) -> Instance:
        return self._model(spec).members[replica]

    def _instances(self) -> Iterator[Instance]:
        for model in self._models.values():
            yield from model.members

    def _make(self, model: str, replica: int) -> Instance:
        spec = self.catalog.models[model]
        entry = self._entry(spec)
        instance = self._instance_type(
            spec,
            entry.engine,
            entry.runtime,
            entry.health,
            self.journal,
            self.gpus,
            outlives=entry.outlives,
            past=entry.past,
            replica=replica,
        )
        instance.figures = self._figures(spec.id)
        if self.closing.done():
            instance.close()
        return instance

    def _entry(self, spec: ModelSpec) -> Entry:
        engine, runtime = self._parts(spec)
        health = Health(
            engine,
            self._probe,
            interval_s=spec.health_interval_s,
            failures=spec.health_failures,
            headers=authorization(spec),
            rest=self._rest,
        )
        past = self.experience.of(spec, engine)
        return Entry(spec, engine, runtime, health, past, outlives=self.keeps and runtime.outlives)

    def _parts(self, spec: ModelSpec) -> tuple[Engine, Runtime]:
        engine, runtime = self._engines.get(spec.engine), self._runtimes.get(spec.runtime)
        if engine is None or runtime is None:
            cause, fix = "; ".join(deferred(spec)), "Ask for a model that this version runs; GET /models lists them."
            raise StartFailed(f"{spec.id} cannot be run: {cause}. {fix}", cause=cause, fix=fix)
        return engine, runtime


def _stranger(runtime: str, name: str) -> str:
    """Return what the GPUs' ledger calls a server that no model of the catalog has: none of them can be called so."""
    return f"{name} on {runtime}"


def _wait_for(spec: ModelSpec, what: str) -> str:
    return f"{spec.id}: {what}: leave this out, and save the file with it again when that is gone"


def _warn_of_idle_keys(spec: ModelSpec) -> None:
    for words in deferred(spec):
        log.warning("%s: %s", server_name(spec), words)


def _down(spec: ModelSpec) -> Status:
    names = [server_name(spec, replica) for replica in range(spec.replicas)]
    down = [Status(spec, name, State.STOPPED, 0.0, 0, 0, None, None, None, None, None, None) for name in names]
    return as_one(down) if len(down) > 1 else down[0]
