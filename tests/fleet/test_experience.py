"""What one model's starts and stops teach, and who is told of it; in virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from gateway.errors import GatewayError, ModelNotLoaded
from gateway.fleet.admission import LATEST_S, SOONEST_S, is_hopeless, retry_after_s
from gateway.fleet.estimates import BEGINNING, Estimate
from gateway.fleet.experience import DEFAULT_COST_S, KEPT_MODELS, Experience, Key, Record, host_name
from gateway.fleet.journal import Entry
from gateway.fleet.refusals import BUSY_RETRY_S
from gateway.fleet.status import described
from gateway.lifecycle import DOWN, State
from tests.fleet.scenes import Scene, play, spec
from tests.simulator.servers import Manners, SimulatedEngine
from tests.simulator.watched import Waiter

STEADY = Manners(make_s=10, load_s=90)
"""A start of 100 s: the server is made in 10 s, and then loads."""


class Taught(Scene):
    """A model that was started before, so often, and stopped."""

    async def taught(self, starts: int = 1) -> Taught:
        for _ in range(starts):
            await self.order("start")
            await self.order("stop")
        return self

    def record(self) -> Record:
        [record] = self.world.fleet.experience.snapshot().values()
        return record

    async def refused(self, *, max_wait_s: float | None = None) -> tuple[GatewayError, float]:
        """Ask in the sight of the witness; return why it was in vain, and how long it took to say so."""
        world, began = self.world, self.loop.time()
        with pytest.raises(GatewayError) as refused, world._waits(self.spec, Waiter(began, max_wait_s)):
            async with self.instance.lease(max_wait_s=max_wait_s):
                raise AssertionError("it was let in")
        world._refused(self.spec, refused.value, began)
        return refused.value, self.loop.time() - began

    def progress_events(self) -> list[Entry]:
        return [entry for entry in self.world.journal._entries if entry.kind == "progress"]


def steady(**keys: Any) -> Taught:
    return Taught(*[STEADY] * 9, **keys)


# ---- what is learned ------------------------------------------------------------------------------------------------


def test_a_start_and_a_stop_teach_what_they_took() -> None:
    async def scenario() -> None:
        scene = await steady().taught()

        record = scene.record()

        assert list(record.phases) == [BEGINNING, "loading"]
        assert record.phases[BEGINNING] == pytest.approx((10,), abs=0.5)
        assert record.phases["loading"] == pytest.approx((90,), abs=2)
        assert record.stops == pytest.approx((STEADY.leaves_s,))
        assert record.drains == ()

    play(scenario)


def test_a_drain_teaches_how_long_requests_go_on() -> None:
    async def scenario() -> None:
        scene = steady()
        await scene.ready()
        request = scene.ask(7.0)
        await scene.after(2)
        await scene.order("stop")

        assert await request == "answered"
        assert scene.record().drains == pytest.approx((5,))

    play(scenario)


@pytest.mark.parametrize(
    "manners",
    [Manners(fails_to_start=True), Manners(dies_loading_s=3), Manners(load_s=1e9, silent_load=True)],
    ids=["never made", "dies", "never ready"],
)
def test_a_start_that_failed_teaches_nothing(manners: Manners) -> None:
    async def scenario() -> None:
        scene = Taught(manners)

        assert await scene.ask() in ("START_FAILED", "START_TIMEOUT")
        await scene.after(60)

        assert scene.world.fleet.experience.snapshot() == {}

    play(scenario)


def test_a_start_that_was_called_off_teaches_nothing() -> None:
    async def scenario() -> None:
        scene = steady()
        await scene.order("start-and-go")
        await scene.after(50)
        await scene.order("stop")

        assert scene.instance.status.state is State.STOPPED
        assert scene.world.fleet.experience.snapshot() == {}

    play(scenario)


def test_a_start_that_was_frozen_from_outside_teaches_nothing_of_its_phases() -> None:
    async def scenario() -> None:
        scene = steady()
        await scene.order("start-and-go")
        await scene.after(20)
        scene.server.listener.paused("the container is paused")
        await scene.after(1)
        assert scene.instance.status.eta_s is None
        await scene.order("start")
        await scene.order("stop")

        assert scene.record().phases == {}

    play(scenario)


def test_an_adopted_server_teaches_nothing_of_a_start_and_has_no_estimate() -> None:
    async def scenario() -> None:
        scene = await steady(keeps=True).taught()
        experience = scene.world.fleet.experience
        before = experience.snapshot()
        await scene.order("start-and-go")
        await scene.after(20)
        await scene.world.kill([scene.spec])
        scene.world.fleet.experience.recall(before)

        await scene.after(1)
        assert scene.instance.status.state is State.LOADING
        assert scene.instance.status.eta_s is None
        await scene.order("start")

        assert scene.world.fleet.experience.snapshot() == before

    play(scenario)


def test_another_server_of_the_same_model_is_not_taken_for_the_same() -> None:
    experience, engine = Experience("here"), SimulatedEngine()
    known = experience.of(spec(args={"a": 1}), engine)
    key = known._key()
    assert key
    experience.put(key, Record({"loading": (50.0,)}))

    assert known.cost_s == 50
    assert experience.of(spec(args={"a": 2}), engine).cost_s == DEFAULT_COST_S
    assert experience.of(spec(args={"a": 1}, max_queue=3), engine).cost_s == 50  # which is the gateway's own affair
    elsewhere = Experience("there")
    elsewhere.recall(experience.snapshot())
    assert elsewhere.of(spec(args={"a": 1}), engine).cost_s == DEFAULT_COST_S


def test_those_of_which_nobody_learned_for_the_longest_time_are_forgotten() -> None:
    experience = Experience()
    keys = [Key(f"m{number}", "", "") for number in range(KEPT_MODELS + 1)]
    for key in keys[:-1]:
        experience.put(key, Record())
    experience.put(keys[0], Record(drains=(1.0,)))
    experience.put(keys[-1], Record())

    assert list(experience.snapshot()) == [*keys[2:-1], keys[0], keys[-1]]


def test_what_is_recalled_does_not_replace_what_was_learned_since() -> None:
    experience, old, new = Experience(), Key("old", "", ""), Key("new", "", "")
    experience.put(new, Record(drains=(2.0,)))

    experience.recall({old: Record(drains=(1.0,)), new: Record(drains=(1.0,))})

    assert experience.get(old).drains == (1.0,)
    assert experience.get(new).drains == (2.0,)


def test_a_host_has_a_name_that_a_file_can_hold() -> None:
    assert 0 < len(host_name()) <= 64


# ---- what is told ---------------------------------------------------------------------------------------------------


def test_the_first_start_has_no_history_and_the_second_tells_what_is_left() -> None:
    async def scenario() -> None:
        scene = steady()
        await scene.order("start-and-go")
        await scene.after(5)
        assert (scene.instance.status.progress, scene.instance.status.eta_s) == (None, None)
        await scene.taught()

        await scene.order("start-and-go")
        await scene.after(4)
        early = scene.instance.status
        first = described(early)
        await scene.after(76)
        late = scene.instance.status

        assert early.progress is None
        assert first
        assert first["phase"] == "starting"  # it has not told anything itself yet
        assert first["eta_s"] == pytest.approx(96, abs=3)
        assert late.progress
        assert late.progress.phase == "loading"
        assert late.eta_s == pytest.approx(20, abs=3)
        await scene.ready()
        assert scene.instance.status.eta_s is None

    play(scenario)


def test_events_of_progress_carry_the_estimate() -> None:
    async def scenario() -> None:
        scene = await steady().taught()
        first = len(scene.progress_events())
        await scene.ready()

        later = [event.data["eta_s"] for event in scene.progress_events()[first:]]

        assert later
        assert all(eta_s > 0 for eta_s in later)
        assert later[-1] < later[0]

    play(scenario)


def test_a_start_that_takes_longer_than_ever_is_never_said_to_be_nearly_over() -> None:
    async def scenario() -> None:
        silent = Manners(make_s=10, load_s=90, silent_load=True)
        scene = await Taught(silent, replace(silent, load_s=900, silent_load=True), stall_timeout=1000.0).taught()
        await scene.order("start-and-go")
        told = []
        for _ in range(6):
            await scene.after(100)
            told.append(scene.instance.status.eta_s or 0)

        assert told == sorted(told)
        assert told[0] >= 10
        assert told[-1] > 100

    play(scenario)


# ---- who is refused, and told to come back --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_who_waits_for_less_than_a_start_takes_is_told_at_once_when_to_come_back(seed: int) -> None:
    async def scenario() -> None:
        scene = await steady().taught()

        error, took_s = await scene.refused(max_wait_s=30)

        assert isinstance(error, ModelNotLoaded)
        assert took_s == 0
        assert error.retry_after_s == pytest.approx(100, abs=3)
        assert "takes about" in error.detail
        assert error.extra["progress"] is None  # it has only just been asked for
        assert scene.is_in(State.STARTING)
        await scene.after(error.retry_after_s or 0)
        await scene.after(3)
        assert scene.is_in(State.READY)  # the start went on (P8)
        assert scene.starts == 2

    play(scenario, seed)


def test_amid_a_start_it_is_what_is_left_that_counts() -> None:
    async def scenario() -> None:
        scene = await steady().taught()
        await scene.order("start-and-go")
        await scene.after(80)

        patient = scene.ask(max_wait_s=60)
        error, took_s = await scene.refused(max_wait_s=5)

        assert took_s == 0
        assert error.retry_after_s == pytest.approx(20, abs=4)
        assert await patient == "answered"

    play(scenario)


def test_without_measurements_nobody_is_refused_before_his_time() -> None:
    async def scenario() -> None:
        scene = steady()

        error, took_s = await scene.refused(max_wait_s=30)

        assert took_s == pytest.approx(30)
        assert isinstance(error, ModelNotLoaded)

    play(scenario)


def test_an_estimate_that_was_wrong_is_corrected_by_the_start_that_it_refused() -> None:
    async def scenario() -> None:
        quick = Manners(make_s=1, load_s=4)
        scene = await Taught(STEADY, *[quick] * 9).taught()
        outcomes = []
        for _ in range(4):
            outcomes.append(await scene.ask(max_wait_s=30))
            await scene.after(40)
            assert scene.is_in(State.READY)
            await scene.order("stop")

        assert outcomes[0] == "MODEL_NOT_LOADED"
        assert outcomes[-1] == "answered"

    play(scenario)


def test_of_a_model_that_is_leaving_one_is_told_when_it_can_be_started_again() -> None:
    async def scenario() -> None:
        slow = Manners(make_s=1, load_s=1, leaves_s=8)
        scene = Taught(*[slow] * 9, stop_grace=30.0)
        await scene.ready()
        await scene.taught()
        await scene.ready()
        stopping = asyncio.create_task(scene.order("stop"))
        await scene.after(1)

        error, _ = await scene.refused(max_wait_s=0)
        await stopping

        assert error.retry_after_s == pytest.approx(7)
        assert scene.instance.status.state in DOWN

    play(scenario)


def test_a_full_queue_tells_when_those_who_wait_have_been_answered() -> None:
    async def scenario() -> None:
        scene = Taught(*[Manners()] * 3, max_concurrency=2, max_queue=4)
        await scene.ready()
        unknown = [scene.ask(20.0) for _ in range(6)]
        await scene.after(1)
        before, _ = await scene.refused()
        assert before.retry_after_s == BUSY_RETRY_S
        await asyncio.gather(*unknown)

        known = [scene.ask(20.0) for _ in range(6)]
        await scene.after(1)
        error, _ = await scene.refused()

        assert error.code == "QUEUE_FULL"
        assert error.retry_after_s == pytest.approx(4 * 20 / 2)
        await asyncio.gather(*known)

    play(scenario)


def test_who_got_no_slot_in_time_is_told_by_what_requests_take() -> None:
    async def scenario() -> None:
        scene = Taught(Manners(), max_concurrency=1, queue_timeout=30.0)
        await scene.ready()
        assert await scene.ask(20.0) == "answered"
        busy = scene.ask(50.0)
        await scene.after(1)

        error, _ = await scene.refused()
        await busy

        assert error.code == "NO_CAPACITY"
        assert error.retry_after_s == pytest.approx(20)

    play(scenario)


def test_a_full_queue_of_a_cold_model_comes_after_its_start() -> None:
    async def scenario() -> None:
        scene = await steady(max_concurrency=1, max_queue=0).taught()
        await scene.ready()
        assert await scene.ask(8.0) == "answered"
        await scene.order("stop")
        first = scene.ask(1.0)
        await scene.after(20)

        error, _ = await scene.refused()

        assert error.code == "QUEUE_FULL"
        assert error.retry_after_s == pytest.approx(80 + 8, abs=4)
        assert await first == "answered"

    play(scenario)


@pytest.mark.parametrize(
    ("estimate", "otherwise_s", "expected"),
    [
        (None, 5, 5),
        (None, 900, 900),
        (Estimate(40, 3), 5, 40),
        (Estimate(0.2, 3), 5, SOONEST_S),
        (Estimate(1e6, 3), 5, LATEST_S),
        (Estimate(2, 0), 5, 5),  # its pace tells of one phase only
        (Estimate(30, 0), 5, 30),
    ],
)
def test_when_to_come_back(estimate: Estimate | None, otherwise_s: float, expected: float) -> None:
    assert retry_after_s(estimate, otherwise_s) == expected


@pytest.mark.parametrize(
    ("estimate", "expected"), [(Estimate(31, 1), True), (Estimate(30, 1), False), (Estimate(9999, 0), False)]
)
def test_only_what_was_measured_makes_a_wait_hopeless(estimate: Estimate, expected: bool) -> None:
    assert is_hopeless(estimate, 30) is expected
