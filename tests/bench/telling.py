"""What was measured, as tables for people. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tests.bench.arithmetic import Case, Figure, Kind, Results
from tests.bench.budgets import Budget
from tests.bench.cold import ColdStart
from tests.bench.scale import Scale
from tests.bench.soak import Soaked

NOTHING = "-"
KIND_WORDS: Mapping[Kind, str] = {
    "whole": "not streamed",
    "streamed": "streamed, all tokens at once",
    "paced": "streamed at 50 tokens/s",
}


def number(value: float | None) -> str:
    """Return a number with three significant digits, or with all before the point."""
    if value is None:
        return NOTHING
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = next((digits for least, digits in ((100, 0), (10, 1), (1, 2)) if abs(value) >= least), 3)
    return f"{value:.{digits}f}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of columns; the first row is the head, the first column stands to the left."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(_cell(cell, width, left=not at) for at, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def _cell(cell: str, width: int, *, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def of_relay(results: Results) -> Iterator[str]:
    """Yield one table for each address and kind of answer."""
    tables = dict.fromkeys((case.address, case.kind) for case in results.cases)
    for address, kind in tables:
        cases = [case for case in results.cases if (case.address, case.kind) == (address, kind)]
        yield ""
        yield f"{address}, {KIND_WORDS[kind]}"
        yield from table([PACED_HEAD if kind == "paced" else HEAD, *_rows(results, cases)])


HEAD = (
    *("connections", "requests/s", "of nginx", "to LiteLLM"),
    *("p50 ms", "added", "p99 ms", "added", "calm p50 ms", "added"),
    *("CPU s/1000", "to nginx", "RSS MiB", "failed"),
)
PACED_HEAD = (
    *("streams", "token p50 ms", "added", "p99 ms", "added"),
    *("CPU s/1000 tokens", "to nginx", "RSS MiB", "unfinished", "upstream late ms"),
)


def _rows(results: Results, cases: Iterable[Case]) -> Iterator[Sequence[str]]:
    for case in cases:
        for name in results.contestants:
            label = f"{case.connections:>4} {name}"
            yield (label, *(_paced_row if case.kind == "paced" else _row)(results, name, case))


def _row(results: Results, name: str, case: Case) -> list[str]:
    of_nginx = results.ratio(name, case, "requests_per_s", to="nginx")
    return [
        number(results.median(name, case, "requests_per_s")),
        NOTHING if of_nginx is None else f"{number(of_nginx * 100)} %",
        _times(results.ratio(name, case, "requests_per_s", to="litellm")),
        *_times_taken(results, name, case, "p50_ms", "p99_ms", "calm_p50_ms"),
        *_costs(results, name, case),
    ]


def _paced_row(results: Results, name: str, case: Case) -> list[str]:
    late = number(results.median(name, case, "upstream_late_p99_ms"))
    return [*_times_taken(results, name, case, "p50_ms", "p99_ms"), *_costs(results, name, case), late]


def _times_taken(results: Results, name: str, case: Case, *figures: Figure) -> Iterator[str]:
    for figure in figures:
        yield number(results.median(name, case, figure))
        yield NOTHING if name == "direct" else number(results.added(name, case, figure))


def _costs(results: Results, name: str, case: Case) -> list[str]:
    return [
        number(results.median(name, case, "cpu_s_per_1000")),
        _times(results.ratio(name, case, "cpu_s_per_1000", to="nginx")),
        number(results.median(name, case, "rss_mib")),
        number(results.median(name, case, "failed")),
    ]


def _times(value: float | None) -> str:
    return NOTHING if value is None else f"{number(value)} x"


def of_budgets(budgets: Iterable[Budget]) -> list[str]:
    """Return a line for each promise: what was measured, the bound, and whether it is kept."""
    rows = [("promise", "measured", "bound", "further goal", "")]
    for budget in budgets:
        sign = "at least" if budget.at_least else "at most"
        goal = NOTHING if budget.goal is None else f"{budget.goal:g}{' (reached)' if budget.reaches_goal else ''}"
        measured = NOTHING if budget.measured is None else f"{number(budget.measured)} {budget.unit}"
        rows.append(
            (budget.what, measured.strip(), f"{sign} {budget.bound:g} {budget.unit}".strip(), goal, budget.verdict)
        )
    return table(rows)


def of_cold_starts(found: Sequence[ColdStart]) -> list[str]:
    """Return what cold starts took, from the shortest to the longest."""
    rows = [("cold start, ms", "min", "median", "max")]
    for words, values in (
        ("from the request to the runtime's start", [each.to_start_ms for each in found]),
        ("from a ready server to the request in it", [each.to_request_ms for each in found]),
    ):
        rows.append((words, number(min(values)), number(statistics.median(values)), number(max(values))))
    return ["", *table(rows)]


def of_scale(found: Scale) -> list[str]:
    """Return what a large catalog costs."""
    words = f"{found.models} models, {found.alive} of them alive: GET /models p50 {number(found.p50_ms)} ms"
    return ["", f"{words}, p99 {number(found.p99_ms)} ms, {found.failed} unanswered"]


def of_soak(found: Soaked) -> list[str]:
    """Return what was asked and how it ended, and memory from the first to the last sample."""
    asked = [("asked by whom, or for what", "times"), *((name, f"{times:,}") for name, times in found.asked.items())]
    ended = ", ".join(f"{status}: {times:,}" for status, times in sorted(found.answered.items()))
    memory = f"resident memory, MiB: {number(found.rss_mib[0][1])} at first, {number(found.rss_mib[-1][1])} at last"
    return ["", *table(asked), f"ended with {ended}", memory]


def of_machine(machine: Mapping[str, Any]) -> list[str]:
    """Return what the numbers were measured on."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return [
        f"{machine['cpu']}, {machine['cores']} cores; {machine['pinning']}; Linux {machine['kernel']}",
        f"{versions}; load before: {machine['load_before']:g}",
    ]
