"""TGI's `/metrics` (tgi.md section 8). A series appears with its first use: a fresh server's page is empty."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict

SECONDS = [0.00015 * 1.5**power for power in range(35)]


class Metrics:
    """Counters, gauges and histograms in Prometheus' text format."""

    def __init__(self, max_total_tokens: int) -> None:
        self._tokens = [max_total_tokens * step / 100 for step in range(1, 101)]
        self._counters: dict[str, int] = defaultdict(int)
        self._gauges: dict[str, int] = {}
        self._histograms: dict[str, list[float]] = defaultdict(list)

    def count(self, name: str, **labels: str) -> None:
        inner = ",".join(f'{label}="{value}"' for label, value in labels.items())
        self._counters[f"{name}{{{inner}}}" if labels else name] += 1

    def gauge(self, name: str, value: int) -> None:
        self._gauges[name] = value

    def observe(self, name: str, value: float) -> None:
        self._histograms[name].append(value)

    def page(self) -> str:
        lines = [line for name, value in self._counters.items() for line in _simple(name, "counter", value)]
        lines += [line for name, value in self._gauges.items() for line in _simple(name, "gauge", value)]
        for name, values in self._histograms.items():
            bounds = SECONDS if name.endswith("_duration") else self._tokens
            lines += _histogram(name, values, bounds)
        return "\n".join([*lines, ""])


def _simple(name: str, kind: str, value: int) -> list[str]:
    return [f"# TYPE {name.partition('{')[0]} {kind}", f"{name} {value}"]


def _histogram(name: str, values: list[float], bounds: list[float]) -> list[str]:
    ordered = sorted(values)
    buckets = [f'{name}_bucket{{le="{bound:g}"}} {bisect_left(ordered, bound)}' for bound in bounds]
    total = [f'{name}_bucket{{le="+Inf"}} {len(values)}', f"{name}_sum {sum(values):g}", f"{name}_count {len(values)}"]
    return [f"# TYPE {name} histogram", *buckets, *total]
