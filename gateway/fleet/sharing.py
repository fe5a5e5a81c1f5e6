"""What a model is told of the GPUs that it shares: pure functions of its place and of what was measured there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from gateway.devices import Device, Memory, Share
from gateway.engines.base import Engine
from gateway.fleet.placement import Place
from gateway.runtimes.base import Launch


def launch_at(
    place: Place,
    launch: Launch,
    engine: Engine,
    *,
    devices: Sequence[Device],
    others: Collection[Place],
    memory: Mapping[str, Memory],
) -> Launch:
    """Return `launch` on the GPUs of `place`, told how much of them it may take if it does not have them whole.

    `others` are the places of all other models, `memory` is what the inventory says right now, before the start.

    Raises:
        NoCapacity: other programs use what this model has reserved.
    """
    return replace(
        engine.placed(launch, shares(place, devices, others, memory)),
        gpus=place.gpus,
        gpu_memory_bytes=place.memory_bytes,
    )


def shares(
    place: Place, devices: Sequence[Device], others: Collection[Place], memory: Mapping[str, Memory]
) -> tuple[Share, ...]:
    """Return what a model has of each of its GPUs: nothing if it has them whole, or if their size is not known.

    What was measured of a GPU is truer than what is declared of it.
    """
    if place.memory_bytes is None:
        return ()
    declared = {name: device.memory_bytes for device in devices for name in device.names}
    found = []
    for gpu in place.gpus:
        measured = memory.get(gpu)
        total_bytes = measured.total_bytes if measured else declared.get(gpu)
        if total_bytes is None:  # then nobody else has any of it
            return ()
        free_bytes = measured.free_bytes if measured else None
        found.append(Share(gpu, place.memory_bytes, total_bytes, free_bytes, reserved_bytes(gpu, others, total_bytes)))
    return tuple(found)


def reserved_bytes(gpu: str, held: Iterable[Place], total_bytes: int) -> int:
    """Return how much of a GPU is reserved by those who hold some of it."""
    return sum(total_bytes if each.memory_bytes is None else each.memory_bytes for each in held if gpu in each.gpus)
