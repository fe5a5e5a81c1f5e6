"""One exchange with one model's server: lease, send, stream, cancel.

An `Errand` holds the lease until the last piece of the answer is taken or the caller has gone, in whatever phase that
happens, and the lease ends where its scope ends. It owns the bounds; what the bytes mean is pure code of the engine
(towards the server) and of a dialect (towards the caller). An `Exchange` is one for a generation, and moves its events.
Two ASGI responses use it: `Relay` writes events to the caller as they come, and `Worked` waits for whole results.
(`gateway.passage` has another errand, which passes bytes on as they are.)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from functools import partial
from typing import Generic, Protocol, TypeVar, cast

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.departure import Departed, Interrupt, interruptible, until_departure
from gateway.engines.base import Call
from gateway.engines.keys import without_key
from gateway.errors import GatewayError, GenerationFailed, GenerationTimeout, ModelNotLoaded, UpstreamFailed
from gateway.fleet.life import Lease
from gateway.fleet.replicas import Served
from gateway.fleet.status import Status
from gateway.generation import Finished, GenerationRequest, GenerationResult, PromptToken, TokenEvent, collect
from gateway.lifecycle import State
from gateway.outcome import LEFT, OK, note
from gateway.waiting import Standing, Wait, standing
from gateway.writers import Choices, Sink, StreamWriter, Tokens, WholeWriter, Writer

log = logging.getLogger(__name__)

Result = TypeVar("Result")

SECOND_ATTEMPT_S = 0.1
REFUSAL_BYTES = 64 * 1024
CANCELLED = "cancelled"
"""What has become of a call whose caller left, or of which another part failed."""
COUNT_S = 2.0
"""How long a server may take to count a prompt's tokens, once the answer is there."""
CLOCK_S = 0.001
"""A timer may fire this much before its time."""
MOST_TOKENS_BYTES = 64 * 2**20
"""Of a prompt's tokens: some 50 bytes each."""


class ConnectFailed(Exception):
    """The connection could not be made: nothing was sent, so sending it again is safe."""


class Broken(Exception):
    """The connection ended before the answer did."""


class Answer(Protocol):
    """A server's answer: its head, and its body as it comes."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]:
        """By their names in lower case."""

    @property
    def retry_after_s(self) -> float | None:
        """When the server wants to be asked again, if it says so."""

    async def more(self) -> bytes:
        """Return what has come of the body since the last time, which is waited for; b"" at its end, however often.

        Raises:
            Broken: it ended too early.
        """


class Client(Protocol):
    """How a request reaches a model's server. The seam behind which the client is chosen by measurement."""

    def send(self, base_url: str, call: Call, headers: Mapping[str, str]) -> AbstractAsyncContextManager[Answer]:
        """Send `call`; leaving the context before the body was read to its end closes the connection at once.

        Raises:
            ConnectFailed: no connection could be made within the client's bound.
            Broken: it ended before the answer's head had come.
        """


class Admission:
    """Whether a caller's request was let in: from then on no part of it is turned away at the queue (promise P4)."""

    def __init__(self) -> None:
        self.granted = False


class Errand(Generic[Result]):
    """A call to a model's server under a lease, and within its bounds. Used once."""

    def __init__(self, instance: Served, client: Client, *, request_id: str, max_wait_s: float | None = None) -> None:
        self.instance = instance
        self.admission = Admission()
        """Its own, or that of the request that it is a part of."""
        self._client = client
        self._tags = {"x-request-id": request_id}
        self._max_wait_s = max_wait_s
        self._asked_at = 0.0
        self.spec = instance.spec
        """The model as the catalog had it when the lease was granted: with the key that was sent, say."""
        self.engine = instance.engine
        """The engine of the server that the lease is for; before there is one, that which the catalog names."""

    def call(self, secret: str) -> Call:
        """Return what is sent."""
        raise NotImplementedError

    def engine_changed(self) -> None:
        """Return if the model's new engine can do this too: the catalog changed while the call waited for its lease.

        Raises:
            Unsupported: it cannot.
            ModelNotLoaded: what is to be sent was meant for the former engine.
        """
        raise ModelNotLoaded(
            f"The catalog has changed, and {self.instance.spec.id} has another engine now. Send the request again.",
            retry_after_s=1.0,
        )

    async def read(self, answer: Answer, pace: Pace) -> Result:
        """Return what becomes of the answer.

        Raises:
            GatewayError, Broken: nothing does.
        """
        raise NotImplementedError

    async def carry_out(self, interrupt: Interrupt, *, streamed: bool) -> Result:
        """Send the call and read the answer. Only if no connection could be made is it sent again, once.

        `streamed`: it may take as long as it likes as long as something comes (`Pace.came`).

        Raises:
            GatewayError: it failed.
        """
        self._asked_at = time.monotonic()
        outcome = GatewayError.code
        try:
            result = await self._carry_out(interrupt, streamed=streamed)
            outcome = self.outcome(result)
            return result
        except asyncio.CancelledError:
            outcome = interrupt.reason.code if isinstance(interrupt.reason, GatewayError) else CANCELLED
            raise
        except GatewayError as error:
            outcome = error.code
            raise
        finally:
            self.instance.figures.ended(outcome)

    async def _carry_out(self, interrupt: Interrupt, *, streamed: bool) -> Result:
        try:
            return await self._attempt(interrupt, streamed=streamed)
        except ConnectFailed:  # nothing was sent; a moment later the gateway may know that the server has ended
            await asyncio.sleep(SECOND_ATTEMPT_S)
        try:
            return await self._attempt(interrupt, streamed=streamed)
        except ConnectFailed as error:
            raise UpstreamFailed(f"The server of {self.instance.spec.id} takes no connection ({error}).") from None

    async def _attempt(self, interrupt: Interrupt, *, streamed: bool) -> Result:
        """Hold a lease for as long as the server works on the call."""
        request = standing()
        lease = self.instance.lease_at_once() or await self._lease(request)
        request.works()
        try:
            lease.on_cut = interrupt.fire
            return await self._under(lease, interrupt, streamed=streamed)
        finally:
            request.worked()
            lease.give_back(lease)

    async def _lease(self, request: Standing) -> Lease:
        """Wait for a lease, which is to be given back. Nothing is awaited once it is granted."""
        wait = self._begin_to_wait(request)
        try:
            return await self.instance.obtain(self._max_wait_s, admitted=self.admission.granted)
        finally:
            wait.end()

    def _begin_to_wait(self, request: Standing) -> Wait:
        """Return the wait of who asks. If it is for a model that is not up, it does not count against him.

        Raises:
            QueueFull: too many wait for models in all.
        """
        status, wait = self.instance.status, Wait(request)
        if _is_cold(status):
            request.rests()
        if not self.admission.granted and (_is_cold(status) or _is_busy(status)):
            wait.begin()
        return wait

    async def _under(self, lease: Lease, interrupt: Interrupt, *, streamed: bool) -> Result:
        self.admission.granted = True
        self.instance.figures.waited(time.monotonic() - self._asked_at)
        before, self.spec, self.engine = self.engine, lease.spec, lease.engine
        if self.engine is not before:
            self.engine_changed()
        timeout_s = lease.spec.generation_timeout_s
        give_up = partial(self._give_up, interrupt, timeout_s, streamed=streamed)
        pace = Pace(timeout_s, give_up, streamed=streamed, begins=self._begins)
        try:
            async with self._client.send(lease.handle.base_url, self.call(lease.secret), self._tags) as answer:
                result = await self.read(answer, pace)
            pace.is_over()
            return await self.complete(result, lease)
        except Broken as error:
            raise self._broken(error, pace) from None
        except GatewayError as error:
            raise without_key(error, self.spec) from None
        finally:
            pace.is_over()

    def _begins(self) -> None:
        self.instance.figures.first_token(time.monotonic() - self._asked_at)

    async def complete(self, result: Result, lease: Lease) -> Result:  # noqa: ARG002 - for those that must ask again
        """Return the result with what was not in the answer, whose connection is closed now. Has a bound of its own."""
        return result

    def outcome(self, result: Result) -> str:  # noqa: ARG002 - for those that pass on what a server refuses
        """Return in one word what has become of a call that was answered."""
        return OK

    async def refusal(self, answer: Answer) -> GatewayError:
        """Return the error that the answer stands for; where waiting helps, the server's word on how long counts."""
        error = self.engine.refusal(answer.status, await start_of(answer, REFUSAL_BYTES))
        if error.retry_after_s is not None and answer.retry_after_s is not None:
            error.retry_after_s = answer.retry_after_s
        return error

    def _broken(self, error: Broken, pace: Pace) -> GatewayError:
        words = f"The server of {self.instance.spec.id} broke off ({error})"
        if pace.came_so_far:
            return GenerationFailed(f"{words} after {pace.came_so_far} tokens.")
        return UpstreamFailed(f"{words} before the first token; its log may say why.")

    def _give_up(self, interrupt: Interrupt, timeout_s: float, *, streamed: bool) -> None:
        what = "sent no token" if streamed else "had not finished"
        words = (
            f"The server of {self.instance.spec.id} {what} within generation_timeout ({timeout_s:g} s). "
            "Ask for fewer tokens, stream the answer, or raise generation_timeout in models.yaml."
        )
        interrupt.fire(GenerationTimeout(words))


class Exchange(Errand[Finished]):
    """One generation request on its way to a model's server, and its events on their way back."""

    def __init__(
        self,
        instance: Served,
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
        super().__init__(instance, client, request_id=request_id, max_wait_s=max_wait_s)
        instance.engine.check(instance.spec, request)
        self._request = request
        self._sink: Sink

    def engine_changed(self) -> None:
        self.engine.check(self.spec, self._request)

    async def whole(self) -> GenerationResult:
        """Return the whole answer. To cancel it closes the connection to the server at once.

        Raises:
            GatewayError: there is none.
        """
        tokens = Tokens()
        with interruptible() as interrupt:
            finished = await self.run(tokens, interrupt)
        return collect(tokens.events, finished)

    async def run(self, sink: Sink, interrupt: Interrupt) -> Finished:
        """Get the answer from the server.

        Raises:
            GatewayError: it failed; `sink` may have taken some of it.
        """
        self._sink = sink
        finished = await self.carry_out(interrupt, streamed=sink.streams)
        self.instance.figures.generated(finished.tokens_generated, finished.prompt_tokens)
        await sink.end(finished)
        return finished

    def call(self, secret: str) -> Call:
        return self.engine.call(self.spec, self._request, secret)

    async def read(self, answer: Answer, pace: Pace) -> Finished:
        """Take events up to the end of the answer; what a server may still send after it is not waited for."""
        if answer.status != 200:
            raise await self.refusal(answer)
        decoder = self.engine.decoder(self._request)
        while chunk := await answer.more():
            tokens, finished = _apart(decoder.feed(chunk))
            if tokens:
                await self._sink.take(tokens, last=finished is not None)
                pace.came(len(tokens))
            if finished:
                return finished.timed(pace.took_s)
        raise Broken("the answer has no end")

    async def complete(self, result: Finished, lease: Lease) -> Finished:
        """Return the end with the prompt's length, which servers tell only at an end of their own."""
        if result.prompt_tokens or not self._request.count_prompt:
            return result
        with suppress(GatewayError, Broken, ConnectFailed, TimeoutError):  # the answer is not lost for a number
            return replace(result, prompt_tokens=await self._count(lease))
        return result

    async def _count(self, lease: Lease) -> int:
        """Return how many tokens the prompt has; 0 if the server does not say."""
        async with asyncio.timeout(COUNT_S):
            call = self.engine.tokenize(self.spec, self._request, lease.secret)
            async with self._client.send(lease.handle.base_url, call, self._tags) as answer:
                if answer.status != 200:
                    return 0
                return len(self.engine.tokens(self._request, await start_of(answer, MOST_TOKENS_BYTES)))


def _apart(events: list[TokenEvent | Finished]) -> tuple[list[TokenEvent], Finished | None]:
    """Return the tokens, and the end if it is there: it is the last one."""
    last = events[-1] if events else None
    finished = last if isinstance(last, Finished) else None
    return cast(list[TokenEvent], events[:-1] if finished else events), finished


class Tokenization(Errand["tuple[PromptToken, ...]"]):
    """A text on its way to a model's server to be cut into tokens."""

    def __init__(
        self,
        instance: Served,
        request: GenerationRequest,
        client: Client,
        *,
        request_id: str,
        max_wait_s: float | None = None,
    ) -> None:
        """Take what it needs.

        Raises:
            Unsupported: the engine cannot do that, so no model is started in vain.
        """
        super().__init__(instance, client, request_id=request_id, max_wait_s=max_wait_s)
        self._request = request
        self.call(secret="")

    def engine_changed(self) -> None:
        self.call(secret="")

    async def tokens(self) -> tuple[PromptToken, ...]:
        """Return the tokens. To cancel it closes the connection to the server at once.

        Raises:
            GatewayError: there are none.
        """
        with interruptible() as interrupt:
            return await self.carry_out(interrupt, streamed=False)

    def call(self, secret: str) -> Call:
        return self.engine.tokenize(self.spec, self._request, secret)

    async def read(self, answer: Answer, pace: Pace) -> tuple[PromptToken, ...]:  # noqa: ARG002 - it comes at once
        if answer.status != 200:
            raise await self.refusal(answer)
        return self.engine.tokens(self._request, await start_of(answer, MOST_TOKENS_BYTES))


def _is_cold(status: Status) -> bool:
    """Say whether a model grants no lease before something has started, or has gone and started again."""
    return status.state is not State.READY or status.held_for is not None


def _is_busy(status: Status) -> bool:
    return bool(status.queued) or status.in_flight >= status.spec.max_concurrency


class Relay(Response):
    """The answer to one or several generation requests, as they come: what an endpoint returns."""

    background = None

    def __init__(self, exchanges: Sequence[Exchange], choices: Choices) -> None:  # not the base class's: there is no
        self._exchanges = as_one(exchanges)  # body yet
        self._choices = choices

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Carry out the exchanges. A caller who leaves ends them at once, in any phase; so does the first failure.

        Raises:
            GatewayError: it failed before anything was written; `api.problems` answers.
        """
        with (StreamWriter if self._choices.stream else WholeWriter)(self._choices, send) as writer:
            try:
                with until_departure(scope, receive) as interrupt:
                    if len(self._exchanges) == 1:  # as nearly all have: it needs no task of its own
                        finished = [await self._exchanges[0].run(writer.part(0), interrupt)]
                    else:
                        finished = await self._run(writer)
            except Departed:
                note(scope, LEFT)
                log.info("%s: a caller left", self._exchanges[0].instance.name)
            except GatewayError as error:
                note(scope, error.code)
                await writer.fail(error)
            else:
                await writer.finish(finished)

    async def _run(self, writer: Writer) -> list[Finished]:
        async def one(index: int, exchange: Exchange) -> Finished:
            with interruptible() as interrupt:
                return await exchange.run(writer.part(index), interrupt)

        work = [partial(one, index, exchange) for index, exchange in enumerate(self._exchanges)]
        return await together(work, at_once=self._exchanges[0].instance.spec.max_concurrency)


def as_one(exchanges: Sequence[Exchange]) -> Sequence[Exchange]:
    """Return the same exchanges, as parts of one request: once one of them has a lease, all are let in."""
    for exchange in exchanges[1:]:
        exchange.admission = exchanges[0].admission
    return exchanges


async def together(work: Sequence[Callable[[], Awaitable[Result]]], *, at_once: int) -> list[Result]:
    """Return all results in order, some of them worked on at once. The first failure, or a cancel, ends them all.

    Raises:
        GatewayError: the first failure; nothing is under way any more.
    """
    room = asyncio.Semaphore(at_once)

    async def one(each: Callable[[], Awaitable[Result]]) -> Result:
        async with room:
            return await each()

    tasks = [asyncio.create_task(one(each), name="exchange") for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


class Worked(Response):
    """An answer that `work` makes of whole results: what an endpoint returns that needs several of them, or headers.

    A caller who leaves ends the work at once, in any phase. What `work` raises is answered by `api.problems`.
    """

    background = None

    def __init__(self, work: Callable[[], Awaitable[bytes | Response]]) -> None:  # and not the base class's, as above
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with until_departure(scope, receive):
                done = await self._work()
        except Departed:
            note(scope, LEFT)
            log.info("a caller left")
        else:
            answer = Response(done, media_type="application/json") if isinstance(done, bytes) else done
            await answer(scope, receive, send)


class Pace:
    """Counts what comes from a server, and bounds the time for all of it or, where it is streamed, between two pieces.

    `give_up` is called when that has passed, `begins` when the first piece of a stream has come. One timer looks when
    the last piece came; to set it anew for each of them would take as long as all else that is done with a token.
    """

    def __init__(
        self, timeout_s: float, give_up: Callable[[], None], *, streamed: bool, begins: Callable[[], None]
    ) -> None:
        self.came_so_far = 0
        self._begins = begins
        self._give_up = give_up
        self._timeout_s = timeout_s
        self._streamed = streamed
        self._loop = asyncio.get_running_loop()
        self._began_at = self._last_at = self._loop.time()
        self._timer = self._loop.call_later(timeout_s, self._look)

    @property
    def took_s(self) -> float:
        """How long the server has had the request."""
        return self._loop.time() - self._began_at

    def is_over(self) -> None:
        """Say that the answer is here, so that what is done with it does not count."""
        self._timer.cancel()

    def came(self, pieces: int = 1) -> None:
        """Say that more pieces came, and are written."""
        if self._streamed:
            self._last_at = self._loop.time()
            if not self.came_so_far:
                self._begins()
        self.came_so_far += pieces

    def _look(self) -> None:
        left_s = self._last_at + self._timeout_s - self._loop.time()
        if left_s <= CLOCK_S:
            self._give_up()
        else:
            self._timer = self._loop.call_later(left_s, self._look)


async def start_of(answer: Answer, most_bytes: int) -> bytes:
    """Return the body of an answer, as much of it as can matter."""
    body = bytearray()
    while len(body) <= most_bytes and (chunk := await answer.more()):
        body += chunk
    return bytes(body[:most_bytes])
