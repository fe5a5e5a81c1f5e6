"""Who gets the GPUs next, who makes room, who waits: a pure function of a snapshot, so that the simulator can try it.

A claim is a model that is to be started and has no GPUs yet; a resident is one that holds some. The oldest claim comes
first, and what fits is placed. For what does not fit, residents make room: only as many as it takes, none while leaving
ones suffice, the least regretted first.

- While a claim has patience, only idle residents go for it: they have had their minimum residency, and their callers
  are not expected back before the claim would lose its patience. All others go on serving whatever comes for them, so
  that requests for one model are served together before the next switch.
- A claim that has no patience left reserves the GPUs that it needs, so that no younger one overtakes it there or starts
  there meanwhile, and residents are held for it: they take no new requests, finish those that they have, and go. One
  whose work outlasts `HOLD_S` takes requests again for as long, and is then held anew for twice as long.

All times are seconds; `now` and every `*_at` are readings of one monotonic clock. The clock is only ever compared with
instants that do not move, so `look_again_at` is exact.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum, auto

from gateway.fleet.placement import Demand, Device, Place, gibibytes, misfit, named, place

RESIDENCY = 0.5
"""A server is left in peace for this part of what it took to start it, so that serving keeps up with switching."""
DOUBT = 2.0
"""An idle server goes early if it is expected back no sooner than after this many times the claim's patience."""
WORTH = 4.0
"""A claim's patience is at most this many times what its own start takes: what loads in a moment waits for a moment."""
TURN_S = 120.0
"""How long a server serves those who waited for its start, at most, before it is held for others."""
HOLD_S = 60.0
"""How long a server is held at a stretch, at first. If its work outlasts that, it takes requests again for so long:
all its callers would wait with the claim for one of them. The next stretch is twice as long, so it comes to an end.
"""
MOST_EXAMINED = 16
"""So many claims at once have room made for them; those behind them get what is free."""
LINGER = 0.5
"""An idle server is waited for at most this part of what it takes to start it again: it may never be asked for."""
LEAST_PATIENCE = 0.25
"""The part of its patience that a claim has however long its own start takes."""
LEARNING = 0.25
"""The weight of the latest interval between two requests."""
REGULAR = 0.25
"""Intervals with a `spread` below this come like clockwork."""


class Phase(StrEnum):
    STARTING = auto()  # it loads
    UP = auto()  # it takes requests
    LEAVING = auto()  # its memory comes back by itself
    STUCK = auto()  # it is not known whether its server is gone


@dataclass(frozen=True, slots=True)
class Usage:
    """How often a model is asked for, in constant memory: what is known of when its next request comes."""

    last_at: float = -math.inf
    interval_s: float = math.inf
    """Between two requests: a running geometric mean, which one long silence does not spoil."""
    spread: float = 1.0
    """How far an interval is from that, as a logarithm: 0 for clockwork, about 1 for callers by chance."""

    def asked(self, now: float) -> Usage:
        """Return what is known once a request has come."""
        if self.last_at == -math.inf:
            return Usage(now)
        interval_s = max(now - self.last_at, 0.1)
        if self.interval_s == math.inf:
            return Usage(now, interval_s)
        off = math.log(interval_s / self.interval_s)
        spread = (1 - LEARNING) * self.spread + LEARNING * abs(off)
        return Usage(now, self.interval_s * math.exp(LEARNING * off), spread)

    def next_in_s(self, now: float) -> float:
        """Return in how many seconds the next request is expected: by the clock, else between interval and silence."""
        silent_s = now - self.last_at
        if math.isinf(self.interval_s):
            return max(silent_s, 1.0)
        if self.spread < REGULAR and silent_s < self.interval_s:
            return max(self.interval_s - silent_s, 1.0)
        return max((2 * self.interval_s + silent_s) / 3, 1.0)

    def absent_from(self, until: float) -> float:
        """Return the instant from which the next request is expected no sooner than `DOUBT` times the time left."""
        if math.isinf(self.interval_s):  # it was asked once, and nothing says that it will be again
            return self.last_at
        by_silence = (self.last_at + DOUBT * until) / (1 + DOUBT)
        by_chance = min(by_silence, until - self.interval_s / DOUBT)
        next_at = self.last_at + self.interval_s
        if self.spread >= REGULAR:
            return by_chance
        return (DOUBT * until - next_at) / (DOUBT - 1) if until <= next_at else max(next_at, by_chance)


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
    held_at: float = math.inf
    """Since when it is held, for whomever."""
    hold_s: float = HOLD_S
    """How long that may last, or the next time that it is."""
    spared_until: float = -math.inf
    """It was held for so long that it is not to be held again before this."""
    owes: bool = False
    """Whether some still wait for it who did so when it became ready."""
    usage: Usage = Usage()
    of: str = ""
    """The model that it is a replica of."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A model that waits for GPUs, since `asked_at`: when its oldest waiting request came."""

    model: str
    demand: Demand
    asked_at: float
    waiting: int
    """How many wait for it; an operator's start, or the catalog's, counts for one."""
    cost_s: float
    """What its start takes, measured or estimated."""
    patience_s: float
    """How long it may take until it serves: it has others held back so early that its own start fits in."""
    of: str = ""
    """The model that it is a replica of: one replica never makes room for another."""

    @property
    def hold_at(self) -> float:
        """Return when its patience is over."""
        return self.asked_at + max(self.patience_s - self.cost_s, LEAST_PATIENCE * self.patience_s)


def patience_s(cost_s: float, bound_s: float) -> float:
    """Return how long a claim waits until it serves, at most, where `bound_s` is the longest that anybody should.

    To wait saves at most a switch, so the wait is in proportion to what one costs.
    """
    return min(bound_s, WORTH * cost_s)


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
    """What tells one policy from another. The simulator compares others with these."""

    def residency_s(self, resident: Resident) -> float:
        """Return for how long a resident that has become ready is left in peace."""
        return RESIDENCY * resident.cost_s

    def regret(self, resident: Resident, now: float) -> float:
        """Return what it costs that this one goes, against how long its room will serve others.

        The cost is measured, the time is a rough guess: by its root it counts for less.
        """
        return resident.cost_s / math.sqrt(resident.usage.next_in_s(now))

    def due_at(self, resident: Resident, claim: Claim) -> float:
        """Return when an idle resident goes for a claim that has patience yet."""
        return resident.usage.absent_from(claim.hold_at)


OURS = Rules()


def decide(snapshot: Snapshot, rules: Rules = OURS) -> Decision:
    """Return what to do: place what fits, oldest claim first, and make room for what does not.

    One replica more that nobody waits for comes after all others. The same snapshot gives the same decision, in
    whatever order its residents and claims come.
    """
    table = _Table(snapshot, rules)
    for claim in sorted(snapshot.claims, key=lambda each: (table.may_wait(each), each.asked_at, each.model)):
        table.serve(claim)
    return table.decision()


def in_vain(demand: Demand, devices: Sequence[Device], residents: Iterable[Resident]) -> str | None:
    """Return why a demand can never be met while pinned models hold what they hold; None if it can."""
    pinned = [each for each in residents if each.pinned and each.phase is not Phase.LEAVING]
    if place(demand, devices, [each.place for each in pinned]) is not None:
        return None
    return f"needs {_demanded(demand)}, and pinned models hold what it could have: {_holders(pinned)}"


class _Table:
    """One decision in the making: what has been given, promised and taken, claim by claim."""

    def __init__(self, snapshot: Snapshot, rules: Rules) -> None:
        self.now, self.devices, self.rules = snapshot.now, snapshot.devices, rules
        self.residents = sorted(snapshot.residents, key=lambda each: each.model)
        self.going = {each.model for each in self.residents if each.phase is Phase.LEAVING}
        self.starting = {
            gpu: each.model for each in self.residents if each.phase is Phase.STARTING for gpu in each.place.gpus
        }
        gone_soon = [each for each in self.residents if each.phase is Phase.LEAVING]
        self.leaving = {gpu for each in gone_soon for gpu in each.place.gpus}
        self.draining = {gpu for each in gone_soon if each.in_flight for gpu in each.place.gpus}
        self.avoided: list[Place] = []
        self.examined: Counter[str] = Counter()
        self.promised: dict[str, Place] = {}
        self.reserved: set[str] = set()
        self.placed: dict[str, Place] = {}
        self.evicted: dict[str, str] = {}
        self.held: dict[str, str] = {}
        self.waits: dict[str, str] = {}
        self.hopeless: dict[str, str] = {}
        self.looks: list[float] = []

    def decision(self) -> Decision:
        look_again_at = min((at for at in self.looks if self.now < at < math.inf), default=None)
        return Decision(self.placed, self.evicted, self.held, self.waits, self.hopeless, look_again_at)

    def serve(self, claim: Claim) -> None:
        """Place a claim, or make room for it, or say why it waits."""
        if words := misfit(claim.demand, self.devices):
            self.hopeless[claim.model] = self.waits[claim.model] = words
        elif (found := self._fit(claim.demand, self._taken())) is not None:
            self.placed[claim.model] = self.promised[claim.model] = found
            self.starting |= dict.fromkeys(found.gpus, claim.model)
        elif words := in_vain(claim.demand, self.devices, self.residents):
            self.hopeless[claim.model] = self.waits[claim.model] = words
        elif ahead := self._crowd_before(claim.demand):
            self.waits[claim.model] = f"waits for {_demanded(claim.demand)}, behind {ahead} others"
        else:
            self.examined.update(self._possible(claim.demand))
            self._wait(claim)

    def _possible(self, demand: Demand) -> Sequence[str]:
        """Return the GPUs that a demand may be met with."""
        wanted = named(demand.gpus, self.devices) if isinstance(demand.gpus, tuple) else self.devices
        return [device.id for device in wanted]

    def _crowd_before(self, demand: Demand) -> int:
        """Return how many older claims may want the GPUs that a demand could have, if they are too many to look on."""
        crowds = sorted(self.examined[gpu] for gpu in self._possible(demand))
        ahead = crowds[min(demand.count, len(crowds)) - 1]
        return ahead if ahead >= MOST_EXAMINED else 0

    def _taken(self) -> list[Place]:
        """Return what nobody can be placed on now: what is held, and GPUs whose free memory is not settled.

        A server that shares a GPU measures what is free there as it loads, so nothing else may come or go meanwhile.
        """
        return [each.place for each in self.residents] + [Place((gpu,)) for gpu in self.leaving.union(self.starting)]

    def _wait(self, claim: Claim) -> None:
        held = [each for each in self.residents if self._is_held(each, claim)]
        aged = bool(held) or (self.now >= claim.hold_at and not self.may_wait(claim))
        found = self._fit_elsewhere(claim.demand) or self._fit_without((), claim.demand)
        if found is None:
            if not self._make_room(claim, aged=aged):
                self._keep_held(held, claim)
        elif not (aged and self._takes_long(found.gpus) and self._make_room_elsewhere(claim)):
            self._promise(claim, found)
            self.looks.append(claim.hold_at)
        if aged and claim.model in self.promised:
            self.reserved.update(self.promised[claim.model].gpus)

    def may_wait(self, claim: Claim) -> bool:
        """Say whether it is one replica more, for which nobody waits: nobody busy is held for that."""
        up = (each for each in self.residents if each.phase is Phase.UP)
        return not claim.waiting and any(_are_replicas(each, claim) for each in up)

    def _keep_held(self, held: Sequence[Resident], claim: Claim) -> None:
        for each in held:
            if each.model not in self.evicted:
                self._hold(each, claim)

    def _hold(self, each: Resident, claim: Claim) -> None:
        self.held.setdefault(each.model, claim.model)
        self.looks.append((each.held_at if each.held_for else self.now) + each.hold_s)

    def _is_held(self, each: Resident, claim: Claim) -> bool:
        held = each.held_for == claim.model and each.phase is Phase.UP and not each.pinned
        return held and not self._is_spared(each)

    def _is_spared(self, each: Resident) -> bool:
        """Say whether a server goes on for a while that does not come to an end of its work while it is held."""
        return bool(each.in_flight) and self.now < self._spared_until(each)

    def _spared_until(self, each: Resident) -> float:
        held_until = each.held_at + each.hold_s
        outlasts = each.held_for is not None and self.now >= held_until
        return held_until + HOLD_S if outlasts else each.spared_until

    def _make_room_elsewhere(self, claim: Claim) -> bool:
        """Have residents go on GPUs where nothing takes long, for a claim that has waited enough."""
        with self._avoiding_what_takes_long():
            victims = self._fewest(claim, self._due(claim, aged=True))
            if victims is not None:
                self._send_away(victims, claim)
            return victims is not None

    def _fit_elsewhere(self, demand: Demand) -> Place | None:
        """Return where a demand fits once those have left who leave, on GPUs where nothing takes long."""
        with self._avoiding_what_takes_long():
            return self._fit_without((), demand)

    def _takes_long(self, gpus: Iterable[str]) -> bool:
        """Say whether a server starts on one of these GPUs, or goes only when it has finished its work."""
        return any(gpu in self.starting or gpu in self.draining for gpu in gpus)

    @contextmanager
    def _avoiding_what_takes_long(self) -> Iterator[None]:
        self.avoided = [Place((gpu,)) for gpu in self.draining.union(self.starting)]
        try:
            yield
        finally:
            self.avoided = []

    def _make_room(self, claim: Claim, *, aged: bool) -> bool:
        """Have residents go for a claim, or held once it is aged, if enough of them are due; else tell when."""
        if (victims := self._fewest(claim, self._due(claim, aged=aged))) is not None:
            self._send_away(victims, claim)
            return True
        staying = self._staying(claim)
        self.looks += [*(self._due_at(each, claim, aged=aged) for each in staying), claim.hold_at]
        self.waits[claim.model] = self._words(claim, aged=aged)
        if aged:
            self._reserve(claim, staying)
        return False

    def _staying(self, claim: Claim) -> list[Resident]:
        """Return who could make room for a claim, now or later."""
        staying = [each for each in self.residents if each.model not in self.going and not each.pinned]
        return [each for each in staying if not _are_replicas(each, claim)]

    def _due(self, claim: Claim, *, aged: bool) -> list[Resident]:
        return [each for each in self._staying(claim) if self._due_at(each, claim, aged=aged) <= self.now]

    def _due_at(self, each: Resident, claim: Claim, *, aged: bool) -> float:
        if each.phase is not Phase.UP or ((each.in_flight or each.queued) and not aged):
            return math.inf  # there will be a snapshot when that has changed
        if each.place.memory_bytes is not None and self._starts_on(each.place.gpus):
            return math.inf  # a server that measures its memory as it loads would take for its own what comes free
        if self._is_spared(each):
            return self._spared_until(each)
        if self._is_held(each, claim):
            return self.now
        rest_s = self.rules.residency_s(each)
        if aged:
            return each.since + max(min(rest_s, claim.patience_s), TURN_S if each.owes else 0.0)
        expected_back = min(self.rules.due_at(each, claim), claim.asked_at + LINGER * each.cost_s)
        return max(each.since + rest_s, expected_back)

    def _starts_on(self, gpus: Iterable[str]) -> bool:
        return any(gpu in self.starting for gpu in gpus)

    def _send_away(self, victims: Sequence[Resident], claim: Claim) -> None:
        found = self._fit_without(victims, claim.demand)
        assert found is not None, "the victims suffice"
        for each in victims:
            self.going.add(each.model)
            self.leaving.update(each.place.gpus)  # nobody can leave beside a start, nor start beside who leaves
            if each.in_flight:
                self._hold(each, claim)
            else:
                self.held.pop(each.model, None)
                self.evicted[each.model] = claim.model
        self._promise(claim, found)

    def _reserve(self, claim: Claim, staying: Sequence[Resident]) -> None:
        """Keep younger claims from the GPUs that an aged one will have: those that come free the soonest.

        If there can be none beside what older claims are to get, it is the next to have them after those.
        """
        soonest = sorted(staying, key=self._free_at)
        if (found := self._plan(claim, soonest)) is not None:
            self.promised[claim.model] = found
            return
        older, self.promised, closed, self.reserved = self.promised, {}, self.reserved, set()
        self._plan(claim, soonest)
        self.promised, self.reserved = older, closed | self.reserved

    def _free_at(self, each: Resident) -> float:
        if each.phase is Phase.STUCK:
            return math.inf
        start_s = each.cost_s if each.phase is Phase.STARTING else 0.0
        return each.since + start_s + self.rules.residency_s(each)

    def _plan(self, claim: Claim, soonest: Sequence[Resident]) -> Place | None:
        """Return what a claim will have once the first of these have gone, where nobody is to start until then.

        Nor is anybody to start elsewhere beside one of them, who could not go meanwhile.
        """
        leaving_suffice = self._fit_without((), claim.demand) is not None
        victims = () if leaving_suffice else self._sufficing(claim.demand, soonest)
        if victims is None:
            return None
        found = self._fit_without(victims, claim.demand)
        assert found is not None, "the victims suffice"
        self.reserved.update(found.gpus, *(each.place.gpus for each in victims))
        return found

    def _fewest(self, claim: Claim, candidates: Sequence[Resident]) -> list[Resident] | None:
        """Return the least regretted residents without which a claim fits, first those that are held for it."""
        held = {each.model for each in candidates if self._is_held(each, claim)}
        regret = {each.model: 0.0 if each.model in held else self.rules.regret(each, self.now) for each in candidates}
        ordered = sorted(candidates, key=lambda each: (each.model not in held, regret[each.model]))
        tries = [(claim.demand, ordered)]
        if claim.demand.gpus == 1:
            tries = [
                (
                    Demand((device.id,), claim.demand.memory_bytes),
                    [each for each in ordered if device.id in each.place.gpus],
                )
                for device in self.devices
            ]
        found = [victims for demand, those in tries if (victims := self._sufficing(demand, those)) is not None]
        # those that nobody asked for since they were adopted cost no regret, and still go only where they must
        return min(found, key=lambda victims: (sum(regret[each.model] for each in victims), len(victims)), default=None)

    def _sufficing(self, demand: Demand, ordered: Sequence[Resident]) -> list[Resident] | None:
        """Return the first of `ordered` without which a demand fits, and none of them in vain."""
        victims: list[Resident] = []
        for each in ordered:
            victims.append(each)
            if self._fit_without(victims, demand) is not None:
                break
        else:
            return None
        for each in reversed(victims):
            fewer = [other for other in victims if other is not each]
            if fewer and self._fit_without(fewer, demand) is not None:
                victims = fewer
        return victims

    def _fit_without(self, victims: Collection[Resident], demand: Demand) -> Place | None:
        gone = self.going.union(each.model for each in victims)
        return self._fit(demand, [*self.avoided, *(each.place for each in self.residents if each.model not in gone)])

    def _fit(self, demand: Demand, taken: Sequence[Place]) -> Place | None:
        reserved = (Place((gpu,)) for gpu in self.reserved)
        return place(demand, self.devices, [*taken, *self.promised.values(), *reserved])

    def _promise(self, claim: Claim, found: Place) -> None:
        self.promised[claim.model] = found
        there = [each for each in self.residents if set(each.place.gpus) & set(found.gpus)]
        reasons = [f"{each.model} {self._leaves(each)}" for each in there if each.model in self.going]
        reasons += [f"{self.starting[gpu]} starts on GPU {gpu}" for gpu in found.gpus if gpu in self.starting]
        self.waits[claim.model] = f"gets GPU {', '.join(found.gpus)}, and waits for it: {'; '.join(reasons)}"

    def _leaves(self, each: Resident) -> str:
        if each.model in self.held:
            return f"takes no new requests and finishes {each.in_flight}"
        return f"goes when it has finished {each.in_flight}" if each.in_flight else "makes room"

    def _words(self, claim: Claim, *, aged: bool) -> str:
        """Return who has what a claim waits for, and what is awaited of each."""
        holders = [
            f"{each.model} has GPU {', '.join(each.place.gpus)} and {self._stays(each, claim, aged=aged)}"
            for each in self.residents
            if each.place.gpus
        ]
        holders += [
            f"{model} is to get GPU {', '.join(each.gpus)}" for model, each in self.promised.items() if each.gpus
        ]
        return f"waits for {_demanded(claim.demand)}: {'; '.join(holders)}"

    def _stays(self, each: Resident, claim: Claim, *, aged: bool) -> str:
        if _are_replicas(each, claim):
            return "is another replica of it"
        if each.model in self.going:
            return f"goes for {self.evicted.get(each.model) or self.held.get(each.model) or 'another'}"
        if each.pinned:
            return "is pinned"
        if each.phase is Phase.STARTING:
            return "is starting"
        if each.phase is Phase.STUCK:
            return "may not be gone yet"
        if self._is_spared(each):
            return "has work that lasts, and serves others meanwhile"
        if each.owes:
            return "serves those who waited for it"
        if self.now < each.since + self.rules.residency_s(each):
            return "has only just started"
        if aged:
            return "is not enough"
        return "is busy" if each.in_flight or each.queued else "is expected to be asked again soon"


def _are_replicas(resident: Resident, claim: Claim) -> bool:
    return bool(claim.of) and resident.of == claim.of


def _demanded(demand: Demand) -> str:
    which = f"GPU {', '.join(demand.gpus)}" if isinstance(demand.gpus, tuple) else f"{demand.count} GPU"
    return f"{gibibytes(demand.memory_bytes)} of {which}" if demand.memory_bytes else f"{which} for itself"


def _holders(residents: Iterable[Resident]) -> str:
    return "; ".join(f"{each.model} has GPU {', '.join(each.place.gpus)}" for each in residents if each.place.gpus)
