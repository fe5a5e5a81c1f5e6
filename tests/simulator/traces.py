from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.fleet.placement import GIB, Demand, Device, Place
from gateway.fleet.scheduling import OURS, Claim, Phase, Resident, Rules, Snapshot, Usage, decide

WAIT_BOUND_S = 120.0
FIRST_GUESS_S = 60.0
LEAVE_S = 4.0


@dataclass(slots=True)
class Request:
    at: float
    model: str
    work_s: float


@dataclass(slots=True)
class Model:
    name: str
    demand: Demand
    load_s: float
    slots: int


@dataclass(slots=True)
class Scenario:
    models: list[Model]
    devices: list[Device]
    requests: list[Request]
    seed: int


@dataclass(slots=True)
class Server:
    """One model's life in the replay."""
    model: Model
    place: Place | None = None
    phase: Phase | None = None
    in_flight: int = 0
    queue: deque = field(default_factory=deque)
    since: float = 0.0
    last_use_at: float = 0.0
    cost_s: float = FIRST_GUESS_S
    held_for: str | None = None
    usage: Usage = Usage()


class Replay:
    def __init__(self, scenario: Scenario, rules: Rules, in_order: bool = False) -> None:
        self.s = scenario
        self.rules = rules
        self.in_order = in_order
        self.random = random.Random(scenario.seed)
        self.servers = {m.name: Server(m) for m in scenario.models}
        self.line: deque[Request] = deque()
        self.events: list = []
        self.seq = 0
        self.waits: list[float] = []
        self.starts = 0
        self.switching_s = 0.0
        self.now = 0.0
        self.look_at = math.inf
        self.decides = 0

    def later(self, at, what, who):
        self.seq += 1
        heapq.heappush(self.events, (at, self.seq, what, who))

    def run(self):
        arrivals = self.s.requests
        n = 0
        while n < len(arrivals) or self.events:
            if n < len(arrivals) and (not self.events or arrivals[n].at <= self.events[0][0]):
                req = arrivals[n]
                n += 1
                self.now = req.at
                server = self.servers[req.model]
                server.usage = server.usage.asked(self.now)
                (self.line if self.in_order else server.queue).append(req)
            else:
                self.now, _, what, who = heapq.heappop(self.events)
                if what is not None:
                    what(who)
                elif self.now != self.look_at:
                    continue
            self.admit()
            self.decide()
        assert len(self.waits) == len(arrivals), (len(self.waits), len(arrivals))
        return self

    def admit(self):
        if self.in_order:
            while self.line:
                server = self.servers[self.line[0].model]
                if server.phase is not Phase.UP or server.in_flight >= server.model.slots:
                    return
                self.begin(server, self.line.popleft())
            return
        for server in self.servers.values():
            if server.queue and server.phase is Phase.UP and server.held_for is None:
                while server.queue and server.in_flight < server.model.slots:
                    self.begin(server, server.queue.popleft())

    def begin(self, server, req):
        self.waits.append(self.now - req.at)
        server.in_flight += 1
        server.last_use_at = self.now
        self.later(self.now + req.work_s, self.end, server)

    def end(self, server):
        server.in_flight -= 1
        server.last_use_at = self.now

    def ready(self, server):
        server.phase = Phase.UP
        took = self.now - server.since
        server.cost_s = took
        server.since = self.now
        server.last_use_at = self.now

    def gone(self, server):
        server.phase = server.place = None

    def claims(self):
        if self.in_order:
            if self.line and self.servers[self.line[0].model].phase is None:
                s = self.servers[self.line[0].model]
                return [Claim(s.model.name, s.model.demand, self.line[0].at, 1, s.cost_s, 0.0)]
            return []
        return [Claim(s.model.name, s.model.demand, s.queue[0].at, len(s.queue), s.cost_s, WAIT_BOUND_S)
                for s in self.servers.values() if s.phase is None and s.queue]

    def decide(self):
        claims = self.claims()
        if not claims:
            for s in self.servers.values():
                if s.held_for: s.held_for = None; again = True
            return
        self.decides += 1
        residents = [Resident(s.model.name, s.place, s.phase, s.in_flight, len(s.queue), False, s.since, s.last_use_at, s.cost_s, s.held_for, s.usage)
                     for s in self.servers.values() if s.phase is not None]
        d = decide(Snapshot(self.now, self.s.devices, residents, claims), self.rules)
        assert not d.hopeless
        for name, where in d.placed.items():
            s = self.servers[name]
            s.place, s.phase, s.since = where, Phase.STARTING, self.now
            load_s = s.model.load_s * self.random.uniform(0.9, 1.1)
            self.starts += 1
            self.switching_s += load_s
            self.later(self.now + load_s, self.ready, s)
        for name in d.evicted:
            s = self.servers[name]
            assert s.in_flight == 0 and s.phase is Phase.UP
            s.phase = Phase.LEAVING
            self.switching_s += LEAVE_S
            self.later(self.now + LEAVE_S, self.gone, s)
        released = False
        for s in self.servers.values():
            h = d.held.get(s.model.name)
            if s.held_for and not h and s.phase is Phase.UP: released = True
            s.held_for = h
        if released: self.admit()
        self.look_at = math.inf
        if d.look_again_at is not None:
            self.look_at = d.look_again_at
            self.later(d.look_again_at, None, None)


class Lru(Rules):
    def residency_s(self, resident): return 0.0
    def regret(self, resident, now): return 1 / (1 + now - resident.last_use_at)
    def due_at(self, resident, claim): return claim.asked_at

class LruRes(Lru):
    def residency_s(self, resident): return resident.cost_s

class Fifo(Lru):
    def regret(self, resident, now): return 1 / (1 + now - resident.since)

class Belady(Rules):
    def __init__(self, scenario, eager=True, weighted=False, res=0.0):
        self.times = {m.name: [] for m in scenario.models}
        for r in scenario.requests: self.times[r.model].append(r.at)
        self.eager, self.weighted, self.res = eager, weighted, res
    def residency_s(self, resident): return self.res * resident.cost_s
    def next_in(self, model, now):
        t = self.times[model]; i = bisect_right(t, now)
        return t[i] - now + 1e-3 if i < len(t) else 1e9
    def regret(self, resident, now):
        return (resident.cost_s if self.weighted else 1.0) / self.next_in(resident.model, now)
    def due_at(self, resident, claim):
        return claim.asked_at if self.eager else math.inf

HOUR = 3600.0

def models(rng, n, gpus, mixed=False, lo=20.0, hi=90.0):
    out = []
    for i in range(n):
        d = Demand(1)
        if mixed:
            d = rng.choice([Demand(1), Demand(1), Demand(1, 12 * GIB), Demand(1, 8 * GIB), Demand(1, 16*GIB), Demand(2)])
        out.append(Model(f"m{i}", d, rng.uniform(lo, hi), 4))
    return out, [Device(str(g), 24 * GIB) for g in range(gpus)]

def work(rng): return rng.uniform(1, 20)

def poisson(rng, rate, until):
    t = rng.expovariate(rate)
    while t < until:
        yield t
        t += rng.expovariate(rate)

def balanced(rng, names, gap):
    for t in poisson(rng, 1/gap, 12*HOUR):
        yield t, rng.choice(names)

def dominant(rng, names, gap):
    for t in poisson(rng, 1/gap, 12*HOUR):
        yield t, names[0] if rng.random() < .8 else rng.choice(names[1:])

def interleaved(rng, names, gap):
    n = int(12*HOUR/gap)
    for i in range(n):
        yield i*gap + rng.uniform(0, gap/4), names[i % len(names)]

def bursty(rng, names, gap):
    out = []
    size = 10
    for name in names:
        for t in poisson(rng, 1/(gap*len(names)*size), 12*HOUR):
            for _ in range(rng.randint(1, 2*size-1)):
                out.append((t, name)); t += rng.expovariate(1/10)
    return sorted(out)

def day_and_night(rng, names, gap):
    out = []
    for i, name in enumerate(names):
        for t in poisson(rng, 2/(gap*2*len(names)), 212*HOUR):
            phase = (t/(212*HOUR) + (0.5 if i % 2 else 0.0)) % 1.0
            if rng.random() < 0.5 - 0.45*math.cos(2*math.pi*phase):
                out.append((t, name))
    return sorted(out)

SHAPES = dict(balanced=balanced, dominant=dominant, interleaved=interleaved, bursty=bursty)
SHAPES["day-and-night"] = day_and_night

def scenario(shape, seed, n=6, gpus=3, gap=15.0, mixed=False, lo=20, hi=90):
    rng = random.Random(f"{shape} {seed}")
    ms, ds = models(rng, n, gpus, mixed, lo, hi)
    reqs = [Request(t, m, work(rng)) for t, m in SHAPES[shape](rng, [m.name for m in ms], gap)]
    return Scenario(ms, ds, reqs, seed)

def quant(xs, q):
    xs = sorted(xs); return xs[min(len(xs)-1, math.ceil(q*len(xs))-1)]

class LruLazy(Lru):
    def due_at(self, resident, claim): return math.inf

class LruLazyRes(LruRes):
    def due_at(self, resident, claim): return math.inf
class LruOurs(Lru):
    residency_s = Rules.residency_s
    due_at = Rules.due_at
class BelOurs(Belady):
    residency_s = Rules.residency_s
    due_at = Rules.due_at
class OursLazy(Rules):
    def due_at(self, resident, claim): return math.inf
class OursLazy0(OursLazy):
    def residency_s(self, resident): return 0.0
