"""The promises in numbers ("it is done when"), each as a row that says what was measured and whether it is kept. Pure.

They depend on the machine and on what else runs there, so nothing but this bench judges by them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tests.bench.arithmetic import Case, Results
from tests.bench.soak import Soaked

Verdict = Literal["kept", "MISSED", "not measured"]


@dataclass(frozen=True)
class Budget:
    """One row. `bound` is the most that is allowed, or with `at_least` the least; `goal` is the further one."""

    what: str
    unit: str
    bound: float
    goal: float | None = None
    at_least: bool = False
    measured: float | None = None
    fell_behind: bool = False
    """Whether there is no number because it was too slow to have one."""

    def holds(self, bound: float) -> bool:
        """Say whether what was measured keeps this bound."""
        if self.measured is None:
            return False
        return self.measured >= bound if self.at_least else self.measured <= bound

    @property
    def verdict(self) -> Verdict:
        if self.measured is None:
            return "MISSED" if self.fell_behind else "not measured"
        return "kept" if self.holds(self.bound) else "MISSED"

    @property
    def reaches_goal(self) -> bool:
        return self.goal is not None and self.holds(self.goal)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict, "reaches_goal": self.reaches_goal}


def all_kept(budgets: Iterable[Budget]) -> bool:
    """Say whether none is missed; what was not measured is not missed."""
    return all(budget.verdict != "MISSED" for budget in budgets)


THIRTY_TWO = Case("/generate", "whole", 32)
ONE = Case("/generate", "whole", 1)
MANY_STREAMS = Case("/generate", "paced", 200)


def of_relay(results: Results) -> list[Budget]:
    """Return the budgets of a warm request."""
    many = "/generate, 32 connections: requests/s over"
    to_litellm = results.ratio("gateway", THIRTY_TWO, "requests_per_s", to="litellm")
    to_nginx = results.ratio("gateway", THIRTY_TWO, "requests_per_s", to="nginx")
    added, calm = (results.added("gateway", ONE, figure, over="nginx") for figure in ("p50_ms", "calm_p50_ms"))
    aside = "" if calm is None else f" (at 100/s: {calm:.2f})"
    answered, took = (results.median("gateway", ONE, figure) for figure in ("requests_per_s", "p50_ms"))
    late = results.added("gateway", MANY_STREAMS, "p99_ms")
    cpu = results.ratio("gateway", MANY_STREAMS, "cpu_s_per_1000", to="nginx")
    streams = "200 streams of 50 tokens/s:"
    return [
        Budget(f"{many} LiteLLM's", "times", 25, 60, at_least=True, measured=to_litellm),
        Budget(f"{many} nginx's", "%", 5, 12, at_least=True, measured=None if to_nginx is None else to_nginx * 100),
        Budget(
            f"/generate, 1 connection, 1,000/s: median added to nginx's{aside}",
            "ms",
            0.5,
            0.2,
            measured=added,
            fell_behind=answered is not None and took is None,
        ),
        Budget(f"{streams} p99 added to a token", "ms", 10, measured=late),
        Budget(f"{streams} CPU over nginx's", "times", 8, 3, measured=cpu),
    ]


def of_cold_start(to_start_ms: float | None, to_request_ms: float | None) -> list[Budget]:
    """Return the budgets of a cold start: medians."""
    return [
        Budget("cold start: from the request to the runtime's start", "ms", 50, measured=to_start_ms),
        Budget("cold start: from a ready server to the request in it", "ms", 25, measured=to_request_ms),
    ]


def of_scale(p99_ms: float | None, idle_cpu_percent: float | None, rss_mib: float | None) -> list[Budget]:
    """Return the budgets of a large catalog. Memory is in MiB, the bound is 150 MB."""
    mb = None if rss_mib is None else rss_mib * 2**20 / 1e6
    return [
        Budget("1,000 models: p99 of GET /models", "ms", 20, measured=p99_ms),
        Budget("1,000 models, 200 of them alive: idle CPU", "% of a core", 3, measured=idle_cpu_percent),
        Budget("1,000 models, 200 of them alive: resident memory", "MB", 150, measured=mb),
    ]


def of_soak(found: Soaked) -> list[Budget]:
    """Return the budgets of a long mixed load: what it may leave behind."""
    more = found.more
    return [
        Budget("soak: resident memory grows after the warm-up", "MB/min", 0.2, measured=found.growth_mb_per_minute),
        Budget("soak: file descriptors more than before", "", 0, measured=more.descriptors),
        Budget("soak: sockets more than before", "", 0, measured=more.sockets),
        Budget("soak: tasks more than before", "", 0, measured=more.tasks),
        Budget("soak: requests still under way", "", 0, measured=found.under_way),
    ]
