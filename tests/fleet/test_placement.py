"""Where a demand goes, and what is said of one that can never be met; one card has two names."""

from __future__ import annotations

import pytest

from gateway.fleet.placement import GIB, NOWHERE, Demand, Device, Place, meets, misfit, place

CARDS = [Device("0", 24 * GIB, "GPU-a"), Device("1", 24 * GIB, "GPU-b")]


@pytest.mark.parametrize("name", ["1", "GPU-b"])
def test_a_card_is_the_same_by_its_number_and_by_its_uuid(name: str) -> None:
    assert place(Demand((name,)), CARDS, ()) == Place(("1",))
    assert place(Demand((name,)), CARDS, [Place(("1",))]) is None
    assert place(Demand((name,), 10 * GIB), CARDS, [Place(("1",), 14 * GIB)]) == Place(("1",), 10 * GIB)
    assert place(Demand((name,), 11 * GIB), CARDS, [Place(("1",), 14 * GIB)]) is None


def test_a_card_that_is_declared_by_its_uuid_is_meant_by_its_number_too() -> None:
    declared = [Device("GPU-b", 20 * GIB, "1")]

    assert place(Demand(("1",)), declared, ()) == Place(("GPU-b",))
    assert misfit(Demand(("1",)), declared) is None


@pytest.mark.parametrize("memory_bytes", [None, GIB])
def test_a_card_cannot_be_had_twice_by_both_its_names(memory_bytes: int | None) -> None:
    twice = Demand(("0", "GPU-a"), memory_bytes)

    assert place(twice, CARDS, ()) is None
    assert misfit(twice, CARDS) == "it names one GPU more than once: 0, GPU-a"


def test_a_name_that_nobody_knows_is_a_card_of_its_own() -> None:
    assert place(Demand(("GPU-z",)), CARDS, [Place(("0",)), Place(("1",))]) == Place(("GPU-z",))


@pytest.mark.parametrize(
    ("found", "demand", "met"),
    [
        (Place(("0",)), Demand(1), True),
        (Place(("1",)), Demand(("1",)), True),
        (Place(("1",)), Demand(("GPU-b",)), True),
        (Place(("1",)), Demand(("0",)), False),
        (Place(("0", "1")), Demand(("1", "0")), False),
        (Place(("0",)), Demand(2), False),
        (Place(("0",)), Demand(1, GIB), False),
        (Place(("0",), GIB), Demand(1, GIB), True),
        (Place(("0",), GIB), Demand(1), False),
        (Place(("0",), GIB), Demand(0), False),
        (NOWHERE, Demand(0), True),
        (NOWHERE, Demand(0, GIB), True),
        (NOWHERE, Demand(1), False),
    ],
)
def test_whether_a_place_is_what_is_asked_for(found: Place, demand: Demand, met: bool) -> None:
    assert meets(found, demand, CARDS) is met
