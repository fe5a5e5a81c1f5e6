"""Several servers of one model: who serves whom, and what becomes of each of them, in virtual time."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from gateway.api.models import model_json
from gateway.catalog import ModelSpec
from gateway.errors import CatalogError, GatewayError, ModelNotRunning, StartFailed, StopFailed, UnknownModel
from gateway.fleet.fleet import Fleet
from gateway.fleet.gpus import Gpus
from gateway.fleet.journal import Entry, Journal
from gateway.fleet.placement import GIB, Device
from gateway.fleet.queue import Among
from gateway.fleet.replicas import Replicas, as_one, least_loaded, to_wake
from gateway.fleet.status import Failure, Status
from gateway.lifecycle import State
from gateway.runtimes.base import Handle, Launch, Listener
from tests.fleet.scenes import Scene, play, spec
from tests.simulator.changes import catalog_of
from tests.simulator.loop import SimulatedLoop
from tests.simulator.servers import BadMannersRuntime, Manners, Server, SimulatedEngine, SimulatedProbe

M, M1, M2 = "tgi-m", "tgi-m-1", "tgi-m-2"


def replica(state: str, in_flight: int = 0, queued: int = 0, **about: Any) -> Status:
    """One replica with four slots."""
    model = spec(max_concurrency=4)
    nothing = dict.fromkeys(("idle_s", "handle", "progress", "progress_s", "failure", "retry_after_s"))
    return Status(model, "tgi-m", State(state), 0.0, in_flight, queued, **{**nothing, **about})


# ---- the choice -----------------------------------------------------------------------------------------------------

RESTS: dict[str, Any] = {"retry_after_s": 5.0}
HELD: dict[str, Any] = {"held_for": "other"}


@pytest.mark.parametrize(
    ("replicas", "chosen"),
    [
        ([replica("ready"), replica("ready")], 0),
        ([replica("ready", 2), replica("ready", 1)], 1),
        ([replica("ready", 1, 3), replica("ready", 3)], 1),
        ([replica("ready", 4, 9), replica("loading")], 0),
        ([replica("unhealthy"), replica("ready", 4, 9)], 1),
        ([replica("starting"), replica("loading", 0, 7)], 1),
        ([replica("stopped"), replica("starting")], 1),
        ([replica("draining", 1), replica("stopped")], 1),
        ([replica("failed", **RESTS), replica("stopped")], 1),
        ([replica("failed", **RESTS), replica("draining")], 1),
        ([replica("stopping", **RESTS), replica("stopping")], 1),
        ([replica("ready", **HELD), replica("ready", 4, 9)], 1),
        ([replica("ready", **HELD), replica("starting")], 1),
        ([replica("unhealthy"), replica("stopped")], 1),
        ([replica("failed", **RESTS), replica("failed", **RESTS)], 0),
    ],
)
def test_a_newcomer_goes_to_the_least_loaded_replica_or_the_nearest_to_be_ready(
    replicas: list[Status], chosen: int
) -> None:
    assert least_loaded(replicas) == chosen


@pytest.mark.parametrize(
    ("replicas", "woken"),
    [
        ([replica("stopped"), replica("stopped")], [0, 1]),
        ([replica("stopped"), replica("failed", **RESTS)], [0]),
        ([replica("starting"), replica("stopped")], [1]),
        ([replica("ready", 3), replica("stopped")], []),
        ([replica("ready", 4), replica("stopped"), replica("stopped")], [1]),
        ([replica("ready", 4), replica("loading"), replica("stopped")], []),
        ([replica("ready", 4), replica("ready", 3), replica("stopped")], []),
        ([replica("ready", 0, **HELD), replica("stopped")], [1]),
        ([replica("ready", 4), replica("failed", **RESTS)], []),
        ([replica("unhealthy"), replica("stopped")], [1]),
    ],
)
def test_where_none_is_ready_all_are_started_and_where_all_are_full_one_more(
    replicas: list[Status], woken: list[int]
) -> None:
    assert to_wake(replicas) == woken


def test_a_model_is_in_the_state_of_its_best_replica_and_has_the_sums_of_all() -> None:
    first, second = (Handle(name, f"http://{name}", port, "pid") for name, port in ((M, 1), (M1, 2)))
    old, new = (Failure(StartFailed(words), at) for words, at in (("old", 1.0), ("new", 2.0)))
    told = as_one(
        [
            replica("failed", 0, 2, failure=new, retry_after_s=7.0, gpus=("0",)),
            replica("ready", 3, 1, handle=second, failure=old, gpus=("1", "0")),
            replica("starting", handle=None, waits_for="room"),
        ]
    )

    assert (told.state, told.in_flight, told.queued) == (State.READY, 3, 3)
    assert (told.failure, told.retry_after_s) == (new, 7.0)
    assert (told.gpus, told.waits_for) == (("0", "1"), "room")
    assert told.handle is second
    assert len(told.replicas) == 3
    assert as_one([replica("ready", handle=first), replica("ready", handle=second)]).handle is first


def test_the_port_and_the_name_of_a_model_are_those_of_the_replica_whose_state_is_told() -> None:
    async def scene() -> None:
        on = await Several(2, Manners(load_s=500.0), Manners(load_s=5.0)).begin()
        assert await on.ask() == M1
        assert on.states == "loading ready"

        told = on.model.status
        assert told.handle
        assert (told.state, told.name, told.handle.name) == ("ready", M1, M1)
        assert model_json(told)["port"] == model_json(told)["replicas"][1]["port"] == told.handle.port

    play(scene)


@pytest.mark.parametrize(
    ("states", "best"),
    [
        ("stopped failed", "failed"),
        ("failed stopping", "stopping"),
        ("stopping starting", "starting"),
        ("starting loading", "loading"),
        ("loading draining", "draining"),
        ("draining unhealthy", "unhealthy"),
        ("unhealthy ready", "ready"),
    ],
)
def test_which_state_is_the_better_one(states: str, best: str) -> None:
    one, other = map(replica, states.split())

    assert as_one([one, other]).state == best
    assert as_one([other, one]).state == best


@pytest.mark.parametrize(
    ("states", "best"),
    [
        ("starting draining", "starting"),
        ("loading draining", "loading"),
        ("ready draining", "ready"),
        ("stopping draining", "stopping"),
        ("stopped draining", "draining"),
        ("failed stopping", "stopping"),
    ],
)
def test_a_model_is_in_the_state_of_one_that_is_wanted_no_longer_only_where_all_others_are_down(
    states: str, best: str
) -> None:
    told = as_one([replica(state, in_flight) for in_flight, state in enumerate(states.split())], wanted=1)

    assert (told.state, told.in_flight, len(told.replicas)) == (best, 1, 2)


def test_a_model_that_starts_is_told_to_start_while_a_replica_beyond_the_count_drains() -> None:
    async def scene() -> None:
        on = await ready(2, Manners(load_s=30.0), drain_timeout=900.0, idle_timeout=50.0)
        short = on.ask(5.0)
        await on.after(1)
        long = on.ask(300.0)
        await on.after(1)
        on.becomes(1)
        await on.after(60)
        assert on.model.status.state == "draining"

        asked = on.ask()
        await on.after(10)
        assert on.states == "loading draining"
        assert on.model.status.state == "loading"
        assert (await short, await asked, await long) == (M, M, M1)

    play(scene)


@pytest.mark.parametrize(
    ("replicas", "idle_s"),
    [
        ([replica("ready", idle_s=5.0), replica("ready", idle_s=3.0)], 3.0),
        ([replica("ready", idle_s=5.0), replica("ready", 1)], None),
        ([replica("ready", idle_s=5.0), replica("stopped")], 5.0),
        ([replica("stopped"), replica("stopped")], None),
    ],
)
def test_a_model_is_idle_when_all_of_it_is(replicas: list[Status], idle_s: float | None) -> None:
    assert as_one(replicas).idle_s == idle_s


# ---- the replicas' lives --------------------------------------------------------------------------------------------


class ByName(BadMannersRuntime):
    """Gives every server the manners that its name has."""

    def __init__(self, *manners: Manners) -> None:
        super().__init__(Random(0))
        self.manners = dict(zip((M, M1, M2), manners, strict=False))

    async def start(self, launch: Launch, listener: Listener) -> Handle:
        self.next_manners = [self.manners.get(launch.name, Manners())]
        return await super().start(launch, listener)


class Several:
    """One model with several replicas of one slot each. Requests tell which server answered them."""

    def __init__(
        self,
        count: int = 2,
        *manners: Manners,
        devices: list[Device] | None = None,
        runtime: ByName | None = None,
        **keys: Any,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.keys = {"max_concurrency": 1, "generation_timeout": 9000.0, **keys}
        self.spec = spec(replicas=count, **self.keys)
        self.runtime = runtime or ByName(*manners)
        probe = SimulatedProbe(self.runtime)
        self.heard: list[Entry] = []
        self.fleet = Fleet(
            catalog_of([self.spec]),
            {"llamacpp": SimulatedEngine()},
            {"process": self.runtime},
            probe,
            Journal(self.loop.time, self.heard.append),
            gpus=Gpus(devices),
            keep_servers=False,
            rest=probe.rest,
        )
        Scene.on_stage.append(self)  # type: ignore[arg-type]
        self.world = self

    async def close(self) -> None:
        await self.fleet.aclose()
        assert not any(self.runtime.alive(name) for name in self.runtime.servers)

    async def begin(self) -> Several:
        await self.fleet.begin()
        await asyncio.sleep(1)
        return self

    @property
    def model(self) -> Replicas:
        served = self.fleet.get(self.fleet.catalog.models["m"])
        assert isinstance(served, Replicas)
        return served

    @property
    def states(self) -> str:
        status = self.fleet.status(self.fleet.catalog.models["m"])
        return " ".join(one.state.value for one in status.replicas or (status,))

    def server(self, name: str) -> Server:
        return self.runtime.newest(name)

    def ask(self, work_s: float = 1.0, *, max_wait_s: float | None = None) -> asyncio.Task[str]:
        return self.loop.create_task(self._ask(work_s, max_wait_s))

    async def _ask(self, work_s: float, max_wait_s: float | None) -> str:
        try:
            async with self.fleet.get(self.spec).lease(max_wait_s=max_wait_s) as lease:
                cut: asyncio.Future[str] = self.loop.create_future()
                requests = self.server(lease.handle.name).requests
                requests[cut] = None

                def end(error: GatewayError) -> None:
                    del requests[cut]
                    cut.set_result(error.code)

                lease.on_cut = end
                try:
                    done, _ = await asyncio.wait([cut], timeout=work_s)
                finally:
                    requests.pop(cut, None)
                return cut.result() if done else lease.handle.name
        except GatewayError as error:
            return error.code

    def becomes(self, count: int, **keys: Any) -> None:
        """Change the catalog."""
        self.fleet.change(catalog_of([spec(replicas=count, **{**self.keys, **keys})]))

    async def after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def ready(count: int = 2, *manners: Manners, **keys: Any) -> Several:
    on = await Several(count, *manners, **keys).begin()
    await on.fleet.get(on.spec).start()
    return on


def test_a_cold_request_starts_all_replicas_and_takes_the_first_that_is_ready() -> None:
    async def scene() -> None:
        on = await Several(3, Manners(load_s=100.0), Manners(load_s=5.0), Manners(load_s=50.0)).begin()
        asked = on.ask()
        await on.after(0.5)
        assert on.states == "starting starting starting"

        assert await asked == M1
        assert on.states == "loading ready loading"
        await on.after(100)
        assert on.states == "ready ready ready"

    play(scene)


def test_requests_go_to_the_replica_with_the_fewest() -> None:
    async def scene() -> None:
        on = await ready(3, max_concurrency=2)
        asked = [on.ask(10.0) for _ in range(6)]

        assert sorted(await asyncio.gather(*asked)) == [M, M, M1, M1, M2, M2]

    play(scene)


def test_who_queues_for_one_replica_is_served_by_the_first_that_is_free() -> None:
    async def scene() -> None:
        on = await ready()
        long, short = on.ask(100.0), on.ask(10.0)
        await on.after(1)
        queued = [on.ask(1.0) for _ in range(4)]
        await on.after(1)
        assert on.model.status.queued == 4

        began = on.loop.time()
        busy = M if M in on.runtime.servers and on.server(M).requests and await short == M1 else M1
        free = M1 if busy == M else M
        assert await asyncio.gather(*queued) == [free] * 4
        assert on.loop.time() - began < 20
        assert await long == busy

    play(scene)


def test_the_queues_of_all_replicas_together_hold_max_queue() -> None:
    async def scene() -> None:
        on = await ready(max_queue=3)
        asked = [on.ask(10.0) for _ in range(2)]
        await on.after(1)
        queued = [on.ask(1.0) for _ in range(3)]
        await on.after(1)

        assert await on.ask() == "QUEUE_FULL"
        assert {*await asyncio.gather(*asked, *queued)} <= {M, M1}

    play(scene)


def test_a_replica_that_is_not_up_yet_takes_part_of_the_queue_as_soon_as_it_is() -> None:
    async def scene() -> None:
        on = await Several(2, Manners(load_s=5.0), Manners(load_s=30.0)).begin()
        first = on.ask(1000.0)
        await on.after(10)
        second = on.ask(5.0)

        assert await second == M1
        assert await first == M

    play(scene)


def test_who_came_first_is_served_first_by_the_replica_that_is_up_while_another_still_loads() -> None:
    async def scene() -> None:
        on = await Several(2, Manners(load_s=10.0), Manners(load_s=400.0), start_timeout=600.0).begin()
        order: list[int] = []

        async def comes(n: int) -> None:
            assert await on.ask(5.0) == M
            order.append(n)

        asked = []
        for n in range(30):  # as many as one replica serves: its own queue is never empty
            asked.append(on.loop.create_task(comes(n)))
            await on.after(0.1 if n < 8 else 5.0)
        await asyncio.gather(*asked)

        assert on.states == "ready loading"
        assert order == list(range(30))

    play(scene)


def test_the_next_one_gets_the_slot_of_another_replica_if_its_caller_leaves_as_he_gets_it() -> None:
    async def scene() -> None:
        on = await Several(2, Manners(load_s=5.0), Manners(load_s=100.0)).begin()
        assert await on.ask() == M
        up, loading = on.model.members
        lease = await up.obtain(None, admitted=False)
        leaves, stays = (
            on.loop.create_task(loading.obtain(None, admitted=False, among=Among(float(came_at))))
            for came_at in range(2)
        )
        await on.after(1)
        assert (up.in_flight, loading.queued) == (1, 2)

        lease.give_back(lease)
        assert (up.in_flight, loading.queued) == (1, 1)
        leaves.cancel()
        await on.after(1)

        assert leaves.cancelled()
        assert stays.done()
        stays.result().give_back(stays.result())
        assert up.in_flight == 0

    play(scene)


def test_a_caller_whose_replica_fails_goes_to_another_one() -> None:
    async def scene() -> None:
        on = await Several(2, Manners(load_s=20.0, dies_loading_s=10.0), Manners(load_s=15.0)).begin()
        asked = on.ask()

        assert await asked == M1
        assert on.states == "failed ready"

    play(scene)


class SlowToLookForTheFirst(ByName):
    """Takes longer to look at what the first replica needs than at what the others do."""

    async def check(self, launch: Launch) -> None:
        await asyncio.sleep(0.2 if launch.name == M else 0.1)


def test_a_cold_caller_whose_replica_gets_no_gpu_waits_for_the_one_that_got_it() -> None:
    async def scene() -> None:
        on = Several(devices=[Device("0", 24 * GIB)], runtime=SlowToLookForTheFirst(), gpus=1, pinned=True)
        await on.begin()

        assert await on.ask() == M1
        assert on.states == "failed ready"

    play(scene)


def test_a_pinned_model_starts_no_replica_for_which_there_is_no_room_whoever_asks() -> None:
    async def scene() -> None:
        on = await Several(devices=[Device("0", 24 * GIB)], gpus=1, pinned=True).begin()
        assert await on.ask() == M
        assert on.states == "ready failed"
        told = len(on.heard)

        assert {*await asyncio.gather(*(on.ask() for _ in range(20)))} == {M}
        assert on.heard[told:] == []
        await on.model.stop()
        assert await on.ask() == M, "what has room again is started again"

    play(scene)


def test_who_has_waited_long_enough_for_gpus_is_told_so_at_once_though_another_replica_loads() -> None:
    async def scene() -> None:
        runtime = SlowToLookForTheFirst(Manners(), Manners(load_s=60.0))
        on = await Several(devices=[Device("0", 24 * GIB)], runtime=runtime, gpus=1, queue_timeout=20.0).begin()
        asked = on.ask()
        await on.after(21)

        assert on.states == "starting loading"
        assert asked.done()
        assert await asked == "NO_CAPACITY"

    play(scene)


def test_where_all_replicas_fail_the_caller_is_told_why() -> None:
    async def scene() -> None:
        on = await Several(2, Manners(fails_to_start=True), Manners(fails_to_start=True)).begin()

        assert await on.ask() == "START_FAILED"
        await on.after(1)
        assert on.states == "failed failed"
        assert await on.ask() == "START_FAILED", "both rest"

    play(scene)


def test_who_can_wait_for_so_long_only_is_refused_in_time_wherever_he_queues() -> None:
    async def scene() -> None:
        on = await Several(2, Manners(load_s=60.0, dies_loading_s=10.0), Manners(load_s=60.0)).begin()
        began = on.loop.time()

        assert await on.ask(max_wait_s=20.0) == "MODEL_NOT_LOADED"
        assert on.loop.time() - began == 20.0

    play(scene)


def test_each_replica_is_stopped_for_its_own_idleness_and_started_again_when_the_others_are_full() -> None:
    async def scene() -> None:
        on = await ready(idle_timeout=60.0)
        busy = on.ask(1000.0)
        await on.after(70)
        assert on.states == "ready stopped"

        also = on.ask()
        await on.after(0.5)
        assert on.states == "ready starting"
        assert await also == M1
        assert await busy == M

    play(scene)


def test_one_replica_that_suffices_is_left_alone() -> None:
    async def scene() -> None:
        on = await ready(idle_timeout=60.0, max_concurrency=2)
        busy = on.ask(200.0)
        await on.after(70)

        assert await on.ask() == M
        assert on.states == "ready stopped"
        assert await busy == M

    play(scene)


def test_start_waits_for_all_and_tells_where_the_first_one_is() -> None:
    async def scene() -> None:
        on = await Several(2, Manners(load_s=5.0), Manners(load_s=50.0)).begin()

        handle = await on.model.start()

        assert on.states == "ready ready"
        assert handle
        assert handle.name == M

    play(scene)


def test_a_start_without_waiting_begins_all() -> None:
    async def scene() -> None:
        on = await Several(2).begin()

        assert await on.model.start(wait=False) is None
        assert on.states == "starting starting"

    play(scene)


def test_a_start_of_which_one_replica_fails_says_so_and_the_others_go_on() -> None:
    async def scene() -> None:
        on = await Several(2, Manners(load_s=30.0), Manners(fails_to_start=True)).begin()

        with pytest.raises(StartFailed):
            await on.model.start()

        assert on.states == "ready failed"
        assert await on.ask() == M

    play(scene)


def test_stop_stops_all_that_run() -> None:
    async def scene() -> None:
        on = await ready(3)
        on.server(M1).die()
        await on.after(0.1)

        await on.model.stop()

        assert set(on.states.split()) <= {"stopped", "failed"}
        with pytest.raises(ModelNotRunning):
            await on.model.stop()

    play(scene)


@pytest.mark.parametrize("wanted", [2, 1])
def test_stop_clears_what_is_perhaps_left_of_replicas_that_failed(wanted: int) -> None:
    async def scene() -> None:
        on = await ready(stop_grace=1.0)
        on.runtime.fall_silent(22.0)
        with pytest.raises(StopFailed):
            await on.model.stop()
        assert on.states == "failed failed"
        members = on.model.members
        on.becomes(wanted)
        await on.after(2)
        left = [one for one in members if one.has_its_name]
        assert left[-1].replica == 1

        await on.fleet.stop(on.fleet.catalog.models["m"])

        assert [one for one in left if one.has_its_name] == []
        with pytest.raises(ModelNotRunning):
            await on.fleet.stop(on.fleet.catalog.models["m"])

    play(scene)


def test_a_forced_stop_cuts_what_runs_on_each() -> None:
    async def scene() -> None:
        on = await ready()
        asked = [on.ask(100.0), on.ask(100.0)]
        await on.after(1)

        await on.model.stop(force=True)

        assert await asyncio.gather(*asked) == ["GENERATION_FAILED"] * 2
        assert on.states == "stopped stopped"

    play(scene)


def test_restart_makes_every_server_anew() -> None:
    async def scene() -> None:
        on = await ready()
        before = [on.server(M), on.server(M1)]

        handle = await on.model.restart()

        assert handle
        assert handle.name == M
        assert on.states == "ready ready"
        assert not any(server.alive for server in before)

    play(scene)


def test_entries_in_the_journal_say_which_replica_they_are_about() -> None:
    async def scene() -> None:
        on = await ready()
        about = {(entry.data["model"], entry.data.get("replica")) for entry in on.heard}

        assert about == {("m", None), ("m", 1)}

    play(scene)


def test_preload_starts_all_replicas() -> None:
    async def scene() -> None:
        on = await Several(3, preload=True).begin()
        await on.after(10)

        assert on.states == "ready ready ready"

    play(scene)


# ---- GPUs -----------------------------------------------------------------------------------------------------------


def test_each_replica_has_a_gpu_of_its_own() -> None:
    async def scene() -> None:
        on = await ready(devices=[Device("0", 24 * GIB), Device("1", 24 * GIB)], gpus=1)

        assert [one.gpus for one in on.model.status.replicas] == [("0",), ("1",)]
        assert on.model.status.gpus == ("0", "1")

    play(scene)


def test_a_replica_without_room_never_makes_another_one_go() -> None:
    async def scene() -> None:
        on = await Several(2, devices=[Device("0", 24 * GIB)], gpus=1, idle_timeout="never").begin()
        for _ in range(30):
            assert await on.ask() == M
            assert all(one.held_for is None for one in on.model.status.replicas)
            await on.after(100)
        assert len(on.runtime.servers) == 1
        assert on.runtime.starts == {M: 1}

    play(scene)


@pytest.mark.parametrize("start_timeout", [60.0, 600.0])
def test_a_replica_that_nobody_waits_for_stops_waiting_for_gpus(start_timeout: float) -> None:
    async def scene() -> None:
        one_gpu: dict[str, Any] = {"devices": [Device("0", 24 * GIB)], "gpus": 1, "start_timeout": start_timeout}
        on = await Several(2, Manners(load_s=5.0), abandon_after=30.0, queue_timeout=500.0, **one_gpu).begin()
        asked = [on.ask(100.0), on.ask(100.0)]
        await on.after(125)
        assert on.model.status.queued == 0
        assert on.states == "ready starting", "one of them queued until a moment ago"

        await on.after(20)
        assert on.states == "ready stopped"
        assert await asyncio.gather(*asked) == [M, M]
        assert on.runtime.starts == {M: 1}

    play(scene)


def test_a_replica_waits_for_gpus_for_as_long_as_anybody_queues_for_the_model() -> None:
    async def scene() -> None:
        one_gpu: dict[str, Any] = {"devices": [Device("0", 24 * GIB)], "gpus": 1}
        on = await Several(2, Manners(load_s=5.0), abandon_after=30.0, queue_timeout=500.0, **one_gpu).begin()
        assert await on.ask() == M
        await on.after(60)
        assert on.states == "ready stopped"

        asked = [on.ask(100.0) for _ in range(4)]
        await on.after(290)
        assert [one.queued for one in on.model.members] == [1, 0]
        assert on.states == "ready starting"
        assert await asyncio.gather(*asked) == [M] * 4
        await on.after(61)
        assert on.states == "ready stopped"

    play(scene)


# ---- the catalog changes --------------------------------------------------------------------------------------------


def test_more_replicas_touch_nothing_that_runs() -> None:
    async def scene() -> None:
        on = await ready(1)
        server, busy = on.server(M), on.ask(900.0)
        await on.after(1)
        queued = on.ask()
        await on.after(1)

        on.becomes(3)
        assert on.states == "ready starting stopped"
        assert await queued == M1, "who came when there was one server only is served by another one"

        assert on.server(M) is server
        assert await busy == M

    play(scene)


def test_more_replicas_of_a_model_that_is_preloaded_are_started() -> None:
    async def scene() -> None:
        on = await Several(1, preload=True).begin()
        await on.after(10)
        on.becomes(2)
        await on.after(10)

        assert on.states == "ready ready"

    play(scene)


def test_fewer_replicas_drain_the_last_ones_and_who_queues_there_is_served_by_those_that_stay() -> None:
    async def scene() -> None:
        on = await ready(3, drain_timeout=100.0)
        kept = on.server(M)
        asked = [on.ask(20.0) for _ in range(3)]
        await on.after(1)
        queued = [on.ask(1.0) for _ in range(3)]
        await on.after(1)

        on.becomes(1)
        assert on.states == "ready draining draining"
        assert sorted(await asyncio.gather(*asked)) == [M, M1, M2]
        assert await asyncio.gather(*queued) == [M] * 3
        await on.after(5)
        assert on.states == "ready"
        assert on.server(M) is kept
        assert not on.runtime.alive(M1)
        assert not on.runtime.alive(M2)

    play(scene)


@pytest.mark.parametrize("order", ["start", "restart"])
def test_who_waits_for_all_replicas_waits_for_those_that_are_still_wanted(order: str) -> None:
    async def scene() -> None:
        on = await Several(3, Manners(load_s=5.0), Manners(load_s=50.0), Manners(load_s=60.0)).begin()
        await on.model.start(wait=False)
        await on.after(10)
        waits = on.loop.create_task(getattr(on.model, order)())
        await on.after(8)
        assert on.states == "ready loading loading"
        assert not waits.done()

        on.becomes(2)
        handle = await waits
        assert handle
        assert handle.name == M
        assert on.states == "ready ready"

    play(scene)


def test_who_waits_for_the_replicas_of_a_model_that_leaves_the_catalog_is_told_so() -> None:
    async def scene() -> None:
        on = await Several(2, Manners(load_s=50.0), Manners(load_s=50.0)).begin()
        waits = on.loop.create_task(on.model.start())
        await on.after(10)

        on.fleet.change(catalog_of([]))
        with pytest.raises(UnknownModel, match="no longer in the catalog"):
            await waits

    play(scene)


@pytest.mark.parametrize(("force", "answer"), [(False, M1), (True, "GENERATION_FAILED")])
def test_a_stop_reaches_a_replica_that_still_drains_when_one_is_wanted(force: bool, answer: str) -> None:
    async def scene() -> None:
        on = await ready(2, drain_timeout=900.0, idle_timeout=30.0)
        short = on.ask(5.0)
        await on.after(1)
        long = on.ask(200.0)
        await on.after(1)
        on.becomes(1)
        await on.after(60)
        assert on.states == "stopped draining"

        stop = on.loop.create_task(on.fleet.stop(on.fleet.catalog.models["m"], force=force))
        await on.after(0.1)
        assert long.done() is force
        await stop

        assert (await short, await long) == (M, answer)
        assert not on.runtime.alive(M1)
        with pytest.raises(ModelNotRunning):
            await on.fleet.stop(on.fleet.catalog.models["m"])
        assert await on.ask() == M

    play(scene)


def test_who_is_sent_to_another_replica_has_the_rest_of_the_queues_timeout_and_no_more() -> None:
    async def scene() -> None:
        on = await ready(2, queue_timeout=100.0, drain_timeout=900.0)
        busy = [on.ask(1000.0), on.ask(1000.0)]
        await on.after(1)
        queued = [on.ask(1.0) for _ in range(4)]
        await on.after(60)
        assert [one.queued for one in on.model.members] == [2, 2]

        on.becomes(1)
        await on.after(0.1)
        assert [one.queued for one in on.model.members] == [4, 0]
        await on.after(38)
        assert not any(asked.done() for asked in queued)
        await on.after(2)
        assert [asked.done() and asked.result() for asked in queued] == ["NO_CAPACITY"] * 4
        for asked in busy:
            asked.cancel()

    play(scene)


def test_who_is_sent_to_another_replica_takes_his_place_there_by_when_he_came() -> None:
    async def scene() -> None:
        on = await ready(2, drain_timeout=900.0)
        busy = [on.ask(100.0), on.ask(100.0)]
        await on.after(1)
        order: list[int] = []
        queued = []
        for n in range(6):
            queued.append(on.ask(5.0))
            queued[n].add_done_callback(lambda _, n=n: order.append(n))  # type: ignore[misc]
            await on.after(1)
        assert [one.queued for one in on.model.members] == [3, 3]

        on.becomes(1)
        assert await asyncio.gather(*queued) == [M] * 6
        assert order == [0, 1, 2, 3, 4, 5]
        await asyncio.gather(*busy)

    play(scene)


def test_a_replica_that_is_wanted_again_while_it_drains_comes_back() -> None:
    async def scene() -> None:
        on = await ready(2, drain_timeout=100.0)
        asked = [on.ask(20.0) for _ in range(2)]
        await on.after(1)
        on.becomes(1)
        on.becomes(2)

        assert {*await asyncio.gather(*asked)} == {M, M1}
        await on.after(5)
        again = [on.ask(20.0) for _ in range(2)]
        assert {*await asyncio.gather(*again)} == {M, M1}

    play(scene)


def test_a_model_that_leaves_the_catalog_leaves_with_all_its_replicas() -> None:
    async def scene() -> None:
        on = await ready(3)
        on.fleet.change(catalog_of([]))
        await on.after(5)

        assert not any(on.runtime.alive(name) for name in (M, M1, M2))
        assert await on.ask() == "MODEL_NOT_FOUND"

    play(scene)


def test_another_server_for_every_replica_comes_after_the_drain() -> None:
    async def scene() -> None:
        on = await ready()
        before, asked = on.server(M1), [on.ask(20.0), on.ask(30.0)]
        await on.after(1)

        on.becomes(2, args={"n": 2})
        later = [on.ask(40.0), on.ask(40.0)]

        assert {*await asyncio.gather(*asked)} == {M, M1}
        assert {*await asyncio.gather(*later)} == {M, M1}
        assert not before.alive

    play(scene)


ONE, TWO, OTHER = (
    spec(id="m", weights="m.gguf"),
    spec(id="m", weights="m.gguf", replicas=2),
    spec(id="m-1", weights="m-1.gguf"),
)


@pytest.mark.parametrize(("before", "after"), [([TWO], [ONE, OTHER]), ([ONE, OTHER], [TWO])])
def test_a_name_that_changes_hands_is_refused_while_its_server_is_there(
    before: list[ModelSpec], after: list[ModelSpec]
) -> None:
    async def scene() -> None:
        on = await Several(1).begin()
        on.fleet.change(catalog_of(before))
        for model in on.fleet.catalog.models.values():
            await on.fleet.get(model).start()
        catalog = on.fleet.catalog

        with pytest.raises(CatalogError, match=r"tgi-m-1 of the model .* is still there"):
            on.fleet.change(catalog_of(after))

        assert on.fleet.catalog is catalog
        on.fleet.change(catalog_of([ONE]))
        await on.after(5)
        on.fleet.change(catalog_of(after))
        assert len(on.fleet.catalog.models) == len(after)

    play(scene)


@pytest.mark.parametrize(("before", "after"), [([TWO], [ONE, OTHER]), ([ONE, OTHER], [TWO])])
def test_a_name_that_changes_hands_is_refused_while_nobody_knows_whether_its_server_is_gone(
    before: list[ModelSpec], after: list[ModelSpec]
) -> None:
    async def scene() -> None:
        on = await Several(1).begin()
        on.fleet.change(catalog_of(before))
        for model in on.fleet.catalog.models.values():
            await on.fleet.get(model).start()
        on.runtime.fall_silent(40.0)
        with pytest.raises(StopFailed):
            await on.fleet.stop(before[-1])
        on.fleet.change(catalog_of([ONE]))
        assert on.server(M1).alive

        with pytest.raises(CatalogError, match=r"tgi-m-1 of the model .* is perhaps still there"):
            on.fleet.change(catalog_of(after))

        await on.after(60)
        assert not on.server(M1).alive
        on.fleet.change(catalog_of(after))
        for model in on.fleet.catalog.models.values():
            await on.fleet.get(model).start()
        await on.after(60)
        assert on.server(M1).alive, "the former model has let go of it"

    play(scene)


# ---- whatever comes -------------------------------------------------------------------------------------------------


class Watching:
    """Sees after every step that nobody waits beside a free slot, and that no server has more than its slots."""

    def __init__(self, on: Several) -> None:
        self.on = on
        self.busy_and_waiting_since: float | None = None

    def __call__(self) -> None:
        status = self.on.fleet.status(self.on.fleet.catalog.models["m"])
        replicas = status.replicas or (status,)
        for one in replicas:
            assert one.in_flight <= one.spec.max_concurrency, one
        free = [one for one in replicas if one.state is State.READY and one.in_flight < one.spec.max_concurrency]
        waiting = bool(free) and status.queued > 0
        now = self.on.loop.time()
        if not waiting:
            self.busy_and_waiting_since = None
        elif self.busy_and_waiting_since is None:
            self.busy_and_waiting_since = now
        else:
            assert now == self.busy_and_waiting_since, f"{self.on.states}: {status.queued} wait beside a free slot"


async def disturb(on: Several, random: Random, asked: list[asyncio.Task[str]]) -> None:
    """Do one thing that happens to a model, or one that somebody does to it."""
    verbs = ["ask", "crowd", "leave", "die", "hang", "count", "server", "stop"]
    match random.choices(verbs, [40, 9, 6, 4, 3, 3, 1, 1])[0]:
        case "ask":
            asked.append(on.ask(random.uniform(0.1, 40), max_wait_s=random.choice([None, None, 20.0])))
        case "crowd":
            asked += [on.ask(random.uniform(0.1, 20)) for _ in range(random.randint(2, 12))]
        case "leave" if asked:
            random.choice(asked).cancel()
        case "die" | "hang" as verb:
            for server in [server for name in on.runtime.servers for server in on.runtime.alive(name)][:1]:
                server.manners = replace(server.manners, hang_lasts_s=random.choice([20.0, 200.0]))
                getattr(server, verb)()
        case "count":
            on.becomes(random.randint(1, 3))
        case "server":
            on.becomes(random.randint(1, 3), args={"n": random.random()})
        case "stop":
            with suppress(GatewayError):
                await on.fleet.stop(on.fleet.catalog.models["m"])


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_nobody_waits_beside_a_free_slot_and_all_end(seed: int) -> None:
    async def scene() -> None:
        random = Random(seed)
        manners = [Manners(load_s=random.uniform(1, 90)) for _ in range(3)]
        on = Several(random.randint(2, 3), *manners, idle_timeout=60.0, queue_timeout=100.0, drain_timeout=20.0)
        await on.begin()
        assert isinstance(on.loop, SimulatedLoop)
        on.loop.after_step = Watching(on)
        asked: list[asyncio.Task[str]] = []
        for _ in range(150):
            await on.after(random.choice([0.0, 0.5, 5.0, random.uniform(0, 120)]))
            await disturb(on, random, asked)
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        on.loop.after_step = lambda: None

        assert sum(outcome in (M, M1, M2) for outcome in outcomes) > len(asked) / 9
        assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        await on.after(1000)
        assert {*on.states.split()} <= {"stopped", "failed"}

    play(scene, seed)


# ---- another life of the gateway ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "adopted", "alive"), [(3, "ready ready ready", 3), (2, "ready ready", 2)])
def test_the_replicas_of_an_earlier_life_are_adopted_and_those_beyond_the_count_removed(
    count: int, adopted: str, alive: int
) -> None:
    async def scene() -> None:
        on = await ready(3)
        servers = [on.server(name) for name in (M, M1, M2)]
        on.fleet.keeps = True
        for one in on.model.members:
            one._outlives = True
        await on.fleet.aclose()
        Scene.on_stage.remove(on)  # type: ignore[arg-type]

        next_life = await Several(count, runtime=on.runtime).begin()
        await next_life.after(2)

        assert next_life.states == adopted
        assert [server.alive for server in servers] == [n < alive for n in range(3)]
        asked = [next_life.ask(5.0) for _ in range(alive)]
        assert sorted(await asyncio.gather(*asked)) == [M, M1, M2][:alive]

    play(scene)
