"""The Python client, sync and async alike: what it sends, what it makes of answers, streams however cut, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
import respx

from gateway.client import (
    AsyncInferenceClient,
    ChatMessage,
    ClientError,
    GatewayRefused,
    GatewayUnreachable,
    InferenceClient,
)

URL = "http://gateway.test:8000"
ANSWER = {
    "generated_text": "The sky is blue",
    "model_id": "m",
    "model": "m",
    "prompt": "The sky is",
    "tokens_generated": 1,
    "finish_reason": "length",
}


class Both:
    """Both clients behind one face: `both.generate(...)` asks the one or the other, and waits for it."""

    def __init__(self, kind: str, **options: Any) -> None:
        self._kind = kind
        self._options = {"base_url": URL, **options}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return self._sync(name) if self._kind == "sync" else self._async(name)

    def _sync(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with InferenceClient(**self._options) as client:
                answer = getattr(client, name)(*args, **options)
                return list(answer) if isinstance(answer, Iterator) else answer

        return call

    def _async(self, name: str) -> Callable[..., Any]:
        async def call(*args: Any, **options: Any) -> Any:
            async with AsyncInferenceClient(**self._options) as client:
                answer = getattr(client, name)(*args, **options)
                return [item async for item in answer] if isinstance(answer, AsyncIterator) else await answer

        return lambda *args, **options: asyncio.run(call(*args, **options))


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def both(kind: str) -> Both:
    return Both(kind)


@pytest.fixture
def gateway() -> Iterator[respx.MockRouter]:
    with respx.mock(base_url=URL) as router:
        yield router


def sent(route: respx.Route) -> Any:
    return json.loads(route.calls.last.request.content)


class Cut(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that arrives in these pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        yield from self._pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


def frame(text: str, whole: str | None = None, *, special: bool = False) -> bytes:
    token = {"id": 1, "text": text, "logprob": -0.1, "special": special}
    said = {"index": 1, "token": token, "generated_text": whole, "details": None}
    return b"data: " + json.dumps(said, ensure_ascii=False).encode() + b"\n\n"


# ---- what is sent ---------------------------------------------------------------------------------------------------


def test_the_documents_example(gateway: respx.MockRouter) -> None:
    gateway.post("/generate").respond(json=ANSWER)
    client = InferenceClient(URL)

    result = client.generate(prompt="123+456=", max_tokens=20, temperature=0.0)

    assert result["generated_text"] == "The sky is blue"
    client.close()


def test_only_what_was_given_is_sent(both: Both, gateway: respx.MockRouter) -> None:
    route = gateway.post("/generate").respond(json=ANSWER)

    assert both.generate("The sky is") == ANSWER

    assert sent(route) == {"prompt": "The sky is"}


def test_every_parameter_has_its_documented_name(both: Both, gateway: respx.MockRouter) -> None:
    route = gateway.post("/generate").respond(json=ANSWER)
    parameters = {
        "max_new_tokens": 5,
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 3,
        "stop": ["."],
        "stop_on_newline": False,
        "seed": 0,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.0,
        "presence_penalty": -1.0,
        "top_tokens": 2,
        "return_full_text": False,
    }

    both.generate("p", model="gpt-2", max_tokens=None, **parameters)

    assert sent(route) == {"prompt": "p", "model_id": "gpt-2", **parameters}


def test_a_misspelt_parameter_is_refused_before_anything_is_sent(both: Both) -> None:
    with pytest.raises(TypeError, match="no such parameter: max_tokns"):
        both.generate("p", max_tokns=3)


@pytest.mark.parametrize(
    ("ask", "method", "target"),
    [
        (lambda c: c.models(), "GET", "/models"),
        (lambda c: c.model("gpt-2"), "GET", "/models/gpt-2"),
        (lambda c: c.model("a/b"), "GET", "/models/a%2Fb"),
        (lambda c: c.start("gpt-2"), "POST", "/models/gpt-2/start"),
        (lambda c: c.start("gpt-2", wait=False), "POST", "/models/gpt-2/start?wait=false"),
        (lambda c: c.stop("gpt-2"), "POST", "/models/gpt-2/stop"),
        (lambda c: c.stop("gpt-2", force=True), "POST", "/models/gpt-2/stop?force=true"),
        (lambda c: c.restart("gpt-2"), "POST", "/models/gpt-2/restart"),
        (lambda c: c.logs("gpt-2"), "GET", "/models/gpt-2/logs?lines=200"),
        (lambda c: c.logs("gpt-2", lines=3, follow=True), "GET", "/models/gpt-2/logs?lines=3&follow=true"),
        (lambda c: c.events(), "GET", "/events"),
        (lambda c: c.health(), "GET", "/health"),
    ],
)
def test_each_address(
    both: Both, gateway: respx.MockRouter, ask: Callable[[Both], Any], method: str, target: str
) -> None:
    route = gateway.route().respond(json={"models": []})

    ask(both)

    request = route.calls.last.request
    assert (request.method, request.url.raw_path.decode()) == (method, target)
    assert request.content == b""
    assert "authorization" not in request.headers


def test_the_key_is_sent_as_bearer(kind: str, gateway: respx.MockRouter) -> None:
    route = gateway.get("/health").respond(json={"status": "ok"})

    Both(kind, api_key="secret").health()

    assert route.calls.last.request.headers["authorization"] == "Bearer secret"


def test_a_gateway_may_live_under_a_path(kind: str, gateway: respx.MockRouter) -> None:
    route = gateway.get("/llm/health").respond(json={"status": "ok"})

    assert Both(kind, base_url=f"{URL}/llm/").health() == {"status": "ok"}
    assert route.called


@pytest.mark.parametrize(
    ("ask", "read_s"),
    [
        (lambda c: c.health(), 30.0),
        (lambda c: c.logs("m"), 30.0),
        (lambda c: c.generate("p"), None),
        (lambda c: c.start("m"), None),
        (lambda c: c.stop("m"), None),
        (lambda c: c.restart("m"), None),
        (lambda c: c.logs("m", follow=True), None),
        (lambda c: c.events(), None),
    ],
)
def test_what_may_take_minutes_has_no_bound_but_the_callers(
    kind: str, gateway: respx.MockRouter, ask: Callable[[Both], Any], read_s: float | None
) -> None:
    route = gateway.route().respond(json={})

    ask(Both(kind))
    ask(Both(kind, timeout_s=2.5))

    by_default, by_caller = (call.request.extensions["timeout"] for call in route.calls)
    assert (by_default["connect"], by_default["read"]) == (5.0, read_s)
    assert (by_caller["connect"], by_caller["read"]) == (2.5, 2.5)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:x", "http://me:pw@host", ""])
def test_what_is_no_address_is_refused(kind: str, url: str) -> None:
    with pytest.raises(ValueError, match="the gateway's address must be like"):
        Both(kind, base_url=url).health()


def test_a_key_that_cannot_be_one_is_refused_and_not_shown(kind: str) -> None:
    with pytest.raises(ValueError, match="holds characters that no key has") as caught:
        Both(kind, api_key="secret\n").health()
    assert "secret" not in str(caught.value)


# ---- what is answered -----------------------------------------------------------------------------------------------


def test_models_are_a_list(both: Both, gateway: respx.MockRouter) -> None:
    gateway.get("/models").respond(json={"models": [{"id": "a"}, {"id": "b"}]})

    assert [model["id"] for model in both.models()] == ["a", "b"]


def test_log_lines_end_at_line_feeds_only(both: Both, gateway: respx.MockRouter) -> None:
    text = "one\r\ntwo\x0c\u2028still two\n\nlast, without an end".encode()
    gateway.get("/models/m/logs").respond(stream=Cut(text[:12], text[12:13], text[13:]))

    assert both.logs("m") == ["one", "two\x0c\u2028still two", "", "last, without an end"]


PULL = b"pulling, 1.0 MB of 9.0 MB\nextracting, 9.0 MB of 9.0 MB\ndone: image and weights of m are here\n"


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_pull_is_lines_until_it_is_done(both: Both, gateway: respx.MockRouter, size: int) -> None:
    route = gateway.post("/models/a%2Fb/pull").respond(
        stream=Cut(*(PULL[i : i + size] for i in range(0, len(PULL), size)))
    )

    assert both.pull("a/b") == PULL.decode().splitlines()
    assert route.calls.last.request.content == b""
    assert route.calls.last.request.extensions["timeout"]["read"] is None


def test_a_pull_that_fails_later_raises_what_its_last_line_says(gateway: respx.MockRouter) -> None:
    gateway.post("/models/m/pull").respond(stream=Cut(b"pulling\nfail", b"ed: The disk is full.\n"))

    with InferenceClient(URL) as client:
        lines = client.pull("m")
        assert next(lines) == "pulling"
        with pytest.raises(GatewayRefused, match=r"START_FAILED: The disk is full\.") as caught:
            next(lines)
    assert caught.value.status == 200


@pytest.mark.parametrize("body", [b"", b"pulling\n", b"done", b"done: all\nnot quite\n"])
def test_a_pull_without_its_end_is_an_error(both: Both, gateway: respx.MockRouter, body: bytes) -> None:
    gateway.post("/models/m/pull").respond(stream=Cut(body))

    with pytest.raises(GatewayUnreachable, match="ended a pull before it was done"):
        both.pull("m")


def test_a_pull_may_be_refused_with_a_status(both: Both, gateway: respx.MockRouter) -> None:
    said = {"detail": "No such image.", "error_code": "START_FAILED", "evidence": ["manifest unknown"]}
    gateway.post("/models/m/pull").respond(503, json=said)

    with pytest.raises(GatewayRefused, match="START_FAILED: No such image") as caught:
        both.pull("m")
    assert caught.value.extra == {"evidence": ["manifest unknown"]}


def test_events(both: Both, gateway: respx.MockRouter) -> None:
    body = (
        b": the last event was 6\n\n"
        b'id: 7\nevent: state\ndata: {"model":"m","to":"ready"}\n\n'
        b": still here\n\n"
        b'id: 8\r\nevent: progress\r\ndata: {"model":"m",\r\ndata: "phase":"x"}\r\n\r\n'
        b'id: 9\nevent: state\ndata: {"cut'
    )
    route = gateway.get("/events").respond(stream=Cut(*(body[i : i + 7] for i in range(0, len(body), 7))))

    assert both.events(last_event_id=6) == [
        {"id": 7, "event": "state", "data": {"model": "m", "to": "ready"}},
        {"id": 8, "event": "progress", "data": {"model": "m", "phase": "x"}},
    ]
    assert route.calls.last.request.headers["last-event-id"] == "6"


# ---- streams --------------------------------------------------------------------------------------------------------

STORY = (
    frame(" caf\u00e9") + b": still working\n\n" + frame("") + frame(" \u2028\U0001f600") + frame("", "", special=True)
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_a_stream_is_the_same_however_it_is_cut(both: Both, gateway: respx.MockRouter, size: int) -> None:
    pieces = [STORY[i : i + size] for i in range(0, len(STORY), size)]
    route = gateway.post("/generate_stream").respond(stream=Cut(*pieces))

    assert both.stream("p", max_tokens=3) == [" caf\u00e9", " \u2028\U0001f600"]
    assert sent(route) == {"prompt": "p", "max_tokens": 3}


def test_the_last_token_may_carry_the_whole_text(both: Both, gateway: respx.MockRouter) -> None:
    gateway.post("/generate_stream").respond(stream=Cut(frame("a") + frame("b", "ab")))

    assert both.stream("p") == ["a", "b"]


def test_special_tokens_are_no_text(both: Both, gateway: respx.MockRouter) -> None:
    gateway.post("/generate_stream").respond(stream=Cut(frame("a") + frame("</s>", "a", special=True)))

    assert both.stream("p") == ["a"]


FAILURE = b'data: {"error":"it broke","error_type":"GENERATION_FAILED","error_code":"GENERATION_FAILED"}\n\n'


def test_tokens_before_a_failure_are_given_and_then_it_raises(gateway: respx.MockRouter) -> None:
    gateway.post("/generate_stream").respond(stream=Cut(frame("a") + frame("b") + FAILURE))

    with InferenceClient(URL) as client:
        tokens = client.stream("p")
        assert [next(tokens), next(tokens)] == ["a", "b"]
        with pytest.raises(GatewayRefused, match="GENERATION_FAILED: it broke") as caught:
            next(tokens)
    assert caught.value.status == 200


@pytest.mark.parametrize("body", [b"", frame("a"), frame("a", "a")[:-1], b"<html>something else</html>"])
def test_a_stream_without_its_end_is_an_error(both: Both, gateway: respx.MockRouter, body: bytes) -> None:
    gateway.post("/generate_stream").respond(stream=Cut(body))

    with pytest.raises(GatewayUnreachable, match="ended a stream before its last token"):
        both.stream("p")


def test_a_stream_may_be_refused_with_a_status(both: Both, gateway: respx.MockRouter) -> None:
    gateway.post("/generate_stream").respond(404, json={"detail": "No model is called 'x'.", "error_code": "X"})

    with pytest.raises(GatewayRefused, match="No model is called 'x'"):
        both.stream("p", model="x")


def chunk(text: str | None, **more: Any) -> bytes:
    said = {"choices": [{"index": 0, "delta": {"content": text} if text is not None else {}}], "usage": None, **more}
    return b"data: " + json.dumps(said, ensure_ascii=False).encode() + b"\n\n"


TURN = (
    chunk("") + chunk(" caf\u00e9") + b": still working\n\n" + chunk(None) + chunk(" \U0001f600") + b"data: [DONE]\n\n"
)
HELLO: list[ChatMessage] = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("size", [1, 3, 64, 10_000])
def test_a_turn_is_the_same_however_it_is_cut(both: Both, gateway: respx.MockRouter, size: int) -> None:
    pieces = [TURN[i : i + size] for i in range(0, len(TURN), size)]
    route = gateway.post("/v1/chat/completions").respond(stream=Cut(*pieces))

    assert both.chat("m", HELLO, temperature=0, max_tokens=None) == [" caf\u00e9", " \U0001f600"]
    assert sent(route) == {"model": "m", "messages": HELLO, "temperature": 0, "stream": True}


@pytest.mark.parametrize("body", [b"", chunk("a"), chunk("a") + b"data: [DONE]"])
def test_a_turn_without_its_end_is_an_error(both: Both, gateway: respx.MockRouter, body: bytes) -> None:
    gateway.post("/v1/chat/completions").respond(stream=Cut(body))

    with pytest.raises(GatewayUnreachable, match="ended a stream before its last token"):
        both.chat("m", HELLO)


def test_a_turn_may_be_refused_early_and_late_in_openais_words(both: Both, gateway: respx.MockRouter) -> None:
    error = {"message": "No.", "type": "server_error", "param": None, "code": "START_FAILED", "fix": "Do."}
    late = chunk("a") + b"data: " + json.dumps({"error": error}).encode() + b"\n\n"
    gateway.post("/v1/chat/completions").side_effect = [
        httpx.Response(503, json={"error": error}, headers={"Retry-After": "7"}),
        httpx.Response(200, stream=Cut(late)),
    ]

    for status, retry_after_s in ((503, 7.0), (200, None)):
        with pytest.raises(GatewayRefused, match="START_FAILED: No") as caught:
            both.chat("m", HELLO)
        assert (caught.value.status, caught.value.retry_after_s) == (status, retry_after_s)
        assert caught.value.extra == {"fix": "Do."}


@pytest.mark.parametrize(
    "data", ["nonsense", "[]", "7", "{}", '{"choices": 7}', '{"choices": [7]}', '{"choices": [{}]}', "[" * 100_000]
)
def test_a_chunk_that_is_none_is_an_error_in_words(both: Both, gateway: respx.MockRouter, data: str) -> None:
    body = chunk("a") + f"data: {data}\n\n".encode() + b"data: [DONE]\n\n"
    gateway.post("/v1/chat/completions").respond(stream=Cut(body))

    with pytest.raises(GatewayUnreachable, match="no part of a chat"):
        both.chat("m", HELLO)


def test_what_comes_after_the_end_of_a_turn_is_not_part_of_it(both: Both, gateway: respx.MockRouter) -> None:
    gateway.post("/v1/chat/completions").respond(stream=Cut(chunk("a") + b"data: [DONE]\n\ndata: nonsense\n\n"))

    assert both.chat("m", HELLO) == ["a"]


def test_a_misspelt_parameter_of_a_chat_is_refused(both: Both) -> None:
    with pytest.raises(TypeError, match="no such parameter: temprature"):
        both.chat("m", HELLO, temprature=1)


def test_a_stream_left_early_closes_its_connection(gateway: respx.MockRouter) -> None:
    closed = []

    class Endless(Cut):
        def __iter__(self) -> Iterator[bytes]:
            while True:
                yield frame("a")

        def close(self) -> None:
            closed.append(True)

    gateway.post("/generate_stream").respond(stream=Endless())

    with InferenceClient(URL) as client:
        tokens = client.stream("p")
        assert next(tokens) == "a"
        tokens.close()
        assert closed == [True]


# ---- errors ---------------------------------------------------------------------------------------------------------


def refused(both: Both) -> GatewayRefused:
    with pytest.raises(GatewayRefused) as caught:
        both.generate("p")
    return caught.value


def test_a_refusal_says_what_the_gateway_said(both: Both, gateway: respx.MockRouter) -> None:
    said = {"detail": "It ended.", "error_code": "START_FAILED", "fix": "Buy memory.", "evidence": ["OOM"]}
    gateway.post("/generate").respond(503, json=said, headers={"Retry-After": "30"})

    error = refused(both)

    assert (error.status, error.error_code, error.detail, error.retry_after_s) == (503, "START_FAILED", "It ended.", 30)
    assert error.extra == {"fix": "Buy memory.", "evidence": ["OOM"]}
    assert str(error) == "START_FAILED: It ended. Try again in 30 s."


def test_a_refused_body_names_the_fields(both: Both, gateway: respx.MockRouter) -> None:
    detail = [
        {"loc": ["body", "top_k"], "msg": "must be at least 1", "type": "x"},
        {"loc": ["body"], "msg": "must be JSON", "type": "y"},
    ]
    gateway.post("/generate").respond(422, json={"detail": detail, "error_code": "VALIDATION_ERROR"})

    assert str(refused(both)) == "VALIDATION_ERROR: top_k: must be at least 1; body: must be JSON"


@pytest.mark.parametrize("body", ["<html>502 Bad Gateway</html>", "", "[]", '{"message": "no"}'])
def test_whoever_else_refuses_is_named_by_its_status(both: Both, gateway: respx.MockRouter, body: str) -> None:
    date = "Wed, 21 Oct 2026 07:28:00 GMT"
    gateway.post("/generate").respond(502, text=body, headers={"Retry-After": date})

    error = refused(both)

    assert (error.status, error.error_code, error.retry_after_s) == (502, "UNKNOWN", None)
    assert error.detail.startswith("HTTP 502 Bad Gateway")


def test_a_redirect_is_no_answer(both: Both, gateway: respx.MockRouter) -> None:
    gateway.post("/generate").respond(307, headers={"Location": "/elsewhere"})

    assert refused(both).status == 307


@pytest.mark.parametrize("body", ["hello", "[]", ""])
def test_another_server_at_that_address(both: Both, gateway: respx.MockRouter, body: str) -> None:
    gateway.get("/models").respond(text=body)

    with pytest.raises(GatewayUnreachable, match=f"What answers at {URL} is not a gateway"):
        both.models()


def test_another_server_with_an_address_of_that_name(both: Both, gateway: respx.MockRouter) -> None:
    gateway.get("/models").respond(json={"object": "list", "data": []})

    with pytest.raises(GatewayUnreachable, match="is not a gateway"):
        both.models()


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (httpx.ConnectError("refused"), f"No gateway answers at {URL} (refused). Start one with `gateway serve`"),
        (httpx.ConnectTimeout(""), f"No gateway answers at {URL} (ConnectTimeout). Start one with"),
        (httpx.ReadTimeout("timed out"), f"The gateway at {URL} did not answer in time (timed out)"),
        (httpx.ReadError("reset"), f"The gateway at {URL} broke the connection off (reset)"),
        (httpx.RemoteProtocolError("gone"), f"The gateway at {URL} broke the connection off (gone)"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_a_gateway_that_does_not_answer(
    both: Both, gateway: respx.MockRouter, method: str, failure: Exception, words: str
) -> None:
    gateway.route().mock(side_effect=failure)

    with pytest.raises(GatewayUnreachable) as caught:
        getattr(both, method)("p")

    assert str(caught.value).startswith(words)
    assert caught.value.url == URL
    assert isinstance(caught.value, ClientError)


def test_nothing_listens(kind: str) -> None:
    with pytest.raises(GatewayUnreachable, match=r"No gateway answers at http://127\.0\.0\.1:1 "):
        Both(kind, base_url="http://127.0.0.1:1").health()


def test_a_proxy_of_the_environment_is_not_asked_for_loopback(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.test:3128")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)

    with pytest.raises(GatewayUnreachable, match=r"No gateway answers .*(refused|attempts failed)"):
        Both(kind, base_url="http://127.0.0.1:1").health()
