"""When the memory of a server that is gone counts as returned: when it is seen to be free, or a bound has passed.

A driver gives memory back some time after the process has ended (seconds, for a large one), and a model that starts
before has less than it reserved. What other programs use never comes back, so it is noted before each start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping

from gateway.devices import Memory
from gateway.fleet.placement import Place, gibibytes
from gateway.fleet.sharing import reserved_bytes
from gateway.runtimes.inventory import Inventory

BOUND_S = 10.0
POLL_S = 0.25
SLACK_BYTES = 512 * 2**20
"""What may be missing: contexts of the driver, and other programs that grew a little."""


class Returning:
    """Sees memory go and come back. One for all models, on one event loop."""

    def __init__(self, inventory: Inventory, *, bound_s: float = BOUND_S, poll_s: float = POLL_S) -> None:
        self._inventory = inventory
        self._bound_s = bound_s
        self._poll_s = poll_s
        self._foreign_bytes: dict[str, int] = {}

    async def before_start(self, place: Place, others: Collection[Place]) -> Mapping[str, Memory]:
        """Return what the GPUs of `place` really have and have free, and note what strangers use of them.

        `others` are the places of all other models. Waits for the inventory's answer, seconds at most.
        """
        memory = await self._inventory.memory(place.gpus)
        for gpu, each in memory.items():
            self._foreign_bytes[gpu] = foreign_bytes(each, reserved_bytes(gpu, others, each.total_bytes))
        return memory

    async def returned(self, place: Place, others: Callable[[], Collection[Place]]) -> str | None:
        """Wait until the memory of `place`, whose server is gone, is seen to be free, or `bound_s` have passed.

        `others` gives the places of all other models, which may change meanwhile. Where nothing can be measured it
        returns at once. It may be cancelled.

        Returns: None; or, when the bound has passed, in words what is still missing.
        """
        missing: str | None = None
        try:
            async with asyncio.timeout(self._bound_s):
                while True:
                    missing = await self._missing(place, others)
                    if missing is None:
                        return None
                    await asyncio.sleep(self._poll_s)
        except TimeoutError:
            return missing

    async def _missing(self, place: Place, others: Callable[[], Collection[Place]]) -> str | None:
        memory = await self._inventory.memory(place.gpus)
        words = []
        for gpu, each in memory.items():
            reserved = reserved_bytes(gpu, others(), each.total_bytes)
            expected = expected_bytes(each, reserved, self._foreign_bytes.get(gpu, 0))
            if each.free_bytes < expected:
                words.append(f"GPU {gpu} has {gibibytes(each.free_bytes)} free and should have {gibibytes(expected)}")
        return "; ".join(words) or None


def foreign_bytes(memory: Memory, reserved: int) -> int:
    """Return what strangers use at least: all that is in use and cannot be the models', who have `reserved` it."""
    return max(memory.total_bytes - memory.free_bytes - reserved, 0)


def expected_bytes(memory: Memory, reserved: int, foreign: int) -> int:
    """Return how much is free once all is back but what others have `reserved`, who may use it to the last byte."""
    return max(memory.total_bytes - reserved - foreign - SLACK_BYTES, 0)
