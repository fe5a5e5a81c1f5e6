"""Counting checks, in virtual time, with answers that a test writes down."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest

from gateway.fleet.health import Answer, Health
from gateway.runtimes.base import Handle
from tests.simulator.loop import SimulatedLoop
from tests.simulator.servers import SimulatedEngine

HANDLE = Handle("tgi-m", "http://127.0.0.1:8080", 8080, "pid 1")
OK, BUSY, NOTHING = (200, b""), (503, b""), None


class Written:
    """A probe whose answers are written down; the last one goes on for ever."""

    def __init__(self, answers: Sequence[Answer | None]) -> None:
        self.answers = list(answers)
        self.asked_at: list[float] = []

    async def ask(self, url: str, timeout_s: float, headers: Mapping[str, str]) -> Answer | None:
        assert url == "http://127.0.0.1:8080/health"
        assert timeout_s > 0
        self.asked_at.append(asyncio.get_running_loop().time())
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def play(answers: Sequence[Answer | None], what: str, *, within_s: float = 1000.0) -> tuple[float | None, list[float]]:
    """Return when `what` returned (None: not within the bound), and when it asked."""
    probe = Written(answers)

    async def scene() -> float | None:
        health = Health(SimulatedEngine(), probe, interval_s=10, failures=3)
        try:
            async with asyncio.timeout(within_s):
                await getattr(health, what)(HANDLE)
        except TimeoutError:
            return None
        return asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=lambda: SimulatedLoop(0)) as runner:
        return runner.run(scene()), probe.asked_at


@pytest.mark.parametrize(
    ("answers", "lost_at"),
    [
        ([NOTHING], 30),
        ([BUSY], 30),
        ([OK, NOTHING], 40),
        ([NOTHING, NOTHING, OK, NOTHING], 60),
        ([NOTHING, OK], None),
        ([OK], None),
    ],
)
def test_only_misses_in_a_row_make_a_server_lost(answers: Sequence[Answer | None], lost_at: float | None) -> None:
    assert play(answers, "until_lost")[0] == lost_at


def test_a_server_is_back_with_the_first_check_that_passes() -> None:
    assert play([NOTHING, NOTHING, OK], "until_back")[0] == 2


def test_a_quick_start_is_asked_often_and_a_slow_one_seldom() -> None:
    _, asked_at = play([BUSY], "until_ready", within_s=300)
    rests = [later - earlier for earlier, later in pairwise(asked_at)]

    assert rests[0] == pytest.approx(0.02)
    assert max(rests) == pytest.approx(1.0)
    assert len(asked_at) < 600


def test_ready_is_noticed_at_once() -> None:
    assert play([NOTHING, BUSY, OK], "until_ready")[0] == pytest.approx(0.04)
