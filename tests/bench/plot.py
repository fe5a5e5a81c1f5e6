"""The picture that the README shows: bars for a few figures, as SVG. Pure.

Bars are logarithmic where one contestant is hundreds of times another; each has its number beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tests.bench.arithmetic import Case, Figure, Results
from tests.bench.budgets import MANY_STREAMS, ONE, THIRTY_TWO
from tests.bench.telling import number

COLOURS = {"direct": "#9aa0a6", "nginx": "#4c8f4c", "litellm": "#c0504d", "gateway": "#2f6fb5"}
NAMES = {"direct": "direct", "nginx": "nginx", "litellm": "LiteLLM", "gateway": "this gateway"}
PANEL_WIDTH, LABEL_WIDTH, BAR_WIDTH, BAR_HEIGHT, LINE = 430, 100, 220, 16, 22
HEAD_HEIGHT, MARGIN = 44, 16
WIDE = 30.0
DECADES = 4.0
"""How many powers of ten a logarithmic bar spans below the longest one."""


@dataclass(frozen=True)
class Panel:
    """One group of bars. A value of None is drawn as not measured."""

    title: str
    remark: str
    values: Mapping[str, float | None]


def panels(results: Results) -> list[Panel]:
    """Return what the picture shows."""
    connections = "not streamed, 32 connections"
    return [
        _panel(
            results, "/generate: requests per second", f"{connections}; more is better", THIRTY_TWO, "requests_per_s"
        ),
        _panel(results, "/generate: median time, ms", "not streamed, 1 connection, 100 requests/s", ONE, "calm_p50_ms"),
        _panel(results, "Streams: p99 delay of a token, ms", "200 streams, 50 tokens/s each", MANY_STREAMS, "p99_ms"),
        _panel(
            results,
            "Streams: CPU ms per 1,000 tokens",
            "the same 200 streams",
            MANY_STREAMS,
            "cpu_s_per_1000",
            times=1000,
        ),
        _panel(results, "/generate: CPU s per 1,000 requests", connections, THIRTY_TWO, "cpu_s_per_1000"),
        _panel(results, "Resident memory, MiB", "after that load", THIRTY_TWO, "rss_mib"),
    ]


def _panel(results: Results, title: str, remark: str, case: Case, figure: Figure, times: float = 1) -> Panel:
    found = {name: results.median(name, case, figure) for name in results.contestants}
    values = {name: None if value is None else value * times for name, value in found.items()}
    if "direct" in values and values["direct"] is None:
        del values["direct"]  # nobody uses neither processor nor memory
    return Panel(title, remark, values)


def svg(shown: Sequence[Panel], caption: Sequence[str]) -> str:
    """Return the picture: two panels a row, the lines of a caption below."""
    height_of = HEAD_HEIGHT + LINE * max((len(panel.values) for panel in shown), default=0) + MARGIN
    rows = math.ceil(len(shown) / 2)
    width, height = 2 * PANEL_WIDTH + MARGIN, rows * height_of + MARGIN + LINE * len(caption)
    size = f'width="{width}" height="{height}"'
    drawn = [
        line
        for at, panel in enumerate(shown)
        for line in _drawn(panel, MARGIN + (at % 2) * PANEL_WIDTH, MARGIN + (at // 2) * height_of)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}" font-family="sans-serif">',
            f'<rect {size} fill="#ffffff"/>',
            *drawn,
            *(_text(MARGIN, rows * height_of + MARGIN + at * LINE, line, size=10) for at, line in enumerate(caption)),
            "</svg>",
            "",
        ]
    )


def _drawn(panel: Panel, left: int, top: int) -> Iterator[str]:
    yield _text(left, top + 12, panel.title, size=13, weight="bold")
    scale = "; logarithmic" if is_wide(panel.values.values()) else ""
    yield _text(left, top + 28, panel.remark + scale, size=10, colour="#5f6368")
    lengths = bar_lengths(panel.values.values())
    for at, ((name, value), length) in enumerate(zip(panel.values.items(), lengths, strict=True)):
        y = top + HEAD_HEIGHT + at * LINE
        yield _text(left, y + 12, NAMES.get(name, name))
        x = left + LABEL_WIDTH
        if length:
            colour = COLOURS.get(name, "#888888")
            yield f'<rect x="{x}" y="{y}" width="{length:.1f}" height="{BAR_HEIGHT}" fill="{colour}"/>'
        yield _text(x + length + 6, y + 12, "not measured" if value is None else number(value))


def is_wide(values: Iterable[float | None]) -> bool:
    """Say whether they differ too much for bars in proportion."""
    positive = [value for value in values if value and value > 0]
    return bool(positive) and max(positive) / min(positive) > WIDE


def bar_lengths(values: Iterable[float | None]) -> list[float]:
    """Return the bars' lengths: in proportion, or to a logarithmic scale where the values differ much."""
    given = list(values)
    positive = [value for value in given if value and value > 0]
    if not positive:
        return [0.0] * len(given)
    most, least = max(positive), min(positive)
    decades = max(DECADES, math.ceil(math.log10(most / least)) + 0.5)
    wide = is_wide(given)

    def length(value: float | None) -> float:
        if not value or value <= 0:
            return 0.0
        share = 1 + math.log10(value / most) / decades if wide else value / most
        return max(share, 0.005) * BAR_WIDTH

    return [length(value) for value in given]


def _text(x: float, y: float, words: str, *, size: int = 12, weight: str = "normal", colour: str = "#202124") -> str:
    style = f'font-size="{size}" font-weight="{weight}" fill="{colour}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'
