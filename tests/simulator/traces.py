"""Traffic replayed under several policies: what each costs in switching, and its callers in waiting.

Virtual time and a heap of events; the policy is the real `gateway.fleet.scheduling.decide` on real snapshots. What is
compared shares all of its machinery (batching, minimum residency, how long a claim waits before an idle one goes, the
wait bound of 120 s) and differs in this:

- `ours`: the rules of the gateway, as they are.
- `lru`: residents go in the order of their last use.
- `optimum`: Belady's rule. It knows when each model is asked for next, and who is asked for last goes first; it also
  knows from when on an idle one will not be asked before its claim loses patience. With mixed costs and sizes no simple
  rule is the least possible, so the best of four is taken for each seed: Belady's order as it is or weighed by the cost
  of starting again, with that knowledge or with our timing.
- `fcfs`: requests begin strictly in the order in which they came, as they do without batching: one whose model is not
  up holds up all that came after it until it is.

And for comparison, with `--more`:

- `lru-at-once`: LRU without our timing: whatever has nothing to do and has had its residency goes at once.
- `optimum-late`: Belady's rule which lets every claim wait until its patience is over, to serve more of it together.

The scenario: `models` models of which each has a GPU for itself, on half as many GPUs (6 on 3), so that there is room
for three of six. A start takes 20 to 90 s (by model, and 10 % more or less each time); policies know what the last one
took, and guess 60 s before. To stop takes 4 s. A request takes 1 to 20 s, four at once on one model. One request a
minute comes on average, for 8 hours (day-and-night: 24). All are drawn anew for each seed. With `mixed`, sizes are
mixed: a third of the models has a GPU for itself, others share one (8, 12 or 16 of 24 GiB), one in six has two.

- `balanced`: every model is asked as often as any other, by chance.
- `dominant`: four of five requests are for one model, the others for any of the rest.
- `interleaved`: the models in turn, one request each.
- `bursty`: sessions of 1 to 19 requests for one model, about 10 s apart.
- `day-and-night`: half of the models are asked by day, the other half by night, with much less in the other half.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from random import Random
from statistics import mean

from gateway.fleet.experience import DEFAULT_COST_S
from gateway.fleet.placement import GIB, Demand, Device, Place
from gateway.fleet.scheduling import (
    HOLD_S,
    OURS,
    Claim,
    Decision,
    Phase,
    Resident,
    Rules,
    Snapshot,
    Usage,
    decide,
    patience_s,
)

WAIT_BOUND_S = 120.0
STOP_S = 4.0
SLOTS = 4
LOAD_VARIES = (0.9, 1.1)
WORK_S = (1.0, 20.0)
HOUR_S = 3600.0
SHARED = [Demand(1, 8 * GIB), Demand(1, 12 * GIB), Demand(1, 16 * GIB)]


@dataclass(frozen=True)
class Setting:
    """What a scenario is drawn from, the same for all shapes."""

    models: int = 6
    gpus: int = 3
    gap_s: float = 60.0
    load_s: tuple[float, float] = (20.0, 90.0)
    hours: float = 8.0
    mixed: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    at: float
    model: str
    work_s: float


@dataclass(frozen=True)
class Scenario:
    """One day's traffic, and where it goes."""

    seed: int
    devices: list[Device]
    demands: dict[str, Demand]
    load_s: dict[str, float]
    requests: list[Request]


@dataclass(frozen=True)
class Outcome:
    cold_starts: float
    wait_p50_s: float
    wait_p99_s: float
    switching_s: float
    """How long servers were being started and stopped, all together."""


Arrivals = Iterator[tuple[float, str]]


def _by_chance(random: Random, gap_s: float, until_s: float) -> Iterator[float]:
    at = random.expovariate(1 / gap_s)
    while at < until_s:
        yield at
        at += random.expovariate(1 / gap_s)


def _balanced(random: Random, models: list[str], setting: Setting) -> Arrivals:
    for at in _by_chance(random, setting.gap_s, setting.hours * HOUR_S):
        yield at, random.choice(models)


def _dominant(random: Random, models: list[str], setting: Setting) -> Arrivals:
    for at in _by_chance(random, setting.gap_s, setting.hours * HOUR_S):
        yield at, models[0] if random.random() < 0.8 else random.choice(models[1:])


def _interleaved(random: Random, models: list[str], setting: Setting) -> Arrivals:
    for number in range(int(setting.hours * HOUR_S / setting.gap_s)):
        yield (number + random.uniform(0.0, 0.25)) * setting.gap_s, models[number % len(models)]


def _bursty(random: Random, models: list[str], setting: Setting) -> Arrivals:
    for model in models:
        for session_at in _by_chance(random, 10 * len(models) * setting.gap_s, setting.hours * HOUR_S):
            at = session_at
            for _ in range(random.randint(1, 19)):
                yield at, model
                at += random.expovariate(1 / 10)


def _day_and_night(random: Random, models: list[str], setting: Setting) -> Arrivals:
    for number, model in enumerate(models):
        for at in _by_chance(random, 0.5 * len(models) * setting.gap_s, 24 * HOUR_S):
            turn = at / (24 * HOUR_S) + number % 2 / 2
            if random.random() < 0.5 - 0.45 * math.cos(2 * math.pi * turn):
                yield at, model


SHAPES: dict[str, Callable[[Random, list[str], Setting], Arrivals]] = {
    "balanced": _balanced,
    "dominant": _dominant,
    "interleaved": _interleaved,
    "bursty": _bursty,
    "day-and-night": _day_and_night,
}


def scenario(shape: str, seed: int, setting: Setting) -> Scenario:
    """Return the traffic of a shape; the same for the same seed."""
    random = Random(f"{shape} {seed}")
    models = [f"model-{number}" for number in range(setting.models)]
    sizes = [Demand(1), Demand(1), random.choice(SHARED), random.choice(SHARED), random.choice(SHARED), Demand(2)]
    demands = {model: sizes[number % 6] if setting.mixed else Demand(1) for number, model in enumerate(models)}
    arrivals = sorted(SHAPES[shape](random, models, setting))
    return Scenario(
        seed=seed,
        devices=[Device(str(number), 24 * GIB) for number in range(setting.gpus)],
        demands=demands,
        load_s={model: random.uniform(*setting.load_s) for model in models},
        requests=[Request(at, model, random.uniform(*WORK_S)) for at, model in arrivals],
    )


class Lru(Rules):
    def regret(self, resident: Resident, now: float) -> float:
        return 1 / (1 + now - resident.last_use_at)


class LruAtOnce(Lru):
    def due_at(self, resident: Resident, claim: Claim) -> float:
        return claim.asked_at


class Oldest(LruAtOnce):
    """First in, first out: for `fcfs`, which has no regrets."""

    def regret(self, resident: Resident, now: float) -> float:
        return 1 / (1 + now - resident.since)


class Belady(Rules):
    """Knows the future: when each model is asked for next."""

    def __init__(self, day: Scenario, *, by_cost: bool) -> None:
        self.asked_at: dict[str, list[float]] = defaultdict(list)
        for request in day.requests:
            self.asked_at[request.model].append(request.at)
        self.by_cost = by_cost

    def next_at(self, model: str, now: float) -> float:
        times = self.asked_at[model]
        place = bisect_right(times, now)
        return times[place] if place < len(times) else 1e9

    def regret(self, resident: Resident, now: float) -> float:
        return (resident.cost_s if self.by_cost else 1.0) / max(self.next_at(resident.model, now) - now, 0.001)


class BeladyForesees(Belady):
    """Lets an idle one go as soon as it is not asked for before its claim loses patience."""

    def due_at(self, resident: Resident, claim: Claim) -> float:
        asked_at = self.asked_at[resident.model]
        last = bisect_right(asked_at, claim.hold_at) - 1
        return asked_at[last] if last >= 0 else 0.0


class BeladyLate(Belady):
    def due_at(self, resident: Resident, claim: Claim) -> float:
        return math.inf


@dataclass(slots=True)
class Server:
    """One model in the replay, whether it is up or not."""

    model: str
    demand: Demand
    queue: deque[Request] = field(default_factory=deque)
    place: Place | None = None
    phase: Phase | None = None
    in_flight: int = 0
    since: float = 0.0
    last_use_at: float = 0.0
    cost_s: float = DEFAULT_COST_S
    held_for: str | None = None
    held_at: float = math.inf
    hold_s: float = HOLD_S
    spared_until: float = -math.inf
    usage: Usage = field(default_factory=Usage)

    def resident(self) -> Resident:
        assert self.place is not None
        assert self.phase is not None
        return Resident(
            self.model,
            self.place,
            self.phase,
            self.in_flight,
            len(self.queue),
            pinned=False,
            since=self.since,
            last_use_at=self.last_use_at,
            cost_s=self.cost_s,
            held_for=self.held_for,
            held_at=self.held_at,
            hold_s=self.hold_s,
            spared_until=self.spared_until,
            usage=self.usage,
            owes=bool(self.queue) and self.queue[0].at <= self.since,
        )

    def hold(self, claim: str | None, now: float) -> bool:
        """Be held for a claim or for none; return whether this one takes requests again."""
        released = self.held_for is not None and claim is None
        if released:
            outlasted = now >= self.held_at + self.hold_s
            self.spared_until = self.held_at + self.hold_s + HOLD_S if outlasted else -math.inf
            self.hold_s = 2 * self.hold_s if outlasted else HOLD_S
        self.held_at = min(self.held_at, now) if claim else math.inf
        self.held_for = claim
        return released


class Replay:
    """One scenario under one policy, event by event. `in_order` is for `fcfs`: one line for all requests."""

    def __init__(self, day: Scenario, rules: Rules, *, in_order: bool = False) -> None:
        self.day, self.rules, self.in_order = day, rules, in_order
        self.random = Random(day.seed)
        self.servers = {model: Server(model, demand) for model, demand in day.demands.items()}
        self.line: deque[Request] = deque()
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.events_so_far = 0
        self.look_at = 0.0
        self.waits_s: list[float] = []
        self.cold_starts = 0
        self.switching_s = 0.0

    def run(self) -> Outcome:
        """Live the day until its last request has begun and ended.

        Raises:
            AssertionError: the policy forgot a request.
        """
        for request in self.day.requests:
            self._at(request.at, lambda request=request: self._arrive(request))  # type: ignore[misc]
        while self.events:
            self.now, _, happens = heapq.heappop(self.events)
            happens()
            self._admit()
            self._decide()
        assert len(self.waits_s) == len(self.day.requests), "every request was served"
        waits_s = sorted(self.waits_s)
        return Outcome(self.cold_starts, _quantile(waits_s, 0.5), _quantile(waits_s, 0.99), self.switching_s)

    def _at(self, at: float, happens: Callable[[], None]) -> None:
        self.events_so_far += 1
        heapq.heappush(self.events, (at, self.events_so_far, happens))

    def _arrive(self, request: Request) -> None:
        server = self.servers[request.model]
        server.usage = server.usage.asked(self.now)
        (self.line if self.in_order else server.queue).append(request)

    def _admit(self) -> None:
        while self.line and self._free(server := self.servers[self.line[0].model]):
            self._begin(server, self.line.popleft())
        for server in self.servers.values():
            while server.queue and self._free(server):
                self._begin(server, server.queue.popleft())

    def _free(self, server: Server) -> bool:
        return server.phase is Phase.UP and server.held_for is None and server.in_flight < SLOTS

    def _begin(self, server: Server, request: Request) -> None:
        self.waits_s.append(self.now - request.at)
        server.in_flight += 1
        server.last_use_at = self.now
        self._at(self.now + request.work_s, lambda: self._end(server))

    def _end(self, server: Server) -> None:
        server.in_flight -= 1
        server.last_use_at = self.now

    def _claims(self) -> list[Claim]:
        down = [server for server in self.servers.values() if server.phase is None]
        waiting = {server.model: server.queue[0].at for server in down if server.queue}
        if self.line and self.servers[self.line[0].model].phase is None:
            waiting[self.line[0].model] = self.line[0].at
        return [
            Claim(
                server.model,
                server.demand,
                waiting[server.model],
                len(server.queue),
                server.cost_s,
                0.0 if self.in_order else patience_s(server.cost_s, WAIT_BOUND_S),
            )
            for server in down
            if server.model in waiting
        ]

    def _decide(self) -> None:
        claims = self._claims()
        residents = [server.resident() for server in self.servers.values() if server.phase]
        self._do(decide(Snapshot(self.now, self.day.devices, residents, claims), self.rules) if claims else Decision())

    def _do(self, decision: Decision) -> None:
        assert not decision.hopeless
        for model, place in decision.placed.items():
            self._start(self.servers[model], place)
        for model in decision.evicted:
            self._stop(self.servers[model])
        released = False
        for server in self.servers.values():
            released |= server.hold(decision.held.get(server.model), self.now)
        if released:
            self._admit()
        if decision.look_again_at is not None and decision.look_again_at != self.look_at:
            self.look_at = decision.look_again_at
            self._at(decision.look_again_at, lambda: None)

    def _start(self, server: Server, place: Place) -> None:
        load_s = self.day.load_s[server.model] * self.random.uniform(*LOAD_VARIES)
        self.cold_starts += 1
        self.switching_s += load_s
        server.place, server.phase, server.since = place, Phase.STARTING, self.now
        self._at(self.now + load_s, lambda: self._ready(server, load_s))

    def _ready(self, server: Server, load_s: float) -> None:
        server.phase, server.since, server.last_use_at, server.cost_s = Phase.UP, self.now, self.now, load_s

    def _stop(self, server: Server) -> None:
        assert server.phase is Phase.UP
        assert not server.in_flight
        self.switching_s += STOP_S
        server.phase = Phase.LEAVING
        self._at(self.now + STOP_S, lambda: self._gone(server))

    def _gone(self, server: Server) -> None:
        server.phase = server.place = None
        server.hold_s, server.spared_until = HOLD_S, -math.inf


def _optimum(day: Scenario) -> Outcome:
    rules = [kind(day, by_cost=by_cost) for kind in (Belady, BeladyForesees) for by_cost in (False, True)]
    return min((Replay(day, each).run() for each in rules), key=lambda outcome: outcome.switching_s)


POLICIES: dict[str, Callable[[Scenario], Outcome]] = {
    "fcfs": lambda day: Replay(day, Oldest(), in_order=True).run(),
    "lru": lambda day: Replay(day, Lru()).run(),
    "ours": lambda day: Replay(day, OURS).run(),
    "optimum": _optimum,
}
MORE: dict[str, Callable[[Scenario], Outcome]] = {
    "lru-at-once": lambda day: Replay(day, LruAtOnce()).run(),
    "optimum-late": lambda day: Replay(day, BeladyLate(day, by_cost=False)).run(),
}


def replay(shape: str, policy: str, seed: int, setting: Setting) -> Outcome:
    """Return what a day of `shape` costs under `policy`; the same for the same seed."""
    return {**POLICIES, **MORE}[policy](scenario(shape, seed, setting))


def averaged(outcomes: Iterable[Outcome]) -> Outcome:
    each = list(outcomes)
    return Outcome(
        mean(one.cold_starts for one in each),
        mean(one.wait_p50_s for one in each),
        mean(one.wait_p99_s for one in each),
        mean(one.switching_s for one in each),
    )


def _quantile(ascending: list[float], part: float) -> float:
    return ascending[max(math.ceil(part * len(ascending)) - 1, 0)] if ascending else 0.0
