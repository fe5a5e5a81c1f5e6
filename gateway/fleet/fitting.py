"""What can be told of a catalog before anything runs: which models can never have the GPUs that they ask for. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from gateway.catalog import ModelSpec
from gateway.devices import Device
from gateway.fleet.gpus import demand_of
from gateway.fleet.placement import Place, misfit, place


def misfits(specs: Iterable[ModelSpec], devices: Sequence[Device]) -> Iterator[tuple[str, str]]:
    """Yield (model, words) for each that can never run, were all GPUs free."""
    for spec in specs:
        if why := misfit(demand_of(spec), devices):
            yield spec.id, f"it can never run on the GPUs that are known: {why}"


def crowded_out(specs: Iterable[ModelSpec], devices: Sequence[Device]) -> Iterator[tuple[str, str]]:
    """Yield (model, words) for each pinned one that finds no room beside the others, which never make any.

    Those that are hardest to place come first, and with all their replicas, so that as many as can be are.
    """
    pinned = [spec for spec in specs if spec.pinned and demand_of(spec).count and not misfit(demand_of(spec), devices)]
    held: dict[str, list[Place]] = {}
    for spec in sorted(pinned, key=_hardest_first):
        held[spec.id] = []
        for _ in range(spec.replicas):
            found = place(demand_of(spec), devices, [each for places in held.values() for each in places])
            if found is None:
                yield spec.id, _without_room(spec, [model for model, places in held.items() if places])
                break
            held[spec.id].append(found)


def _hardest_first(spec: ModelSpec) -> tuple[bool, bool, int, int]:
    demand = demand_of(spec)
    whole = demand.memory_bytes is None
    return not isinstance(demand.gpus, tuple), not whole, -demand.count, -(demand.memory_bytes or 0)


def _without_room(spec: ModelSpec, placed: Sequence[str]) -> str:
    if placed == [spec.id]:
        return f"it is pinned, and there are not enough GPUs for its {spec.replicas} replicas at once"
    others = ", ".join(model for model in placed if model != spec.id)
    return f"it is pinned, and has no room beside what else is: {others}; whichever starts first keeps the GPUs"
