"""Asking a model's server how it is: until it is ready, and for as long as it serves.

A missed check is counted, not believed: only several in a row make a server unhealthy, and only its
runtime can say that it ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from gateway.engines.base import Engine
from gateway.runtimes.base import Handle

CHECK_TIMEOUT_S = 5.0
SHORTEST_REST_S, LONGEST_REST_S, REST_SHARE = 0.02, 1.0, 0.02
"""While a server loads it is asked again after 2 % of the time it took so far: soon if it is quick, seldom if slow."""
RECOVERY_REST_S = 1.0

Answer = tuple[int, bytes]
MOST_BYTES = 64 * 1024
"""Of a health check's answer: a server that lists its models may go on for long."""
Rest = Callable[[Handle, float], Awaitable[None]]


class Probe(Protocol):
    """How a health check reaches a server."""

    async def ask(self, url: str, timeout_s: float, headers: Mapping[str, str]) -> Answer | None:
        """Return status and body, or None if nothing answered within `timeout_s`."""


async def rest(_: Handle, seconds: float) -> None:
    """Wait between two checks. The simulator has a twin that jumps over checks which could not tell anything new."""
    await asyncio.sleep(seconds)


class Health:
    """The health checks of one model's server."""

    def __init__(
        self,
        engine: Engine,
        probe: Probe,
        *,
        interval_s: float,
        failures: int,
        headers: Mapping[str, str] | None = None,
        rest: Rest = rest,
    ) -> None:
        """Take what it needs. `headers` go with each check: the key of a server that asks for one."""
        self._engine = engine
        self._probe = probe
        self._interval_s = interval_s
        self._failures = failures
        self._headers = headers or {}
        self._rest = rest

    def change(self, other: Health) -> None:
        """Go on as `other` would, also with a server that is being watched."""
        self._interval_s, self._failures, self._headers = other._interval_s, other._failures, other._headers

    async def until_ready(self, handle: Handle) -> None:
        """Return when the server first says that it takes requests. Bounded by the caller.

        Raises:
            StartFailed: it says that it never will.
        """
        began = asyncio.get_running_loop().time()
        while not await self._is_ready(handle):
            loaded_s = asyncio.get_running_loop().time() - began
            await self._rest(handle, min(max(loaded_s * REST_SHARE, SHORTEST_REST_S), LONGEST_REST_S))

    async def until_lost(self, handle: Handle) -> None:
        """Return when the server has missed `failures` checks in a row. Waits as long as it does not."""
        missed = 0
        while missed < self._failures:
            await self._rest(handle, self._interval_s)
            missed = 0 if await self._is_alive(handle) else missed + 1

    async def until_back(self, handle: Handle) -> None:
        """Return when a check passes again. Bounded by the caller, who then gives the server up: it is asked often."""
        while not await self._is_alive(handle):
            await self._rest(handle, min(self._interval_s, RECOVERY_REST_S))

    async def _is_ready(self, handle: Handle) -> bool:
        answer = await self._ask(handle)
        return answer is not None and self._engine.is_ready(*answer)

    async def _is_alive(self, handle: Handle) -> bool:
        answer = await self._ask(handle)
        return answer is not None and self._engine.is_alive(*answer)

    async def _ask(self, handle: Handle) -> Answer | None:
        return await self._probe.ask(handle.base_url + self._engine.health_path, CHECK_TIMEOUT_S, self._headers)
