"""One exchange with one model's server: lease, send, stream, cancel.

`Exchange` holds the lease until the last event is taken or the caller has gone, in whatever phase that happens, and
the lease ends where its scope ends. It moves events and owns the bounds; what the bytes mean is pure code of the engine
(towards the server) and of a dialect (towards the caller). Two ASGI responses use it: `Relay` writes the events of one
exchange to the caller as they come, and `Worked` waits for whole results.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import replace
from itertools import zip_longest
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.departure import Departed, Interrupt, interruptible, until_departure
from gateway.engines.base import Call
from gateway.engines.keys import without_key
from gateway.errors import GatewayError, GenerationFailed, GenerationTimeout, UpstreamFailed
from gateway.fleet.instance import Instance
from gateway.fleet.life import Lease
from gateway.generation import Finished, GenerationRequest, GenerationResult, TokenEvent, collect
from gateway.writers import Reply, Sink, StreamWriter, Tokens, WholeWriter

log = logging.getLogger(__name__)

SECOND_ATTEMPT_S = 0.1
REFUSAL_BYTES = 64 * 1024


class ConnectFailed(Exception):
    """The connection could not be made: nothing was sent, so sending it again is safe."""


class Broken(Exception):
    """The connection ended before the answer did."""


class Answer(Protocol):
    """A server's answer: its status, and its body as it comes. Raises `Broken` if it ends too early."""

    @property
    def status(self) -> int: ...

    @property
    def retry_after_s(self) -> float | None:
        """When the server wants to be asked again, if it says so."""

    def chunks(self) -> AsyncGenerator[bytes, None]: ...


class Client(Protocol):
    """How a request reaches a model's server. The seam behind which the client is chosen by measurement."""

    def post(self, base_url: str, call: Call, headers: Mapping[str, str]) -> AbstractAsyncContextManager[Answer]:
        """Send `call`; leaving the context before the body was read to its end closes the connection at once.

        Raises:
            ConnectFailed: no connection could be made within the client's bound.
            Broken: it ended before the answer's head had come.
        """


class Exchange:
    """One request on its way to a model's server, and the answer on its way back. Used once."""

    def __init__(
        self,
        instance: Instance,
        request: GenerationRequest,
        client: Client,
        *,
        request_id: str,
        max_wait_s: float | None = None,
    ) -> None:
        """Take what it needs.

        Raises:
            Unsupported: the engine cannot do what is asked, so no model is started in vain.
        """
        instance.engine.check(instance.spec, request)
        self.instance = instance
        self._request = request
        self._client = client
        self._tags = {"x-request-id": request_id}
        self._max_wait_s = max_wait_s

    async def whole(self) -> GenerationResult:
        """Return the whole answer. To cancel it closes the connection to the server at once.

        Raises:
            GatewayError: there is none.
        """
        tokens = Tokens()
        async with interruptible() as interrupt:
            finished = await self.run(tokens, interrupt)
        return collect(tokens.events, finished)

    async def run(self, sink: Sink, interrupt: Interrupt) -> Finished:
        """Get the answer from the server. Only if no connection could be made is it asked for again, once.

        Raises:
            GatewayError: it failed; `sink` may have taken some of it.
        """
        try:
            return await self._attempt(sink, interrupt)
        except ConnectFailed:  # nothing was sent; a moment later the gateway may know that the server has ended
            await asyncio.sleep(SECOND_ATTEMPT_S)
        try:
            return await self._attempt(sink, interrupt)
        except ConnectFailed as error:
            raise UpstreamFailed(f"The server of {self.instance.spec.id} takes no connection ({error}).") from None

    async def _attempt(self, sink: Sink, interrupt: Interrupt) -> Finished:
        """Hold a lease for as long as the server works on the request."""
        timeout_s = self.instance.spec.generation_timeout_s
        async with self.instance.lease(max_wait_s=self._max_wait_s) as lease:
            lease.on_cut = interrupt.fire
            leased_at = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(timeout_s) as bound:
                    finished = await self._send(lease, _Pace(sink, bound, timeout_s))
            except TimeoutError:
                raise self._too_slow(timeout_s, streamed=sink.streams) from None
        return replace(finished, generation_s=asyncio.get_running_loop().time() - leased_at)

    async def _send(self, lease: Lease, pace: _Pace) -> Finished:
        call = self.instance.engine.call(self.instance.spec, self._request, lease.secret)
        try:
            async with self._client.post(lease.handle.base_url, call, self._tags) as answer:
                if answer.status != 200:
                    raise await self._refusal(answer)
                return await self._events(answer, pace)
        except Broken as error:
            raise self._broken(error, pace) from None
        except GatewayError as error:
            raise without_key(error, self.instance.spec) from None

    async def _refusal(self, answer: Answer) -> GatewayError:
        """Return the error that the answer stands for; where waiting helps, the server's word on how long counts."""
        error = self.instance.engine.refusal(answer.status, await _start_of(answer))
        if error.retry_after_s is not None and answer.retry_after_s is not None:
            error.retry_after_s = answer.retry_after_s
        return error

    async def _events(self, answer: Answer, pace: _Pace) -> Finished:
        """Take events up to the end of the answer; what a server may still send after it is not waited for."""
        decoder = self.instance.engine.decoder(self._request)
        async with aclosing(answer.chunks()) as chunks:
            async for chunk in chunks:
                events = decoder.feed(chunk)
                for event, following in zip_longest(events, events[1:]):
                    if isinstance(event, Finished):
                        return event
                    await pace.take(event, last=isinstance(following, Finished))
        raise Broken("the answer has no end")

    def _broken(self, error: Broken, pace: _Pace) -> GatewayError:
        words = f"The server of {self.instance.spec.id} broke off ({error})"
        if pace.taken:
            return GenerationFailed(f"{words} after {pace.taken} tokens.")
        return UpstreamFailed(f"{words} before the first token; its log may say why.")

    def _too_slow(self, timeout_s: float, *, streamed: bool) -> GenerationTimeout:
        what = "sent no token" if streamed else "had not finished"
        return GenerationTimeout(
            f"The server of {self.instance.spec.id} {what} within generation_timeout ({timeout_s:g} s). "
            "Ask for fewer tokens, stream the answer, or raise generation_timeout in models.yaml."
        )


class Relay(Response):
    """The answer to one generation request, as it comes: what an endpoint returns."""

    background = None

    def __init__(self, exchange: Exchange, reply: Reply) -> None:  # and not the base class's: there is no body yet
        self._exchange = exchange
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - an ASGI app
        """Carry out the exchange. A caller who leaves ends it at once, in any phase.

        Raises:
            GatewayError: it failed before anything was written; `api.problems` answers.
        """
        with (StreamWriter if self._reply.stream else WholeWriter)(self._reply, send) as writer:
            try:
                async with until_departure(receive) as interrupt:
                    finished = await self._exchange.run(writer, interrupt)
            except Departed:
                log.info("%s: a caller left", self._exchange.instance.name)
            except GatewayError as error:
                await writer.fail(error)
            else:
                await writer.finish(finished)


class Worked(Response):
    """An answer that `work` makes of whole results, as JSON: what an endpoint returns that needs several of them.

    A caller who leaves ends the work at once, in any phase. What `work` raises is answered by `api.problems`.
    """

    background = None

    def __init__(self, work: Callable[[], Awaitable[bytes]]) -> None:  # and not the base class's, as above
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with until_departure(receive):
                body = await self._work()
        except Departed:
            log.info("a caller left")
        else:
            await Response(body, media_type="application/json")(scope, receive, send)


class _Pace:
    """Counts the tokens of an exchange and, where they are streamed, bounds the time between two of them."""

    def __init__(self, sink: Sink, bound: asyncio.Timeout, timeout_s: float) -> None:
        self.taken = 0
        self._sink = sink
        self._bound = bound
        self._timeout_s = timeout_s

    async def take(self, event: TokenEvent, *, last: bool) -> None:
        self.taken += 1
        await self._sink.take(event, last=last)
        if self._sink.streams and not self._bound.expired():
            self._bound.reschedule(asyncio.get_running_loop().time() + self._timeout_s)


async def _start_of(answer: Answer) -> bytes:
    """Return the body of a refusal, as much as can matter."""
    body = b""
    async with aclosing(answer.chunks()) as chunks:
        async for chunk in chunks:
            body += chunk
            if len(body) > REFUSAL_BYTES:
                break
    return body[:REFUSAL_BYTES]
