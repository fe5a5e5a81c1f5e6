"""In how long a model that waits for GPUs serves, from what is known of those who are before it: pure."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.devices import Device
from gateway.fleet.estimates import Estimate, in_turn
from gateway.fleet.placement import Demand, Place, place

Holder = tuple[Place, Estimate | None]
"""What somebody has of the GPUs, and in how long he has gone, were he asked to; None if that is not known."""


def room_in(demand: Demand, devices: Sequence[Device], holders: Sequence[Holder]) -> Estimate | None:
    """Return in how long enough of the holders can have gone, the quickest first; None if that is not known."""
    known = sorted(((leaves, held) for held, leaves in holders if leaves), key=lambda each: each[0].seconds)
    staying = [held for held, leaves in holders if leaves is None]
    for number, (leaves, _) in enumerate(known, start=1):
        if place(demand, devices, [*staying, *(held for _, held in known[number:])]) is not None:
            return leaves
    return None


def serves_in(room: Estimate | None, starts: Sequence[Estimate | None]) -> Estimate | None:
    """Return in how long a model serves that finds `room`, after those ahead of it: each start takes its time.

    Where some of the starts were never measured, it is at least so long, which nobody has seen (`samples` is 0).
    """
    if room is None:
        return None
    if (all_of_it := in_turn(room, *starts)) is not None:
        return all_of_it
    least = in_turn(room, *(start for start in starts if start))
    return least and Estimate(least.seconds, 0)
