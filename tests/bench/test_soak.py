"""What two minutes of mixed load leave behind: nothing. `scripts/bench soak` looks for thirty."""

from __future__ import annotations

import os
from shutil import which

import pytest

from tests.bench import soak
from tests.bench.budgets import Budget, of_soak
from tests.bench.machine import cores

MINUTES = float(os.environ.get("SOAK_MINUTES", "2"))


@pytest.mark.skipif(which("nginx") is None, reason="there is no nginx on this machine")
@pytest.mark.timeout(MINUTES * 60 + soak.WARM_UP_S + 240)
def test_a_mixed_load_with_leavers_and_failing_models_leaves_nothing_behind() -> None:
    found = soak.measure(MINUTES, cores(), print, callers=8)  # it has the machine not for itself

    missed = [budget for budget in of_soak(found) if budget.verdict != "kept"]
    assert missed == list[Budget]()
    assert min(found.asked.values()) > 10
    assert found.answered.keys() == {"200", "401", "404", "422", "502", "503", "left"}
