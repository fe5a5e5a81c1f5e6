"""The simulator itself: it holds on good code, finds every planted bug, and lives a day again to the letter."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gateway.catalog import ModelSpec
from tests.fleet.scenes import spec
from tests.simulator.changes import (
    BAD,
    ChangingWorld,
    catalog_of,
    with_another_server,
    with_one,
    with_other_words,
    without,
)
from tests.simulator.loop import Deadlock, SimulatedLoop
from tests.simulator.planted import BUGS, parts_with
from tests.simulator.promises import Day, simulate
from tests.simulator.servers import NEVER, Manners

ENOUGH_DAYS = 600


def first_broken_day(promise: str) -> Day:
    for seed in range(ENOUGH_DAYS):
        day = simulate(seed, **parts_with(promise))
        if day.broke:
            return day
    raise AssertionError(f"{ENOUGH_DAYS} days did not show that {promise} is broken")


@pytest.mark.parametrize("promise", BUGS)
def test_a_planted_bug_is_found_and_its_day_can_be_lived_again(promise: str) -> None:
    broken = first_broken_day(promise)

    again = simulate(broken.seed, **parts_with(promise))

    assert again == broken


def test_the_same_seed_gives_the_same_day_in_another_process() -> None:
    program = "from tests.simulator.promises import simulate; print('\\n'.join(simulate(3).trace))"
    root = Path(__file__).parent.parent.parent

    told = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True).stdout

    assert told.splitlines() == simulate(3).trace


def test_a_day_has_the_requests_the_orders_and_the_faults_that_it_must() -> None:
    days = [simulate(seed) for seed in range(10)]

    assert all(sum(day.outcomes.values()) >= 300 for day in days)
    assert all(sum("operator: " in line and line.count(":") == 1 for line in day.trace) >= 3 for day in days)
    assert all(sum("fault: " in line for line in day.trace) == 2 for day in days)
    assert sum("the catalog changes: " in line for day in days for line in day.trace) >= len(days)


def test_most_days_have_gpus_and_too_few_of_them() -> None:
    days = [simulate(seed) for seed in range(12)]

    with_gpus = [day for day in days if day.gpus]
    assert len(with_gpus) > len(days) / 2
    assert all(2 <= day.gpus <= 8 for day in with_gpus)
    assert sum(day.evictions for day in with_gpus) > 5 * len(with_gpus)
    assert sum(day.outcomes.get("NO_CAPACITY", 0) for day in with_gpus) > 0
    assert any("-1: starting -> loading" in line for day in with_gpus for line in day.trace), "replicas"


def test_a_failing_seed_is_replayed_with_one_command() -> None:
    root = Path(__file__).parent.parent.parent
    seed = first_broken_day("P1").seed
    command = ["scripts/simulate", "promises", "--seed", str(seed), "--plant", "P1"]

    lived = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    assert lived.returncode == 1
    assert f"seed {seed}: P1" in lived.stderr
    assert " ".join(command) in lived.stderr


def test_waiting_for_nothing_is_a_deadlock_and_not_a_hang() -> None:
    async def wait_for_nothing() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock), asyncio.Runner(loop_factory=lambda: SimulatedLoop(0)) as runner:
        runner.run(wait_for_nothing())


SECONDS = st.sampled_from([0.0, 0.001, 0.5, 4.0, 5.0, 10.0, 30.0, 60.0, 300.0, 901.0])
MANNERS = st.builds(
    Manners,
    make_s=st.sampled_from([0.0, 1.0, 30.0]),
    load_s=st.sampled_from([0.0, 5.0, 100.0, NEVER]),
    fails_to_start=st.sampled_from([False] * 5 + [True]),
    silent_load=st.booleans(),
    dies_loading_s=st.sampled_from([NEVER] * 4 + [1.0]),
    dies_serving_s=st.sampled_from([NEVER] * 4 + [0.0, 5.0]),
    hangs_s=st.sampled_from([NEVER] * 4 + [0.0, 20.0]),
    hang_lasts_s=st.sampled_from([7.0, 60.0, NEVER]),
    leaves_s=st.sampled_from([0.2, 5.0, 500.0]),
)


EDITS = st.tuples(
    st.integers(0, 1), st.sampled_from(["words", "server", "remove", "bad", "gone"]), st.integers(0, 1000)
)


class Gateway(RuleBasedStateMachine):
    """Two models, tried in every way that Hypothesis can think of; the witness watches after every step."""

    @initialize(seed=st.integers(0, 2**16))
    def the_gateway_is_there(self, seed: int) -> None:
        self.runner = asyncio.Runner(loop_factory=lambda: SimulatedLoop(seed))
        self.tasks: list[asyncio.Task[object]] = []
        self.run(self._open())

    async def _open(self) -> None:
        bounds = {"queue_timeout": 20, "drain_timeout": 10, "abandon_after": 15, "idle_timeout": 120}
        one = spec(id="one", weights="1.gguf", max_concurrency=1, max_queue=2, start_timeout=200, **bounds)
        two = spec(id="two", weights="2.gguf", max_concurrency=3, stall_timeout=30, unhealthy_timeout=20, **bounds)
        self.world = ChangingWorld([one, two], seed=0)
        self.specs = [one, two]

    def run(self, work: object) -> None:
        self.runner.run(work)  # type: ignore[arg-type]

    async def _begin(self, work: object) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(work))  # type: ignore[arg-type]

    @rule(model=st.integers(0, 1), callers=st.integers(1, 4), work_s=SECONDS, max_wait_s=st.none() | SECONDS)
    def requests_arrive(self, model: int, callers: int, work_s: float, max_wait_s: float | None) -> None:
        for _ in range(callers):
            self.run(self._begin(self.world.request(self.specs[model], work_s, max_wait_s=max_wait_s)))

    @rule(model=st.integers(0, 1), verb=st.sampled_from(["start", "start-and-go", "stop", "force-stop", "restart"]))
    def an_operator_orders(self, model: int, verb: str) -> None:
        self.run(self._begin(self.world.operate(self.specs[model], verb)))

    @rule(seconds=SECONDS)
    def time_passes(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    @rule(which=st.integers(0, 50))
    def somebody_leaves(self, which: int) -> None:
        if self.tasks:
            self.tasks[which % len(self.tasks)].cancel()
            self.run(asyncio.sleep(0))

    @rule(manners=MANNERS)
    def the_next_server_has_manners(self, manners: Manners) -> None:
        self.world.runtime.next_manners.append(manners)

    @rule(seconds=SECONDS)
    def the_daemon_falls_silent(self, seconds: float) -> None:
        async def fall_silent() -> None:
            self.world.runtime.fall_silent(seconds)

        self.run(fall_silent())

    @rule(model=st.integers(0, 1), hangs=st.booleans())
    def a_server_fails(self, model: int, hangs: bool) -> None:
        async def fail() -> None:
            for server in self.world.runtime.alive(f"tgi-{self.specs[model].id}"):
                if hangs:
                    server.hang()
                else:
                    server.die()

        self.run(fail())

    @rule(killed=st.booleans(), changed=st.booleans(), down_s=st.sampled_from([0.0, 1.0, 400.0]))
    def the_gateway_goes_and_comes_again(self, killed: bool, changed: bool, down_s: float) -> None:
        one, *others = self.world.fleet.catalog.models.values()
        specs = [one.model_copy(update={"args": {"version": self.world.loop.time()}}) if changed else one, *others]
        come_again = self.world.kill if killed else self.world.leave_and_come_again
        self.run(self._begin(come_again(specs, down_s=down_s)))

    @rule(edits=st.lists(EDITS, min_size=1, max_size=3), at_once=st.booleans())
    def somebody_edits_the_catalog(self, edits: list[tuple[int, str, int]], at_once: bool) -> None:
        async def edit() -> None:
            if self.world.down:  # a kill may have begun in this very tick
                return
            for model, how, seed in edits:
                self._edit(self.specs[model], how, Random(seed), at_once=at_once)

        self.run(edit())

    def _edit(self, spec: ModelSpec, how: str, random: Random, *, at_once: bool) -> None:
        if how in ("bad", "gone"):
            self.world.file.vanish() if how == "gone" else self.world.file.save(BAD)
            return
        now = catalog_of(self.world.fleet.catalog.models.values())
        spec = now.models.get(spec.id, spec)
        match how:
            case "remove":
                later = without(now, spec)
            case "words":
                later = with_one(now, with_other_words(spec, random))
            case _:
                later = with_one(now, with_another_server(spec, random))
        self.world.file.save(later)
        if at_once:
            self.world.take(later)

    @invariant()
    def no_promise_is_broken(self) -> None:
        assert self.world.broken is None

    def teardown(self) -> None:
        try:
            self.run(self.world.close())
            self.run(self._settle())
            left = asyncio.all_tasks(self.runner.get_loop())
            assert [task.get_name() for task in left] == []
        finally:
            self.runner.close()

    async def _settle(self) -> None:
        for outcome in await asyncio.gather(*self.tasks, return_exceptions=True):
            assert outcome is None or isinstance(outcome, str | asyncio.CancelledError), outcome


Gateway.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
TestGateway = Gateway.TestCase
