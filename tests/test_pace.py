"""How long a server may take, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from gateway.relay import Pace
from tests.simulator.loop import SimulatedLoop


class Bounded:
    """A pace of ten seconds, and when it was given up."""

    def __init__(self, *, streamed: bool) -> None:
        self.loop = asyncio.get_running_loop()
        self.given_up_at: list[float] = []
        self.begun_at: list[float] = []
        self.pace = Pace(10, self._give_up, streamed=streamed, begins=lambda: self.begun_at.append(self.loop.time()))

    def _give_up(self) -> None:
        self.given_up_at.append(self.loop.time())

    async def comes_at(self, *instants: float) -> None:
        for instant in instants:
            await asyncio.sleep(instant - self.loop.time())
            self.pace.came()


@pytest.mark.parametrize(
    ("streamed", "instants", "end"),
    [
        (True, [], 10),
        (True, [9.5], 19.5),
        (True, [3, 4, 5, 14.5], 24.5),
        (False, [3, 4, 5, 9], 10),
    ],
)
def test_a_stream_is_given_up_after_a_silence_and_a_whole_answer_after_its_time(
    streamed: bool, instants: list[float], end: float
) -> None:
    async def scene() -> None:
        bounded = Bounded(streamed=streamed)
        await bounded.comes_at(*instants)
        await asyncio.sleep(60)

        assert bounded.given_up_at == [pytest.approx(end)]
        assert bounded.begun_at == (instants[:1] if streamed else [])

    with asyncio.Runner(loop_factory=lambda: SimulatedLoop(0)) as runner:
        runner.run(scene())


def test_what_is_over_is_not_given_up() -> None:
    async def scene() -> None:
        bounded = Bounded(streamed=True)
        await bounded.comes_at(3, 12)
        bounded.pace.is_over()
        await asyncio.sleep(60)

        assert bounded.given_up_at == []

    with asyncio.Runner(loop_factory=lambda: SimulatedLoop(0)) as runner:
        runner.run(scene())
