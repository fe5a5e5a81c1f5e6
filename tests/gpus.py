"""A machine's GPUs for tests: an inventory whose memory the test takes and gives back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from gateway.devices import Device, Memory

GIB = 2**30


class WrittenInventory:
    """Knows what it was told. `used` is in bytes by id; a GPU in `silent` exists, and nothing is told of it."""

    def __init__(
        self, devices: Sequence[Device] | None = None, *, silence: str | None = None, source: str = "NVML"
    ) -> None:
        self.source = source
        self._devices = devices
        self.silence = silence
        self.used: dict[str, int] = {}
        self.silent: set[str] = set()
        self.asked = 0
        self.closed = False

    def devices(self) -> Sequence[Device] | None:
        return self._devices

    async def memory(self, gpus: Collection[str]) -> Mapping[str, Memory]:
        self.asked += 1
        return {
            device.id: Memory(device.memory_bytes, device.memory_bytes - self.used.get(device.id, 0))
            for device in self._devices or ()
            if device.id in gpus and device.id not in self.silent and device.memory_bytes is not None
        }

    async def aclose(self) -> None:
        self.closed = True


def gpus(*gib: float) -> WrittenInventory:
    """Return an inventory of GPUs `0`, `1`, ... with so much memory each."""
    return WrittenInventory([Device(str(number), int(each * GIB)) for number, each in enumerate(gib)])
