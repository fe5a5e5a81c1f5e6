"""A simulated catalog that changes, its file, and the witness of promise P9: only what changed is touched."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from gateway.catalog import Catalog, ModelSpec
from gateway.catalog_watch import CatalogWatch
from gateway.errors import CatalogError, GatewayError
from gateway.fleet.identity import same_server
from gateway.fleet.instance import CHANGED, REMOVED, Instance
from gateway.fleet.life import Lease, Life
from gateway.fleet.placement import GIB
from gateway.lifecycle import DOWN, MADE, SERVING, STARTING_UP, State
from tests.simulator.servers import SimulatedEngine
from tests.simulator.watched import Waiter, Watched
from tests.simulator.world import FORMER, ROUNDING_S, World

BAD = CatalogError(["models.yaml: m: gpus: must be a number", "models.yaml: default_model: there is no model x"])
GONE = CatalogError(["models.yaml: there is no such file"])
PATH = Path("models.yaml")


class MemoryFile:
    """The twin of a catalog's file. What it says is a number, and what that means is known here."""

    def __init__(self, specs: Iterable[ModelSpec]) -> None:
        self._loop = asyncio.get_running_loop()
        self._meanings: dict[bytes, Catalog | CatalogError] = {}
        self._says: bytes | CatalogError = b""
        self._began = self._loop.time()
        self._looks = 0
        self._disturbed: asyncio.Future[None] = self._loop.create_future()
        self.save(catalog_of(specs))

    def save(self, meaning: Catalog | CatalogError) -> None:
        content = b"%d" % len(self._meanings)
        self._meanings[content] = meaning
        self._put(content)

    def vanish(self) -> None:
        self._put(GONE)

    def half_write(self) -> None:
        """Hold what no reader should make anything of: not even a bad catalog, as long as it does not last."""
        self._put(b"half of " + b"%d" % len(self._meanings))

    async def read(self) -> bytes:
        self._looks += 1
        if isinstance(self._says, CatalogError):
            raise self._says
        return self._says

    async def load(self, content: bytes) -> Catalog:
        meaning = self._meanings.get(content, BAD)
        if isinstance(meaning, CatalogError):
            raise meaning
        return meaning

    async def rest(self, seconds: float) -> None:
        """Rest as the real one does, but jump over all looks that could only find the same once more."""
        if self._looks >= 2:
            await asyncio.shield(self._disturbed)
        passed = self._loop.time() - self._began
        await asyncio.sleep(seconds - passed % seconds)

    def _put(self, says: bytes | CatalogError) -> None:
        self._says = says
        self._looks = 0
        disturbed, self._disturbed = self._disturbed, self._loop.create_future()
        disturbed.set_result(None)


def catalog_of(specs: Iterable[ModelSpec]) -> Catalog:
    return Catalog(path=PATH, default_model=None, models={spec.id: spec for spec in specs})


@dataclass(frozen=True)
class Seen:
    """What must stay as it is when others change. A lease more is no harm: there may be more slots than before."""

    instance: Instance | None
    life: Life | None
    state: State
    leases: frozenset[Lease]

    def goes_on(self, after: Seen) -> bool:
        same = (after.instance, after.life, after.state) == (self.instance, self.life, self.state)
        return same and self.leases <= after.leases


class ChangingWorld(World):
    """A world whose catalog is a file that is watched, as the real one is."""

    def _open(self, specs: list[ModelSpec], *, keep: bool) -> None:
        super()._open(specs, keep=keep)
        self.file = MemoryFile(specs)
        self._changed_at: dict[str, float] = {}
        self._pending: dict[str, ModelSpec] = {}  # what holds once the server before has gone
        self._perhaps_kept: set[str] = set()
        """Whose next start may go on or be called off: it began for a reason that a change has given or taken."""
        self._touching: frozenset[str] | None = None
        if watching := getattr(self, "_watching", None):
            watching.cancel()
        watch = CatalogWatch(self.file, self.take, self._refuse, rest=self.file.rest)
        self._watching = self.loop.create_task(watch.run(), name="watch the catalog")

    async def close(self) -> None:
        while self._change:
            await asyncio.wait([self._change])
        self._watching.cancel()
        await asyncio.wait([self._watching])
        await super().close()

    # The catalog changes

    def take(self, catalog: Catalog) -> None:
        """Have the fleet take a changed catalog, and see whom it touches in this instant."""
        if self.fleet.closing.done():
            self.fleet.change(catalog)
            return
        before, after = self.fleet.catalog.models, catalog.models
        self.many |= {model for model, spec in after.items() if spec.replicas > 1}
        touched = {model for model in {*before, *after} if before.get(model) != after.get(model)}
        seen = {model: self._seen(model) for model in before}
        if touched:
            self.tell(f"the catalog changes: {', '.join(sorted(touched))}")
        stay = {model for model in touched if model in before and model in after and self._stays(model, after[model])}
        for model in sorted(touched):
            self._expect(model, before.get(model), after.get(model))
        self._touching = frozenset(touched - stay)
        self.fleet.change(catalog)
        self._touching = None
        for model in before.keys() - self.many:
            if (model not in touched or model in stay) and not seen[model].goes_on(self._seen(model)):
                self.breaks(f"P9: {model} is touched by a change that is not its server's")
        for model in touched - self.many:
            self._witness_change(model, after.get(model))

    def _refuse(self, error: CatalogError) -> None:
        catalog, seen = self.fleet.catalog, {model: self._seen(model) for model in self.watched}
        self.tell("a bad catalog")
        self.fleet.refuse(error)
        if self.fleet.catalog is not catalog or seen != {model: self._seen(model) for model in self.watched}:
            self.breaks("P9: a bad catalog changes something")
        if self.fleet.catalog_error is not error:
            self.breaks("P9: nobody is told of a bad catalog")

    def _seen(self, model: str) -> Seen:
        instance = self._instance_of(model)
        if instance is None:
            return Seen(None, None, State.STOPPED, frozenset())
        life = instance._life
        return Seen(instance, life, instance.status.state, frozenset(life.leases if life else ()))

    def _instance_of(self, model: str) -> Instance | None:
        known = self.fleet._models.get(model)
        return known.members[0] if known else None

    def _stays(self, model: str, spec: ModelSpec) -> bool:
        """Say whether the server that a model has, or is about to have, is what its new entry asks for."""
        return same_server(SimulatedEngine(), self.watched[model].spec, spec)

    def _expect(self, model: str, before: ModelSpec | None, after: ModelSpec | None) -> None:
        """Note what the change allows, before it comes."""
        now = self.loop.time()
        if after is None:
            watched = self.watched[model]
            watched.asked_for = watched.kept = False
            watched.stop_asked = True
            self._pending.pop(model, None)
            return
        watched = self.watched.setdefault(model, Watched(after, since=now))
        if watched.state not in DOWN and self._has_reason(watched.spec, before, after):
            self._perhaps_kept.add(model)
        watched.asked_for = watched.asked_for or before is None
        if watched.state is State.FAILED and (after.preload or after.pinned):
            watched.asked_for = True
        if watched.state in DOWN or self._stays(model, after):
            self._now_is(model, after)
        else:
            self._pending[model] = after
        if before is None or not same_server(SimulatedEngine(), before, after) or not self._stays(model, after):
            watched.stop_asked = True

    def _has_reason(self, *specs: ModelSpec | None) -> bool:
        return any(spec.preload or spec.pinned for spec in specs if spec)

    def _now_is(self, model: str, spec: ModelSpec) -> None:
        """Judge a model by another entry from now on. What is overdue by it is due now, and not before."""
        watched, now = self.watched[model], self.loop.time()
        self._pending.pop(model, None)
        watched.spec = spec
        self._changed_at[model] = now
        if spec.idle_timeout_s is not None:
            watched.last_use = max(watched.last_use, now - spec.idle_timeout_s)

    def _witness_change(self, model: str, spec: ModelSpec | None) -> None:
        state, name = self.fleet.status(self.watched[model].spec).state, f"tgi-{model}"
        if spec is None and (state in STARTING_UP or state in SERVING):
            self.breaks(f"P9: {model} is removed from the catalog, and is {state}")
        if spec and state in MADE and not self._fits(spec, self.runtime.newest(name)):
            self.breaks(f"P9: {model} is {state} with a server that the catalog does not ask for")
        instance = self._instance_of(model)
        if spec and instance and (instance._next.spec if instance._next else instance.spec) != spec:
            self.breaks(f"P9: a change of {model} is lost")

    # The witness

    def moved(self, data: Mapping[str, Any]) -> None:
        model, to = data["model"], data["to"]
        if self._touching is not None and model not in self._touching:
            self.breaks(f"P9: {model} moves because others are changed")
        if to == State.STARTING and model not in self.fleet.catalog.models:
            self.breaks(f"P9: {model} is started, and is not in the catalog")
        if to == State.STARTING:
            self.watched[model].adopting = False  # what was found was not wanted, and is gone
        super().moved(data)
        if to in DOWN and model in self._pending:
            self._now_is(model, self._pending[model])
        if to in (State.READY, State.FAILED):
            self._perhaps_kept.discard(model)
        spec = self.fleet.catalog.models.get(model)
        if to == State.READY and spec and not self._fits(spec, self.runtime.newest(f"tgi-{model}")):
            self.breaks(f"P9: {model} is ready with a server that the catalog does not ask for")
        if data["reason"] in (CHANGED, REMOVED) and not self.watched[model].stop_asked:
            self.breaks(f"P9: {model} goes ({data['reason']}), and its entry did not change")

    def witness_adoption(self, data: Mapping[str, Any]) -> None:
        if self._touching is None:  # else it is one that nobody wanted, and that is let go on its way out
            super().witness_adoption(data)

    def _deadline(self, watched: Watched) -> float | None:
        deadline = super()._deadline(watched)
        return None if deadline is None else max(deadline, self._judged_since(watched))

    def _waits_until(self, watched: Watched, waiter: Waiter) -> float:
        until = super()._waits_until(watched, waiter)
        if self._judged_since(watched) < waiter.asked_at:
            return until
        bounded_anew = self._judged_since(watched) + (watched.spec.queue_timeout_s if watched.state in SERVING else 0)
        return max(until, bounded_anew)

    def _unwanted_from(self, watched: Watched) -> float:
        if watched.spec.id in self._perhaps_kept:
            return float("inf")
        return max(super()._unwanted_from(watched), self._judged_since(watched))

    def _witness_calling_off(self, watched: Watched, reason: str) -> None:
        if watched.spec.id not in self._perhaps_kept:
            super()._witness_calling_off(watched, reason)

    def _judged_since(self, watched: Watched) -> float:
        return self._changed_at.get(watched.spec.id, 0.0)

    def _refused(self, spec: ModelSpec, error: GatewayError, began: float) -> None:
        if self._changed_at.get(spec.id, -1.0) >= began - ROUNDING_S:
            spec = spec.model_copy(update={"queue_timeout_s": 0.0})  # its bound was another one
        super()._refused(spec, error, began)

    # Callers and operators may name a model that is gone

    async def request(self, spec: ModelSpec, work_s: float, *, max_wait_s: float | None = None) -> str:
        if spec.id not in self.watched:
            return self._ended("MODEL_NOT_FOUND")
        return await super().request(spec, work_s, max_wait_s=max_wait_s)

    async def operate(self, spec: ModelSpec, verb: str) -> None:
        if spec.id in self.watched:
            await super().operate(spec, verb)
        else:
            self.tell(f"operator: {verb} {spec.id} means nobody")


# ---- what people do to a catalog -----------------------------------------------------------------------------------


async def edit(world: ChangingWorld, random: Random) -> None:
    """Change the catalog in one of the ways in which people and machines do."""
    if world.down or world.fleet.closing.done():
        return
    now = catalog_of(world.fleet.catalog.models.values())
    kind = random.choice(["save", "save", "save", "at once", "several", "bad", "half", "gone", "back again"])
    world.tell(f"catalog: {kind}")
    match kind:
        case "save":
            world.file.save(changed(now, random))
        case "at once":  # as if the file had been judged in this very instant
            later = changed(now, random)
            world.file.save(later)
            world.take(later)
        case "several":
            running = [spec.id for spec in now.models.values() if world.fleet.status(spec).state not in DOWN]
            one = random.choice([None, *running])  # who works on an entry saves it again and again
            for _ in range(random.randint(2, 4)):
                now = with_one(now, with_another_server(now.models[one], random)) if one else changed(now, random)
                world.file.save(now)
                world.take(now)
        case "bad":
            world.file.save(BAD)
            await _then_save(world, random, [0.0, 0.5, 3.0, 600.0], changed(now, random))
        case "half":
            world.file.half_write()
            await _then_save(world, random, [0.0, 0.3, 0.9], changed(now, random))
        case "gone":
            world.file.vanish()
            await _then_save(world, random, [0.0, 0.5, 30.0], now)
        case _:
            model = random.choice(list(now.models.values()))
            world.file.save(without(now, model))
            await _then_save(world, random, [0.0, 0.5, 1.5, 10.0, 90.0], with_one(without(now, model), model))


async def _then_save(world: ChangingWorld, random: Random, after_s: list[float], catalog: Catalog) -> None:
    await asyncio.sleep(random.choice(after_s))
    world.file.save(catalog)


def changed(catalog: Catalog, random: Random) -> Catalog:
    """Return the same catalog with one or more of its models changed, removed or added."""
    for _ in range(random.choice([1, 1, 2, 3])):
        spec = random.choice(list(catalog.models.values()))
        match random.choice(["words", "words", "server", "remove", "add", "rename"]):
            case "words":
                catalog = with_one(catalog, with_other_words(spec, random))
            case "server":
                catalog = with_one(catalog, with_another_server(spec, random))
            case "remove":
                catalog = without(catalog, spec)
            case "add":
                catalog = with_one(catalog, _named(spec, random))
            case _:
                catalog = with_one(without(catalog, spec), _named(spec, random))
    return catalog


def with_one(catalog: Catalog, spec: ModelSpec) -> Catalog:
    return catalog_of({**catalog.models, spec.id: spec}.values())


def without(catalog: Catalog, spec: ModelSpec) -> Catalog:
    left = [each for each in catalog.models.values() if each.id != spec.id]
    return catalog_of(left) if left else catalog


def with_other_words(spec: ModelSpec, random: Random) -> ModelSpec:
    """Return an entry that asks for the same server, and treats its callers in another way."""
    said = {
        "idle_timeout_s": random.choice([30.0, 900.0, None]),
        "queue_timeout_s": random.choice([5.0, 60.0, 300.0]),
        "drain_timeout_s": random.choice([2.0, 60.0]),
        "abandon_after_s": random.choice([5.0, 60.0]),
        "health_interval_s": random.choice([5.0, 10.0]),
        "max_concurrency": random.choice([1, 4, 16]),
        "max_queue": random.choice([0, 8, 256]),
        "aliases": (f"alias-{random.randint(0, 9**9)}",),
        "preload": random.random() < 0.2,
        "pinned": random.random() < 0.2,
    }
    if spec.replicas > 1:
        said["replicas"] = random.choice([1, 2, 3])
    return spec.model_copy(update=dict(random.sample(sorted(said.items()), random.randint(1, 4))))


def with_another_server(spec: ModelSpec, random: Random) -> ModelSpec:
    bounds = {
        "start_timeout_s": random.choice([60.0, 1200.0]),
        "stall_timeout_s": random.choice([20.0, 180.0]),
        "unhealthy_timeout_s": random.choice([10.0, 60.0]),
        "stop_grace_s": random.choice([1.0, 10.0]),
    }
    gpus = {"gpu_memory_bytes": random.choice([None, 4 * GIB, 14 * GIB])} if spec.gpus else {}
    return with_other_words(spec, random).model_copy(update={"args": {"version": random.random()}, **bounds, **gpus})


def _named(spec: ModelSpec, random: Random) -> ModelSpec:
    """Return the same entry under another id: sometimes one that was there before, or a server of ours still has."""
    names = [FORMER.removeprefix("tgi-"), *(f"model-{number}" for number in range(6))]
    name = random.choice(names)
    return spec.model_copy(update={"id": name, "weights_source": f"{name}.gguf", "aliases": ()})
