"""Counters and histograms for what is counted in the midst of requests: plain numbers, told to Prometheus when asked.

They are counted in one thread, the event loop's, so that they need no locks; the page may be written in another one
meanwhile.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import INF, floatToGoString


class Count:
    """A counter's number for one set of labels: who counts adds to it."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0


class Buckets:
    """A histogram's numbers for one set of labels. `counts` is of each bucket alone; the last is beyond all bounds."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value, in the first bucket whose bound is not below it. It must be a number: NaN is in no bucket."""
        self.sum += value
        self.counts[bisect_left(self.bounds, value)] += 1


Row = TypeVar("Row")


class _Rows(Collector, Generic[Row]):
    """One name's rows, by the values of its labels."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str], new: Callable[[], Row]) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._new = new
        self._rows: dict[tuple[str, ...], Row] = {}

    def of(self, *labels: str) -> Row:
        """Return the numbers for these values of the labels. From now on they are told, as 0 at first."""
        if labels not in self._rows:
            self._rows[labels] = self._new()
        return self._rows[labels]

    def forget(self, firsts: Collection[str]) -> None:
        """Tell no more of the rows whose first label has one of these values."""
        for labels in [labels for labels in self._rows if labels[0] in firsts]:
            del self._rows[labels]

    def _told(self) -> Iterable[tuple[tuple[str, ...], Row]]:
        return self._rows.copy().items()  # in one step: the event loop may add a row while a page is written


class Counts(_Rows[Count]):
    """A counter with labels."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str], registry: CollectorRegistry) -> None:
        super().__init__(name, documentation, labels, Count)
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        for labels, count in self._told():
            family.add_metric(labels, count.value)
        yield family


class Histograms(_Rows[Buckets]):
    """A histogram with labels. `buckets` are the upper bounds, in order, without the infinite one."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str],
        registry: CollectorRegistry,
        buckets: Sequence[float],
    ) -> None:
        super().__init__(name, documentation, labels, lambda: Buckets(buckets))
        self._bounds = [str(floatToGoString(bound)) for bound in (*buckets, INF)]  # type: ignore[no-untyped-call]
        registry.register(self)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        for labels, row in self._told():
            counts = tuple(row.counts)  # in one step: all that is told of them must be from one moment
            family.add_metric(labels, list(zip(self._bounds, accumulate(counts), strict=True)), row.sum)
        yield family
