"""Writing an answer to the caller: at once when it is whole, or event by event.

What the bytes mean is the dialect's business (`Reply`); when the status goes out, and that something goes out
while nothing comes, is decided here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol, Self

from starlette.types import Send

from gateway.errors import GatewayError
from gateway.generation import Finished, GenerationResult, TokenEvent, collect

QUIET_S = 10.0
"""A stream's status is withheld this long at most; then a comment goes out whenever nothing came for this long."""
LAST_WORDS_S = 2.0
"""How long a caller may take to read why its stream failed, before the connection is cut."""

Head = Sequence[tuple[bytes, bytes]]
"""An answer's headers, as ASGI has them."""
EVENT_STREAM: Head = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),  # nginx would keep tokens back otherwise
]
JSON: Head = [(b"content-type", b"application/json")]
COMMENT = b": still working\n\n"
BETWEEN_EVENTS = (b"\n\n", b"\n\r\n")
"""How what was written ends where an event ends, with either kind of line ends."""


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


class Choices(Protocol):
    """How a dialect writes an answer that is made of several generations. Pure, as `Reply`."""

    stream: bool

    def whole(self, results: Sequence[GenerationResult]) -> bytes:
        """Return the body of an answer that is not streamed (JSON)."""

    def event(self, index: int, event: TokenEvent, *, last: bool) -> bytes:
        """Return what a stream says of one token of the generation with this index; may be empty."""

    def end(self, index: int, finished: Finished) -> bytes:
        """Return what a stream says of the end of one generation; may be empty."""

    def done(self, finished: Sequence[Finished]) -> bytes:
        """Return how a stream ends, after the end of every generation."""

    def failure(self, error: GatewayError) -> bytes:
        """Return what a stream says of a failure; nothing follows it."""


class Alone:
    """A reply as the only choice."""

    def __init__(self, reply: Reply) -> None:
        self.stream = reply.stream
        self._reply = reply
        self.failure = reply.failure

    def whole(self, results: Sequence[GenerationResult]) -> bytes:
        return self._reply.whole(results[0])

    def event(self, index: int, event: TokenEvent, *, last: bool) -> bytes:  # noqa: ARG002 - there is no other
        return self._reply.event(event, last=last)

    def end(self, index: int, finished: Finished) -> bytes:  # noqa: ARG002 - its end is the end of all
        return b""

    def done(self, finished: Sequence[Finished]) -> bytes:
        return self._reply.end(finished[0])


class Sink(Protocol):
    """Takes the events of one exchange."""

    streams: bool
    """Whether each goes on to the caller as it comes."""

    async def take(self, events: Sequence[TokenEvent], *, last: bool = False) -> None:
        """Take the next tokens, at least one, which came at once. `last`: the last of them is that of the answer.

        When they are written, waits until the caller has room for them.
        """

    async def end(self, finished: Finished) -> None:
        """Take the end of the exchange."""


class Writer(Protocol):
    """Takes the events of exchanges and answers the caller. A context: what it has running ends with it."""

    def part(self, index: int) -> Sink:
        """Return what takes the events of the exchange with this index."""

    async def finish(self, finished: Sequence[Finished]) -> None:
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

    async def take(self, events: Sequence[TokenEvent], *, last: bool = False) -> None:  # noqa: ARG002 - the end comes
        self.events += events

    async def end(self, finished: Finished) -> None:
        pass


class WholeWriter:
    """Keeps the answer until it is whole."""

    def __init__(self, choices: Choices, send: Send) -> None:
        self._parts: dict[int, Tokens] = {}
        self._choices = choices
        self._send = send

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def part(self, index: int) -> Sink:
        self._parts[index] = Tokens()
        return self._parts[index]

    async def finish(self, finished: Sequence[Finished]) -> None:
        results = [collect(self._parts[index].events, each) for index, each in enumerate(finished)]
        await send_whole(self._send, self._choices.whole(results))

    async def fail(self, error: GatewayError) -> None:
        raise error


async def send_whole(send: Send, body: bytes, status: int = 200, head: Head = JSON) -> None:
    """Send an answer that is whole."""
    head = [*head, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


class Stream:
    """Writes server-sent events as they come, and a comment when nothing has come for a while.

    The status is withheld until the first event, so that an early failure still has a status of its own; or
    until `QUIET_S`, because proxies give up on what is silent for long.
    """

    def __init__(self, send: Send) -> None:
        self.head: Head = EVENT_STREAM
        self.began = False
        self._send = send
        self._turn = asyncio.Lock()  # a comment, and several exchanges, write to one connection
        self._last_bytes = BETWEEN_EVENTS[0]
        self._loop = asyncio.get_running_loop()
        self._last_write_at = self._loop.time()
        self._timer = self._loop.call_later(QUIET_S, self._look)
        self._comment: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let no more comments go out."""
        self._timer.cancel()
        if self._comment:
            self._comment.cancel()

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send `data`, which may end within an event; waits until the caller has room for it."""
        self._last_write_at = self._loop.time()
        async with self._turn:
            await self._write(data, more=more)

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        if not self.began:
            self.began = True
            await self._send({"type": "http.response.start", "status": 200, "headers": self.head})
        self._last_bytes = data[-3:] if len(data) >= 3 else (self._last_bytes + data)[-3:]
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def fail(self, error: GatewayError, words: bytes) -> None:
        """End with `words` that tell of `error`.

        Raises:
            GatewayError: `error` itself, if nothing was written yet.
        """
        if not self.began:
            raise error
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                await self.write(b"\n\n" + words if self._within_event else words, more=False)
        except TimeoutError:  # it does not read: without its last message the server cuts the connection
            pass

    @property
    def _within_event(self) -> bool:
        return not self._last_bytes.endswith(BETWEEN_EVENTS)

    async def _beat(self) -> None:
        self._last_write_at = self._loop.time()
        async with self._turn:
            if not self._within_event:  # half of one may have been written meanwhile
                await self._write(COMMENT)

    def _look(self) -> None:
        quiet_s = self._loop.time() - self._last_write_at
        if quiet_s >= QUIET_S and not self._within_event and (self._comment is None or self._comment.done()):
            self._comment = self._loop.create_task(self._beat(), name="heartbeat")
            quiet_s = 0.0
        self._timer = self._loop.call_later(max(QUIET_S - quiet_s, 0.1), self._look)


class StreamWriter:
    """Writes each event as it comes."""

    def __init__(self, choices: Choices, send: Send) -> None:
        self._choices = choices
        self._stream = Stream(send)

    def __enter__(self) -> Self:
        self._stream.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.__exit__(*error)

    def part(self, index: int) -> Sink:
        return _Part(self._stream, self._choices, index)

    async def finish(self, finished: Sequence[Finished]) -> None:
        await self._stream.write(self._choices.done(finished), more=False)

    async def fail(self, error: GatewayError) -> None:
        await self._stream.fail(error, self._choices.failure(error))


class _Part:
    """One exchange's events in a stream."""

    streams = True

    def __init__(self, stream: Stream, choices: Choices, index: int) -> None:
        self._stream = stream
        self._choices = choices
        self._index = index

    async def take(self, events: Sequence[TokenEvent], *, last: bool = False) -> None:
        *others, final = events
        before = [self._choices.event(self._index, event, last=False) for event in others] if others else ()
        if data := b"".join(before) + self._choices.event(self._index, final, last=last):
            await self._stream.write(data)

    async def end(self, finished: Finished) -> None:
        if data := self._choices.end(self._index, finished):
            await self._stream.write(data)
