"""Which model gets which GPU, who waits and who makes room: the ledger with tenants that do what they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gateway.catalog import ModelSpec
from gateway.errors import NoCapacity, StartFailed
from gateway.fleet.estimates import Estimate
from gateway.fleet.gpus import Gpus, Occupancy
from gateway.fleet.placement import GIB, Device, Place
from gateway.fleet.scheduling import Phase, Usage
from tests.gpus import gpus as free_gpus
from tests.simulator.loop import SimulatedLoop

TWO = [Device("0", 24 * GIB), Device("1", 24 * GIB)]


class Obedient:
    """A model that takes what it gets, and goes when it is told to, after `leaves_s`."""

    def __init__(
        self, ledger: Gpus, name: str, gpus: int | list[str] = 1, *, leaves_s: float = 1.0, **keys: Any
    ) -> None:
        self.spec = ModelSpec.model_validate({"id": name, "hf_name": name, "gpus": gpus, **keys})
        self.key = name
        self.ledger = ledger
        self.leaves_s = leaves_s
        self.loop = asyncio.get_running_loop()
        self.asked_at = self.since = self.last_use_at = self.loop.time()
        self.phase = Phase.STARTING
        self.in_flight = 0
        self.usage = Usage()
        self.held_for: str | None = None
        self.told: list[str] = []

    async def up(self) -> Place:
        self.asked_at = self.loop.time()
        place = await self.ledger.take(self)
        self.phase, self.since, self.last_use_at = Phase.UP, self.loop.time(), self.loop.time()
        self.ledger.changed()
        return place

    def occupancy(self) -> Occupancy:
        return Occupancy(
            self.phase, self.in_flight, 0, self.since, self.last_use_at, self.asked_at, 1.0, self.usage, owes=False
        )

    def leaves_in(self) -> Estimate | None:
        return None

    def starts_in(self) -> Estimate | None:
        return None

    def waits(self) -> None:
        self.told.append("waits")

    def make_room(self, claimant: str) -> None:
        assert not self.in_flight
        self.told.append(f"makes room for {claimant}")
        self.phase = Phase.LEAVING
        self.loop.call_later(self.leaves_s, self.ledger.give_back, self.spec.id)

    def hold(self, claimant: str | None) -> None:
        self.held_for = claimant

    def end_request(self) -> None:
        self.in_flight = 0
        self.last_use_at = self.loop.time()
        self.ledger.changed()


def run(scene: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=lambda: SimulatedLoop(0)) as runner:
        runner.run(scene())  # type: ignore[arg-type]


def test_a_count_gets_free_ones_and_names_get_what_they_name() -> None:
    async def scene() -> None:
        gpus = Gpus([Device(str(number)) for number in range(4)])

        assert (await Obedient(gpus, "b", ["1"]).up()).gpus == ("1",)
        assert (await Obedient(gpus, "a", 2).up()).gpus == ("0", "2")
        assert (await Obedient(gpus, "none", 0).up()).gpus == ()
        assert gpus.of("a") == ("0", "2")
        assert list(gpus.holders("1")) == ["b"]

    run(scene)


def test_a_part_of_a_gpu_is_shared_up_to_what_it_has() -> None:
    async def scene() -> None:
        gpus = Gpus(TWO)
        small = [await Obedient(gpus, name, gpu_memory="12GiB").up() for name in ("a", "b")]

        assert [each.gpus for each in small] == [("0",), ("0",)], "best fit leaves the other one whole"
        assert (await Obedient(gpus, "large").up()).gpus == ("1",)

    run(scene)


def test_what_a_model_has_it_keeps_until_it_is_given_back() -> None:
    async def scene() -> None:
        gpus = Gpus([Device("0")])
        a = Obedient(gpus, "a")

        assert await a.up() == await a.up() == Place(("0",))
        gpus.give_back("a")
        assert (await Obedient(gpus, "b").up()).gpus == ("0",)

    run(scene)


def test_an_idle_model_makes_room_and_the_claim_gets_it_when_it_is_gone() -> None:
    async def scene() -> None:
        gpus = Gpus([Device("0", 24 * GIB)])
        a, b = Obedient(gpus, "a", leaves_s=7.0), Obedient(gpus, "b")
        await a.up()

        assert (await b.up()).gpus == ("0",)

        assert a.told == ["makes room for b"]
        assert b.told == ["waits"]
        assert not gpus.why("b")

    run(scene)


def test_a_busy_model_is_held_back_once_the_claim_has_waited_long_enough_and_goes_when_it_is_done() -> None:
    async def scene() -> None:
        loop = asyncio.get_running_loop()
        gpus = Gpus([Device("0", 24 * GIB)])
        a, b = Obedient(gpus, "a"), Obedient(gpus, "b")
        await a.up()
        a.in_flight = 1
        claim = loop.create_task(b.up())
        await asyncio.sleep(500)

        assert (a.held_for, a.told) == ("b", [])
        assert "a" in gpus.why("b")
        a.end_request()
        assert (await claim).gpus == ("0",)

    run(scene)


def test_a_hold_ends_with_the_claim_that_it_is_for() -> None:
    async def scene() -> None:
        gpus = Gpus([Device("0", 24 * GIB)])
        a, b = Obedient(gpus, "a"), Obedient(gpus, "b")
        await a.up()
        a.in_flight = 1
        claim = asyncio.create_task(b.up())
        await asyncio.sleep(500)
        claim.cancel()
        await asyncio.sleep(1)

        assert a.held_for is None
        assert not gpus.why("b")

    run(scene)


def test_a_claim_that_leaves_in_the_tick_in_which_it_is_met_gives_the_gpus_back() -> None:
    async def scene() -> None:
        gpus = Gpus([Device("0")])
        await Obedient(gpus, "a").up()
        claim = asyncio.create_task(Obedient(gpus, "b").up())
        await asyncio.sleep(0)
        gpus.give_back("a")
        await asyncio.sleep(0)
        claim.cancel()
        await asyncio.wait([claim])
        gpus.give_back("b")  # as the end of every life does

        assert (await Obedient(gpus, "c").up()).gpus == ("0",)

    run(scene)


def test_what_is_pinned_is_not_waited_for() -> None:
    async def scene() -> None:
        gpus = Gpus([Device("0", 24 * GIB)])
        await Obedient(gpus, "a", pinned=True).up()

        with pytest.raises(NoCapacity, match=r"(?s)a .*pinned|pinned.*a") as refusal:
            await Obedient(gpus, "b").up()

        assert refusal.value.retry_after_s

    run(scene)


def test_nobody_waits_for_the_gpu_of_a_stranger_that_does_not_go() -> None:
    async def scene() -> None:
        gpus = Gpus(TWO)
        gpus.hold("stranger", Place(("0",)))
        a, b, c = (Obedient(gpus, name) for name in "abc")
        await a.up()
        waiting = asyncio.get_running_loop().create_task(b.up())
        await asyncio.sleep(500)
        assert a.told == [], "the stranger is leaving"

        gpus.stays("stranger")
        assert (await waiting).gpus == ("1",)

        assert a.told == ["makes room for b"]
        gpus.give_back("stranger")
        assert (await c.up()).gpus == ("0",)

    run(scene)


def test_without_an_inventory_ids_are_counted_up() -> None:
    async def scene() -> None:
        gpus = Gpus(None)

        assert (await Obedient(gpus, "a", 2).up()).gpus == ("0", "1")
        assert (await Obedient(gpus, "b").up()).gpus == ("2",)
        assert (await Obedient(gpus, "c", ["7"]).up()).gpus == ("7",)

    run(scene)


def test_the_gpus_of_a_server_that_was_found_are_its_own_until_they_are_given_back() -> None:
    async def scene() -> None:
        gpus = Gpus([Device("0"), Device("1")])
        gpus.hold("stranger", Place(("0",)))

        assert not gpus.has_room(Place(("0",)))
        assert gpus.has_room(Place(("1",)))
        assert (await Obedient(gpus, "b").up()).gpus == ("1",)
        claim = asyncio.create_task(Obedient(gpus, "c", ["0"]).up())
        await asyncio.sleep(1)
        gpus.give_back("stranger")
        assert (await claim).gpus == ("0",)

    run(scene)


@pytest.mark.parametrize(
    ("gpus", "keys", "words"),
    [
        (["0", "7"], {}, "GPU 7 is not there: there are 0, 1"),
        (3, {}, "it needs 3 GPUs, and there are 0=24 GiB, 1=24 GiB"),
        (1, {"gpu_memory": "40GiB"}, "it needs 1 GPU with 40 GiB each, and there are 0=24 GiB, 1=24 GiB"),
    ],
)
def test_what_can_never_fit_is_told_at_once_with_the_numbers(gpus: Any, keys: dict[str, Any], words: str) -> None:
    async def scene() -> None:
        with pytest.raises(StartFailed, match=words):
            await Obedient(Gpus(TWO), "a", gpus, **keys).up()

    run(scene)


CARD = Device("0", 24 * GIB, "GPU-a")


@pytest.mark.parametrize("names", [("0", "GPU-a"), ("GPU-a", "0")])
def test_two_models_that_name_one_card_by_its_two_names_take_turns(names: tuple[str, str]) -> None:
    async def scene() -> None:
        gpus = Gpus([CARD])
        a, b = (Obedient(gpus, model, [name]) for model, name in zip("ab", names, strict=True))

        assert await a.up() == Place(("0",))
        assert await b.up() == Place(("0",))

        assert a.told == ["makes room for b"]

    run(scene)


@pytest.mark.parametrize("name", ["0", "GPU-a"])
def test_a_server_that_was_found_with_a_card_by_either_name_holds_that_card(name: str) -> None:
    async def scene() -> None:
        gpus = Gpus([CARD])
        found = Place((name,), 20 * GIB)
        assert gpus.has_room(found)
        gpus.hold("stranger", found)

        assert gpus.of("stranger") == ("0",)
        assert list(gpus.holders("0")) == ["stranger"]
        assert list(gpus.in_sight()) == [CARD]
        assert not gpus.has_room(Place(("0",), 5 * GIB))
        assert not gpus.has_room(Place(("GPU-a",), 5 * GIB))
        claim = asyncio.create_task(Obedient(gpus, "c").up())
        await asyncio.sleep(1)
        assert not claim.done()
        gpus.give_back("stranger")
        assert (await claim).gpus == ("0",)

    run(scene)


@pytest.mark.parametrize(
    ("before", "anew", "told"), [(10 * GIB, 4 * GIB, 14 * GIB), (None, 4 * GIB, None), (4 * GIB, None, None)]
)
def test_what_a_model_held_and_is_not_back_yet_is_told_beside_what_it_holds_anew(
    before: int | None, anew: int | None, told: int | None
) -> None:
    async def scene() -> None:
        inventory = free_gpus(24)
        inventory.used["0"] = 10 * GIB
        gpus = Gpus([CARD], inventory)
        gpus.hold("a", Place(("0",), before))
        gpus.give_back("a")
        gpus.hold("a", Place(("0",), anew))

        assert gpus.holders("0") == {"a": Place(("0",), told)}
        inventory.used.clear()
        await asyncio.sleep(1)
        assert gpus.holders("0") == {"a": Place(("0",), anew)}
        await gpus.aclose()

    run(scene)


def test_a_model_may_name_a_gpu_that_the_inventory_lacks() -> None:
    async def scene() -> None:
        assert (await Obedient(Gpus([Device("0")]), "a", ["GPU-3f2a"]).up()).gpus == ("GPU-3f2a",)

    run(scene)
