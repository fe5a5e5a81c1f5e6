"""Bugs planted on purpose: what the simulator must find, or it watches nothing. One for each promise it proves."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TypedDict

from gateway.catalog import Catalog
from gateway.errors import CatalogError, GatewayError
from gateway.fleet.fleet import Fleet
from gateway.fleet.gpus import Gpus, Tenant
from gateway.fleet.instance import CHANGED, Entry, Instance
from gateway.fleet.life import Lease, Life
from gateway.fleet.placement import Place
from gateway.fleet.queue import Ticket
from gateway.fleet.scheduling import Claim, Decision, Phase, Resident
from gateway.lifecycle import Event, State
from gateway.runtimes.base import Found, Handle


class Parts(TypedDict, total=False):
    instance: type[Instance]
    fleet: type[Fleet]
    gpus: type[Gpus]


class StopsBusyServers(Instance):
    """Breaks P1: does not drain."""

    def _lead_down(self, reason: str, *, force: bool = False) -> None:
        super()._lead_down(reason, force=True)


class StartsTwice(Instance):
    """Breaks P2: starts anew while the old life is still being cleared."""

    def _end(self, life: Life, reason: str) -> None:
        super()._end(life, reason)
        if self._queue or reason == "restart":
            self._serve_again = self._loop.create_task(
                self._runtime.start(self.engine.launch(self.spec, self.name, ""), life)
            )


class LosesLeases(Instance):
    """Breaks P4: a lease that is granted in the very tick in which its caller leaves is never given back."""

    def _withdraw(self, ticket: Ticket) -> None:
        self._queue.leave(ticket)
        self._last_use = self._loop.time()
        self._rearm()


class WaitsForEver(Instance):
    """Breaks P5: forgets the limit of a drain."""

    def _due(self) -> tuple[float, str] | None:
        due = super()._due()
        return None if due and due[1] == "drain_timeout" else due


class QueuesForEver(Instance):
    """Breaks P7: forgets to bound the wait of those who come while the model runs."""

    def _bound(self, ticket: Ticket) -> None:
        if self._state not in ("ready", "unhealthy"):
            super()._bound(ticket)


class ForgetsPromises(Instance):
    """Breaks P8: calls a start off although somebody was told to come back."""

    def _call_off_at(self) -> float | None:
        self._promised_until = 0.0
        return super()._call_off_at()


class HoldsOn(Instance):
    """Breaks P10: keeps the lease for a second after the caller has gone."""

    def _give_back(self, lease: Lease) -> None:
        self._loop.call_later(1.0, super()._give_back, lease)


class BelievesTheFirstMiss(Instance):
    """Breaks P11: takes a server for dead that missed its checks."""

    async def _watch(self, life: Life, handle: Handle) -> None:
        await self._health.until_lost(handle)
        await asyncio.sleep(0)
        raise RuntimeError("it did not answer")


class LeavesServers(Instance):
    """Breaks P2: does not remove the server of a life that failed."""

    async def _clear(self) -> GatewayError | None:
        return None if self._life and self._life.failed else await super()._clear()


class SleepsOn(Instance):
    """Breaks P4: does not wake the queue when a server has recovered."""

    def _move(self, event: Event, reason: str) -> None:
        recovered = self._state is State.UNHEALTHY and event is Event.PASS
        grant = self._grant
        if recovered:
            self._grant = lambda: None  # type: ignore[method-assign]
        super()._move(event, reason)
        self._grant = grant  # type: ignore[method-assign]


class NeverWakes(Instance):
    """Breaks P4: does not wake the queue when a lease is given back."""

    def _grant(self) -> None:
        if not any(ticket.asked_at < self._loop.time() for ticket in self._queue):
            super()._grant()


class IgnoresStalls(Instance):
    """Breaks P5: lets a start go on without any progress."""

    def _start(self, reason: str) -> None:
        super()._start(reason)
        if self._life:
            self._life._stall_timeout_s = 1e9


class BoundsTheWholeOnly(Instance):
    """Breaks P7: bounds the wait for a model that runs as if it were still to be started."""

    def _bound(self, ticket: Ticket) -> None:
        ticket.wait_until(ticket.asked_at + self._bounds.longest_wait_s)


class ComesBack(Instance):
    """Starts a model again that an operator has stopped."""

    def _lead_down(self, reason: str, *, force: bool = False) -> None:
        self._wanted = self._wanted or reason == "operator"
        super()._lead_down(reason, force=force)


class NeverIdle(Instance):
    """Does not stop what nobody uses."""

    def _due(self) -> tuple[float, str] | None:
        due = super()._due()
        return None if due and due[1] == "idle" else due


class AdoptsNothing(Instance):
    """Breaks P6: removes what runs, and starts it anew."""

    def adopt(self, found: Found) -> None:
        self.discard(found)


class AdoptsEverything(Instance):
    """Breaks P6: takes over what the catalog does not ask for any more."""

    def discard(self, found: Found) -> asyncio.Task[None]:
        self.adopt(found)
        return self._loop.create_task(asyncio.sleep(0), name="preload nothing")


class LeavesOrphans(Instance):
    """Breaks P6: forgets the servers that it does not want."""

    def discard(self, found: Found) -> asyncio.Task[None]:
        return self._loop.create_task(asyncio.sleep(0), name="preload nothing")


class GivesUpAdopting(Instance):
    """Breaks P11: takes a server for dead because its runtime does not say at once where it is."""

    async def _adopt(self, life: Life, found: Found) -> Handle:
        return await self._runtime.adopt(found, life)


class ForgetsLeftovers(Instance):
    """Breaks P6: never looks again for what a stop may have left."""

    def _due(self) -> tuple[float, str] | None:
        due = super()._due()
        return None if due and due[1] == "perhaps left" else due


class StartsTheClockAgain(Instance):
    """Breaks P5: gives an adopted server all the time to start that a new one has."""

    def adopt(self, found: Found) -> None:
        super().adopt(replace(found, made_at=self._journal.now()))


class PromisesTooEarly(Instance):
    """Breaks P3: gives its GPUs back before its server is gone."""

    def _end(self, life: Life, reason: str) -> None:
        super()._end(life, reason)
        self._gpus.give_back(self.spec.id)


class IgnoresItsPlace(Instance):
    """Breaks P3: starts on the first GPU whatever it was given."""

    async def _place(self, life: Life) -> Place:
        place = await super()._place(life)
        return replace(place, gpus=("0",)) if place.gpus else place


class RestartsForWords(Instance):
    """Breaks P9: takes its server down though only the gateway's own part of the entry changed."""

    def change(self, entry: Entry) -> None:
        super().change(entry)
        self._lead_down(CHANGED)


class KeepsTheServer(Instance):
    """Breaks P9: goes on with a server that the catalog does not ask for any more."""

    def change(self, entry: Entry) -> None:
        self._next = entry
        self._follow()


class Lingers(Instance):
    """Breaks P9: refuses everybody once the catalog has it no more, and stays."""

    def remove(self) -> None:
        self._removed = True


class ForgetsTheLast(Instance):
    """Breaks P9: of two changes in quick succession, the second one is lost."""

    def change(self, entry: Entry) -> None:
        if self._next is None:
            super().change(entry)


class RestartsAll(Fleet):
    """Breaks P9: a changed catalog is a reason to start everything afresh."""

    def change(self, catalog: Catalog) -> None:
        super().change(catalog)
        for instance in self._instances():
            instance._lead_down(CHANGED)


class EmptiesItself(Fleet):
    """Breaks P9: takes a bad catalog for one without models."""

    def refuse(self, error: CatalogError) -> None:
        super().refuse(error)
        for instance in self._instances():
            instance.remove()


class NeverAges(Gpus):
    """Breaks P3: nobody is ever held for a claim that has waited long, so busy ones may keep their GPUs for ever."""

    def _claim(self, tenant: Tenant) -> Claim:
        return replace(super()._claim(tenant), patience_s=1e9)


class YoungestFirst(Gpus):
    """Breaks P3: who came last is served first."""

    def _claim(self, tenant: Tenant) -> Claim:
        claim = super()._claim(tenant)
        return replace(claim, asked_at=-claim.asked_at)


class HoldsAtOnce(Gpus):
    """Breaks P3: holds whoever starts for whoever waits, so that servers go before they have served anybody."""

    def _resident(self, model: str, held: Place) -> Resident:
        known = super()._resident(model, held)
        if known.phase is Phase.STARTING:
            return replace(known, phase=Phase.UP, in_flight=1, owes=False, since=-1e9)
        return known


class EvictsBusyServers(Instance):
    """Breaks P3: makes room at once, whatever it is doing."""

    def hold(self, claimant: str | None) -> None:
        if claimant and self._life and self._life.leases:
            self._end(self._life, f"makes room for {claimant}")
        else:
            super().hold(claimant)


class EvictsMore(Gpus):
    """Breaks P3: has one more make room than it takes."""

    def _make_room(self, decision: Decision, now: float) -> None:
        super()._make_room(decision, now)
        for claimant in sorted(set(decision.evicted.values())):
            known = [self._resident(model, held) for model, held in self._held.items()]
            idle = [each.model for each in known if each.phase is Phase.UP and not (each.in_flight or each.pinned)]
            for model in idle[:1]:
                self._tenants[model].make_room(claimant)


class ClaimsAsBefore(Gpus):
    """Breaks P3: who has made room comes before the one for which it did, since its callers came first."""

    def _make_room(self, decision: Decision, now: float) -> None:
        super()._make_room(decision, now)
        self._yielded.clear()


class LeavesBeside(Gpus):
    """Breaks P3: lets an idle server go while another one measures what is free on their GPU."""

    def starts_beside(self, model: str) -> bool:
        return False


GPUS: dict[str, type[Gpus]] = {
    "P3-beside": LeavesBeside,
    "P3-starve": NeverAges,
    "P3-overtaken": YoungestFirst,
    "P3-thrash": HoldsAtOnce,
    "P3-more": EvictsMore,
    "P3-again": ClaimsAsBefore,
}
FLEETS: dict[str, type[Fleet]] = {"P9-others": RestartsAll, "P9-bad": EmptiesItself}
INSTANCES: dict[str, type[Instance]] = {
    "P1": StopsBusyServers,
    "P2": StartsTwice,
    "P2-left": LeavesServers,
    "P3": PromisesTooEarly,
    "P3-busy": EvictsBusyServers,
    "P3-place": IgnoresItsPlace,
    "P4": LosesLeases,
    "P4-recovery": SleepsOn,
    "P4-wake": NeverWakes,
    "P5": WaitsForEver,
    "P5-stall": IgnoresStalls,
    "P5-adopted": StartsTheClockAgain,
    "P6": AdoptsNothing,
    "P6-stale": AdoptsEverything,
    "P6-orphan": LeavesOrphans,
    "P7": QueuesForEver,
    "P7-whole": BoundsTheWholeOnly,
    "stop": ComesBack,
    "idle": NeverIdle,
    "P8": ForgetsPromises,
    "P6-leftover": ForgetsLeftovers,
    "P9": RestartsForWords,
    "P9-stale": KeepsTheServer,
    "P9-removed": Lingers,
    "P9-last": ForgetsTheLast,
    "P10": HoldsOn,
    "P11-adoption": GivesUpAdopting,
    "P11": BelievesTheFirstMiss,
}
BUGS = sorted([*INSTANCES, *FLEETS, *GPUS])


def parts_with(bug: str) -> Parts:
    """Return the parts of a gateway with this bug, as `simulate` takes them."""
    if bug in GPUS:
        return {"gpus": GPUS[bug]}
    return {"instance": INSTANCES[bug]} if bug in INSTANCES else {"fleet": FLEETS[bug]}
