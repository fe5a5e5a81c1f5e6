"""The bench measures and judges; how long anything took is not asserted here."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

from tests.bench.departures import BOUND_MS, Measured, report
from tests.bench.machine import tree
from tests.end_to_end.addresses import EVERY
from tests.end_to_end.departures import DOUBLES
from tests.runtimes.processes import runs, wait_until


def test_whoever_ends_the_bench_ends_what_it_started() -> None:
    command = [sys.executable, "-m", "tests.bench", "cold", "--starts", "200"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as bench:
        wait_until(lambda: len(tree(bench.pid)) > 1)
        started = tree(bench.pid)
        bench.terminate()
        assert bench.wait(60) == 128 + signal.SIGTERM

    assert not any(runs(pid) for pid in started)


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
