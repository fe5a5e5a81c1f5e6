"""The witness of the GPUs (P3): servers never take more than there is, and who makes room has cause to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gateway.catalog import ModelSpec
from gateway.fleet.fleet import Fleet
from gateway.fleet.placement import Device, Place
from tests.simulator.servers import BadMannersRuntime

MAKES_ROOM = "makes room for "


def taken(devices: Sequence[Device], runtime: BadMannersRuntime) -> dict[str, int]:
    """Return how many bytes of each GPU the servers have that are alive, whatever the gateway thinks of them."""
    whole = {device.id: device.memory_bytes or 1 for device in devices}
    number = {name: device.id for device in devices for name in (device.id, device.uuid)}
    sums = dict.fromkeys(whole, 0)
    for server in (servers[-1] for servers in runtime.servers.values() if servers[-1].alive):
        for gpu in (number[name] for name in server.gpus):
            sums[gpu] += server.gpu_memory_bytes or whole[gpu]
    return sums


def check(devices: Sequence[Device], runtime: BadMannersRuntime, fleet: Fleet, breaks: Callable[[str], None]) -> None:
    """See that no GPU is promised or used beyond what it has."""
    for name, more in runtime.grabbed.items():
        if more and runtime.alive(name):
            breaks(f"P3: {name} has {dict(more)} bytes more than its share: they came free while it started")
    used = taken(devices, runtime)
    for device in devices:
        has = device.memory_bytes or 1
        if used[device.id] > has:
            breaks(f"P3: the servers on GPU {device.id} have {used[device.id]} of {has} bytes")
        promised = sum(held.memory_bytes or has for held in fleet.gpus.holders(device.id).values())
        if promised > has:
            breaks(f"P3: {promised} of {has} bytes of GPU {device.id} are promised")


def is_asked_for(found: Place, spec: ModelSpec) -> bool:
    """Say whether a place is of the size that a model asks for, and not what a former server of it has."""
    count = spec.gpus if isinstance(spec.gpus, int) else len(spec.gpus)
    return (len(found.gpus), found.memory_bytes) == (count, spec.gpu_memory_bytes)


def cause_of_room(claimant: str, spec: ModelSpec, fleet: Fleet) -> str | None:
    """Return what is wrong with a model that goes to make room, or None."""
    if spec.pinned:
        return f"{spec.id} is pinned, and makes room"
    if not fleet.gpus.why(claimant):
        return f"{spec.id} makes room for {claimant}, which does not wait for any"
    return None
