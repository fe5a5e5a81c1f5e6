"""What becomes of servers when the gateway goes and comes again (P6), and of those that are frozen from outside."""

from __future__ import annotations

import asyncio

import pytest

from gateway.errors import RuntimeUnavailable
from gateway.lifecycle import State
from tests.fleet.scenes import Scene, play
from tests.simulator.servers import NEVER, Manners
from tests.simulator.world import FORMER


def test_a_server_that_served_is_adopted_and_serves_on() -> None:
    async def scene() -> None:
        one = Scene()
        await one.ready()
        server = one.server

        await one.world.kill([one.spec], down_s=100)

        assert await one.ask() == "answered"
        assert one.server is server
        assert one.starts == 1

    play(scene)


def test_one_that_was_still_loading_has_what_was_left_of_its_time() -> None:
    async def scene() -> None:
        one = Scene(Manners(make_s=0, load_s=NEVER), start_timeout=200)
        starting = one.loop.create_task(one.world.operate(one.spec, "start"))
        await one.after(120)
        await one.world.kill([one.spec])
        await asyncio.wait([starting])

        await one.after(79)
        assert one.is_in(State.LOADING)
        await one.after(2)

        assert one.is_in(State.FAILED)
        failure = one.instance.status.failure
        assert failure
        assert failure.error.code == "START_TIMEOUT"

    play(scene)


def test_one_that_is_older_than_a_start_may_take_has_the_time_of_an_unhealthy_one() -> None:
    async def scene() -> None:
        one = Scene(Manners(hang_lasts_s=NEVER), start_timeout=200, unhealthy_timeout=50, idle_timeout="never")
        await one.ready()
        await one.after(1000)
        one.server.hang()
        await one.world.kill([one.spec])

        await one.after(49)
        assert one.is_in(State.LOADING)
        await one.after(30)

        assert one.is_in(State.FAILED)

    play(scene)


def test_an_adopted_server_that_ends_before_it_is_ready_costs_nobody_an_error() -> None:
    async def scene() -> None:
        one = Scene(Manners(make_s=0, load_s=300), Manners(), stall_timeout=600)
        starting = one.loop.create_task(one.world.operate(one.spec, "start"))
        await one.after(10)
        await one.world.kill([one.spec])
        await asyncio.wait([starting])
        asked = one.ask()
        await one.after(1)

        one.server.die("exit status 0")

        assert await asked == "answered"
        assert one.starts == 2

    play(scene)


def test_a_server_that_the_catalog_would_make_otherwise_is_replaced() -> None:
    async def scene() -> None:
        one = Scene()
        await one.ready()
        changed = one.spec.model_copy(update={"args": {"slots": True}})

        await one.world.kill([changed])

        assert await one.ask() == "answered"
        assert one.starts == 2
        assert len(one.runtime.alive(one.instance.name)) == 1

    play(scene)


def test_a_server_whose_bounds_alone_have_changed_is_kept() -> None:
    async def scene() -> None:
        one = Scene()
        await one.ready()
        changed = one.spec.model_copy(update={"idle_timeout_s": 7.0, "aliases": ("other",), "name": "Other"})

        await one.world.kill([changed])
        await one.after(1)

        assert one.is_in(State.READY)
        assert one.starts == 1

    play(scene)


def test_what_has_ended_meanwhile_and_what_no_model_has_is_removed() -> None:
    async def scene() -> None:
        one = Scene()
        await one.ready()
        one.server.die()
        await one.world.kill([one.spec])
        await one.after(30)

        assert one.is_in(State.STOPPED)
        assert one.server.removed
        assert one.runtime.newest(FORMER).removed

    play(scene)


def test_while_it_is_not_known_what_runs_a_model_is_refused_and_afterwards_adopted() -> None:
    async def scene() -> None:
        one = Scene()
        await one.ready()
        server = one.server
        one.runtime.fall_silent(100)
        await one.world.kill([one.spec])

        assert await one.ask() == "RUNTIME_UNAVAILABLE"
        with pytest.raises(RuntimeUnavailable, match="not known yet"):
            one.world.fleet.get(one.spec)
        await one.after(110)

        assert await one.ask() == "answered"
        assert one.server is server

    play(scene)


def test_a_gateway_that_keeps_its_servers_lets_requests_finish_and_goes() -> None:
    async def scene() -> None:
        one = Scene(keeps=True)
        await one.ready()
        server, asked = one.server, one.ask(work_s=20)
        await one.after(1)

        await one.world.fleet.aclose()

        assert await asked == "answered"
        assert server.alive
        assert one.instance.status.state is State.STOPPED

    play(scene)


def test_a_gateway_that_keeps_its_servers_keeps_those_that_load() -> None:
    async def scene() -> None:
        one = Scene(Manners(make_s=0, load_s=100), keeps=True)
        starting = one.loop.create_task(one.world.operate(one.spec, "start"))
        await one.after(50)

        await one.world.leave_and_come_again([one.spec])
        await asyncio.wait([starting])

        assert await one.ask() == "answered"
        assert one.starts == 1

    play(scene)


def test_a_stop_that_was_ordered_is_finished_by_a_gateway_that_keeps_its_servers() -> None:
    async def scene() -> None:
        one = Scene(Manners(leaves_s=5.0), keeps=True)
        await one.ready()
        asked = one.ask(work_s=20)
        await one.after(1)
        stopping = one.loop.create_task(one.world.operate(one.spec, "stop"))
        await one.after(1)

        await one.world.fleet.aclose()

        assert await asked == "answered"
        await stopping
        assert one.server.removed

    play(scene)


def test_a_paused_server_is_unhealthy_at_once_and_well_when_it_answers_again() -> None:
    async def scene() -> None:
        one = Scene(Manners(hang_lasts_s=NEVER))
        await one.ready()

        one.server.hang()
        one.server.listener.paused("it was paused")
        await one.after(0.001)
        assert one.is_in(State.UNHEALTHY)
        assert await one.ask() == "MODEL_UNHEALTHY"
        one.server.recover()
        await one.after(7)

        assert one.is_in(State.READY)

    play(scene)


def test_a_server_that_stays_paused_is_replaced_after_unhealthy_timeout() -> None:
    async def scene() -> None:
        one = Scene(Manners(hang_lasts_s=NEVER), Manners(), unhealthy_timeout=30)
        await one.ready()
        one.server.hang()
        one.server.listener.paused("it was paused")
        await one.after(40)

        assert await one.ask() == "answered"
        assert one.starts == 2
        failure = one.instance.status.failure
        assert failure
        assert "it was paused" in failure.error.detail

    play(scene)


def test_a_runtime_that_falls_silent_while_a_server_is_adopted_ends_nothing() -> None:
    async def scene() -> None:
        one = Scene(start_timeout=60, unhealthy_timeout=10)
        await one.ready()
        await one.after(500)
        server = one.server
        one.runtime.silent_after_find_s = 200
        await one.world.kill([one.spec])

        await one.after(150)
        assert one.is_in(State.LOADING)
        await one.after(100)

        assert one.is_in(State.READY)
        assert one.server is server

    play(scene)


def test_what_a_stop_may_have_left_is_looked_for_until_it_is_known_to_be_gone() -> None:
    async def scene() -> None:
        one = Scene(stop_grace=1)
        await one.ready()
        one.runtime.fall_silent(100)
        await one.world.operate(one.spec, "stop")
        assert one.is_in(State.FAILED)
        assert one.server.alive

        await one.after(150)

        assert one.server.removed
        assert one.starts == 1

    play(scene)


def test_an_operator_can_stop_what_an_earlier_stop_may_have_left() -> None:
    async def scene() -> None:
        one = Scene(stop_grace=1)
        await one.ready()
        one.runtime.fall_silent(31)
        await one.world.operate(one.spec, "stop")
        assert one.is_in(State.FAILED)
        await one.after(2)

        await one.instance.stop()

        assert one.server.removed

    play(scene)


def test_a_server_that_is_paused_while_it_loads_has_the_time_of_an_unhealthy_one() -> None:
    async def scene() -> None:
        one = Scene(Manners(make_s=0, load_s=500, silent_load=True), Manners(), stall_timeout=180, unhealthy_timeout=20)
        asked = one.ask()
        await one.after(10)
        one.server.listener.paused("it was paused")
        await one.after(1)
        progress = one.instance.status.progress
        assert progress
        assert "paused" in progress.phase

        await one.after(25)

        assert await asked == "START_TIMEOUT"
        failure = one.instance.status.failure
        assert failure
        assert "stayed paused for unhealthy_timeout (20 s)" in failure.error.detail

    play(scene)


def test_what_a_server_says_while_it_serves_is_no_progress() -> None:
    async def scene() -> None:
        one = Scene()
        await one.ready()
        before = one.world.journal.last_id

        one.server.listener.line("loading 3")

        assert one.world.journal.last_id == before

    play(scene)
