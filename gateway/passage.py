"""A request that is put through to a model's server as it is, and its answer likewise (contract section 4).

For callers who speak the API that the server itself speaks so well that nothing has to be translated: TGI's own, under
`/models/{id}/tgi`, and OpenAI's for engine `openai`. Lease, bounds and cancels are those of every exchange.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.catalog import ModelSpec
from gateway.departure import Departed, until_departure
from gateway.engines.base import Call
from gateway.engines.keys import begun_key, hidden, without_key
from gateway.errors import GatewayError, GenerationFailed, ModelNotLoaded, UpstreamFailed
from gateway.fleet.replicas import Served
from gateway.lifecycle import SERVING
from gateway.outcome import LEFT, OK, note
from gateway.relay import Answer, Broken, Client, ConnectFailed, Errand, Pace, start_of
from gateway.writers import EVENT_STREAM, Head, Stream, send_whole

log = logging.getLogger(__name__)

MOST_BYTES = 256 * 2**20
"""Of an answer that is not streamed: it is whole here before the first byte goes on."""
MOST_LINE_BYTES = 8 * 2**20
"""Of one line of a stream."""
SHORTEST_KEY = 8
"""A shorter `api_key` is no secret but a word like EMPTY or none, for servers without keys; a model may say it."""
LOOK_S = 10.0
"""How long a server may take to answer what is no generation."""
_PASSED_ON = re.compile(r"content-type|x-(?:compute|total|validation|queue|inference|time|prompt|generated)-[a-z-]+")
REFUSED = "refused"
"""What has become of a call that the server refused in its own words, which went on as they are."""
USAGE_BYTES = 4096
"""Where an answer tells of its length: at its end."""
OPENAIS_END = (b"data: [DONE]", b"data:[DONE]")
_TOLD = re.compile(rb'"(generated_tokens|completion_tokens|prompt_tokens|input_length)"\s*:\s*(\d{1,9})\b')
"""The keys themselves: within a text their quotes would be escaped."""
_PROVIDERS_REFUSAL = (401, 403)
"""What a server says of the gateway's own key, and not of the caller's."""


class Manner(Protocol):
    """What a dialect does to an answer on its way. Pure; made for one request, and used for it alone."""

    keeps_refusals: bool
    """Whether an answer other than 200 goes on as it is, and does not become one of the gateway's errors."""

    @property
    def may_end(self) -> bool:
        """Whether a stream is complete after the lines so far."""

    @property
    def is_over(self) -> bool:
        """Whether its last event has come: what a server may still send after it is not waited for."""

    def whole(self, body: bytes) -> bytes:
        """Return what goes on of an answer that is not streamed.

        Raises:
            Broken: it has no end.
            GenerationFailed: it tells of an error.
        """

    def line(self, line: bytes) -> bytes:
        """Return what goes on of a stream's next line, which has its end unless it is the last one; may be empty.

        Raises:
            GenerationFailed: it tells of an error.
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
        instance: Served,
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
        self._told = Told()

    def call(self, secret: str) -> Call:
        return self.engine.forward(self.spec, self._call, secret)

    async def read(self, answer: Answer, pace: Pace) -> Whole | None:
        """Pass a stream on as it comes, and return None; or return the answer once it is whole."""
        answer = _discreet(answer, self.spec)
        _refuse_odd_status(answer)
        if answer.status in _PROVIDERS_REFUSAL or (answer.status != 200 and not self.manner.keeps_refusals):
            raise await self.refusal(answer)
        _refuse_compressed(answer)
        if self.stream is None or answer.status != 200 or not _is_stream(answer):
            whole = await _whole(answer)
            passed = replace(whole, body=self.manner.whole(whole.body))
            if whole.status == 200:
                self._told.whole(answer.headers, whole.body)
                self._count()
            return passed
        self.stream.head = [*_passed_on(answer.headers), *EVENT_STREAM[1:]]  # all but our own content-type
        await self._pass_on(answer, self.stream, pace)
        self._count()
        return None

    def outcome(self, result: Whole | None) -> str:
        return OK if result is None or result.status == 200 else REFUSED

    def _count(self) -> None:
        self.instance.figures.generated(self._told.tokens, self._told.prompt_tokens)

    async def _pass_on(self, answer: Answer, stream: Stream, pace: Pace) -> None:
        lines = _Lines()
        try:
            while chunk := await answer.more():
                if await self._over_with(lines.feed(chunk), stream, pace):
                    return
        except Broken:
            if not self.manner.may_end:
                raise
            return
        last = self.manner.line(lines.rest())
        if not self.manner.may_end:  # and half a line would spoil the event that tells of it
            raise Broken("the answer has no end")
        if last:
            self._told.line(last)
            await stream.write(last)

    async def _over_with(self, lines: Sequence[bytes], stream: Stream, pace: Pace) -> bool:
        """Pass lines on up to the end of the answer, and return whether that was among them."""
        passed: list[bytes] = []
        said_something = over = False
        try:
            for line in lines:
                passed.append(self.manner.line(line))
                if not line.isspace():
                    self._told.line(line)
                    said_something = said_something or not line.startswith(b":")  # comments may go on for ever
                elif over := self.manner.is_over:
                    break
        finally:
            if data := b"".join(passed):
                await stream.write(data)
        if said_something:
            pace.came()
        return over

    def no_stream(self, whole: Whole) -> GatewayError:
        """Return what it means that a server answers like this where a stream was awaited, and has begun."""
        if whole.status == 200:
            return UpstreamFailed("The model's server answered with something that is no stream.")
        return without_key(self.engine.refusal(whole.status, whole.body), self.spec)


class PutThrough(Response):
    """The answer to a request that is put through: what an endpoint returns."""

    background = None

    def __init__(self, passage: Passage) -> None:  # and not the base class's: there is no body yet
        self._passage = passage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
                with until_departure(scope, receive) as interrupt:
                    whole = await passage.carry_out(interrupt, streamed=passage.streamed)
            except Departed:
                note(scope, LEFT)
                log.info("%s: a caller left", passage.instance.name)
            except GatewayError as error:
                note(scope, error.code)
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


async def look(instance: Served, call: Call, client: Client, *, request_id: str) -> Whole:
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
            _refuse_odd_status(answer)
            if answer.status in _PROVIDERS_REFUSAL:
                raise instance.engine.refusal(answer.status, b"")
            _refuse_compressed(answer)
            return await _whole(_discreet(answer, instance.spec))
    except (Broken, ConnectFailed, TimeoutError) as error:
        words = f"The server of {instance.spec.id} does not answer ({type(error).__name__})."
        raise UpstreamFailed(words) from None


class Told:
    """How many tokens an answer has that is passed on as it is, from what the server says of it anyway.

    A stream whose server does not say has as many as it has events.
    """

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self._said: int | None = None
        self._events = 0

    @property
    def tokens(self) -> int:
        return self._events if self._said is None else self._said

    def whole(self, headers: Mapping[str, str], body: bytes) -> None:
        """Look into an answer that is whole: into TGI's headers, and where OpenAI's bodies have their `usage`."""
        for name in ("generated_tokens", "prompt_tokens"):
            if re.fullmatch(r"\d{1,9}", said := headers.get("x-" + name.replace("_", "-"), ""), re.ASCII):
                self._take(name, int(said))
        self._look(body[-USAGE_BYTES:])

    def line(self, line: bytes) -> None:
        """Look into the next line of a stream."""
        if line.startswith(b"data:") and not line.startswith(OPENAIS_END):
            self._events += 1
            if b'_tokens"' in line:
                self._look(line[-USAGE_BYTES:])

    def _look(self, words: bytes) -> None:
        for name, said in _TOLD.findall(words):
            self._take(name.decode(), int(said))

    def _take(self, name: str, tokens: int) -> None:
        if name in ("prompt_tokens", "input_length"):
            self.prompt_tokens = tokens
        else:
            self._said = tokens


class _Lines:
    """Cuts what comes into lines."""

    def __init__(self) -> None:
        self._begun = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the lines that are complete now, with their ends.

        Raises:
            GenerationFailed: one has no end.
        """
        *lines, begun = chunk.split(b"\n")
        if lines and self._begun:
            lines[0] = bytes(self._begun) + lines[0]
            self._begun.clear()
        if begun:
            self._begun += begun
        if len(self._begun) > MOST_LINE_BYTES:
            raise GenerationFailed(f"The model's server sent more than {MOST_LINE_BYTES:,} bytes that are no event.")
        return [line + b"\n" for line in lines]

    def rest(self) -> bytes:
        """Return the line that has no end."""
        return bytes(self._begun)


class _Discreet:
    """An answer without the gateway's key, in whatever place and pieces the server repeats it."""

    def __init__(self, answer: Answer, spec: ModelSpec) -> None:
        self._answer = answer
        self._spec = spec
        self.status = answer.status
        self.retry_after_s = answer.retry_after_s
        self.headers = {name: self._hidden(value) for name, value in answer.headers.items()}
        self._held = b""
        """What may be the beginning of the key."""

    async def more(self) -> bytes:
        while chunk := await self._answer.more():
            said = hidden(self._held + chunk, self._spec)
            sure = len(said) - begun_key(said, self._spec)
            self._held = said[sure:]
            if sure:
                return said[:sure]
        held, self._held = self._held, b""
        return held

    def _hidden(self, value: str) -> str:
        return hidden(value.encode("utf-8", "surrogateescape"), self._spec).decode("utf-8", "surrogateescape")


def _discreet(answer: Answer, spec: ModelSpec) -> Answer:
    """Return the answer without the key, if there is one. A good answer may hold words that only stand in its place."""
    key = spec.api_key.get_secret_value() if spec.api_key else ""
    return _Discreet(answer, spec) if len(key) >= (SHORTEST_KEY if answer.status == 200 else 1) else answer


def _refuse_odd_status(answer: Answer) -> None:
    """Raise UpstreamFailed for what is not the status of an answer."""
    if not 200 <= answer.status <= 599:
        raise UpstreamFailed(f"The model's server answered with status {answer.status}; look into its log.")


def _refuse_compressed(answer: Answer) -> None:
    """Raise UpstreamFailed for an answer of which nothing can be read."""
    if answer.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise UpstreamFailed(
            "The model's server compressed its answer, though it was asked not to (Accept-Encoding: identity). "
            "Turn compression off there, or in the proxy before it."
        )


def _is_stream(answer: Answer) -> bool:
    return answer.headers.get("content-type", "").partition(";")[0].strip().lower() == "text/event-stream"


def _passed_on(headers: Mapping[str, str]) -> Head:
    """Return those of a server's headers that are meant for whoever asked."""
    kept = ((name, value) for name, value in headers.items() if _PASSED_ON.fullmatch(name))
    return [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in kept]


async def _whole(answer: Answer) -> Whole:
    body = await start_of(answer, MOST_BYTES)
    if len(body) == MOST_BYTES:
        raise UpstreamFailed(f"The model's server answered with more than {MOST_BYTES:,} bytes; stream the answer.")
    return Whole(answer.status, _passed_on(answer.headers), body)
