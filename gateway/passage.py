"""A request that is put through to a model's server as it is, and its answer likewise (contract section 4).

For callers who speak the API that the server itself speaks so well that nothing has to be translated: TGI's own, under
`/models/{id}/tgi`, and OpenAI's for engine `openai`. Lease, bounds and cancels are those of every exchange.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.departure import Departed, until_departure
from gateway.engines.base import Call
from gateway.engines.keys import hidden, without_key
from gateway.errors import GatewayError, ModelNotLoaded, UpstreamFailed
from gateway.fleet.instance import Instance
from gateway.lifecycle import SERVING
from gateway.relay import Answer, Broken, Client, ConnectFailed, Errand, Pace, start_of
from gateway.writers import EVENT_STREAM, Head, Stream, send_whole

log = logging.getLogger(__name__)

MOST_BYTES = 256 * 2**20
"""Of an answer that is not streamed: it is whole here before the first byte goes on."""
LOOK_S = 10.0
"""How long a server may take to answer what is no generation."""
_PASSED_ON = re.compile(r"content-type|x-(?:compute|total|validation|queue|inference|time|prompt|generated)-[a-z-]+")
_PROVIDERS_REFUSAL = (401, 403)
"""What a server says of the gateway's own key, and not of the caller's."""


class Manner(Protocol):
    """What a dialect does to an answer on its way. Pure; made for one request, and used for it alone."""

    keeps_refusals: bool
    """Whether an answer other than 200 goes on as it is, and does not become one of the gateway's errors."""

    def feed(self, chunk: bytes) -> bytes:
        """Return what goes on of the answer so far; may be empty."""

    def rest(self) -> bytes:
        """Return what was held back, at the end of the answer.

        Raises:
            Broken: it must not end here.
        """

    def failure(self, error: GatewayError) -> bytes:
        """Return what a stream says of a failure; nothing follows it."""


@dataclass(frozen=True, slots=True)
class Whole:
    """An answer that is whole, or its refusal."""

    status: int
    head: Head
    body: bytes


class Passage(Errand["Whole | None"]):
    """A caller's own call on its way to a model's server, and the answer on its way back."""

    def __init__(
        self,
        instance: Instance,
        call: Call,
        client: Client,
        manner: Manner,
        *,
        streamed: bool,
        request_id: str,
        max_wait_s: float | None = None,
    ) -> None:
        """Take what it needs. `streamed`: the caller asks for server-sent events."""
        super().__init__(instance, client, request_id=request_id, max_wait_s=max_wait_s)
        self.manner = manner
        self.streamed = streamed
        self._call = call
        self.stream: Stream | None = None
        """Where events go on to; set by the one who answers."""

    def call(self, secret: str) -> Call:
        return self.instance.engine.forward(self.instance.spec, self._call, secret)

    async def read(self, answer: Answer, pace: Pace) -> Whole | None:
        """Pass a stream on as it comes, and return None; or return the answer once it is whole."""
        if answer.status in _PROVIDERS_REFUSAL or (answer.status != 200 and not self.manner.keeps_refusals):
            raise await self.refusal(answer)
        if self.stream is None or answer.status != 200 or not _is_stream(answer):
            whole = await _whole(answer)
            body = self.manner.feed(whole.body) + self.manner.rest()
            return replace(whole, body=body if whole.status == 200 else hidden(body, self.instance.spec))
        self.stream.head = [*_passed_on(answer.headers), *EVENT_STREAM[1:]]  # all but our own content-type
        async with aclosing(answer.chunks()) as chunks:
            async for chunk in chunks:
                if data := self.manner.feed(chunk):
                    await self.stream.write(data)
                if not _is_comment(chunk):  # a server may go on with these for ever
                    pace.came()
        if rest := self.manner.rest():
            await self.stream.write(rest)
        return None

    def no_stream(self, whole: Whole) -> GatewayError:
        """Return what it means that a server answers like this where a stream was awaited, and has begun."""
        if whole.status == 200:
            return UpstreamFailed("The model's server answered with something that is no stream.")
        return without_key(self.instance.engine.refusal(whole.status, whole.body), self.instance.spec)


class PutThrough(Response):
    """The answer to a request that is put through: what an endpoint returns."""

    background = None

    def __init__(self, passage: Passage) -> None:  # and not the base class's: there is no body yet
        self._passage = passage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - an ASGI app
        """Carry it out. A caller who leaves ends it at once, in any phase.

        Raises:
            GatewayError: it failed before anything was written; `api.problems` answers.
        """
        passage = self._passage
        with Stream(send) as stream:
            if passage.streamed:
                passage.stream = stream
            else:
                stream.close()
            try:
                async with until_departure(receive) as interrupt:
                    whole = await passage.carry_out(interrupt, streamed=passage.streamed)
            except Departed:
                log.info("%s: a caller left", passage.instance.name)
            except GatewayError as error:
                await stream.fail(error, passage.manner.failure(error))
            else:
                await self._finish(stream, whole, send)

    async def _finish(self, stream: Stream, whole: Whole | None, send: Send) -> None:
        if whole is None:
            await stream.write(b"", more=False)
        elif not stream.began:
            stream.close()
            await send_whole(send, whole.body, whole.status, whole.head)
        else:  # the status went out before the server said its own
            error = self._passage.no_stream(whole)
            await stream.fail(error, self._passage.manner.failure(error))


async def look(instance: Instance, call: Call, client: Client, *, request_id: str) -> Whole:
    """Return what a model's server answers to a call that takes no lease: it neither wakes nor keeps the model.

    Raises:
        ModelNotLoaded: it does not run.
        UpstreamFailed: it does not answer in time, or not at all.
    """
    status = instance.status
    if status.state not in SERVING or status.handle is None:
        words = f"{instance.spec.id} does not run ({status.state}); a generation request starts it."
        raise ModelNotLoaded(words)
    forwarded = instance.engine.forward(instance.spec, call, "")
    try:
        async with (
            asyncio.timeout(LOOK_S),
            client.send(status.handle.base_url, forwarded, {"x-request-id": request_id}) as answer,
        ):
            if answer.status in _PROVIDERS_REFUSAL:
                raise instance.engine.refusal(answer.status, b"")
            return await _whole(answer)
    except (Broken, ConnectFailed, TimeoutError) as error:
        words = f"The server of {instance.spec.id} does not answer ({type(error).__name__})."
        raise UpstreamFailed(words) from None


def _is_stream(answer: Answer) -> bool:
    return answer.headers.get("content-type", "").startswith("text/event-stream")


def _is_comment(chunk: bytes) -> bool:
    """Say whether a piece of a stream only keeps the connection alive."""
    return all(not line or line.startswith(b":") for line in chunk.splitlines())


def _passed_on(headers: Mapping[str, str]) -> Head:
    """Return those of a server's headers that are meant for whoever asked."""
    kept = ((name, value) for name, value in headers.items() if _PASSED_ON.fullmatch(name))
    return [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in kept]


async def _whole(answer: Answer) -> Whole:
    body = await start_of(answer, MOST_BYTES)
    if len(body) == MOST_BYTES:
        raise UpstreamFailed(f"The model's server answered with more than {MOST_BYTES:,} bytes; stream the answer.")
    return Whole(answer.status, _passed_on(answer.headers), body)
