"""Who gets the GPUs next, who makes room, who waits: a pure function of a snapshot, so that the simulator can try it.

A claim is a model that is to be started and has no GPUs yet; a resident is one that holds some. The oldest claim comes
first. What fits is placed. For what does not fit, idle residents go: only as many as it takes, the least regretted
first, and each only when it is due: it has had its minimum residency, and either its callers seem to have left, or the
claim has waited about as long as the switch would take. A claim whose patience is over reserves the GPUs that it needs,
so that no younger one overtakes it there, and has residents held back: these take no new requests, finish those that
they have, and make room then.

All times are seconds; `now` and every `*_at` are readings of one monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum, auto

from gateway.fleet.placement import Demand, Device, Place, place

RESIDENCY = 1.0
"""A server is left in peace for as long as it took to start it: at most half of the time goes into switching."""
SPARE = 1.0
QUIET = 2.0
HORIZON = 4.0


class Phase(StrEnum):
    STARTING = auto()  # it loads
    UP = auto()  # it takes requests
    LEAVING = auto()  # its memory comes back by itself


@dataclass(frozen=True, slots=True)
class Usage:
    """How often a model is asked for, in constant memory: what is known of when its next request comes."""

    last_at: float = -math.inf
    interval_s: float = math.inf
    """Between two requests: a running geometric mean, which a single long silence does not spoil."""
    spread: float = 1.0
    """How far an interval is from that, as a factor's logarithm: 0 for a clock, about 1 for independent callers."""

    def asked(self, now: float) -> Usage:
        """Return what is known once a request has come."""
        if math.isinf(self.last_at):
            return Usage(now)
        interval_s = max(now - self.last_at, 0.1)
        if math.isinf(self.interval_s):
            return Usage(now, interval_s)
        off = math.log(interval_s / self.interval_s)
        return Usage(now, self.interval_s * math.exp(off * 0.25), self.spread * 0.75 + abs(off) * 0.25)

    def next_in_s(self, now: float) -> float:
        """Return in how many seconds the next request is expected."""
        silent_s = now - self.last_at
        if self.spread < 0.25 and silent_s < self.interval_s:
            return max(self.interval_s - silent_s, 1.0)
        return max(silent_s, min(self.interval_s, 1e6), 1.0)


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that holds GPUs."""

    model: str
    place: Place
    phase: Phase
    in_flight: int
    queued: int
    pinned: bool
    since: float
    """When it took its place; once it is UP, when it became ready."""
    last_use_at: float
    cost_s: float
    """What it takes to start it again, measured or estimated."""
    held_for: str | None = None
    """The claim for which the last decision held it."""
    usage: Usage = Usage()


@dataclass(frozen=True, slots=True)
class Claim:
    """A model that waits for GPUs. `patience_s` is how long it waits before it has others held back."""

    model: str
    demand: Demand
    asked_at: float
    waiting: int
    cost_s: float
    patience_s: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    now: float
    devices: Sequence[Device]
    residents: Sequence[Resident]
    claims: Sequence[Claim]


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done now. Whoever is in none of it waits."""

    placed: Mapping[str, Place] = field(default_factory=dict)
    """Claims that get their GPUs."""
    evicted: Mapping[str, str] = field(default_factory=dict)
    """Residents that go now, and for which claim."""
    held: Mapping[str, str] = field(default_factory=dict)
    """Residents that take no new requests until they have gone, and for which claim. All others take them."""
    waits: Mapping[str, str] = field(default_factory=dict)
    """Why each claim that is not placed waits, in words."""
    hopeless: Mapping[str, str] = field(default_factory=dict)
    """Claims that wait in vain, since pinned models have what they need, and why in words."""
    look_again_at: float | None = None
    """When this may change though nothing happens."""


class Rules:
    """What a policy is made of. The simulator tries others in the place of these."""

    def residency_s(self, resident: Resident) -> float:
        """Return for how long a resident that has become ready is left in peace."""
        return RESIDENCY * resident.cost_s

    def regret(self, resident: Resident, now: float) -> float:
        """Return what it costs that this one goes, for each second that its room is of use to others."""
        return resident.cost_s / resident.usage.next_in_s(now)

    def due_at(self, resident: Resident, claim: Claim) -> float:
        """Return when an idle resident goes for a claim that still has patience."""
        usage = resident.usage
        if usage.interval_s > HORIZON * resident.cost_s:
            return claim.asked_at
        return min(resident.last_use_at + QUIET * usage.interval_s, claim.asked_at + SPARE * resident.cost_s)


OURS = Rules()


def decide(snapshot: Snapshot, rules: Rules = OURS) -> Decision:
    """Return what to do: place what fits, oldest claim first, and make room for what does not."""
    table = _Table(snapshot, rules)
    for claim in sorted(snapshot.claims, key=lambda each: (each.asked_at, each.model)):
        table.serve(claim)
    return table.decision()


class _Table:
    """One decision in the making: what is given, promised and taken away, claim by claim."""

    def __init__(self, snapshot: Snapshot, rules: Rules) -> None:
        self.now, self.devices, self.rules = snapshot.now, snapshot.devices, rules
        self.residents = snapshot.residents
        self.going = {each.model for each in snapshot.residents if each.phase is Phase.LEAVING}
        self.starting = {gpu for each in snapshot.residents if each.phase is Phase.STARTING for gpu in each.place.gpus}
        self.promised: list[Place] = []
        self.placed: dict[str, Place] = {}
        self.evicted: dict[str, str] = {}
        self.held: dict[str, str] = {}
        self.waits: dict[str, str] = {}
        self.hopeless: dict[str, str] = {}
        self.looks: list[float] = []

    def decision(self) -> Decision:
        look_at = min((at for at in self.looks if at > self.now), default=None)
        return Decision(self.placed, self.evicted, self.held, self.waits, self.hopeless, look_at)

    def serve(self, claim: Claim) -> None:
        now_taken = [each.place for each in self.residents] + [Place((gpu,)) for gpu in self.starting]
        if (found := self._fit(claim, now_taken)) is not None:
            self.placed[claim.model] = found
            self.promised.append(found)
            self.starting.update(found.gpus)
            return
        self._wait_or_make_room(claim)

    def _wait_or_make_room(self, claim: Claim) -> None:
        if (found := self._fit_without(claim, ())) is not None:
            self._promise(claim, found, "waits for memory to come back")
            return
        aged = self.now - claim.asked_at >= claim.patience_s
        if not aged:
            self.looks.append(claim.asked_at + claim.patience_s)
        movable = [each for each in self.residents if not each.pinned and each.model not in self.going]
        up = [each for each in movable if each.phase is Phase.UP]
        at = {each.model: self._free_at(each, claim, aged) for each in up}
        due = [each for each in up if at[each.model] <= self.now]
        victims = self._fewest(claim, due)
        if victims is None:
            self.looks.extend(at.values())
            rest = self._fewest(claim, movable)
            if rest is None:
                self.hopeless[claim.model] = "pinned"
            elif aged and (found := self._fit_without(claim, rest)) is not None:
                self.promised.append(found)
            self.waits[claim.model] = "waits"
            return
        found = self._fit_without(claim, victims)
        assert found is not None
        self._promise(claim, found, "waits for ...")
        for each in victims:
            self.going.add(each.model)
            if each.in_flight:
                self.held[each.model] = claim.model
            else:
                self.evicted[each.model] = claim.model

    def _free_at(self, each: Resident, claim: Claim, aged: bool) -> float:
        rested_at = each.since + self.rules.residency_s(each)
        if aged:
            return rested_at
        if each.in_flight or each.queued:
            return math.inf
        return max(rested_at, self.rules.due_at(each, claim))

    def _promise(self, claim: Claim, found: Place, words: str) -> None:
        self.promised.append(found)
        self.waits[claim.model] = words

    def _fewest(self, claim: Claim, candidates: Iterable[Resident]) -> list[Resident] | None:
        regret = {each.model: self.rules.regret(each, self.now) for each in candidates}
        ordered = sorted(candidates, key=lambda each: (each.held_for != claim.model, regret[each.model]))
        for count in range(1, len(ordered) + 1):
            if self._fit_without(claim, ordered[:count]) is not None:
                return self._pruned(claim, ordered[:count])
        return None

    def _pruned(self, claim: Claim, victims: list[Resident]) -> list[Resident]:
        for each in reversed(victims):
            fewer = [other for other in victims if other is not each]
            if self._fit_without(claim, fewer) is not None:
                victims = fewer
        return victims

    def _fit_without(self, claim: Claim, victims: Collection[Resident]) -> Place | None:
        gone = self.going.union(each.model for each in victims)
        return self._fit(claim, [each.place for each in self.residents if each.model not in gone])

    def _fit(self, claim: Claim, taken: list[Place]) -> Place | None:
        return place(claim.demand, self.devices, taken + self.promised)
