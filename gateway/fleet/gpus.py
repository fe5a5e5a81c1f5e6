"""The GPUs' one ledger: who holds what, who waits for room, and who is asked to make it.

It decides nothing itself: whenever something changed it draws a snapshot, asks `scheduling.decide`, and does what that
says, all between two awaits.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from gateway.catalog import ModelSpec
from gateway.devices import Device
from gateway.engines.base import Engine
from gateway.errors import NoCapacity, StartFailed
from gateway.fleet.estimates import LEAST_S, Estimate
from gateway.fleet.outlook import Holder, room_in, serves_in
from gateway.fleet.placement import NOWHERE, Demand, Place, described, meets, misfit, named, place, unlimited
from gateway.fleet.refusals import BUSY_GPUS_RETRY_S
from gateway.fleet.returning import Returning
from gateway.fleet.scheduling import (
    HOLD_S,
    Claim,
    Decision,
    Phase,
    Resident,
    Snapshot,
    Usage,
    decide,
    in_vain,
    patience_s,
)
from gateway.fleet.sharing import launch_at
from gateway.runtimes.base import Found, Launch
from gateway.runtimes.inventory import Inventory

log = logging.getLogger(__name__)

PATIENCE_S = 120.0
"""How long a model waits for GPUs, at most, before others are held back for it."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """How a model uses what it holds, or wants what it waits for. Times are readings of the loop's clock."""

    phase: Phase
    in_flight: int
    queued: int
    since: float
    """When it took its place; once it is UP, when it became ready."""
    last_use_at: float
    asked_at: float
    """When the first of those who wait for it came."""
    cost_s: float
    usage: Usage
    owes: bool
    """Whether some still wait for it who did so when it became ready."""
    wanted: bool = False
    """Whether an operator or the catalog has it start, though nobody may queue for it."""


class Tenant(Protocol):
    """A server of a model, as the GPUs see it. Nothing in here waits."""

    spec: ModelSpec

    @property
    def key(self) -> str:
        """What it is known by here: the model's id, with a number for all replicas but the first."""

    def occupancy(self) -> Occupancy: ...

    def leaves_in(self) -> Estimate | None:
        """Return in how long it can have gone; None if that is not known, or if it never makes room."""

    def starts_in(self) -> Estimate | None:
        """Return how long a start of it takes; None if that is not known."""

    def waits(self) -> None:
        """Hear that there is no room yet."""

    def make_room(self, claimant: str) -> None:
        """Go now: nothing is in flight."""

    def hold(self, claimant: str | None) -> None:
        """Take no new requests until this one has gone, for `claimant`; or (None) take them again."""


@dataclass(eq=False, slots=True)
class _Waiting:
    tenant: Tenant
    placed: asyncio.Future[Place]
    why: str = ""


@dataclass(frozen=True, slots=True)
class _Hold:
    """`lasts_s`: how long it may."""

    claimant: str
    since: float
    lasts_s: float = HOLD_S


@dataclass(frozen=True, slots=True)
class _Spared:
    """One whose work has outlasted a hold: until when it takes requests, and how long the next hold may last."""

    until: float = -math.inf
    then_held_s: float = HOLD_S


NOT_HELD = _Hold("", math.inf)


def demand_of(spec: ModelSpec) -> Demand:
    """Return what a model asks for; a server that others run asks for nothing."""
    return Demand(0 if spec.runtime == "external" else spec.gpus, spec.gpu_memory_bytes)


def place_of(found: Found) -> Place:
    """Return what a server holds that was found running."""
    return Place(found.gpus, found.gpu_memory_bytes)


class Gpus:
    """The one owner of the GPUs' reservations and of the claims to them. Lives on one event loop.

    `devices` are the GPUs there are. Without them ids are counted up from 0, and the runtime says which of them do
    not exist.
    """

    def __init__(self, devices: Collection[Device] | None, inventory: Inventory | None = None) -> None:
        """Take what there is. Without an `inventory` memory counts as returned as soon as its server is gone."""
        self.devices = None if devices is None else tuple(devices)
        self._memory = Returning(inventory) if inventory else None
        self._returning: dict[asyncio.Task[None], tuple[str, Place]] = {}
        self._held: dict[str, Place] = {}
        self._tenants: dict[str, Tenant] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._holds: dict[str, _Hold] = {}
        self._spared: dict[str, _Spared] = {}
        self._yielded: dict[str, float] = {}
        """When a model, or one of its replicas, last made room for another."""
        self._staying: set[str] = set()
        """Strangers that do not go."""
        self._look: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    # What models ask for

    async def take(self, tenant: Tenant) -> Place:
        """Return the GPUs of a model once it has them; what it has already stays its own. Its caller bounds the wait.

        Raises:
            StartFailed: there are no such GPUs, were all of them free; says which there are.
            NoCapacity: those who hold them never let go of them.
        """
        model, demand = tenant.key, demand_of(tenant.spec)
        self._tenants[model] = tenant
        if model in self._held:
            return self._held[model]
        if not demand.count:
            return NOWHERE
        self.refuse_misfit(tenant.spec)
        waiting = self._waiting[model] = _Waiting(tenant, asyncio.get_running_loop().create_future())
        self.changed()
        try:
            return await waiting.placed
        finally:
            if self._waiting.get(model) is waiting:  # it leaves without them
                del self._waiting[model]
                self.changed()

    def is_misplaced(self, tenant: Tenant) -> bool:
        """Say whether a model holds GPUs on which it cannot start: others than its catalog entry asks for by now, or
        such where another server comes or goes.

        They are what a former server has: that must be gone, and its place given back, before `take`.
        """
        found = self._held.get(tenant.key)
        if found is None:
            return False
        return not meets(found, demand_of(tenant.spec), self.devices or ()) or self._moves_beside(tenant.key, found)

    def refuse_misfit(self, spec: ModelSpec) -> None:
        """Return if a model could have its GPUs, were all of them free.

        Raises:
            StartFailed: it never can; says which there are.
        """
        if self.devices is not None and (why := misfit(demand_of(spec), self.devices)):
            cause = f"{spec.id} can never run on the GPUs that are known: {why}"
            fix = "Correct `gpus` or `gpu_memory` of this model in models.yaml, or GATEWAY_GPUS."
            raise StartFailed(f"{cause}. {fix}", cause=cause, fix=fix)

    def refuse_in_vain(self, tenant: Tenant) -> None:
        """Return if a model that is down may hope for GPUs.

        Raises:
            NoCapacity: pinned models hold all that would do, so that a start would be of no use.
        """
        demand = demand_of(tenant.spec)
        if demand.count and self.devices is not None and not misfit(demand, self.devices):
            others = ((model, held) for model, held in self._held.items() if model != tenant.key)
            residents = [self._resident(model, held) for model, held in others]
            if why := in_vain(demand, self.devices, residents):
                raise _in_vain(tenant.key, why)

    def starts_beside(self, model: str) -> bool:
        """Say whether a server that shares a GPU with this model's is starting: it measures what is free there."""
        mine = self._held.get(model, NOWHERE)
        if mine.memory_bytes is None:
            return False
        beside = (name for name, held in self._held.items() if name != model and set(held.gpus) & set(mine.gpus))
        return any(name in self._tenants and self._phase_of(name) is Phase.STARTING for name in beside)

    def _moves_beside(self, model: str, found: Place) -> bool:
        others = [self._resident(name, held) for name, held in self._held.items() if name != model]
        moving = [each.place for each in others if each.phase in (Phase.STARTING, Phase.LEAVING)]
        moving += [held for _, held in self._returning.values()]
        return any(set(each.gpus) & set(found.gpus) for each in moving)

    def _phase_of(self, model: str) -> Phase:
        return self._tenants[model].occupancy().phase

    def hold(self, name: str, found: Place, tenant: Tenant | None = None) -> None:
        """Note the GPUs of a server that was found running; whose it is, if it is a model's.

        A `name` that is nobody's must be none that a model can have.
        """
        if found.gpus:
            gpus = (device.id for device in named(found.gpus, self.devices or ()))  # whatever it was told to have
            self._held[name] = replace(found, gpus=tuple(gpus))
        if tenant:
            self._tenants[name] = tenant

    def stays(self, name: str) -> None:
        """Note that a server that is nobody's does not go: nobody waits for its GPUs until it has gone all the same."""
        self._staying.add(name)
        self.changed()

    def has_room(self, found: Place) -> bool:
        """Say whether a server that was found may keep its GPUs beside those who hold some already."""
        if self.devices is None or not found.gpus:
            return True
        return place(Demand(found.gpus, found.memory_bytes), self.devices, self._places()) is not None

    async def fitted(self, launch: Launch, engine: Engine, model: str, found: Place) -> Launch:
        """Return `launch` on its GPUs, with what it is to be told of them. Asks what is really free: seconds at most.

        Raises:
            NoCapacity: other programs use what this model has reserved.
        """
        others = [*self._others(model), *(held for _, held in self._returning.values())]
        memory = await self._memory.before_start(found, others) if self._memory and found.gpus else {}
        return launch_at(found, launch, engine, devices=self.devices or (), others=others, memory=memory)

    def give_back(self, model: str) -> None:
        """Take back what a model held, whose server is gone: it is given to others once it is seen to be free."""
        self._holds.pop(model, None)
        self._spared.pop(model, None)
        self._staying.discard(model)
        if found := self._held.pop(model, None):
            if self._memory and not self._closed:
                comes_back = asyncio.create_task(self._until_returned(model, found), name=f"memory of {model}")
                self._returning[comes_back] = (model, found)
                comes_back.add_done_callback(self._returned)
            self.changed()

    async def _until_returned(self, model: str, found: Place) -> None:
        assert self._memory is not None
        if missing := await self._memory.returned(found, lambda: self._others(model)):
            log.warning("tgi-%s: its server is gone, and its memory is not seen to be free: %s", model, missing)

    def _returned(self, task: asyncio.Task[None]) -> None:
        del self._returning[task]
        if not task.cancelled() and (error := task.exception()):
            log.error("the memory of GPUs could not be watched", exc_info=error)
        self.changed()

    def _places(self) -> list[Place]:
        return [*self._held.values(), *(held for _, held in self._returning.values())]

    def _others(self, model: str) -> list[Place]:
        """Return what all other models hold."""
        return [held for name, held in self._held.items() if name != model]

    def changed(self) -> None:
        """Look again in the loop's next turn: something is other than it was."""
        if self._look is None and not self._closed and (self._waiting or self._holds):
            self._look = asyncio.get_running_loop().call_soon(self._decide)

    def close(self) -> None:
        """Give nobody any more GPUs, and ask nobody to make room."""
        self._closed = True
        for due in (self._look, self._timer, *self._returning):
            if due:
                due.cancel()

    async def aclose(self) -> None:
        """Return when nothing is watched any more."""
        self.close()
        await asyncio.gather(*self._returning, return_exceptions=True)

    # What is told of them

    def of(self, model: str) -> tuple[str, ...]:
        """Return the GPUs that a model has now."""
        return self._held.get(model, NOWHERE).gpus

    def place_of(self, model: str) -> Place:
        return self._held.get(model, NOWHERE)

    def why(self, model: str) -> str:
        """Return in words why a model has no GPUs yet; empty if it waits for none."""
        return self._waiting[model].why if model in self._waiting else ""

    def serves_in(self, model: str) -> Estimate | None:
        """Return in how long a model that waits for GPUs serves, if that can be told."""
        if model not in self._waiting:
            return None
        claims = {name: self._claim(each.tenant) for name, each in self._waiting.items()}
        mine = claims[model]
        before = [name for name, each in claims.items() if (each.asked_at, name) < (mine.asked_at, model)]
        room = room_in(mine.demand, self.known(), [*self._leaving()])
        return serves_in(room, [self._waiting[name].tenant.starts_in() for name in (*before, model)])

    def _leaving(self) -> Iterator[Holder]:
        """Yield what everybody has of the GPUs, and in how long he can have gone."""
        for name, held in self._held.items():
            yield held, self._tenants[name].leaves_in() if name in self._tenants else None
        for _, held in self._returning.values():
            yield held, Estimate(LEAST_S, 1)

    def holders(self, gpu: str) -> dict[str, Place]:
        """Return who holds a GPU or some of it, and what: in all, if what a model held has not come back yet."""
        found: dict[str, Place] = {}
        for model, held in [*self._held.items(), *self._returning.values()]:
            if gpu in held.gpus:
                found[model] = _both(found[model], held) if model in found else held
        return found

    def known(self) -> Sequence[Device]:
        """Return the GPUs that may be given: those there are, or as many as could be asked for."""
        if self.devices is not None:
            return self.devices
        return unlimited(self._places(), [demand_of(each.tenant.spec) for each in self._waiting.values()])

    def in_sight(self) -> Sequence[Device]:
        """Return the GPUs there are, and those that are held by a name that is none of theirs."""
        known = self.devices or ()
        names = {name for device in known for name in device.names}
        held = dict.fromkeys(gpu for each in self._places() for gpu in each.gpus if gpu not in names)
        return [*known, *map(Device, held)]

    # Deciding, and doing what was decided

    def _decide(self) -> None:
        self._look = None
        if self._timer:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._forget_old_holds(now)
        decision = decide(self._snapshot(now))
        self._place(decision)
        self._explain(decision)
        self._make_room(decision, now)
        for model, why in decision.hopeless.items():
            self._give_up(model, why)
        if decision.look_again_at is not None:
            self._timer = loop.call_at(decision.look_again_at, self.changed)

    def _snapshot(self, now: float) -> Snapshot:
        return Snapshot(
            now=now,
            devices=self.known(),
            residents=[
                *(self._resident(model, held) for model, held in self._held.items()),
                *(_leaving(model, held) for model, held in self._returning.values()),
            ],
            claims=[self._claim(each.tenant) for each in self._waiting.values() if not each.placed.done()],
        )

    def _resident(self, model: str, held: Place) -> Resident:
        tenant = self._tenants.get(model)
        if tenant is None:  # a stranger, who is being removed
            return replace(_leaving(model, held), phase=Phase.STUCK if model in self._staying else Phase.LEAVING)
        now, spared = tenant.occupancy(), self._spared.get(model, _Spared())
        hold = self._holds.get(model, NOT_HELD)
        return Resident(
            model,
            held,
            now.phase,
            now.in_flight,
            now.queued,
            pinned=tenant.spec.pinned,
            since=now.since,
            last_use_at=now.last_use_at,
            cost_s=now.cost_s,
            held_for=hold.claimant or None,
            held_at=hold.since,
            hold_s=hold.lasts_s if hold.claimant else spared.then_held_s,
            spared_until=spared.until,
            usage=now.usage,
            owes=now.owes,
            of=tenant.spec.id,
        )

    def _claim(self, tenant: Tenant) -> Claim:
        now, spec = tenant.occupancy(), tenant.spec
        patience = patience_s(now.cost_s, min(PATIENCE_S, spec.queue_timeout_s / 2))
        asked_at = max(now.asked_at, self._yielded.get(spec.id, -math.inf))
        waiting = max(now.queued, int(now.wanted))
        return Claim(tenant.key, demand_of(spec), asked_at, waiting, now.cost_s, patience, of=spec.id)

    def _explain(self, decision: Decision) -> None:
        for model, why in decision.waits.items():
            waiting = self._waiting[model]
            if not waiting.why:
                log.info("tgi-%s: %s", model, why)
                waiting.tenant.waits()
            waiting.why = why

    def _place(self, decision: Decision) -> None:
        for model, found in decision.placed.items():
            waiting = self._waiting.pop(model)
            self._held[model] = found
            waiting.placed.set_result(found)
            log.info("tgi-%s: gets GPU %s of %s", model, ", ".join(found.gpus), described(self.known()))

    def _make_room(self, decision: Decision, now: float) -> None:
        for model in self._holds.keys() - decision.held.keys() - decision.evicted.keys():
            self._let_go_on(model, now)
        for model, claimant in decision.held.items():
            before = self._holds.get(model, NOT_HELD)
            if before.claimant != claimant:
                log.info("tgi-%s: takes no new requests: %s has waited long enough", model, claimant)
            lasts_s = before.lasts_s if before.claimant else self._spared.pop(model, _Spared()).then_held_s
            self._holds[model] = _Hold(claimant, min(before.since, now), lasts_s)
            self._tenants[model].hold(claimant)
        for model, claimant in decision.evicted.items():
            # all its replicas come after the claimant from now on, had it just come
            self._yielded[self._tenants[model].spec.id] = math.nextafter(now, math.inf)
            self._tenants[model].make_room(claimant)

    def _let_go_on(self, model: str, now: float) -> None:
        """Hold a model no longer, and not again at once if its work has outlasted that."""
        hold = self._holds.pop(model)
        held_until = hold.since + hold.lasts_s
        if now >= held_until:
            self._spared[model] = _Spared(held_until + HOLD_S, 2 * hold.lasts_s)
        self._tenants[model].hold(None)

    def _forget_old_holds(self, now: float) -> None:
        """Begin anew with those who were not held again soon."""
        for model in [model for model, spared in self._spared.items() if now > spared.until + HOLD_S]:
            del self._spared[model]

    def _give_up(self, model: str, why: str) -> None:
        waiting = self._waiting.pop(model)
        if not waiting.placed.done():
            waiting.placed.set_exception(_in_vain(model, why))


def _both(one: Place, other: Place) -> Place:
    """Return in one what is held of the same GPU twice."""
    whole = one.memory_bytes is None or other.memory_bytes is None
    return replace(one, memory_bytes=None if whole else (one.memory_bytes or 0) + (other.memory_bytes or 0))


def _leaving(model: str, held: Place) -> Resident:
    return Resident(model, held, Phase.LEAVING, 0, 0, pinned=False, since=0.0, last_use_at=0.0, cost_s=0.0)


def _in_vain(model: str, why: str) -> NoCapacity:
    next_step = "Stop a model (POST /models/ID/stop), or tell of more GPUs with GATEWAY_GPUS"
    return NoCapacity(f"{model} {why}. {next_step}.", retry_after_s=BUSY_GPUS_RETRY_S)
