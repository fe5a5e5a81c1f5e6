"""What is made of measured numbers: percentiles, medians over runs, what a proxy adds, ratios. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Figure = Literal[
    "requests_per_s",
    "p50_ms",
    "p99_ms",
    "calm_p50_ms",
    "cpu_s_per_1000",
    "rss_mib",
    "failed",
    "upstream_late_p99_ms",
]
"""`calm_p50_ms` is of an open loop so slow that the processors sleep between its requests, and forget."""
Kind = Literal["whole", "streamed", "paced"]
"""An answer that is not streamed; one that is, and there at once; one whose tokens come at a pace."""


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` of all are not above (nearest rank).

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("there is no percentile of nothing")
    rank = math.ceil(len(values) * percent / 100)
    return sorted(values)[max(rank, 1) - 1]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return by how much y grows with each x, as the straight line through all points does (least squares).

    Raises:
        ValueError: they have no two different x.
    """
    xs, ys = zip(*points, strict=True) if points else ((), ())
    try:
        return statistics.linear_regression(xs, ys).slope
    except statistics.StatisticsError:
        raise ValueError("there is no slope of less than two points") from None


def ratio(value: float | None, other: float | None) -> float | None:
    """Return how many times `other` the value is; None where either is not known, or `other` is nothing."""
    return value / other if value is not None and other else None


@dataclass(frozen=True)
class Case:
    """One address, asked for one kind of answer, over so many connections."""

    address: str
    kind: Kind
    connections: int


@dataclass(frozen=True)
class Sample:
    """What one contestant did in one run of a case. A figure that was not measured is not there."""

    contestant: str
    case: Case
    figures: Mapping[Figure, float]


class Results:
    """The samples of all runs, as medians over the runs."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self.samples = list(samples)
        self.cases = list(dict.fromkeys(sample.case for sample in self.samples))
        self.contestants = list(dict.fromkeys(sample.contestant for sample in self.samples))

    def median(self, contestant: str, case: Case, figure: Figure) -> float | None:
        """Return the median over the runs; None if it was not measured in every one of them.

        Who is now and then too slow to have a time is not judged by the runs in which it was not.
        """
        samples = [each for each in self.samples if each.contestant == contestant and each.case == case]
        found = [each.figures[figure] for each in samples if figure in each.figures]
        return statistics.median(found) if found and len(found) == len(samples) else None

    def added(self, contestant: str, case: Case, figure: Figure, *, over: str = "direct") -> float | None:
        """Return what a contestant adds to what `over` takes: the difference of their medians."""
        mine, theirs = self.median(contestant, case, figure), self.median(over, case, figure)
        return None if mine is None or theirs is None else mine - theirs

    def ratio(self, contestant: str, case: Case, figure: Figure, *, to: str) -> float | None:
        """Return how many times as much as `to` a contestant has of this figure."""
        return ratio(self.median(contestant, case, figure), self.median(to, case, figure))
