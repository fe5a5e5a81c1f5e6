"""What tests of real processes need: to look at the process table, and to wait for a condition with a bound."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

from gateway.runtimes.base import Progress

BOUND_S = 20.0
PROGRAMS = Path(__file__).with_name("programs")


class Ear:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.reports: list[Progress] = []
        self.pauses: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, progress: Progress) -> None:
        self.reports.append(progress)

    def paused(self, reason: str) -> None:
        self.pauses.append(reason)


async def until(condition: Callable[[], object], bound_s: float = BOUND_S) -> None:
    """Return when `condition` holds; fail after the bound."""
    async with asyncio.timeout(bound_s):
        while not condition():
            await asyncio.sleep(0.005)


def wait_until(condition: Callable[[], object], bound_s: float = BOUND_S) -> None:
    """The same, for tests without a loop."""
    deadline = time.monotonic() + bound_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never came to hold"
        time.sleep(0.005)


def runs(pid: int) -> bool:
    """Say whether this process exists and has not ended. One that nobody has reaped yet has ended."""
    state = _state(Path(f"/proc/{pid}"))
    return state is not None and state[0] not in "ZX"


def children() -> set[int]:
    """Return our child processes, those included that are not reaped."""
    found = ((int(entry.name), _state(entry)) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return {pid for pid, state in found if state and state[1] == os.getpid()}


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _state(process: Path) -> tuple[str, int] | None:
    try:
        state, parent, *_ = (process / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return state, int(parent)
