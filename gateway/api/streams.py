"""Endless answers: lines or events for as long as the caller reads them and the gateway serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.departure import Departed, Interrupt, until_disconnect

HEARTBEAT_S = 10.0
LAST_WORDS_S = 2.0
"""How long a stream may go on once the gateway shuts down."""


EVENTS: dict[str, Any] = {
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "properties": {
                "data": {"type": "string", "contentMediaType": "application/json"},
                "event": {"type": "string"},
                "id": {"type": "string"},
            },
            "required": ["data"],
        }
    }
}
"""How server-sent events stand in the OpenAPI document: as OpenAPI 3.2 has them, each by itself."""


class EventStream(Response):
    """The response class of routes that answer nothing else: FastAPI documents no content of its own for it."""


class Ended(Exception):
    """The gateway ends its streams: it shuts down."""


class LineStream(Response):
    """Sends what `source` yields until it is exhausted, the caller leaves, or shortly after `until` is done.

    `heartbeat` is sent whenever nothing came for ten seconds, so that nobody on the way gives the connection up.
    """

    def __init__(
        self,
        source: AsyncIterator[bytes],
        media_type: str,
        *,
        until: asyncio.Future[None],
        heartbeat: bytes | None = None,
    ) -> None:
        headers = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}
        super().__init__(headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._source = source
        self._until = until
        self._heartbeat = heartbeat

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            with until_disconnect(receive) as interrupt, self._ending(interrupt):
                await self._pump(send)
        except Departed:
            return
        except Ended:
            pass
        await send({"type": "http.response.body", "body": b""})

    @contextmanager
    def _ending(self, interrupt: Interrupt) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        timers: list[asyncio.TimerHandle] = []

        def soon(_: object) -> None:
            timers.append(loop.call_later(LAST_WORDS_S, interrupt.fire, Ended()))

        self._until.add_done_callback(soon)
        try:
            yield
        finally:
            self._until.remove_done_callback(soon)
            for timer in timers:
                timer.cancel()

    async def _pump(self, send: Send) -> None:
        upcoming: asyncio.Task[bytes] | None = None
        try:
            while True:
                upcoming = upcoming or asyncio.ensure_future(anext(self._source))
                await asyncio.wait([upcoming], timeout=HEARTBEAT_S if self._heartbeat else None)
                if upcoming.done():
                    data, upcoming = upcoming.result(), None
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                elif self._heartbeat:
                    await send({"type": "http.response.body", "body": self._heartbeat, "more_body": True})
        except StopAsyncIteration:
            return
        finally:
            if upcoming is not None:
                upcoming.cancel()
                await asyncio.wait([upcoming])
            await self._source.aclose()  # type: ignore[attr-defined]
