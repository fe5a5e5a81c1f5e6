"""Memory that comes back late, in parts, or never: in virtual time, on written GPUs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine
from typing import Any, TypeVar

import pytest

from gateway.devices import Device
from gateway.fleet.placement import NOWHERE, Place
from gateway.fleet.returning import BOUND_S, POLL_S, SLACK_BYTES, Returning
from tests.gpus import GIB, WrittenInventory, gpus
from tests.simulator.loop import SimulatedLoop

T = TypeVar("T")
TEN = Place(("0",), 10 * GIB)
WHOLE = Place(("0",))


def play(scene: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=lambda: SimulatedLoop(seed=1)) as runner:
        return runner.run(scene)


def nobody() -> Collection[Place]:
    return ()


async def came_back(
    inventory: WrittenInventory, place: Place, others: Callable[[], Collection[Place]] = nobody
) -> tuple[str | None, float]:
    """Return what was said when the wait was over, and after how many seconds that was."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    words = await Returning(inventory).returned(place, others)
    return words, loop.time() - began


def later(inventory: WrittenInventory, after_s: float, gpu: str, used: float) -> None:
    asyncio.get_running_loop().call_later(after_s, inventory.used.__setitem__, gpu, int(used * GIB))


def test_memory_that_is_back_is_not_waited_for() -> None:
    inventory = gpus(24)

    assert play(came_back(inventory, WHOLE)) == (None, 0)
    assert inventory.asked == 1


@pytest.mark.parametrize("place", [TEN, WHOLE])
def test_it_is_waited_for_until_it_is_seen(place: Place) -> None:
    async def scene() -> tuple[str | None, float]:
        inventory = gpus(24)
        inventory.used["0"] = 10 * GIB
        later(inventory, 1.1, "0", 4)
        later(inventory, 3.1, "0", 0.2)  # a context of the driver may stay
        return await came_back(inventory, place)

    words, waited_s = play(scene())

    assert words is None
    assert 3.1 <= waited_s <= 3.1 + POLL_S


def test_all_gpus_of_a_model_are_waited_for() -> None:
    async def scene() -> tuple[str | None, float]:
        inventory = gpus(24, 24)
        inventory.used = {"0": 10 * GIB, "1": 10 * GIB}
        later(inventory, 1, "1", 0)
        later(inventory, 2, "0", 0)
        return await came_back(inventory, Place(("0", "1"), 10 * GIB))

    words, waited_s = play(scene())

    assert (words, waited_s >= 2) == (None, True)


def test_memory_that_never_comes_back_is_given_up_at_the_bound_and_the_words_have_the_numbers() -> None:
    async def scene() -> tuple[str | None, float]:
        inventory = gpus(24)
        inventory.used["0"] = 10 * GIB
        return await came_back(inventory, TEN)

    assert play(scene()) == ("GPU 0 has 14 GiB free and should have 23.5 GiB", BOUND_S)


def test_what_others_may_use_is_not_waited_for() -> None:
    async def scene() -> tuple[str | None, float]:
        inventory = gpus(24)
        inventory.used["0"] = 10 * GIB  # of the other one, which has all that it reserved
        return await came_back(inventory, TEN, lambda: [Place(("0",), 10 * GIB)])

    assert play(scene()) == (None, 0)


def test_others_that_come_and_go_meanwhile_count_as_they_are_now() -> None:
    async def scene() -> tuple[str | None, float]:
        inventory, held = gpus(24), list[Place]()
        inventory.used["0"] = 10 * GIB
        asyncio.get_running_loop().call_later(2.1, held.append, Place(("0",), 10 * GIB))
        return await came_back(inventory, TEN, lambda: held)

    words, waited_s = play(scene())

    assert words is None
    assert waited_s >= 2.1


def test_what_strangers_used_before_the_start_is_theirs() -> None:
    async def scene() -> list[str | None]:
        inventory = gpus(24)
        returning = Returning(inventory)
        inventory.used["0"] = 9 * GIB  # 8 of a model that reserved 8, and 1 of a stranger
        other = Place(("0",), 8 * GIB)
        memory = await returning.before_start(TEN, [other])
        assert memory["0"].free_bytes == 15 * GIB
        inventory.used["0"] = GIB
        gone = await returning.returned(TEN, nobody)
        inventory.used["0"] = GIB + SLACK_BYTES + 1
        return [gone, await returning.returned(TEN, nobody)]

    gone, more = play(scene())

    assert gone is None
    assert more == "GPU 0 has 22.5 GiB free and should have 22.5 GiB"


@pytest.mark.parametrize(
    ("inventory", "place"),
    [
        (WrittenInventory(None), TEN),
        (WrittenInventory([Device("0")]), TEN),
        (gpus(24), Place(("7",), GIB)),
        (gpus(24), NOWHERE),
    ],
)
def test_where_nothing_can_be_measured_nothing_is_waited_for(inventory: WrittenInventory, place: Place) -> None:
    assert play(came_back(inventory, place)) == (None, 0)


def test_a_gpu_that_falls_silent_meanwhile_is_not_waited_for_any_more() -> None:
    async def scene() -> tuple[str | None, float]:
        inventory = gpus(24)
        inventory.used["0"] = 10 * GIB
        asyncio.get_running_loop().call_later(1, inventory.silent.add, "0")
        return await came_back(inventory, TEN)

    words, waited_s = play(scene())

    assert words is None
    assert waited_s < BOUND_S


def test_the_wait_can_be_cancelled() -> None:
    async def scene() -> bool:
        inventory = gpus(24)
        inventory.used["0"] = 10 * GIB
        wait = asyncio.create_task(Returning(inventory).returned(TEN, nobody))
        await asyncio.sleep(1)
        wait.cancel()
        await asyncio.wait([wait])
        return wait.cancelled()

    assert play(scene())
