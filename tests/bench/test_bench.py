"""The bench measures and judges; how long anything took is not asserted here."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.bench.departures import BOUND_MS, Measured, report
from tests.end_to_end.addresses import EVERY
from tests.end_to_end.departures import DOUBLES


def test_one_departure_that_took_longer_breaks_the_bound() -> None:
    quick = [Measured(phase, "generate", (1.0, 2.0, 6.0)) for phase in DOUBLES]
    slow = Measured("loading", "generate", (1.0, BOUND_MS + 1))

    assert report(quick, 3)["kept"] is True
    assert report([*quick, slow], 3)["kept"] is False


def test_the_report_tells_of_every_phase_at_every_address() -> None:
    command = [sys.executable, "-m", "tests.bench", "departures", "--runs", "1", "--json"]
    bench = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    found = json.loads(bench.stdout)["departures"]

    assert bench.returncode == (0 if found["kept"] else 1)
    assert found["phases"].keys() == DOUBLES.keys()
    for phase in found["phases"].values():
        assert list(phase["addresses"]) == [each.name for each in EVERY]
        assert 0 < phase["min_ms"] <= phase["median_ms"] <= phase["max_ms"]
