"""What it costs to stand between: every contestant in front of the same upstream, in one run on one machine."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.arithmetic import Case, Figure, Results, Sample, percentile
from tests.bench.callers import Target, ask, at_fixed_rate, json_of, read_streams, wrk
from tests.bench.machine import CannotMeasure, Cores, cpu_s, pinned, rss_mib
from tests.bench.rivals import ADDRESSES, EVERY, KINDS, Contestant, Place
from tests.bench.upstream import TOKENS_PER_S, Upstream, upstream

CONNECTIONS = (1, 32, 256)
STREAMS = (1, 32, 200, 256)
SPREAD_S = 1.0
"""Within what time all streams begin; the tokens of this time do not count for their delay."""
WARM_UP_REQUESTS = 20
ENOUGH_EACH, SLOW_TAKES = 10, 5
"""How many answers each connection must have had; and how many times as long whoever gave fewer is measured."""
SETTLE_S, LOOK_S, IDLE_SHARE = 10.0, 0.2, 0.2


@dataclass(frozen=True)
class Plan:
    """What to measure, and how long. `rates_per_s` is at how many requests a second the open loop asks."""

    runs: int = 5
    seconds: float = 2.0
    tokens: int = 8
    contestants: tuple[str, ...] = tuple(EVERY)
    connections: tuple[int, ...] = CONNECTIONS
    streams: tuple[int, ...] = STREAMS
    addresses: tuple[str, ...] = ADDRESSES
    rates_per_s: tuple[int, int] = (1000, 300)
    """With one connection, and with several. Who answers no more than that has no times: they would only grow."""
    calm_rate_per_s: int = 100
    """The slower one, with one connection."""

    def cases(self) -> Iterator[Case]:
        """Yield what is measured of each contestant, in turn."""
        for address in self.addresses:
            for kind in KINDS:
                counts = self.streams if kind == "paced" else self.connections
                yield from (Case(address, kind, count) for count in counts)


@dataclass
class Measured:
    """All samples, and why a contestant was not measured."""

    samples: list[Sample] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def results(self) -> Results:
        return Results(self.samples)


def measure(plan: Plan, cores: Cores, told: Callable[[str], object]) -> Measured:
    """Return what was measured. Each run has each contestant once, so that a slow hour is everybody's.

    A contestant that cannot be had is left out, and the reason kept; so is a case that it does not answer.

    Raises:
        CannotMeasure: the upstream, or wrk, cannot be had.
    """
    measured = Measured()
    with tempfile.TemporaryDirectory() as name, pinned(cores.others):
        folder = Path(name)
        with upstream(folder, plan.tokens, cores.others) as behind:
            for run in range(plan.runs):
                for contestant in plan.contestants:
                    told(f"run {run + 1} of {plan.runs}: {contestant}")
                    _one_turn(contestant, plan, Place(folder, behind, cores.tested), measured)
    return measured


def _one_turn(name: str, plan: Plan, place: Place, measured: Measured) -> None:
    """Have one contestant run, be measured in all cases, and go."""
    if name in measured.missing:
        return
    try:
        with EVERY[name](place) as contestant:
            for case in plan.cases():
                _one_case(contestant, case, plan, place, measured)
                _settle(contestant)
    except CannotMeasure as error:
        measured.missing[name] = str(error)


def _one_case(contestant: Contestant, case: Case, plan: Plan, place: Place, measured: Measured) -> None:
    try:
        figures = figures_of(contestant, case, plan, place)
    except (CannotMeasure, OSError, subprocess.TimeoutExpired) as error:  # what was measured before is not lost for it
        measured.missing[f"{contestant.name}, {case.address}, {case.kind}, {case.connections}"] = str(error)
    else:
        measured.samples.append(Sample(contestant.name, case, figures))


def _settle(contestant: Contestant) -> None:
    """Wait until nothing of the last case is left to do: one that was asked for too much may be busy for a while."""
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        before_s = cpu_s(contestant.pids)
        time.sleep(LOOK_S)
        if cpu_s(contestant.pids) - before_s <= IDLE_SHARE * LOOK_S:
            return


def figures_of(contestant: Contestant, case: Case, plan: Plan, place: Place) -> dict[Figure, float]:
    """Return what one contestant does in one case. One that cannot keep up with the open loop has no times there.

    Raises:
        CannotMeasure: it does not answer as it must.
    """
    if case.kind == "paced":
        return _paced(contestant, case, plan, place.upstream)
    target = contestant.target(case.address, case.kind, plan.tokens)
    _warm_up(target, "word0")
    figures = _as_fast_as_it_can(contestant, target, case.connections, plan.seconds, place)
    if figures["requests_per_s"] > (rate_per_s := plan.rates_per_s[case.connections > 1]):
        timed = at_fixed_rate(target, case.connections, rate_per_s, plan.seconds)
        figures |= {"p50_ms": percentile(timed.took_ms, 50), "p99_ms": percentile(timed.took_ms, 99)}
        figures["failed"] += timed.failed
    if case.connections == 1 and figures["requests_per_s"] > plan.calm_rate_per_s:
        calm = at_fixed_rate(target, 1, plan.calm_rate_per_s, plan.seconds)
        figures["calm_p50_ms"] = percentile(calm.took_ms, 50)
        figures["failed"] += calm.failed
    return figures


def _as_fast_as_it_can(
    contestant: Contestant, target: Target, connections: int, seconds: float, place: Place
) -> dict[Figure, float]:
    """Return throughput and CPU. Who is slow is measured for longer: what the end cuts off would count too much."""
    pids = contestant.pids
    for its_seconds in (seconds, seconds * SLOW_TAKES):
        before_s = cpu_s(pids)
        fast = wrk(target, connections, its_seconds, place.folder)
        used_s = cpu_s(pids) - before_s
        if fast.requests >= ENOUGH_EACH * connections:
            break
    if not fast.requests:
        raise CannotMeasure(f"{target.path} answered nobody within {its_seconds:g} s")
    return {
        "requests_per_s": (fast.requests - fast.failed) / fast.seconds,
        "failed": fast.failed,
        **_of_tree(pids, used_s, fast.requests),
    }


def _paced(contestant: Contestant, case: Case, plan: Plan, behind: Upstream) -> dict[Figure, float]:
    """Return how late tokens are; CPU is for a thousand tokens here."""
    _warm_up(contestant.target(case.address, "paced", 2), " @", times=2)
    tokens = round((plan.seconds + SPREAD_S) * TOKENS_PER_S)
    target, pids = contestant.target(case.address, "paced", tokens), contestant.pids
    _upstream_late_p99_ms(behind)  # of the warm-up
    before_s = cpu_s(pids)
    read = read_streams(target, case.connections, plan.seconds + SPREAD_S, warm_up_s=SPREAD_S, spread_s=SPREAD_S)
    used_s = cpu_s(pids) - before_s
    if not read.late_ms:
        raise CannotMeasure(f"{target.path} sent no token within {plan.seconds:g} s")
    return {
        "p50_ms": percentile(read.late_ms, 50),
        "p99_ms": percentile(read.late_ms, 99),
        "failed": case.connections - read.ended,
        "upstream_late_p99_ms": _upstream_late_p99_ms(behind),
        **_of_tree(pids, used_s, read.tokens),
    }


def _warm_up(target: Target, words: str, times: int = WARM_UP_REQUESTS) -> None:
    """Ask a few times, and see that the answer is the upstream's: an error would be very fast."""
    for _ in range(times):
        answer = ask(target)
        if words.encode() not in answer:
            raise CannotMeasure(f"{target.path} answers something else: {answer[-300:].decode(errors='replace')}")


def _of_tree(pids: Sequence[int], used_s: float, count: int) -> dict[Figure, float]:
    if not pids:
        return {}
    return {"cpu_s_per_1000": used_s / count * 1000, "rss_mib": rss_mib(pids)}


def _upstream_late_p99_ms(behind: Upstream) -> float:
    return float(json_of(ask(Target(behind.ports["paced"], "/late", method="GET")))["late_p99_ms"])
