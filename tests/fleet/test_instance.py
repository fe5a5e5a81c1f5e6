"""The life of one model, scenario by scenario, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from gateway.errors import (
    GatewayError,
    ModelNotLoaded,
    ModelNotRunning,
    ModelUnhealthy,
    ShuttingDown,
    StartFailed,
    StartTimeout,
)
from gateway.lifecycle import State
from gateway.runtimes.base import Progress
from tests.fleet.scenes import Scene, play
from tests.simulator.servers import NEVER, Manners

Scenario = Callable[[], Coroutine[Any, Any, None]]
SEEDS = range(20)


def in_every_order(scenario: Scenario) -> Callable[[int], None]:
    """Play the scenario under several seeds: what is ready at the same instant runs in another order each time."""

    @pytest.mark.parametrize("seed", SEEDS)
    def test(seed: int) -> None:
        play(scenario, seed)

    test.__name__, test.__doc__ = scenario.__name__, scenario.__doc__
    return test


@in_every_order
async def test_a_hundred_cold_callers_cause_one_start() -> None:
    scene = Scene()

    outcomes = await asyncio.gather(*(scene.ask(0.1) for _ in range(100)))

    assert outcomes.count("answered") == 100
    assert scene.starts == 1


@in_every_order
async def test_slots_are_never_exceeded_and_the_queue_is_served_in_the_order_of_arrival() -> None:
    scene = Scene(max_concurrency=2)
    await scene.ready()
    order: list[int] = []
    most = 0

    async def caller(number: int) -> None:
        nonlocal most
        async with scene.instance.lease() as lease:
            with scene.held(lease):
                order.append(number)
                most = max(most, scene.instance.status.in_flight)
                await asyncio.sleep(1)

    callers = []
    for number in range(10):
        callers.append(asyncio.create_task(caller(number)))
        await asyncio.sleep(0.01)
    await asyncio.gather(*callers)

    assert order == list(range(10))
    assert most == 2


@in_every_order
async def test_a_stop_in_the_tick_of_a_start_releases_every_waiter() -> None:
    scene = Scene()
    request = scene.ask()
    while scene.is_in(State.STOPPED):
        await scene.after(0)

    await scene.order("stop")

    assert await request == "MODEL_NOT_LOADED"
    assert scene.is_in(State.STOPPED)


@in_every_order
async def test_a_caller_who_leaves_while_queued_or_loading_leaves_nothing() -> None:
    scene = Scene(max_concurrency=1)
    cold = scene.ask()
    await scene.after(2)
    await scene.world.leave(cold)
    await scene.ready()
    busy = scene.ask(10)
    await scene.after(0.1)
    queued = scene.ask()
    await scene.after(0.1)
    assert scene.instance.status.queued == 1
    await scene.world.leave(queued)

    assert scene.instance.status.queued == 0
    assert await busy == "answered"
    assert scene.instance.status.in_flight == 0


@in_every_order
async def test_a_caller_who_leaves_in_the_tick_of_the_grant_leaves_no_lease() -> None:
    scene = Scene(Manners(make_s=1, load_s=5), max_concurrency=1)
    requests = [scene.ask(0.5) for _ in range(4)]
    while not scene.is_in(State.READY):
        await scene.after(0.001)
    requests[0].cancel()
    requests[1].cancel()
    await asyncio.wait(requests)
    await scene.after(0.1)

    assert scene.instance.status.in_flight == 0
    assert scene.instance.status.queued == 0


@in_every_order
async def test_a_lease_that_is_cut_in_the_tick_of_its_grant_is_not_used() -> None:
    """Found by the simulator: its holder could not hear of it yet, and the request went to a dying server."""
    scene = Scene(max_concurrency=1)
    await scene.ready()
    busy = scene.ask(1)
    await scene.after(0.5)
    queued = scene.ask(1)
    await scene.after(0.4)

    def stop_as_soon_as_it_is_granted() -> None:
        if scene.instance.status.queued:
            scene.loop.call_soon(stop_as_soon_as_it_is_granted)
        else:
            orders.append(asyncio.create_task(scene.order("force-stop")))

    orders: list[asyncio.Task[object]] = []
    await scene.after(0.1)
    stop_as_soon_as_it_is_granted()
    outcomes = await asyncio.gather(busy, queued)

    assert outcomes[0] == "answered"
    assert outcomes[1] in ("GENERATION_FAILED", "answered")
    await asyncio.wait(orders)


@in_every_order
async def test_an_idle_server_is_stopped_and_the_next_request_starts_it_again() -> None:
    scene = Scene(idle_timeout="15m")
    assert await scene.ask() == "answered"

    await scene.after(14 * 60)
    assert scene.is_in(State.READY)
    assert await scene.ask() == "answered"
    await scene.after(14 * 60)
    assert scene.is_in(State.READY)
    await scene.after(2 * 60)

    assert scene.is_in(State.STOPPED)
    assert await scene.ask() == "answered"
    assert scene.starts == 2


@in_every_order
async def test_a_request_in_the_instant_of_the_idle_stop_is_answered() -> None:
    scene = Scene(idle_timeout=60)
    await scene.ready()

    await scene.after(60)
    outcome = await scene.ask()

    assert outcome == "answered"


@in_every_order
async def test_a_pinned_server_and_one_without_idle_timeout_stay() -> None:
    pinned = Scene(pinned=True, idle_timeout=60)
    await pinned.ready()
    await pinned.after(3600)

    assert pinned.is_in(State.READY)


@in_every_order
async def test_a_busy_server_is_drained_before_it_stops() -> None:
    scene = Scene(drain_timeout=60)
    await scene.ready()
    request = scene.ask(20)
    await scene.after(1)
    stop = asyncio.create_task(scene.order("stop"))
    await scene.after(1)
    assert scene.is_in(State.DRAINING)

    assert await request == "answered"
    await stop
    assert scene.is_in(State.STOPPED)


@in_every_order
async def test_a_drain_ends_at_its_limit_and_tells_those_it_cuts() -> None:
    scene = Scene(drain_timeout=5)
    await scene.ready()
    request = scene.ask(30)
    await scene.after(1)

    await scene.order("stop")

    assert await request == "GENERATION_FAILED"
    assert scene.is_in(State.STOPPED)


@in_every_order
async def test_a_forced_stop_cuts_at_once() -> None:
    scene = Scene()
    await scene.ready()
    request = scene.ask(30)
    await scene.after(1)
    began = scene.loop.time()

    await scene.order("force-stop")

    assert await request == "GENERATION_FAILED"
    assert scene.loop.time() - began < 1


@in_every_order
async def test_who_asks_while_a_server_drains_gets_the_next_one() -> None:
    scene = Scene()
    await scene.ready()
    running = scene.ask(5)
    await scene.after(0.1)
    stop = asyncio.create_task(scene.order("stop"))
    await scene.after(0.1)
    late = scene.ask()

    assert await running == "answered"
    await stop
    assert await late == "answered"
    assert scene.starts == 2


@in_every_order
async def test_a_restart_keeps_the_queue() -> None:
    scene = Scene(max_concurrency=1)
    await scene.ready()
    running = scene.ask(5)
    await scene.after(0.1)
    queued = scene.ask()
    await scene.after(0.1)

    handle = await scene.order("restart")

    assert handle is not None
    assert await running == await queued == "answered"
    assert scene.starts == 2


@in_every_order
async def test_a_stop_that_comes_after_a_restart_has_the_last_word() -> None:
    scene = Scene()
    await scene.ready()
    running = scene.ask(5)
    await scene.after(1)
    restart = asyncio.create_task(scene.order("restart"))
    await scene.after(1)

    await scene.order("stop")

    assert await running == "answered"
    with pytest.raises(ModelNotLoaded):
        await restart
    assert scene.is_in(State.STOPPED)
    assert scene.starts == 1


@in_every_order
async def test_a_stop_in_the_tick_in_which_a_restart_starts_again_has_the_last_word() -> None:
    """Found by Hypothesis: the restart saw the next life being stopped, and started a third."""
    scene = Scene(*[Manners(make_s=0, load_s=5, leaves_s=0)] * 4)
    await scene.ready()
    restart = asyncio.create_task(scene.order("restart"))
    while scene.starts < 2:
        await scene.after(0)

    await scene.order("force-stop")
    await asyncio.wait([restart])
    await scene.after(20)

    assert isinstance(restart.exception(), ModelNotLoaded)
    assert scene.is_in(State.STOPPED)


@in_every_order
async def test_a_failed_start_is_told_to_all_and_remembered_until_it_has_cooled_down() -> None:
    scene = Scene(Manners(fails_to_start=True), Manners())

    first = await asyncio.gather(*(scene.ask() for _ in range(3)))
    at_once = await scene.ask()
    retry_after_s = scene.instance.status.retry_after_s or 0
    await scene.after(retry_after_s)
    later = await scene.ask()

    assert first == ["START_FAILED"] * 3
    assert at_once == "START_FAILED"
    assert 0 < retry_after_s <= 5
    assert later == "answered"
    assert scene.starts == 2


@in_every_order
async def test_an_operators_start_does_not_wait_for_the_cool_down() -> None:
    scene = Scene(Manners(fails_to_start=True), Manners())
    assert await scene.ask() == "START_FAILED"

    await scene.order("start")

    assert scene.is_in(State.READY)


@in_every_order
async def test_the_pauses_of_a_model_that_keeps_failing_grow() -> None:
    scene = Scene(*[Manners(fails_to_start=True)] * 4)
    pauses = []
    for _ in range(4):
        assert await scene.ask() == "START_FAILED"
        await scene.after(0.1)
        pause_s = scene.instance.status.retry_after_s or 0
        pauses.append(round(pause_s))
        await scene.after(pause_s)

    assert pauses == [5, 10, 20, 40]


@in_every_order
async def test_a_server_that_dies_while_serving_is_started_again_for_those_who_queue() -> None:
    scene = Scene(Manners(dies_serving_s=5), Manners(), max_concurrency=1)
    await scene.ready()
    running = scene.ask(20)
    await scene.after(0.1)
    queued = scene.ask()

    assert await running in ("broken off", "GENERATION_FAILED")
    assert await queued == "answered"
    assert scene.starts == 2


@in_every_order
async def test_a_server_that_dies_again_and_again_cools_down() -> None:
    scene = Scene(*[Manners(load_s=1, dies_serving_s=1)] * 3)
    assert await scene.ask(5) in ("broken off", "GENERATION_FAILED")
    assert await scene.ask(5) in ("broken off", "GENERATION_FAILED")

    await scene.after(1)

    assert scene.is_in(State.FAILED)
    assert scene.instance.status.retry_after_s == pytest.approx(10, abs=1.5)


@in_every_order
async def test_a_start_ends_at_its_hard_cap_even_with_progress() -> None:
    scene = Scene(Manners(load_s=NEVER), start_timeout=100, stall_timeout=50)
    began = scene.loop.time()

    assert await scene.ask() == "START_TIMEOUT"
    assert scene.loop.time() - began == pytest.approx(100)
    assert "start_timeout" in str(scene.instance.status.failure)


@in_every_order
async def test_a_start_without_progress_ends_early() -> None:
    scene = Scene(Manners(load_s=NEVER, silent_load=True), start_timeout=1200, stall_timeout=30)
    began = scene.loop.time()

    assert await scene.ask() == "START_TIMEOUT"
    assert scene.loop.time() - began < 35
    assert "stall_timeout" in str(scene.instance.status.failure)


@in_every_order
async def test_progress_keeps_a_slow_start_alive_and_is_shown() -> None:
    scene = Scene(Manners(load_s=600), start_timeout=1200, stall_timeout=60)
    request = scene.ask()
    await scene.after(300)

    progress = scene.instance.status.progress
    assert isinstance(progress, Progress)
    assert progress.phase == "loading"
    assert await request == "answered"


@in_every_order
async def test_a_start_that_nobody_waits_for_any_more_is_called_off() -> None:
    scene = Scene(Manners(load_s=500), abandon_after=60)
    request = scene.ask()
    await scene.after(10)
    request.cancel()
    await scene.after(59)
    assert scene.is_in(State.LOADING)
    await scene.after(2)

    assert scene.is_in(State.STOPPED)
    assert scene.instance.status.failure is None


@in_every_order
async def test_a_caller_who_comes_back_in_time_finds_the_start_going_on() -> None:
    scene = Scene(Manners(load_s=100), abandon_after=30)

    assert await scene.ask(max_wait_s=20) == "MODEL_NOT_LOADED"
    await scene.after(40)  # told to come back after 20 s: a reason for 40 s
    assert await scene.ask() == "answered"
    assert scene.starts == 1


@in_every_order
async def test_an_operators_start_goes_on_without_anybody() -> None:
    scene = Scene(Manners(load_s=500), abandon_after=30)

    assert await scene.order("start-and-go") is None
    await scene.after(510)

    assert scene.is_in(State.READY)


@in_every_order
async def test_a_queued_request_waits_no_longer_than_its_bound() -> None:
    scene = Scene(max_concurrency=1, queue_timeout=10)
    await scene.ready()
    busy = scene.ask(30)
    await scene.after(0.1)
    began = scene.loop.time()

    assert await scene.ask() == "NO_CAPACITY"
    assert scene.loop.time() - began == pytest.approx(10)
    assert await busy == "answered"


@in_every_order
async def test_who_would_not_wait_is_not_told_of_busy_slots_when_the_model_gets_ready_that_instant() -> None:
    """Found by Hypothesis: the wait ended in the tick in which the model became ready."""
    scene = Scene(Manners(make_s=0, load_s=0))

    outcomes = await asyncio.gather(*(scene.ask(0, max_wait_s=0) for _ in range(2)))

    assert set(outcomes) <= {"MODEL_NOT_LOADED", "answered"}


@in_every_order
async def test_a_full_queue_refuses_at_once() -> None:
    scene = Scene(max_concurrency=1, max_queue=1)
    await scene.ready()
    requests = [scene.ask(5)]
    await scene.after(0.1)
    requests.append(scene.ask())
    await scene.after(0.1)

    assert await scene.ask() == "QUEUE_FULL"
    assert await asyncio.gather(*requests) == ["answered"] * 2


@in_every_order
async def test_a_silent_server_is_unhealthy_refuses_and_recovers() -> None:
    scene = Scene(Manners(hangs_s=20, hang_lasts_s=70), unhealthy_timeout=60, generation_timeout=500)
    await scene.ready()
    running = scene.ask(120)
    while not scene.is_in(State.UNHEALTHY):
        await scene.after(1)
    with pytest.raises(ModelUnhealthy) as refused:
        async with scene.instance.lease():
            pass
    assert refused.value.retry_after_s
    while scene.is_in(State.UNHEALTHY):
        await scene.after(1)

    assert scene.is_in(State.READY)
    assert await running == "answered"


@in_every_order
async def test_those_who_queue_are_served_when_a_silent_server_recovers() -> None:
    """The queue slept on beside free slots: leases given back while the server was unhealthy woke nobody."""
    scene = Scene(Manners(hangs_s=20, hang_lasts_s=70), max_concurrency=1, unhealthy_timeout=60, generation_timeout=60)
    await scene.ready()
    running = scene.ask(500)
    await scene.after(15)
    queued = scene.ask()
    while not scene.is_in(State.UNHEALTHY):
        await scene.after(1)

    assert await running == "generation timeout"
    assert await queued == "answered"
    assert scene.starts == 1


@in_every_order
async def test_a_server_silent_for_too_long_is_replaced_and_its_callers_are_told() -> None:
    scene = Scene(Manners(hangs_s=20, hang_lasts_s=NEVER), Manners(), unhealthy_timeout=60, generation_timeout=500)
    await scene.ready()

    assert await scene.ask(400) == "GENERATION_FAILED"
    assert await scene.ask() == "answered"
    assert scene.starts == 2


@in_every_order
async def test_a_daemon_that_is_silent_ends_no_model() -> None:
    scene = Scene()
    await scene.ready()

    scene.runtime.fall_silent(3600)
    await scene.after(600)

    assert scene.is_in(State.READY)
    assert await scene.ask() == "answered"


@in_every_order
async def test_a_stop_that_the_daemon_does_not_answer_is_told_and_the_next_start_clears_up() -> None:
    scene = Scene()
    await scene.ready()
    left = scene.server
    scene.runtime.fall_silent(100)

    with pytest.raises(GatewayError, match="not known whether"):
        await scene.order("stop")
    assert scene.is_in(State.FAILED)
    await scene.after(100)
    await scene.order("start")

    assert not left.alive
    assert scene.is_in(State.READY)


@in_every_order
async def test_stopping_what_does_not_run_is_an_error_that_says_so() -> None:
    scene = Scene()

    with pytest.raises(ModelNotRunning):
        await scene.order("stop")
    with pytest.raises(ModelNotRunning):
        await scene.order("restart")


@in_every_order
async def test_a_shutdown_refuses_the_queue_drains_the_rest_and_leaves_no_server() -> None:
    scene = Scene(max_concurrency=1)
    await scene.ready()
    running = scene.ask(5)
    await scene.after(0.1)
    queued = scene.ask()
    await scene.after(0.1)

    await scene.world.close()

    assert await running == "answered"
    assert await queued == "SHUTTING_DOWN"
    assert scene.is_in(State.STOPPED)
    assert not scene.runtime.alive(scene.instance.name)
    with pytest.raises(ShuttingDown):
        async with scene.instance.lease():
            pass


@in_every_order
async def test_an_operator_who_leaves_ends_neither_a_start_nor_a_stop() -> None:
    scene = Scene(Manners(load_s=10))
    start = asyncio.create_task(scene.order("start"))
    await scene.after(1)
    start.cancel()
    await scene.after(20)
    assert scene.is_in(State.READY)
    stop = asyncio.create_task(scene.order("stop"))
    await scene.after(0)
    await asyncio.sleep(0)
    stop.cancel()
    await scene.after(30)

    assert scene.is_in(State.STOPPED)


@in_every_order
async def test_start_answers_with_what_is_running_already() -> None:
    scene = Scene()

    first = await scene.order("start")
    second = await scene.order("start")

    assert first is second
    assert scene.starts == 1


@in_every_order
async def test_start_tells_its_caller_why_it_failed() -> None:
    dies = Scene(Manners(dies_loading_s=1))
    with pytest.raises(StartFailed, match="Try again"):
        await dies.order("start")


@in_every_order
async def test_start_tells_its_caller_that_it_took_too_long() -> None:
    never = Scene(Manners(load_s=NEVER), start_timeout=50)
    with pytest.raises(StartTimeout):
        await never.order("start")


@in_every_order
async def test_the_journal_tells_each_move() -> None:
    scene = Scene(Manners(silent_load=True))
    await scene.ready()
    await scene.order("stop")

    moves = [entry.data["to"] for entry in scene.world.journal._entries if entry.kind == "state"]

    assert moves == ["starting", "loading", "ready", "stopping", "stopped"]
