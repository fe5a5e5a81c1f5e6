"""Bugs planted on purpose: what the simulator must find, or it watches nothing. One for each promise it proves."""

from __future__ import annotations

import asyncio

from gateway.fleet.instance import Instance
from gateway.fleet.life import Lease, Life
from gateway.fleet.queue import Ticket
from gateway.runtimes.base import Handle


class StopsBusyServers(Instance):
    """Breaks P1: does not drain."""

    def _lead_down(self, reason: str, *, force: bool = False) -> None:
        super()._lead_down(reason, force=True)


class StartsTwice(Instance):
    """Breaks P2: starts anew while the old life is still being cleared."""

    def _end(self, life: Life, reason: str) -> None:
        super()._end(life, reason)
        if self._queue or reason == "restart":
            self._serve_again = self._loop.create_task(
                self._runtime.start(self.engine.launch(self.spec, self.name, ""), life)
            )


class LosesLeases(Instance):
    """Breaks P4: a lease that is granted in the very tick in which its caller leaves is never given back."""

    def _withdraw(self, ticket: Ticket) -> None:
        self._queue.leave(ticket)
        self._last_use = self._loop.time()
        self._rearm()


class WaitsForEver(Instance):
    """Breaks P5: forgets the limit of a drain."""

    def _due(self) -> tuple[float, str] | None:
        due = super()._due()
        return None if due and due[1] == "drain_timeout" else due


class QueuesForEver(Instance):
    """Breaks P7: forgets to bound the wait of those who come while the model runs."""

    def _bound(self, ticket: Ticket) -> None:
        if self._state not in ("ready", "unhealthy"):
            super()._bound(ticket)


class ForgetsPromises(Instance):
    """Breaks P8: calls a start off although somebody was told to come back."""

    def _call_off_at(self) -> float | None:
        self._promised_until = 0.0
        return super()._call_off_at()


class HoldsOn(Instance):
    """Breaks P10: keeps the lease for a second after the caller has gone."""

    def _give_back(self, lease: Lease) -> None:
        self._loop.call_later(1.0, super()._give_back, lease)


class BelievesTheFirstMiss(Instance):
    """Breaks P11: takes a server for dead that missed its checks."""

    async def _watch(self, handle: Handle) -> None:
        await self._health.until_lost(handle)
        await asyncio.sleep(0)
        raise RuntimeError("it did not answer")


INSTANCES: dict[str, type[Instance]] = {
    "P1": StopsBusyServers,
    "P2": StartsTwice,
    "P4": LosesLeases,
    "P5": WaitsForEver,
    "P7": QueuesForEver,
    "P8": ForgetsPromises,
    "P10": HoldsOn,
    "P11": BelievesTheFirstMiss,
}
