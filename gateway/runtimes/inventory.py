"""Which GPUs there are, and what is free of them: the seam, and what answers where nothing can be measured.

Not knowing is an answer here, never an error and never a long wait: a machine may have no GPU, no driver, or a driver
that hangs, and the models that need none go on all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from gateway.devices import Device, Memory


class Inventory(Protocol):
    """Something that knows of GPUs."""

    @property
    def source(self) -> str:
        """Where its knowledge comes from, in a word or two."""

    @property
    def silence(self) -> str | None:
        """Why nothing can be measured, in words; None if something can, or if nobody tried yet."""

    def devices(self) -> Sequence[Device] | None:
        """Return the GPUs that may be given to models; None if nothing is known of any.

        Always the same answer. The first time it may block for seconds, so it is asked before the loop serves anybody.
        """

    async def memory(self, gpus: Collection[str]) -> Mapping[str, Memory]:
        """Return what these GPUs have and what is free of it right now, by the id that was asked for.

        One that is missing in the answer cannot be told. Waits for a few seconds at most.
        """

    async def aclose(self) -> None:
        """Let go of what was opened; nothing is known afterwards."""


class DeviceFiles:
    """The GPUs that have a device file here, by number. A gateway in a container sees none of them."""

    source = "device files"
    silence = "a device file does not tell how much memory a GPU has"

    def __init__(self, folder: Path = Path("/dev"), names: Mapping[str, str] | None = None) -> None:
        """`names` says what kind a GPU is, by number, where that is known."""
        endings = (path.name.removeprefix("nvidia") for path in folder.glob("nvidia[0-9]*"))
        numbers = sorted(int(ending) for ending in endings if ending.isdecimal())
        self._devices = [Device(str(number), name=(names or {}).get(str(number), "")) for number in numbers] or None

    def devices(self) -> Sequence[Device] | None:
        return self._devices

    async def memory(self, gpus: Collection[str]) -> Mapping[str, Memory]:  # noqa: ARG002 - a file does not tell
        return {}

    async def aclose(self) -> None:
        pass


class JoinedInventory:
    """One inventory of several: what is declared is what there is; else what is measured; else what has a file.

    Whichever it is, what is free is measured, for those GPUs that can be.
    """

    def __init__(self, declared: Mapping[str, int] | None, measured: Inventory, files: Inventory) -> None:
        """`declared` is memory in bytes by id: it wins, for an operator may want to give less than there is."""
        self._declared = declared or {}
        self._measured = measured
        self._files = files

    @property
    def source(self) -> str:
        if self._declared:
            return "GATEWAY_GPUS"
        if self._measured.devices() is not None:
            return self._measured.source
        return self._files.source if self._files.devices() is not None else "nothing"

    @property
    def silence(self) -> str | None:
        return self._measured.silence

    def devices(self) -> Sequence[Device] | None:
        measured = self._measured.devices()
        if not self._declared:
            return self._files.devices() if measured is None else measured
        return declared_devices(self._declared, measured or ())

    async def memory(self, gpus: Collection[str]) -> Mapping[str, Memory]:
        return await self._measured.memory(gpus)

    async def aclose(self) -> None:
        await self._measured.aclose()
        await self._files.aclose()


def declared_devices(declared: Mapping[str, int], measured: Sequence[Device]) -> list[Device]:
    """Return the GPUs that are declared, with what else is known of them.

    One that is declared by both its names counts once, as it was declared first.
    """
    known = {name: device for device in measured for name in device.names}
    there = {gpu: known.get(gpu, Device(gpu)) for gpu in declared}
    first = {device.id: gpu for gpu, device in reversed(there.items())}
    return [_called(there[gpu], gpu, declared[gpu]) for gpu in there if first[there[gpu].id] == gpu]


def _called(device: Device, name: str, memory_bytes: int) -> Device:
    """Return a GPU by this one of its names, of this size."""
    other = next((each for each in device.names if each != name), "")
    return replace(device, id=name, uuid=other, memory_bytes=memory_bytes)
