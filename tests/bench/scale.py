"""The control plane with a thousand models, two hundred of which are alive and watched.

Their servers are addresses of one nginx (runtime `external`), so that what is measured is the gateway, and each health
check is a real one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.arithmetic import percentile
from tests.bench.callers import Target, ask, at_fixed_rate, json_of
from tests.bench.machine import CannotMeasure, Cores, cpu_s, pinned, rss_mib, tree
from tests.bench.rivals import Place, gateway_of
from tests.bench.upstream import Upstream, upstream

MODELS = 1000
ALIVE = 200
REQUESTS_PER_S = 5
SETTLE_S = 3.0


@dataclass(frozen=True)
class Scale:
    """What so many models cost. `failed` counts questions without an answer in time."""

    models: int
    alive: int
    p50_ms: float
    p99_ms: float
    failed: int
    idle_cpu_percent: float
    rss_mib: float


def measure(seconds: float, cores: Cores, told: Callable[[str], object]) -> Scale:
    """Return what the gateway takes: idle for `seconds`, then asked for all models at a fixed rate for as long.

    Raises:
        CannotMeasure: the gateway does not run, or a model does not start.
    """
    told(f"{MODELS} models, {ALIVE} of them alive")
    with tempfile.TemporaryDirectory() as name, pinned(cores.others):
        folder = Path(name)
        with upstream(folder, 1, cores.others) as behind:
            models = {f"m{number}": _model(number, behind) for number in range(MODELS)}
            with gateway_of(Place(folder, behind, cores.tested), models) as (pid, port, key):
                return _measured(pid, port, {"Authorization": f"Bearer {key}"}, seconds)


def _measured(pid: int, port: int, headers: dict[str, str], seconds: float) -> Scale:
    for number in range(ALIVE):
        ask(Target(port, f"/models/m{number}/start?wait=true", headers=headers))
    listed = Target(port, "/models", headers=headers, method="GET")
    alive = sum(each["running"] for each in json_of(ask(listed))["models"])
    if alive != ALIVE:
        raise CannotMeasure(f"{alive} models are ready, and not {ALIVE}")
    time.sleep(SETTLE_S)
    idle_percent = _idle_cpu_percent(pid, seconds)
    timed = at_fixed_rate(listed, 1, REQUESTS_PER_S, seconds)
    return Scale(
        MODELS,
        alive,
        percentile(timed.took_ms, 50),
        percentile(timed.took_ms, 99),
        timed.failed,
        idle_percent,
        rss_mib(tree(pid)),
    )


def _idle_cpu_percent(pid: int, seconds: float) -> float:
    pids, began = tree(pid), time.monotonic()
    before_s = cpu_s(pids)
    time.sleep(seconds)
    return (cpu_s(pids) - before_s) / (time.monotonic() - began) * 100


def _model(number: int, behind: Upstream) -> dict[str, Any]:
    url = f"{behind.url('whole')}/m{number}"
    return {"engine": "tgi", "hf_name": f"m{number}", "runtime": "external", "url": url, "idle_timeout": "never"}
