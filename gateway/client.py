"""The Python client of a gateway: `InferenceClient`, and `AsyncInferenceClient` for asyncio.

    from gateway.client import InferenceClient

    with InferenceClient("http://127.0.0.1:8000") as client:
        result = client.generate("The capital of France is", max_tokens=20, temperature=0.0)
        print(result["generated_text"])
        for text in client.stream("Once upon a time"):
            print(text, end="", flush=True)

A model that is not running is started by the first request for it, which may take minutes: generations, starts and
stops are waited for as long as they take, unless the caller sets `timeout_s`. What is not given is not sent, so the
gateway's defaults hold. Talks HTTP, and imports nothing else of the package.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NotRequired, Protocol, Self, TypedDict, TypeVar, Unpack, cast
from urllib.parse import quote, urlsplit

import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S = 5.0
QUICK_TIMEOUT_S = 30.0
"""How long a question that the gateway answers from memory may take, unless the caller sets `timeout_s`."""

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

# ---- what is asked and answered -------------------------------------------------------------------------------------


class Parameters(TypedDict, total=False):
    """What a generation may be asked. None counts as not given; the gateway says what it allows and assumes."""

    model: str | None
    """Id, alias or hub name of a model; the gateway's default model if absent."""
    max_new_tokens: int | None
    max_tokens: int | None
    """The same as max_new_tokens: give one of them."""
    temperature: float | None
    """0 to 2; 0 always takes the likeliest token."""
    top_p: float | None
    top_k: int | None
    stop: list[str] | str | None
    stop_on_newline: bool | None
    seed: int | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    top_tokens: int | None
    """Report so many of the likeliest tokens at each position, in `tokens`."""
    return_full_text: bool | None
    """Whether generated_text begins with the prompt; never in streams."""


class ChatMessage(TypedDict):
    """One turn of a conversation, in OpenAI's words."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


class ChatParameters(TypedDict, total=False):
    """What an answer in a conversation may be asked. None counts as not given."""

    max_tokens: int | None
    temperature: float | None
    """0 to 2; 0 always takes the likeliest token."""
    top_p: float | None
    stop: list[str] | str | None
    seed: int | None
    frequency_penalty: float | None
    presence_penalty: float | None


class Candidate(TypedDict):
    """One candidate for a position, and how likely it was."""

    token: str
    probability: float
    percentage: float
    logprob: float
    rank: int


class Generated(TypedDict):
    """The answer to `generate`."""

    generated_text: str
    model_id: str
    model: str
    prompt: str
    tokens_generated: int
    finish_reason: str
    tokens: NotRequired[list[list[Candidate]]]


class Progress(TypedDict):
    """How far a start has come; `eta_s` is in how many seconds the model is ready, if that can be estimated."""

    phase: str
    done: float | None
    total: float | None
    unit: str | None
    eta_s: NotRequired[float | None]


class LastError(TypedDict):
    error_code: str
    detail: str
    evidence: list[str]
    fix: str | None
    at: float
    retry_at: float | None


class LastStop(TypedDict):
    """Why a model last began to go down, at `at` seconds since 1970."""

    reason: str
    at: float


class Model(TypedDict):
    """One model of the catalog, and what is known of it now."""

    id: str
    name: str
    hf_name: str | None
    running: bool
    state: str
    engine: str
    runtime: str
    progress: Progress | None
    in_flight: int
    queued: int
    idle_seconds: float | None
    port: int | None
    gpus: NotRequired[list[str]]
    waits_for: NotRequired[str | None]
    """Why it has no GPUs yet, while it waits for some."""
    held_for: NotRequired[str | None]
    """The model that gets its GPUs as soon as what it works on has ended."""
    last_error: LastError | None
    last_stop: NotRequired[LastStop | None]


class Message(TypedDict):
    message: str


class Started(TypedDict):
    message: str
    port: int | None
    container_name: str


class Health(TypedDict):
    status: str
    model_loaded: bool
    checkpoint: str | None
    timestamp: str


class Event(TypedDict):
    """One event of the gateway: `event` is `state`, `progress` or `catalog`; `id` is what to go on from."""

    id: int
    event: str
    data: dict[str, Any]


# ---- what goes wrong ------------------------------------------------------------------------------------------------


class ClientError(Exception):
    """A request had no good answer."""


class GatewayRefused(ClientError):
    """The gateway answered, and the answer is no.

    `error_code` is one of its documented codes, which never change. `retry_after_s` is set where waiting helps, and
    `extra` holds what else it said (`fix`, `evidence`). Where a stream failed after it had begun, `status` is 200.
    """

    def __init__(
        self,
        status: int,
        error_code: str,
        detail: str,
        retry_after_s: float | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(status, error_code, detail, retry_after_s, extra)
        self.status = status
        self.error_code = error_code
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.extra = dict(extra or {})

    def __str__(self) -> str:
        wait = "" if self.retry_after_s is None else f" Try again in {self.retry_after_s:g} s."
        return f"{self.error_code}: {self.detail}{wait}"


class GatewayUnreachable(ClientError):
    """No gateway answered at `url`, or not to the end."""

    def __init__(self, url: str, words: str) -> None:
        super().__init__(url, words)
        self.url = url
        self.words = words

    def __str__(self) -> str:
        return self.words


@contextmanager
def _in_words(url: str) -> Iterator[None]:
    """Turn whatever httpx raises into `GatewayUnreachable`."""
    try:
        yield
    except httpx.RequestError as error:
        raise GatewayUnreachable(url, _why(url, error)) from error


def _why(url: str, error: httpx.RequestError) -> str:
    reason = str(error) or type(error).__name__
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return f"No gateway answers at {url} ({reason}). Start one with `gateway serve`, or name its address."
    if isinstance(error, httpx.TimeoutException):
        return f"The gateway at {url} did not answer in time ({reason}); wait longer with timeout_s, or read its log."
    return f"The gateway at {url} broke the connection off ({reason}); its log may say why."


def _not_a_gateway(url: str) -> GatewayUnreachable:
    return GatewayUnreachable(url, f"What answers at {url} is not a gateway; name the address of `gateway serve`.")


def _refusal(response: httpx.Response) -> GatewayRefused:
    """Return the error that a read answer stands for, whoever on the way may have written it."""
    try:
        said = response.json()
    except ValueError:
        said = None
    if isinstance(said, dict) and isinstance(said.get("error"), dict):
        return _openai_refusal(response.status_code, said["error"], _retry_after(response))
    if not isinstance(said, dict) or "detail" not in said:
        words = f"HTTP {response.status_code} {response.reason_phrase}, and not in a gateway's words"
        return GatewayRefused(response.status_code, "UNKNOWN", f"{words}: is this its address?", _retry_after(response))
    detail, code = said.pop("detail"), said.pop("error_code", "UNKNOWN")
    return GatewayRefused(response.status_code, str(code), _words(detail), _retry_after(response), said)


def _openai_refusal(status: int, error: Mapping[str, Any], retry_after_s: float | None = None) -> GatewayRefused:
    """Return the error that an object of OpenAI's shape stands for."""
    extra = {name: value for name, value in error.items() if name not in ("message", "code", "type", "param")}
    return GatewayRefused(status, str(error.get("code") or "UNKNOWN"), str(error.get("message")), retry_after_s, extra)


def _retry_after(response: httpx.Response) -> float | None:
    seconds = response.headers.get("retry-after", "")
    return float(seconds) if seconds.isascii() and seconds.isdigit() else None


def _words(detail: object) -> str:
    """Return a detail as one line; a list has the fields that are wrong."""
    if not isinstance(detail, list):
        return str(detail)
    faults = [fault for fault in detail if isinstance(fault, dict)]
    return "; ".join(f"{_field(fault.get('loc'))}: {fault.get('msg')}" for fault in faults)


def _field(loc: object) -> str:
    steps = [str(step) for step in loc] if isinstance(loc, list) else []
    return ".".join(steps[1:] or steps) or "request"


# ---- calls: what is sent --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Call:
    """One HTTP request. A `patient` one has no bound on its answer but the caller's own."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    patient: bool = False

    def arguments(self, timeout_s: float | None) -> dict[str, Any]:
        """Return the request as httpx takes it."""
        longest_s = timeout_s if timeout_s is not None or self.patient else QUICK_TIMEOUT_S
        return {
            "method": self.method,
            "url": self.path,
            "json": self.body,
            "params": self.query or None,
            "headers": self.headers,
            "timeout": httpx.Timeout(longest_s, connect=min(CONNECT_TIMEOUT_S, longest_s or CONNECT_TIMEOUT_S)),
        }


def _generation(path: str, prompt: str, parameters: Parameters) -> _Call:
    if unknown := parameters.keys() - Parameters.__annotations__.keys():
        raise TypeError(f"no such parameter: {', '.join(sorted(unknown))}")
    given = {name: value for name, value in parameters.items() if value is not None}
    if "model" in given:
        given["model_id"] = given.pop("model")
    return _Call("POST", path, {"prompt": prompt, **given}, patient=True)


def _conversation(model_id: str, messages: Sequence[ChatMessage], parameters: ChatParameters) -> _Call:
    if unknown := parameters.keys() - ChatParameters.__annotations__.keys():
        raise TypeError(f"no such parameter: {', '.join(sorted(unknown))}")
    given = {name: value for name, value in parameters.items() if value is not None}
    body = {"model": model_id, "messages": list(messages), **given, "stream": True}
    return _Call("POST", "/v1/chat/completions", body, patient=True)


def _model(model_id: str) -> _Call:
    return _Call("GET", _address(model_id))


def _start(model_id: str, wait: bool) -> _Call:
    return _Call("POST", f"{_address(model_id)}/start", query={} if wait else {"wait": "false"}, patient=True)


def _stop(model_id: str, force: bool) -> _Call:
    return _Call("POST", f"{_address(model_id)}/stop", query={"force": "true"} if force else {}, patient=True)


def _restart(model_id: str) -> _Call:
    return _Call("POST", f"{_address(model_id)}/restart", patient=True)


def _log(model_id: str, lines: int, follow: bool, replica: int) -> _Call:
    query = {"lines": str(lines)} | ({"follow": "true"} if follow else {})
    query |= {"replica": str(replica)} if replica else {}
    return _Call("GET", f"{_address(model_id)}/logs", query=query, patient=follow)


def _pull(model_id: str) -> _Call:
    return _Call("POST", f"{_address(model_id)}/pull", patient=True)


def _event_stream(last_event_id: int | None) -> _Call:
    headers = {} if last_event_id is None else {"Last-Event-ID": str(last_event_id)}
    return _Call("GET", "/events", headers=headers, patient=True)


def _address(model_id: str) -> str:
    return f"/models/{quote(model_id, safe='')}"


_MODELS = _Call("GET", "/models")
_HEALTH = _Call("GET", "/health")
_STATUS = _Call("GET", "/status")


@dataclass(frozen=True, slots=True)
class _Gateway:
    """Where a gateway is and how to be let in: what both clients are made of."""

    url: str
    api_key: str | None = field(repr=False)
    timeout_s: float | None

    def __post_init__(self) -> None:
        if not _is_address(self.url):
            raise ValueError(f"the gateway's address must be like {DEFAULT_URL}, without a user or password")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("the gateway's key holds characters that no key has")

    def options(self) -> dict[str, Any]:
        """Return what an httpx client is made with."""
        headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        # what the environment names as a proxy cannot reach this machine's own loopback
        loopback = urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")
        return {"base_url": self.url, "headers": headers, "trust_env": not loopback}

    def answer(self, response: httpx.Response) -> Any:
        """Return the JSON object of a good answer, or raise what a bad one stands for."""
        if not response.is_success:
            raise _refusal(response)
        try:
            said = response.json()
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise _not_a_gateway(self.url)
        return said

    def models(self, answer: Mapping[str, Any]) -> list[Model]:
        models = answer.get("models")
        if not isinstance(models, list):
            raise _not_a_gateway(self.url)
        return cast("list[Model]", models)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises where it is none
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc


# ---- streams: what comes back in pieces -----------------------------------------------------------------------------


class _Reading(Protocol[T_co]):
    """Makes values of a body's bytes, however they are cut into chunks."""

    def feed(self, chunk: bytes) -> Iterator[T_co]:
        """Yield what `chunk` completes."""

    def end(self) -> Iterator[T_co]:
        """Yield what the end of the body completes; raise if it must not end here."""


class _Lines:
    """Lines of text. Only a line feed ends one: JSON may hold any of the others that `str.splitlines` knows."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[str]:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode(errors="replace")

    def end(self) -> Iterator[str]:
        if self._rest:
            yield self._rest.decode(errors="replace")


@dataclass(slots=True)
class _Frame:
    """One server-sent event, as it is on the wire."""

    id: str = ""
    kind: str = "message"
    data: list[str] = field(default_factory=list)

    def take(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self.data.append(value)
        elif name == "event":
            self.kind = value
        elif name == "id":
            self.id = value


class _Frames:
    """Server-sent events with data. One that the body's end cuts short is dropped, as the standard says."""

    def __init__(self) -> None:
        self._lines = _Lines()
        self._frame = _Frame()

    def feed(self, chunk: bytes) -> Iterator[_Frame]:
        for line in self._lines.feed(chunk):
            if line:
                self._frame.take(line)
                continue
            frame, self._frame = self._frame, _Frame()
            if frame.data:
                yield frame


class _Events:
    """The gateway's own events."""

    def __init__(self) -> None:
        self._frames = _Frames()

    def feed(self, chunk: bytes) -> Iterator[Event]:
        for frame in self._frames.feed(chunk):
            yield {"id": int(frame.id), "event": frame.kind, "data": json.loads("\n".join(frame.data))}

    def end(self) -> Iterator[Event]:
        return iter(())


class _Tokens:
    """The texts of a generation's tokens, from events in TGI's shape. Special tokens are no text."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._frames = _Frames()
        self._complete = False

    def feed(self, chunk: bytes) -> Iterator[str]:
        for frame in self._frames.feed(chunk):
            said = json.loads("\n".join(frame.data))
            if "error" in said:
                raise GatewayRefused(200, said.get("error_code", "UNKNOWN"), str(said["error"]))
            self._complete = said["generated_text"] is not None
            token = said["token"]
            if token["text"] and not token["special"]:
                yield token["text"]

    def end(self) -> Iterator[str]:
        if not self._complete:
            raise GatewayUnreachable(self._url, f"The gateway at {self._url} ended a stream before its last token.")
        return iter(())


class _Turn:
    """The texts of an assistant's turn, from chunks in OpenAI's shape. Who made them may be a provider."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._frames = _Frames()
        self._complete = False

    def feed(self, chunk: bytes) -> Iterator[str]:
        for frame in self._frames.feed(chunk):
            data = "\n".join(frame.data)
            if data == "[DONE]":
                self._complete = True
            elif not self._complete:
                yield from self._texts(data)

    def _texts(self, data: str) -> list[str]:
        try:
            said = json.loads(data)
            if isinstance(error := said.get("error"), dict):
                raise _openai_refusal(200, error)
            return [text for choice in said["choices"] if (text := str(choice["delta"].get("content") or ""))]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            words = f"The gateway at {self._url} sent something that is no part of a chat; its log may say why."
            raise GatewayUnreachable(self._url, words) from None

    def end(self) -> Iterator[str]:
        if not self._complete:
            raise GatewayUnreachable(self._url, f"The gateway at {self._url} ended a stream before its last token.")
        return iter(())


class _PullLines:
    """How far a pull has come. Its last line says that it is done, or why it failed."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lines = _Lines()
        self._last = ""

    def feed(self, chunk: bytes) -> Iterator[str]:
        yield from map(self._seen, self._lines.feed(chunk))

    def end(self) -> Iterator[str]:
        yield from map(self._seen, self._lines.end())
        if not self._last.startswith("done: "):
            raise GatewayUnreachable(self._url, f"The gateway at {self._url} ended a pull before it was done.")

    def _seen(self, line: str) -> str:
        self._last = line
        if line.startswith("failed: "):
            raise GatewayRefused(200, "START_FAILED", line.removeprefix("failed: "))  # the line has no code of its own
        return line


# ---- the clients ----------------------------------------------------------------------------------------------------


class InferenceClient:
    """Talks to one gateway. Close it, or use it as a context manager; threads may share it.

    `timeout_s` bounds each wait for the gateway's next bytes. By default a generation, start or stop may take as
    long as it needs, and anything else 30 seconds. Whatever is asked raises `GatewayRefused` or `GatewayUnreachable`.
    """

    def __init__(
        self, base_url: str = DEFAULT_URL, *, api_key: str | None = None, timeout_s: float | None = None
    ) -> None:
        self._gateway = _Gateway(base_url, api_key, timeout_s)
        self._http = httpx.Client(**self._gateway.options())

    def generate(self, prompt: str, **parameters: Unpack[Parameters]) -> Generated:
        """Return the answer to a prompt, whole. `Parameters` lists what may be asked."""
        return cast(Generated, self._ask(_generation("/generate", prompt, parameters)))

    def stream(self, prompt: str, **parameters: Unpack[Parameters]) -> Generator[str]:
        """Yield the texts of the answer's tokens as they come; closing the iterator ends the generation."""
        return self._read(_generation("/generate_stream", prompt, parameters), _Tokens(self._gateway.url))

    def chat(
        self,
        id: str,  # noqa: A002 - what the contract calls it
        messages: Sequence[ChatMessage],
        **parameters: Unpack[ChatParameters],
    ) -> Generator[str]:
        """Yield the pieces of the assistant's next turn as they come; closing the iterator ends the generation."""
        return self._read(_conversation(id, messages, parameters), _Turn(self._gateway.url))

    def models(self) -> list[Model]:
        """Return all models of the catalog."""
        return self._gateway.models(self._ask(_MODELS))

    def model(self, id: str) -> Model:  # noqa: A002 - what the contract calls it
        return cast(Model, self._ask(_model(id)))

    def start(self, id: str, wait: bool = True) -> Started:  # noqa: A002
        """Start a model and return when it is ready; without `wait` return at once."""
        return cast(Started, self._ask(_start(id, wait)))

    def stop(self, id: str, force: bool = False) -> Message:  # noqa: A002
        """Let a model's requests finish, stop it, and return when it is gone; `force` cuts the requests off."""
        return cast(Message, self._ask(_stop(id, force)))

    def restart(self, id: str) -> Started:  # noqa: A002
        return cast(Started, self._ask(_restart(id)))

    def logs(self, id: str, lines: int = 200, follow: bool = False, replica: int = 0) -> Generator[str]:  # noqa: A002
        """Yield the last lines of a model's server, or that of a `replica`; with `follow` go on until it ends."""
        return self._read(_log(id, lines, follow, replica), _Lines())

    def pull(self, id: str) -> Generator[str]:  # noqa: A002
        """Fetch a model's image and weights without starting it; yield lines that say how far that has come.

        The last one begins with `done: `. What fails raises `GatewayRefused`. Closing the iterator does not end the
        download.
        """
        return self._read(_pull(id), _PullLines(self._gateway.url))

    def events(self, last_event_id: int | None = None) -> Generator[Event]:
        """Yield what happens from now on, or after an event seen before, until the gateway ends."""
        return self._read(_event_stream(last_event_id), _Events())

    def health(self) -> Health:
        return cast(Health, self._ask(_HEALTH))

    def status(self) -> Mapping[str, Any]:
        """Return what `GET /status` says of the gateway, its GPUs and its catalog."""
        return cast("Mapping[str, Any]", self._ask(_STATUS))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, call: _Call) -> Any:
        with _in_words(self._gateway.url):
            response = self._http.request(**call.arguments(self._gateway.timeout_s))
        return self._gateway.answer(response)

    def _read(self, call: _Call, reading: _Reading[T]) -> Generator[T]:
        with _in_words(self._gateway.url), self._http.stream(**call.arguments(self._gateway.timeout_s)) as response:
            if not response.is_success:
                response.read()
                raise _refusal(response)
            for chunk in response.iter_bytes():
                yield from reading.feed(chunk)
        yield from reading.end()


class AsyncInferenceClient:
    """As `InferenceClient`, for asyncio: what that returns is awaited here, what it yields comes by `async for`.

    Leave a stream early inside `contextlib.aclosing(...)`, so that its generation ends at once.
    """

    def __init__(
        self, base_url: str = DEFAULT_URL, *, api_key: str | None = None, timeout_s: float | None = None
    ) -> None:
        self._gateway = _Gateway(base_url, api_key, timeout_s)
        self._http = httpx.AsyncClient(**self._gateway.options())

    async def generate(self, prompt: str, **parameters: Unpack[Parameters]) -> Generated:
        return cast(Generated, await self._ask(_generation("/generate", prompt, parameters)))

    def stream(self, prompt: str, **parameters: Unpack[Parameters]) -> AsyncGenerator[str]:
        return self._read(_generation("/generate_stream", prompt, parameters), _Tokens(self._gateway.url))

    def chat(
        self,
        id: str,  # noqa: A002
        messages: Sequence[ChatMessage],
        **parameters: Unpack[ChatParameters],
    ) -> AsyncGenerator[str]:
        return self._read(_conversation(id, messages, parameters), _Turn(self._gateway.url))

    async def models(self) -> list[Model]:
        return self._gateway.models(await self._ask(_MODELS))

    async def model(self, id: str) -> Model:  # noqa: A002
        return cast(Model, await self._ask(_model(id)))

    async def start(self, id: str, wait: bool = True) -> Started:  # noqa: A002
        return cast(Started, await self._ask(_start(id, wait)))

    async def stop(self, id: str, force: bool = False) -> Message:  # noqa: A002
        return cast(Message, await self._ask(_stop(id, force)))

    async def restart(self, id: str) -> Started:  # noqa: A002
        return cast(Started, await self._ask(_restart(id)))

    def logs(
        self,
        id: str,  # noqa: A002
        lines: int = 200,
        follow: bool = False,
        replica: int = 0,
    ) -> AsyncGenerator[str]:
        return self._read(_log(id, lines, follow, replica), _Lines())

    def pull(self, id: str) -> AsyncGenerator[str]:  # noqa: A002
        return self._read(_pull(id), _PullLines(self._gateway.url))

    def events(self, last_event_id: int | None = None) -> AsyncGenerator[Event]:
        return self._read(_event_stream(last_event_id), _Events())

    async def health(self) -> Health:
        return cast(Health, await self._ask(_HEALTH))

    async def status(self) -> Mapping[str, Any]:
        return cast("Mapping[str, Any]", await self._ask(_STATUS))

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _ask(self, call: _Call) -> Any:
        with _in_words(self._gateway.url):
            response = await self._http.request(**call.arguments(self._gateway.timeout_s))
        return self._gateway.answer(response)

    async def _read(self, call: _Call, reading: _Reading[T]) -> AsyncGenerator[T]:
        arguments = call.arguments(self._gateway.timeout_s)
        with _in_words(self._gateway.url):
            async with self._http.stream(**arguments) as response:
                if not response.is_success:
                    await response.aread()
                    raise _refusal(response)
                async for chunk in response.aiter_bytes():
                    for value in reading.feed(chunk):
                        yield value
        for value in reading.end():
            yield value
