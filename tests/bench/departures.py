"""How soon the engine's connection is closed after a caller has left (promise P10), measured at the double.

Both read the machine's monotonic clock: the caller just before it closes, the double when its work has stopped. Who
queues or waits for a start has no connection to an engine; there it is how soon the place is seen to be given back,
the question by HTTP included.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.end_to_end.addresses import EVERY, Address
from tests.end_to_end.departures import AT_THE_ENGINE, BEFORE_IT, Phase, Scene, scene
from tests.runtimes.processes import wait_until

BOUND_MS = 100.0


@dataclass(frozen=True)
class Measured:
    """What one phase took at one address, once for each run."""

    phase: Phase
    address: str
    took_ms: tuple[float, ...]


def measure(runs: int, told: Callable[[str], object]) -> list[Measured]:
    """Return what was measured: every phase at every address, so many times. `told` hears of each phase."""
    with tempfile.TemporaryDirectory() as folder, scene(Path(folder)) as stage:
        return list(_phases(stage, runs, told))


def _phases(stage: Scene, runs: int, told: Callable[[str], object]) -> Iterator[Measured]:
    for phase in AT_THE_ENGINE:
        told(phase)
        for address in EVERY:
            yield Measured(phase, address.name, tuple(_until_aborted_ms(stage, phase, address) for _ in range(runs)))
    with stage.place_taken():
        for phase in BEFORE_IT:
            told(phase)
            for address in EVERY:
                took_ms = tuple(_until_place_is_free_ms(stage, phase, address) for _ in range(runs))
                yield Measured(phase, address.name, took_ms)


def _until_aborted_ms(stage: Scene, phase: Phase, address: Address) -> float:
    """Return how long it took until the last of the caller's requests to the engine was seen to end."""
    double = stage.doubles[phase]
    before = len(double.aborted_at)
    caller = stage.caller(phase, address)
    left_at = time.monotonic()
    caller.close()
    wait_until(lambda: len(double.aborted_at) == before + address.asks)
    wait_until(lambda: stage.in_flight(phase) == 0)
    return (max(double.aborted_at[before:]) - left_at) * 1000


def _until_place_is_free_ms(stage: Scene, phase: Phase, address: Address) -> float:
    caller = stage.caller(phase, address)
    left_at = time.monotonic()
    caller.close()
    wait_until(lambda: stage.queued(phase) == 0)
    return (time.monotonic() - left_at) * 1000


def report(measured: list[Measured], runs: int) -> dict[str, object]:
    """Return one JSON object; `kept` says whether the bound was."""
    phases = {phase: [each for each in measured if each.phase == phase] for phase in (*BEFORE_IT, *AT_THE_ENGINE)}
    return {
        "bound_ms": BOUND_MS,
        "runs": runs,
        "kept": all(took_ms <= BOUND_MS for each in measured for took_ms in each.took_ms),
        "phases": {
            phase: {
                **_summary([took_ms for each in found for took_ms in each.took_ms]),
                "addresses": {each.address: _summary(each.took_ms) for each in found},
            }
            for phase, found in phases.items()
        },
    }


def _summary(took_ms: list[float] | tuple[float, ...]) -> dict[str, float]:
    values = {"min_ms": min(took_ms), "median_ms": statistics.median(took_ms), "max_ms": max(took_ms)}
    return {name: round(value, 2) for name, value in values.items()}
