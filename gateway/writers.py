"""Writing an answer to the caller: at once when it is whole, or event by event.

What the bytes mean is the dialect's business (`Reply`); when the status goes out, and that something goes out
while nothing comes, is decided here.
"""

from __future__ import annotations

import asyncio
from typing import Protocol, Self

from starlette.types import Send

from gateway.errors import GatewayError
from gateway.generation import Finished, GenerationResult, TokenEvent, collect

QUIET_S = 10.0
"""A stream's status is withheld this long at most; then a comment goes out whenever nothing came for this long."""
LAST_WORDS_S = 2.0
"""How long a caller may take to read why its stream failed, before the connection is cut."""

EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),  # nginx would keep tokens back otherwise
]
COMMENT = b": still working\n\n"


class Reply(Protocol):
    """How a dialect writes one answer. Pure; made for one request, and used for it alone."""

    stream: bool

    def whole(self, result: GenerationResult) -> bytes:
        """Return the body of an answer that is not streamed (JSON)."""

    def event(self, event: TokenEvent, *, last: bool) -> bytes:
        """Return what a stream says of one token; may be empty. `last`: it is known to be the last one."""

    def end(self, finished: Finished) -> bytes:
        """Return how a stream ends."""

    def failure(self, error: GatewayError) -> bytes:
        """Return what a stream says of a failure; nothing follows it."""


class Sink(Protocol):
    """Takes the events of one exchange."""

    streams: bool
    """Whether each goes on to the caller as it comes."""

    async def take(self, event: TokenEvent, *, last: bool = False) -> None:
        """Take the next token; when it is written, waits until the caller has room for it."""


class Writer(Sink, Protocol):
    """Takes the events of one exchange and answers the caller. A context: what it has running ends with it."""

    async def finish(self, finished: Finished) -> None:
        """Write the end of a good answer."""

    async def fail(self, error: GatewayError) -> None:
        """Tell the caller of a failure in the stream if one has begun, else raise `error`."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class Tokens:
    """Keeps the events of an exchange."""

    streams = False

    def __init__(self) -> None:
        self.events: list[TokenEvent] = []

    async def take(self, event: TokenEvent, *, last: bool = False) -> None:  # noqa: ARG002 - the end comes anyway
        self.events.append(event)


class WholeWriter(Tokens):
    """Keeps the answer until it is whole."""

    def __init__(self, reply: Reply, send: Send) -> None:
        super().__init__()
        self._reply = reply
        self._send = send

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    async def finish(self, finished: Finished) -> None:
        body = self._reply.whole(collect(self.events, finished))
        head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await self._send({"type": "http.response.start", "status": 200, "headers": head})
        await self._send({"type": "http.response.body", "body": body})

    async def fail(self, error: GatewayError) -> None:
        raise error


class StreamWriter:
    """Writes each event as it comes, and a comment when nothing has come for a while.

    The status is withheld until the first event, so that an early failure still has a status of its own; or
    until `QUIET_S`, because proxies give up on what is silent for long.
    """

    streams = True

    def __init__(self, reply: Reply, send: Send) -> None:
        self._reply = reply
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._began = False
        self._last_write_at = self._loop.time()
        self._timer = self._loop.call_later(QUIET_S, self._look)
        self._comment: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._comment:
            self._comment.cancel()

    async def take(self, event: TokenEvent, *, last: bool = False) -> None:
        if data := self._reply.event(event, last=last):
            await self._write(data)

    async def finish(self, finished: Finished) -> None:
        await self._write(self._reply.end(finished), more=False)

    async def fail(self, error: GatewayError) -> None:
        if not self._began:
            raise error
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                await self._write(self._reply.failure(error), more=False)
        except TimeoutError:  # it does not read: without its last message the server cuts the connection
            pass

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        if not self._began:
            self._began = True
            await self._send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
        self._last_write_at = self._loop.time()
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    def _look(self) -> None:
        quiet_s = self._loop.time() - self._last_write_at
        if quiet_s >= QUIET_S and (self._comment is None or self._comment.done()):
            self._comment = self._loop.create_task(self._write(COMMENT), name="heartbeat")
            quiet_s = 0.0
        self._timer = self._loop.call_later(max(QUIET_S - quiet_s, 0.1), self._look)
