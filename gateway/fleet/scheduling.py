"""Who gets the GPUs next, who makes room, who waits: a pure function of a snapshot, so that the simulator can try it.

A claim is a model that is to be started and has no GPUs yet; a resident is one that holds some. Only residents without
a request in flight are evicted, and pinned ones never. A claim that has waited too long has a resident held back: that
one takes no new requests, finishes those that it has, and makes room then.

All times are seconds; `now` and every `*_at` are readings of one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum, auto

from gateway.fleet.placement import Demand, Device, Place, place


class Phase(StrEnum):
    STARTING = auto()  # it loads
    UP = auto()  # it takes requests
    LEAVING = auto()  # its memory comes back by itself


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that holds GPUs."""

    model: str
    place: Place
    phase: Phase
    in_flight: int
    queued: int
    pinned: bool
    since: float
    """When it took its place; once it is UP, when it became ready."""
    last_use_at: float
    cost_s: float
    """What it takes to start it again, measured or estimated."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A model that waits for GPUs. `patience_s` is how long it waits before it has others held back."""

    model: str
    demand: Demand
    asked_at: float
    waiting: int
    cost_s: float
    patience_s: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    now: float
    devices: Sequence[Device]
    residents: Sequence[Resident]
    claims: Sequence[Claim]


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done now. Whoever is in none of it waits."""

    placed: Mapping[str, Place] = field(default_factory=dict)
    """Claims that get their GPUs."""
    evicted: Mapping[str, str] = field(default_factory=dict)
    """Residents that go now, and for which claim."""
    held: Mapping[str, str] = field(default_factory=dict)
    """Residents that take no new requests until they have gone, and for which claim. All others take them."""
    waits: Mapping[str, str] = field(default_factory=dict)
    """Why each claim that is not placed waits, in words."""
    hopeless: Mapping[str, str] = field(default_factory=dict)
    """Claims that are to be refused, because those who hold what they need never go; and why."""
    look_again_at: float | None = None
    """When this may change though nothing happens."""


def decide(snapshot: Snapshot) -> Decision:
    """Return what to do: place what fits, oldest claim first, and make room for what does not."""
    held = {each.model: each.place for each in snapshot.residents}
    placed: dict[str, Place] = {}
    evicted: dict[str, str] = {}
    waits: dict[str, str] = {}
    for claim in sorted(snapshot.claims, key=lambda each: each.asked_at):
        if (found := place(claim.demand, snapshot.devices, [*held.values(), *placed.values()])) is not None:
            placed[claim.model] = found
            continue
        waits[claim.model] = "waits for GPUs"
        for victim in sorted(snapshot.residents, key=lambda each: each.last_use_at):
            idle = victim.phase is Phase.UP and not (victim.in_flight or victim.queued or victim.pinned)
            if idle and victim.model not in evicted:
                evicted[victim.model] = claim.model
                break
    return Decision(placed, evicted, waits=waits)
