"""Models that share GPUs: who waits, who makes room, and what their callers see of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from random import Random
from typing import Any

import pytest

from gateway.api.models import model_json
from gateway.errors import NoCapacity, RuntimeUnavailable
from gateway.fleet.gpus import Gpus
from gateway.fleet.identity import fingerprint
from gateway.fleet.placement import GIB, Device
from gateway.fleet.scheduling import HOLD_S
from gateway.fleet.status import Status
from gateway.lifecycle import State
from gateway.runtimes.base import Launch
from gateway.waiting import Standing
from tests.fleet.scenes import Scene, play, spec
from tests.simulator.changes import catalog_of
from tests.simulator.servers import BadMannersRuntime, Broke, Deaf, Manners, Server, SimulatedEngine
from tests.simulator.world import World

ONE_GPU = [Device("0", 24 * GIB)]
FOUR_GPUS = [Device(str(number), 24 * GIB) for number in range(4)]
WELL = Manners(make_s=1.0, load_s=5.0)


class Shared:
    """Several models on few GPUs, in virtual time."""

    def __init__(
        self,
        *names: str,
        devices: list[Device] = ONE_GPU,
        gpus: type[Gpus] = Gpus,
        runtime: BadMannersRuntime | None = None,
        **keys: Any,
    ) -> None:
        self.specs = {
            name: spec(id=name, weights=f"{name}.gguf", **{"gpus": 1, **keys.get(name, {})}) for name in names
        }
        self.world = World(list(self.specs.values()), 0, runtime, devices=devices, gpus=gpus)
        self.world.runtime.next_manners = [WELL] * 50
        Scene.on_stage.append(self)  # type: ignore[arg-type]

    def ask(self, name: str, work_s: float = 1.0, **bounds: float) -> asyncio.Task[str]:
        return asyncio.create_task(self.world.request(self.specs[name], work_s, **bounds))

    def status(self, name: str) -> Status:
        return self.world.fleet.status(self.specs[name])

    async def until_held(self, name: str) -> None:
        async with asyncio.timeout(300):
            while not self.status(name).held_for:
                await asyncio.sleep(1)

    def becomes(self, name: str, **keys: Any) -> None:
        """Change a model's entry in the catalog."""
        self.specs[name] = spec(**{"id": name, "weights": f"{name}.gguf", "gpus": 1, **keys})
        self.world.watched[name].spec = self.specs[name]
        self.world.many |= {name} if self.specs[name].replicas > 1 else set()
        self.world.fleet.change(catalog_of(self.specs.values()))

    async def perhaps_leave(self, name: str, silent_s: float) -> None:
        """Order a stop of which nobody knows whether it did anything, for the runtime has fallen silent."""
        self.world.runtime.fall_silent(silent_s)
        await self.world.operate(self.specs[name], "stop")
        assert self.status(name).state is State.FAILED
        assert self.status(name).gpus

    def told_s(self, name: str) -> float:
        """Return the Retry-After of the refusal that has just been given."""
        return (self.world.watched[name].promised_until - self.world.loop.time()) / 2

    def moves(self, name: str) -> Iterable[str]:
        return [line.partition(f"{name}: ")[2] for line in self.world.trace if f"  {name}: " in line]


def test_an_idle_model_makes_room_for_one_that_is_asked_for() -> None:
    async def scene() -> None:
        on = Shared("a", "b")
        assert await on.ask("a") == "answered"

        assert await on.ask("b") == "answered"

        assert "ready -> stopping (makes room for b)" in on.moves("a")
        assert on.status("b").gpus == ("0",)
        last_stop = model_json(on.status("a"))["last_stop"]
        assert last_stop["reason"] == "makes room for b"
        assert 0 < last_stop["at"] < on.world.loop.time()
        assert model_json(on.status("b"))["last_stop"] is None
        assert on.status("a").gpus == ()

    play(scene)


def test_nobody_makes_room_for_a_model_that_is_seen_to_lack_its_weights() -> None:
    async def scene() -> None:
        on = Shared("a", "b", "c")
        assert await on.ask("a") == "answered"
        on.world.runtime.lacks_files.add("tgi-b")

        assert await on.ask("b") == "START_FAILED"

        assert on.status("b").state is State.FAILED
        failure = on.status("b").failure
        assert failure
        assert failure.error.detail == "its weights do not exist"
        await asyncio.sleep(10)
        assert on.status("a").state is State.READY
        assert await on.ask("c") == "answered", "who has his weights gets the GPU"

        on.world.runtime.lacks_files.clear()
        await on.world.order(on.specs["b"], "start")
        assert on.status("b").gpus == ("0",)

    play(scene)


def test_what_can_never_fit_is_refused_before_its_files_are_looked_at() -> None:
    async def scene() -> None:
        on = Shared("b", b={"gpus": 2})
        on.world.runtime.looks_for_s = 5.0
        asked = on.ask("b")
        await asyncio.sleep(1)

        assert asked.done()
        assert await asked == "START_FAILED"
        failure = on.status("b").failure
        assert failure
        assert "it needs 2 GPUs, and there are 0=24 GiB" in failure.error.detail

    play(scene)


def test_a_busy_model_finishes_what_it_has_and_those_who_queue_for_it_are_served_later() -> None:
    async def scene() -> None:
        on = Shared("a", "b", a={"generation_timeout": 1000.0})
        assert await on.ask("a") == "answered"
        long = on.ask("a", work_s=500.0)
        await asyncio.sleep(1)
        other = on.ask("b")
        await on.until_held("a")

        assert on.status("a").held_for == model_json(on.status("a"))["held_for"] == "b"
        assert model_json(on.status("b"))["waits_for"] == on.status("b").waits_for
        assert (on.status("b").state, on.status("b").waits_for is not None) == (State.STARTING, True)
        assert await other == "NO_CAPACITY"  # after its 300 s, and not before
        again = on.ask("b")
        await on.until_held("a")
        late = on.ask("a")
        await asyncio.sleep(1)
        assert on.status("a").queued == 1
        assert await long == "answered", "nothing that runs is cut"
        assert await again == "answered"
        assert await late == "answered"

    play(scene)


def test_who_has_made_room_waits_for_its_next_turn_though_its_callers_came_first() -> None:
    async def scene() -> None:
        on = Shared("a", "b", a={"max_concurrency": 1, "queue_timeout": 1000.0})
        assert await on.ask("a") == "answered"
        await asyncio.sleep(300)
        queue = [on.ask("a", work_s=50.0) for _ in range(5)]
        await asyncio.sleep(1)
        other = on.ask("b")

        assert await other == "answered"
        assert [task for task in queue if not task.done()], "they came before, and are served later"
        assert [await task for task in queue] == ["answered"] * 5
        assert on.world.runtime.starts == {"tgi-a": 2, "tgi-b": 1}

    play(scene)


def test_who_has_made_room_waits_also_for_one_that_came_in_the_same_moment() -> None:
    async def scene() -> None:
        on = Shared("a", "b")
        assert await on.ask("a") == "answered"
        await asyncio.sleep(300)
        now = on.world.loop.time()
        other = on.ask("b")
        while on.status("a").state is not State.STOPPING:
            await asyncio.sleep(0)
        again = on.ask("a")
        await asyncio.sleep(0)
        assert on.world.loop.time() == now, "all of this takes no time"

        assert await other == "answered"
        assert not again.done()
        assert await again == "answered"
        assert on.world.runtime.starts == {"tgi-a": 2, "tgi-b": 1}

    play(scene)


@pytest.mark.parametrize("replicas", [1, 2, 3, 20])
def test_where_one_replica_has_made_room_the_others_wait_for_their_turn_too(replicas: int) -> None:
    async def scene() -> None:
        keys = {"max_concurrency": 1, "queue_timeout": 2000.0, "max_queue": 1000}
        on = Shared("m", "b", m={"replicas": replicas, **keys}, b=keys)
        traffic: list[asyncio.Task[str]] = []
        for _ in range(25):  # a bit more than one replica serves
            traffic.append(on.ask("m", 5.0))
            await asyncio.sleep(4.0)
        other = on.ask("b")
        while not other.done():
            traffic.append(on.ask("m", 5.0))
            await asyncio.sleep(4.0)

        assert other.result() == "answered"
        assert on.world.runtime.starts["tgi-b"] == 1
        assert sum(on.world.runtime.starts.values()) <= 3, "m, b, and perhaps m again since"
        for task in traffic:
            await on.world.leave(task)

    play(scene)


def test_an_operators_start_of_a_further_replica_has_its_turn_as_any_other_start_has() -> None:
    async def scene() -> None:
        on = Shared("m", "b", devices=FOUR_GPUS[:2], m={"replicas": 2})
        assert await on.ask("b") == "answered"
        start = asyncio.create_task(on.world.order(on.specs["m"], "start"))
        while not start.done():
            on.ask("b", 6.0)
            await asyncio.sleep(5)

        await start
        assert on.world.runtime.starts["tgi-m-1"] == 1

    play(scene)


def test_a_claim_does_not_wait_for_a_long_drain_while_an_idle_server_can_go() -> None:
    async def scene() -> None:
        long = {"drain_timeout": 1800.0, "generation_timeout": 2000.0}
        on = Shared("a", "b", "drains", devices=FOUR_GPUS[:2], drains=long)
        work = on.ask("drains", 1500.0)
        assert await on.ask("a") == "answered"
        goes = asyncio.create_task(on.world.operate(on.specs["drains"], "stop"))
        await asyncio.sleep(1)
        assert on.status("drains").state is State.DRAINING

        assert await on.ask("b") == "answered"

        assert "ready -> stopping (makes room for b)" in on.moves("a")
        assert await work == "answered"
        await goes

    play(scene)


def test_a_server_that_is_cut_off_has_nothing_to_finish_before_it_goes() -> None:
    async def scene() -> None:
        on = Shared("a")
        work = on.ask("a", 100.0)
        await asyncio.sleep(10)
        (server,) = on.world.fleet._instances()
        assert server.occupancy().in_flight == 1
        goes = asyncio.create_task(on.world.operate(on.specs["a"], "force-stop"))
        while on.status("a").state is not State.STOPPING:
            await asyncio.sleep(0)

        assert on.status("a").in_flight == 1, "its caller has not heard of it yet"
        assert server.occupancy().in_flight == 0
        await goes
        await work

    play(scene)


def test_what_leaves_keeps_its_gpu_though_a_replica_that_starts_has_its_name_by_now() -> None:
    async def scene() -> None:
        keys = {"max_concurrency": 1, "generation_timeout": 5000.0}
        on = Shared("m", "b", devices=FOUR_GPUS[:2], m=keys)
        stranger = Server("tgi-m-1", Manners(leaves_s=9.0), Deaf(), Launch("tgi-m-1", gpus=("0",)))
        on.world.runtime.servers["tgi-m-1"] = [stranger]
        await on.world.fleet.begin()
        work = on.ask("m", 100.0)
        await asyncio.sleep(2)
        other, queued = on.ask("b"), on.ask("m")
        await asyncio.sleep(2)
        on.becomes("m", replicas=2, **keys)
        await asyncio.sleep(1)
        assert not stranger.alive
        assert [await each for each in (queued, other, work)] == ["answered"] * 3

    play(scene)


def test_what_does_not_go_keeps_nobody_from_being_preloaded() -> None:
    class Stays(BadMannersRuntime):
        async def stop(self, name: str, *, grace_s: float) -> None:
            if name == "tgi-stays":
                raise RuntimeUnavailable("it was killed, and has not ended")
            await super().stop(name, grace_s=grace_s)

    async def scene() -> None:
        runtime = Stays(Random(0))
        on = Shared("a", runtime=runtime, a={"preload": True})
        runtime.servers["tgi-stays"] = [Server("tgi-stays", Manners(), Deaf())]
        await on.world.fleet.begin()
        await asyncio.sleep(60)

        assert on.status("a").state is State.READY
        runtime.servers["tgi-stays"][0].die("at last")

    play(scene)


def test_who_is_told_to_come_back_because_of_pinned_models_finds_the_start_that_began_since() -> None:
    async def scene() -> None:
        on = Shared("a", "b", a={"pinned": True}, b={"abandon_after": 5.0})
        on.world.runtime.next_manners = [WELL, Manners(make_s=1.0, load_s=40.0)]
        assert await on.ask("a") == "answered"
        assert await on.ask("b") == "NO_CAPACITY"
        await on.world.order(on.specs["a"], "stop")
        again = on.ask("b")
        await asyncio.sleep(1)
        await on.world.leave(again)
        await asyncio.sleep(45)

        assert on.status("b").state is State.READY, "it was promised a minute"

    play(scene)


async def _idle_beside_a_start(gpus: type[Gpus]) -> None:
    """Have a model become idle while another one starts on their GPU, and see that it goes afterwards."""
    on = Shared("a", "b", gpus=gpus, a={"gpu_memory": "10GiB", "idle_timeout": 30.0}, b={"gpu_memory": "10GiB"})
    on.world.runtime.next_manners = [WELL, Manners(make_s=1.0, load_s=60.0)]
    assert await on.ask("a") == "answered"
    assert await on.ask("b") == "answered"
    await asyncio.sleep(10)
    told = "\n".join(on.world.trace)
    assert 0 < told.index("b: loading -> ready") < told.index("a: ready -> stopping (idle)")


def test_an_idle_server_stays_as_long_as_another_one_starts_beside_it() -> None:
    play(lambda: _idle_beside_a_start(Gpus))


def test_the_simulator_sees_one_that_goes_beside_a_start() -> None:
    class LeavesBeside(Gpus):
        def starts_beside(self, model: str) -> bool:
            return False

    with pytest.raises(Broke, match="they came free while it started"):
        play(lambda: _idle_beside_a_start(LeavesBeside))


def test_who_waits_for_gpus_is_told_so_and_refused_in_bound() -> None:
    async def scene() -> None:
        on = Shared("a", "b", a={"generation_timeout": 1000.0})
        assert await on.ask("a") == "answered"
        on.ask("a", work_s=900.0)
        await asyncio.sleep(1)
        began = asyncio.get_running_loop().time()

        assert await on.ask("b", max_wait_s=7.0) == "MODEL_NOT_LOADED"
        assert asyncio.get_running_loop().time() - began == 7.0
        progress = on.status("b").progress
        assert progress is not None
        assert progress.phase == "waiting for GPUs"
        assert "a" in (on.status("b").waits_for or "")

        assert await on.ask("b") == "NO_CAPACITY"
        assert asyncio.get_running_loop().time() - began == 307.0

    play(scene)


def test_the_wait_for_gpus_takes_nothing_from_the_time_of_the_start() -> None:
    async def scene() -> None:
        on = Shared("a", "b", a={"generation_timeout": 1000.0}, b={"start_timeout": 60.0})
        assert await on.ask("a") == "answered"
        on.ask("a", work_s=250.0)
        await asyncio.sleep(1)

        assert await on.ask("b") == "answered"

    play(scene)


def test_who_queues_is_not_at_work_any_more_once_his_model_makes_room() -> None:
    async def scene() -> None:
        on = Shared("a", "b", a={"max_concurrency": 1, "queue_timeout": 1000.0, "generation_timeout": 1000.0})
        counted: list[int] = []

        async def asks() -> str:
            with Standing(counted.append):
                return await on.ask("a")

        assert await on.ask("a") == "answered"
        long = on.ask("a", work_s=130.0)
        await asyncio.sleep(1)
        caller = asyncio.create_task(asks())
        await asyncio.sleep(5)
        assert sum(counted) == 1, "he waits for a slot of a model that is up"

        other = on.ask("b")
        await on.until_held("a")
        assert sum(counted) == 0
        assert [await task for task in (long, other)] == ["answered"] * 2
        assert not caller.done(), "he is served by the next start"
        assert sum(counted) == 0
        assert await caller == "answered"

    play(scene)


@pytest.mark.parametrize("order", ["restart", "change"])
def test_who_queues_is_not_at_work_any_more_once_his_model_goes_to_start_again(order: str) -> None:
    async def scene() -> None:
        on = Shared("a", a={"max_concurrency": 1})
        counted: list[int] = []

        async def asks() -> str:
            with Standing(counted.append):
                return await on.ask("a")

        assert await on.ask("a") == "answered"
        long = on.ask("a", work_s=30.0)
        await asyncio.sleep(1)
        caller = asyncio.create_task(asks())
        await asyncio.sleep(1)
        assert sum(counted) == 1

        if order == "change":
            on.becomes("a", max_concurrency=1, args={"n": 2})
        else:
            restart = asyncio.create_task(on.world.operate(on.specs["a"], "restart"))
            await asyncio.sleep(1)
        assert on.status("a").state is State.DRAINING
        assert sum(counted) == 0
        assert [await task for task in (long, caller)] == ["answered"] * 2
        if order == "restart":
            await restart

    play(scene)


def test_one_long_stream_keeps_neither_its_models_callers_nor_the_claim_waiting_till_it_ends() -> None:
    async def scene() -> None:
        on = Shared("a", "b", a={"generation_timeout": 2000.0}, b={"queue_timeout": 2000.0})
        assert await on.ask("a") == "answered"
        stream = on.ask("a", work_s=900.0)
        await asyncio.sleep(1)
        claim = on.ask("b")
        await on.until_held("a")
        assert on.status("a").held_for == "b"

        assert await on.ask("a") == "answered"
        assert not stream.done()
        assert on.status("b").waits_for
        assert await stream == "answered"
        waited_since = asyncio.get_running_loop().time()
        assert await claim == "answered"
        assert asyncio.get_running_loop().time() <= waited_since + 2 * HOLD_S + 60

    play(scene)


@pytest.mark.parametrize(("work_s", "every_s"), [(70.0, 20.0), (90.0, 20.0), (130.0, 30.0), (200.0, 60.0)])
def test_a_claim_has_its_turn_though_all_work_of_the_other_outlasts_a_hold(work_s: float, every_s: float) -> None:
    async def scene() -> None:
        on = Shared("x", "y", x={"max_concurrency": 8, "generation_timeout": 1000.0}, y={"queue_timeout": 900.0})
        assert await on.ask("x") == "answered"

        async def ask_on() -> None:
            while True:
                on.ask("x", work_s=work_s)
                await asyncio.sleep(every_s)

        asking = asyncio.create_task(ask_on())
        await asyncio.sleep(300)

        assert await on.ask("y") == "answered"
        asking.cancel()

    play(scene)


def test_a_start_that_nobody_wants_any_more_gives_up_its_claim() -> None:
    async def scene() -> None:
        on = Shared("a", "b", a={"generation_timeout": 1000.0})
        assert await on.ask("a") == "answered"
        busy = on.ask("a", work_s=800.0)
        await asyncio.sleep(1)
        waiting = on.ask("b")
        await on.until_held("a")
        assert on.status("a").held_for == "b"
        await on.world.leave(waiting)
        await asyncio.sleep(100)

        assert on.status("b").state is State.STOPPED
        assert on.status("a").held_for is None
        assert await on.ask("a") == "answered"
        assert await busy == "answered"

    play(scene)


def test_an_operators_start_that_gets_no_gpus_is_given_up_after_its_time() -> None:
    async def scene() -> None:
        on = Shared("a", "b", a={"pinned": True}, b={"start_timeout": 60.0})
        assert await on.ask("a") == "answered"

        await on.world.operate(on.specs["b"], "start")

        assert on.status("b").state is State.FAILED
        failure = on.status("b").failure
        assert failure is not None
        assert failure.error.code == "NO_CAPACITY"
        assert "pinned" in failure.error.detail
        assert not on.status("b").retry_after_s, "it is no fault of the model's: it does not cool down"

    play(scene)


def test_a_server_whose_end_is_not_known_keeps_its_gpus() -> None:
    async def scene() -> None:
        on = Shared("a", "b")
        assert await on.ask("a") == "answered"
        on.world.runtime.fall_silent(100.0)
        waiting = on.ask("b")
        await asyncio.sleep(50)

        assert on.status("a").gpus == ("0",)
        assert on.status("b").gpus == ()
        assert await waiting == "answered"

    play(scene)


def test_a_model_whose_memory_others_use_rests_and_does_not_turn_others_out_again_and_again() -> None:
    async def scene() -> None:
        on = Shared("a", "b", a={"args": {"memory": "taken by others"}})
        for _ in range(60):
            on.ask("a")
            on.ask("b")
            await asyncio.sleep(10)

        assert on.world.outcomes.get("answered", 0) >= 50
        assert sum("makes room for a" in move for move in on.moves("b")) <= 6, "pauses grow"

    play(scene)


def test_the_queues_time_out_is_spent_once_however_often_the_model_is_switched() -> None:
    async def scene() -> None:
        keys = {"queue_timeout": 60.0, "max_concurrency": 1}
        on = Shared(*"abcd", a=keys, b=keys, c=keys, d=keys)
        loop = asyncio.get_running_loop()
        asked = [on.ask(name, work_s=10.0) for name in "abcd" for _ in range(10)]

        await asyncio.wait(asked)

        assert loop.time() < 60 + 4 * 10 + 30, "60 s of waiting, and the starts between them"
        assert set(on.world.outcomes) == {"answered", "NO_CAPACITY"}
        assert on.world.outcomes["answered"] >= 5

    play(scene)


def test_a_server_that_is_nobodys_and_a_model_of_its_name_have_gpus_of_their_own() -> None:
    async def scene() -> None:
        on = Shared("tgi-a", devices=[Device("0", 24 * GIB), Device("1", 24 * GIB)])
        stranger = Launch("tgi-a", gpus=("0",))
        on.world.runtime.servers["tgi-a"] = [Server("tgi-a", Manners(leaves_s=9.0), Deaf(), stranger)]
        await on.world.fleet.begin()

        assert await on.ask("tgi-a") == "answered"
        assert on.status("tgi-a").gpus == ("1",)

    play(scene)


def test_a_server_of_an_older_entry_keeps_what_it_takes_until_it_is_gone() -> None:
    async def scene() -> None:
        on = Shared("a", "b", a={"gpu_memory": "3GiB"}, b={"gpu_memory": "20GiB"})
        older = Launch("tgi-a", gpus=("0",), fingerprint="another")
        on.world.runtime.servers["tgi-a"] = [Server("tgi-a", Manners(leaves_s=9.0), Deaf(), older)]
        await on.world.fleet.begin()
        waiting = on.ask("b")
        await asyncio.sleep(5)

        assert on.status("b").gpus == ()
        assert await waiting == "answered"

    play(scene)


def test_an_idle_server_does_not_go_while_another_measures_the_gpu_that_they_share() -> None:
    async def scene() -> None:
        on = Shared("a", "c", a={"gpu_memory": "10GiB", "idle_timeout": 20.0}, c={"gpu_memory": "10GiB"})
        on.world.runtime.next_manners = [WELL, Manners(make_s=1.0, load_s=60.0)]
        assert await on.ask("a") == "answered"
        loading = on.ask("c")
        await asyncio.sleep(40)

        assert on.status("c").state is State.LOADING
        assert on.status("a").state is State.READY
        assert await loading == "answered"
        await asyncio.sleep(30)
        assert on.status("a").state is State.STOPPED

    play(scene)


@pytest.mark.parametrize(
    ("keys", "gpus"),
    [
        ({"gpus": 2}, ("0", "1")),
        ({"gpus": ["3"]}, ("3",)),
        ({"gpus": 0}, ()),
        ({"gpu_memory": "6GiB"}, ("0",)),
        ({"args": {"version": 2}}, ("0",)),
    ],
)
def test_a_model_whose_gpus_are_changed_while_its_server_is_perhaps_left_gets_what_the_new_entry_asks_for(
    keys: dict[str, Any], gpus: tuple[str, ...]
) -> None:
    async def scene() -> None:
        on = Shared("a", "b", devices=FOUR_GPUS, a={"stop_grace": 1.0}, b={"gpu_memory": "1GiB"})
        await on.world.fleet.begin()
        assert await on.ask("a") == "answered"
        await on.perhaps_leave("a", 28.0)
        on.becomes("a", stop_grace=1.0, **keys)
        await asyncio.sleep(6)  # it has rested, and nobody has looked again yet

        assert await on.ask("a") == "answered"

        assert on.world.runtime.newest("tgi-a").gpus == on.status("a").gpus == gpus
        assert on.world.fleet.gpus.place_of("a").memory_bytes == on.specs["a"].gpu_memory_bytes

    play(scene)


def test_its_former_gpus_are_nobodys_else_before_its_former_server_is_known_to_be_gone() -> None:
    async def scene() -> None:
        on = Shared("a", "b", devices=FOUR_GPUS[:2], a={"gpus": ["0"], "stop_grace": 1.0}, b={"gpus": ["0"]})
        await on.world.fleet.begin()
        assert await on.ask("a") == "answered"
        await on.perhaps_leave("a", 100.0)
        on.becomes("a", gpus=["1"], stop_grace=1.0)
        waiting = on.ask("b")
        await asyncio.sleep(6)

        assert await on.ask("a") == "RUNTIME_UNAVAILABLE"
        failure = on.status("a").failure
        assert failure
        assert "its former server must be gone first" in failure.error.detail
        assert on.status("a").gpus == ("0",)
        assert on.status("b").gpus == ()
        assert await waiting == "answered"
        assert await on.ask("a") == "answered"
        assert on.status("a").gpus == ("1",)

    play(scene)


def test_a_model_starts_in_the_place_of_its_former_server_only_where_nobody_comes_or_goes() -> None:
    async def scene() -> None:
        half = {"gpu_memory": "10GiB", "stop_grace": 100.0}
        on = Shared("a", "b", a={**half, "stop_grace": 1.0}, b=half)
        on.world.runtime.next_manners = [WELL, Manners(leaves_s=30.0), WELL]
        assert await on.ask("a") == "answered"
        assert await on.ask("b") == "answered"
        await on.perhaps_leave("a", 28.0)
        await asyncio.sleep(6)
        goes = asyncio.create_task(on.world.operate(on.specs["b"], "stop"))
        await asyncio.sleep(1)
        assert on.status("b").state is State.STOPPING

        assert await on.ask("a") == "answered"

        await goes
        told = "\n".join(on.world.trace)
        assert told.index("b: stopping -> stopped") < told.rindex("a: starting -> loading")

    play(scene)


def test_a_removed_model_of_which_something_is_perhaps_left_is_the_one_that_goes_on_when_it_is_back() -> None:
    async def scene() -> None:
        on = Shared("a", "b", a={"stop_grace": 1.0, "generation_timeout": 1000.0})
        await on.world.fleet.begin()
        assert await on.ask("a") == "answered"
        await on.perhaps_leave("a", 32.0)
        on.world.fleet.change(catalog_of([on.specs["b"]]))
        await asyncio.sleep(5)
        assert on.status("a").state is not State.STOPPED, "it is not forgotten"
        on.world.fleet.change(catalog_of(on.specs.values()))
        long = on.ask("a", 100.0)
        await asyncio.sleep(60)

        assert await long == "answered", "nobody removes its server while it serves"
        assert len(on.world.runtime.alive("tgi-a")) == 1

    play(scene)


def test_a_removed_model_is_forgotten_once_what_was_perhaps_left_of_it_is_gone() -> None:
    async def scene() -> None:
        on = Shared("a", "b", a={"stop_grace": 1.0})
        await on.world.fleet.begin()
        assert await on.ask("a") == "answered"
        await on.perhaps_leave("a", 32.0)
        on.world.fleet.change(catalog_of([on.specs["b"]]))
        await asyncio.sleep(60)

        assert on.world.runtime.alive("tgi-a") == []
        assert on.status("a").state is State.STOPPED
        assert await on.ask("b") == "answered"

    play(scene)


def test_a_pinned_model_does_not_stand_in_its_own_way() -> None:
    async def scene() -> None:
        on = Shared("a", a={"pinned": True, "stop_grace": 1.0})
        assert await on.ask("a") == "answered"
        await on.perhaps_leave("a", 22.0)
        await asyncio.sleep(6)

        assert await on.ask("a") == "answered"

    play(scene)


@pytest.mark.parametrize("name", ["0", "GPU-a"])
def test_a_server_that_was_found_with_its_card_by_either_name_keeps_that_card_to_itself(name: str) -> None:
    async def scene() -> None:
        on = Shared("a", "b", devices=[Device("0", 24 * GIB, "GPU-a")], a={"gpus": [name]}, b={"gpus": ["GPU-a"]})
        asked_for = Launch("tgi-a", gpus=(name,), fingerprint=fingerprint(SimulatedEngine(), on.specs["a"]))
        on.world.runtime.servers["tgi-a"] = [Server("tgi-a", Manners(), Deaf(), asked_for)]
        await on.world.fleet.begin()
        assert await on.ask("a") == "answered"
        assert on.status("a").gpus == ("0",)

        assert await on.ask("b") == "answered"

        assert "ready -> stopping (makes room for b)" in on.moves("a")

    play(scene)


def test_who_got_no_gpus_is_told_to_come_back_when_their_holder_has_usually_gone_and_the_model_started() -> None:
    async def scene() -> None:
        keys = {"queue_timeout": 60.0, "generation_timeout": 1000.0}
        on = Shared("a", "b", a=keys, b=keys)
        on.world.runtime.next_manners = [Manners(make_s=2.0, load_s=8.0, leaves_s=4.0)] * 50
        for name in "abab":
            assert await on.ask(name, work_s=20.0) == "answered"
            await asyncio.sleep(1)
        on.ask("b", work_s=900.0)

        assert await on.ask("a") == "NO_CAPACITY"
        assert on.told_s("a") == pytest.approx(20 + 4 + 10, abs=1.0)

    play(scene)


def test_who_got_no_gpus_of_one_that_was_never_seen_to_go_is_told_a_usual_time() -> None:
    async def scene() -> None:
        on = Shared("a", "b", a={"queue_timeout": 20.0}, b={"generation_timeout": 1000.0})
        on.ask("b", work_s=900.0)
        await asyncio.sleep(20)

        assert await on.ask("a") == "NO_CAPACITY"
        assert on.told_s("a") == 30.0

    play(scene)


@pytest.mark.parametrize(("turns", "told_s"), [("a", 30.0), ("ababa", 4 + 10 + 10)])
def test_who_waits_for_a_model_that_makes_room_is_told_so_and_to_come_back_when_it_can_have_started_again(
    turns: str, told_s: float
) -> None:
    async def scene() -> None:
        keys = {"max_concurrency": 4, "queue_timeout": 40.0, "generation_timeout": 1000.0, "idle_timeout": "never"}
        on = Shared("a", "b", a=keys)
        on.world.runtime.next_manners = [Manners(make_s=2.0, load_s=8.0, leaves_s=4.0)] * 50
        for name in turns:
            assert await on.ask(name) == "answered"
            await asyncio.sleep(100)
        on.ask("a", work_s=900.0)
        await asyncio.sleep(1)
        on.ask("b")
        await on.until_held("a")

        with pytest.raises(NoCapacity) as refused:
            async with on.world.fleet.get(on.specs["a"]).lease():
                pass
        assert "takes no new requests since it makes room for b" in refused.value.detail
        assert refused.value.retry_after_s == pytest.approx(told_s, abs=2.0)

    play(scene)
