"""In how long a model that waits for GPUs serves: tables."""

from __future__ import annotations

import pytest

from gateway.fleet.estimates import Estimate
from gateway.fleet.outlook import Holder, room_in, serves_in
from gateway.fleet.placement import GIB, Demand, Device, Place

TWO = [Device("0", 24 * GIB), Device("1", 24 * GIB)]


def leaves(gpu: str, seconds: float | None, memory_bytes: int | None = None) -> Holder:
    return Place((gpu,), memory_bytes), None if seconds is None else Estimate(seconds, 3)


@pytest.mark.parametrize(
    ("demand", "holders", "seconds"),
    [
        (Demand(1), [leaves("0", 9.0), leaves("1", 5.0)], 5.0),
        (Demand(("0",)), [leaves("0", 9.0), leaves("1", 5.0)], 9.0),
        (Demand(2), [leaves("0", 9.0), leaves("1", 5.0)], 9.0),
        (Demand(1), [leaves("0", 9.0), leaves("1", None)], 9.0),
        (Demand(2), [leaves("0", 9.0), leaves("1", None)], None),
        (Demand(1), [leaves("0", None), leaves("1", None)], None),
        (Demand(1, 20 * GIB), [leaves("0", 1.0, 12 * GIB), leaves("0", 8.0, 12 * GIB), leaves("1", 20.0)], 8.0),
        (Demand(1), [], None),
        (Demand(3), [leaves("0", 9.0)], None),
    ],
)
def test_there_is_room_when_enough_have_gone(demand: Demand, holders: list[Holder], seconds: float | None) -> None:
    found = room_in(demand, TWO, holders)

    assert found == (None if seconds is None else Estimate(seconds, 3))


ROOM, START = Estimate(5.0, 3), Estimate(40.0, 2)


@pytest.mark.parametrize(
    ("room", "starts", "told"),
    [
        (ROOM, [START], Estimate(45.0, 2)),
        (ROOM, [START, START], Estimate(85.0, 2)),
        (ROOM, [None, START], Estimate(45.0, 0)),
        (ROOM, [None], Estimate(5.0, 0)),
        (None, [START], None),
    ],
)
def test_it_serves_when_those_ahead_of_it_and_it_have_started(
    room: Estimate | None, starts: list[Estimate | None], told: Estimate | None
) -> None:
    assert serves_in(room, starts) == told
