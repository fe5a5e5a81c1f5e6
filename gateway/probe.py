"""Health checks over the relay's client: they reach a server the way its requests do, and trust whom these trust."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from gateway.engines.base import Call
from gateway.fleet.health import MOST_BYTES, Answer
from gateway.relay import Broken, Client, ConnectFailed, start_of

CHECK = Call("", method="GET", fresh=True)
"""Each has a connection of its own: one that was kept may be closed by then, and would look like a missed check."""


class HttpProbe:
    """Asks servers over HTTP how they are."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def ask(self, url: str, timeout_s: float, headers: Mapping[str, str]) -> Answer | None:
        """Return status and body (no more of it than can matter), or None if nothing answered within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s), self._client.send(url, CHECK, headers) as answer:
                return answer.status, await start_of(answer, MOST_BYTES)
        except (ConnectFailed, Broken, TimeoutError, ValueError):  # what cannot be sent is not answered either
            return None
