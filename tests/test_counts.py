"""Our own counters and histograms tell what those of prometheus_client tell that were fed the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest

from gateway.counts import Counts, Histograms

disable_created_metrics()  # type: ignore[no-untyped-call]  # as the gateway does

BOUNDS = (0.005, 0.01, 0.5, 1, 2.5, 1200, 2_500_000)
NAMES = ["model", "outcome"]
LABELS = st.tuples(st.text(max_size=3), st.sampled_from(["ok", 'odd "\\\n']))
VALUES = (
    st.sampled_from([*BOUNDS, 0, -0.0, 2_500_001, float("inf")])
    | st.floats(0, 3_000_000)
    | st.floats(allow_nan=False)
    | st.integers(-5, 3_000_000)
)
TOUCHED = None
"""A row that somebody asked for, and has counted nothing in yet."""


@given(st.lists(st.tuples(LABELS, st.just(TOUCHED) | st.integers(0, 10**9))))
def test_a_counter_is_told_as_prometheus_own(steps: list[tuple[tuple[str, str], int | None]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = Counts("some_total", "What\\ever\nthis is.", NAMES, registry=ours)
    known = Counter("some_total", "What\\ever\nthis is.", NAMES, registry=theirs)
    for labels, amount in steps:
        mine.of(*labels).value += amount or 0
        known.labels(*labels).inc(amount or 0)

    assert generate_latest(ours) == generate_latest(theirs)


@given(st.lists(st.tuples(LABELS, st.just(TOUCHED) | VALUES)))
@example([(("m", "ok"), bound) for bound in (0, *BOUNDS, float("inf"))])
@example([(("m", "ok"), float("inf")), (("m", "ok"), float("-inf"))])
def test_a_histogram_is_told_as_prometheus_own(steps: list[tuple[tuple[str, str], float | None]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = Histograms("some_seconds", "What\\ever\nthis is.", NAMES, registry=ours, buckets=BOUNDS)
    known = Histogram("some_seconds", "What\\ever\nthis is.", NAMES, registry=theirs, buckets=BOUNDS)
    for labels, value in steps:
        my_row, known_row = mine.of(*labels), known.labels(*labels)
        if value is not TOUCHED:
            my_row.observe(value)
            known_row.observe(value)

    assert generate_latest(ours) == generate_latest(theirs)


@given(st.lists(LABELS), st.lists(LABELS), st.sets(st.text(max_size=3)))
def test_what_is_forgotten_is_what_prometheus_own_forgets_and_begins_anew(
    before: list[tuple[str, str]], after: list[tuple[str, str]], others: set[str]
) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = Counts("some_total", "Some.", NAMES, registry=ours)
    known = Counter("some_total", "Some.", NAMES, registry=theirs)

    def count(rows: list[tuple[str, str]]) -> None:
        for labels in rows:
            mine.of(*labels).value += 1
            known.labels(*labels).inc()

    count(before)
    gone = others | {model for model, _ in before[:1]}
    mine.forget(gone)
    for model in gone:
        known.remove_by_labels({"model": model})
    count(after)

    assert generate_latest(ours) == generate_latest(theirs)


@pytest.fixture
def impatient_threads() -> Iterator[None]:
    """Let threads change places as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@contextmanager
def counting(rows: Histograms) -> Iterator[None]:
    """Count in ever new rows in another thread, all the while."""
    done = Event()

    def count() -> None:
        number = 0
        while not done.is_set():
            number += 1
            rows.of(str(number % 100)).observe(number % 3)
            if number % 100 == 0:
                rows.forget([str(each) for each in range(100)])

    thread = Thread(target=count)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.usefixtures("impatient_threads")
def test_a_page_that_is_written_while_somebody_counts_is_whole_and_agrees_with_itself() -> None:
    registry = CollectorRegistry()
    rows = Histograms("some_seconds", "Some.", ["model"], registry=registry, buckets=(0.5, 1))
    with counting(rows):
        families = [family for _ in range(100) for family in registry.collect()]

    samples = [sample for family in families for sample in family.samples]
    assert len(families) == 100
    assert samples
    for parts in zip(*(samples[at::5] for at in range(5)), strict=True):
        low, middle, infinite, count, _ = (part.value for part in parts)
        assert low <= middle <= infinite == count
