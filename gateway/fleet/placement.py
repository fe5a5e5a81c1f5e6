"""Which GPUs a model gets: pure functions of what there is and of what is held. Nothing here waits or remembers.

A model has its GPUs whole, or takes `memory_bytes` of each and shares them. One whose memory is not known is only had
whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import count, islice

from gateway.devices import Device as Device  # it is a word of placement too

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Demand:
    """What a model asks for: a number of GPUs or their ids, and memory on each of them (None: all of it)."""

    gpus: int | tuple[str, ...]
    memory_bytes: int | None = None

    @property
    def count(self) -> int:
        return self.gpus if isinstance(self.gpus, int) else len(self.gpus)


@dataclass(frozen=True, slots=True)
class Place:
    """The GPUs that a model holds, by id, and how much of each (None: all of it)."""

    gpus: tuple[str, ...]
    memory_bytes: int | None = None


NOWHERE = Place(())
"""The place of a model that asks for no GPU."""


def place(demand: Demand, devices: Sequence[Device], held: Collection[Place]) -> Place | None:
    """Return where `demand` goes, or None while there is no room.

    Best fit: the GPUs that are left with the least, so that large models find whole ones; among equals the first.
    """
    if not demand.count:
        return NOWHERE
    wanted = list(dict.fromkeys(named(demand.gpus, devices))) if isinstance(demand.gpus, tuple) else devices
    left = [(room, device.id) for device in wanted if (room := _left(demand, device, held)) is not None]
    if isinstance(demand.gpus, int):
        left = sorted(left, key=lambda found: found[0])[: demand.count]
    if len(left) < demand.count:
        return None
    return Place(tuple(gpu for _, gpu in left), demand.memory_bytes)


def meets(found: Place, demand: Demand, devices: Sequence[Device]) -> bool:
    """Say whether a place is what `demand` asks for: so many GPUs, or those that it names, and as much of each."""
    if not demand.count:
        return not found.gpus
    if isinstance(demand.gpus, tuple):
        same = found.gpus == tuple(device.id for device in named(demand.gpus, devices))
    else:
        same = len(found.gpus) == demand.gpus
    return same and found.memory_bytes == demand.memory_bytes


def misfit(demand: Demand, devices: Sequence[Device]) -> str | None:
    """Return why `demand` can never be met, were the GPUs all free, with the numbers; None if it can."""
    if isinstance(demand.gpus, tuple):
        known = {name for device in devices for name in device.names}
        if missing := [gpu for gpu in demand.gpus if gpu.isdigit() and gpu not in known]:
            return (
                f"GPU {', '.join(missing)} is not there: there are {', '.join(each.id for each in devices) or 'none'}"
            )
        if twice := _twice(demand.gpus, devices):
            return f"it names one GPU more than once: {twice}"
    if place(demand, devices, ()) is not None:
        return None
    of_memory = f" with {gibibytes(demand.memory_bytes)} each" if demand.memory_bytes else ""
    which = f"GPU {', '.join(demand.gpus)}" if isinstance(demand.gpus, tuple) else _counted(demand.count)
    return f"it needs {which}{of_memory}, and there are {described(devices)}"


def free_bytes(device: Device, held: Iterable[Place]) -> int | None:
    """Return how much of a GPU nobody holds; None if its memory is not known and nobody holds any of it."""
    shares = [each.memory_bytes for each in held if device.id in each.gpus]
    if device.memory_bytes is None:
        return 0 if shares else None
    return 0 if None in shares else max(device.memory_bytes - sum(share or 0 for share in shares), 0)


def unlimited(held: Iterable[Place], demands: Sequence[Demand]) -> list[Device]:
    """Return GPUs for a machine of which nothing is known: those that are held or named, and as many as are counted.

    The runtime says which of them do not exist.
    """
    named = {gpu for each in demands if isinstance(each.gpus, tuple) for gpu in each.gpus}
    taken = {gpu for each in held for gpu in each.gpus} | named
    fresh = (str(number) for number in count() if str(number) not in taken)
    more = sum(each.count for each in demands if isinstance(each.gpus, int))
    return [Device(gpu) for gpu in sorted(taken) + list(islice(fresh, more))]


def described(devices: Sequence[Device]) -> str:
    """Return GPUs in words: `0=24 GiB, 1`."""
    each = (f"{device.id}={gibibytes(device.memory_bytes)}" if device.memory_bytes else device.id for device in devices)
    return ", ".join(each) or "none"


def gibibytes(amount: int | None) -> str:
    return f"{(amount or 0) / GIB:.3g} GiB"


def _counted(number: int) -> str:
    return "1 GPU" if number == 1 else f"{number} GPUs"


def named(names: tuple[str, ...], devices: Sequence[Device]) -> list[Device]:
    """Return the GPUs that are meant, by number or UUID. One by a name that nobody knows is a GPU of its own."""
    known = {name: device for device in devices for name in device.names}
    return [known.get(name) or Device(name) for name in names]


def _twice(names: tuple[str, ...], devices: Sequence[Device]) -> str:
    """Return the names in words that mean a GPU which another one of them means too."""
    meant = [device.id for device in named(names, devices)]
    return ", ".join(name for name, gpu in zip(names, meant, strict=True) if meant.count(gpu) > 1)


def _left(demand: Demand, device: Device, held: Iterable[Place]) -> int | None:
    """Return what a GPU is left with once `demand` is met on it, or None if it cannot be."""
    free = free_bytes(device, held)
    if demand.memory_bytes is None or device.memory_bytes is None:
        return (device.memory_bytes or 0) if free == device.memory_bytes else None
    return None if free is None or free < demand.memory_bytes else free - demand.memory_bytes
