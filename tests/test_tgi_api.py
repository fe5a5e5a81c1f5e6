"""TGI's own API over another engine, over real sockets, before a server that does what each test tells it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from gateway.api.rights import right_for
from gateway.lifecycle import State
from tests.scripted_server import HEAD, Conversation, end, token
from tests.test_relay import Stage, stage, two_tokens

BASE = "/models/m/tgi"
ASKED = {"inputs": "Once", "parameters": {"max_new_tokens": 3}}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
TOKENS = b'{"tokens":[{"id":7,"piece":"Once"},{"id":8,"piece":" upon"}]}'


def answer(status: int, body: bytes) -> bytes:
    return (
        b"HTTP/1.1 %d Said\r\nContent-Length: %d\r\nContent-Type: application/json\r\n\r\n" % (status, len(body)) + body
    )


async def refused(on: Stage, path: str, body: Any) -> dict[str, Any]:
    answered = await on.post(BASE + path, body)
    assert answered.headers["content-type"] == "application/json"
    assert {"error", "error_type", "error_code"} <= answered.json().keys()
    assert "detail" not in answered.json()
    return {"status": answered.status_code, **answered.json()}


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({}, "VALIDATION_ERROR", "Input validation error: `inputs` field required"),
        ([], "VALIDATION_ERROR", "Input validation error: the body must be a JSON object"),
        (
            {"inputs": "", "parameters": {"top_p": 1}},
            "EMPTY_PROMPT",
            "Input validation error: `inputs` cannot be empty",
        ),
        (
            {"inputs": "x", "parameters": {"temperature": 0.0}},
            "INVALID_TEMPERATURE",
            "Input validation error: `temperature` must be strictly positive",
        ),
        (
            {"inputs": "x", "parameters": {"max_new_tokens": 0}},
            "INVALID_MAX_TOKENS",
            "Input validation error: `max_new_tokens` must be strictly positive",
        ),
        (
            {"inputs": "x", "parameters": {"max_new_tokens": 32}},
            "INVALID_MAX_TOKENS",
            "Input validation error: `max_new_tokens` must leave room for `inputs` in the 32 tokens",
        ),
        (
            {"inputs": "x", "parameters": {"top_k": 0}},
            "INVALID_TOP_K",
            "Input validation error: `top_k` must be strictly positive",
        ),
        ({"inputs": "x", "parameters": {"truncate": 3}}, "UNSUPPORTED", "Input validation error: `truncate` is not"),
        (
            {"inputs": "x", "parameters": None},
            "VALIDATION_ERROR",
            "Input validation error: `parameters` input should be",
        ),
        (
            {"inputs": "x", "parameters": {"grammar": {"type": "json", "value": {}}}},
            "VALIDATION_ERROR",
            "Input validation error: grammar is not valid: Grammar must have a 'properties' field",
        ),
        (
            {"inputs": "x", "parameters": {"temperature": -1, "top_p": 2}},
            "VALIDATION_ERROR",
            "Input validation error: `temperature` must be strictly positive; `top_p` must be > 0.0 and < 1.0",
        ),
    ],
)
def test_a_bad_request_is_refused_in_tgis_shape_and_wakes_nothing(body: Any, code: str, words: str) -> None:
    async def scene() -> None:
        async with stage(two_tokens, context_tokens=32) as on:
            for path in ("/generate", "/generate_stream", ""):
                told = await refused(on, path, body)
                assert (told["status"], told["error_type"], told["error_code"]) == (422, "validation", code)
                assert told["error"].startswith(words)
            assert on.instance.status.state is State.STOPPED

    asyncio.run(scene())


def test_a_prompt_that_is_too_long_is_422_before_a_stream_as_well() -> None:
    error = {"code": 400, "message": "too long", "type": "exceed_context_size_error", "n_prompt_tokens": 9, "n_ctx": 4}

    async def refuse(conversation: Conversation) -> None:
        await conversation.say(answer(400, json.dumps({"error": error}).encode()))

    async def scene() -> None:
        async with stage(refuse) as on:
            for path in ("/generate", "/generate_stream"):
                told = await refused(on, path, ASKED)
                assert (told["status"], told["error_code"]) == (422, "PROMPT_TOO_LONG")

    asyncio.run(scene())


def test_a_stream_that_breaks_off_ends_with_one_event_in_the_shape_of_its_address() -> None:
    async def break_off(conversation: Conversation) -> None:
        await conversation.say(HEAD + token(" upon"))

    async def scene() -> None:
        async with stage(break_off) as on:
            native = (await on.post(BASE + "/generate_stream", ASKED)).text
            openai = (await on.post(BASE + "/v1/completions", {"prompt": "Once", "stream": True})).text
            whole = await refused(on, "/generate", ASKED)

            first, last = [json.loads(event[6:]) for event in native.split("\n\n")[:-1]]
            assert first["token"]["text"] == " upon"
            assert (last["error_type"], last["error_code"]) == ("generation", "GENERATION_FAILED")
            *_, last = [json.loads(event[6:]) for event in openai.split("\n\n")[:-1]]
            assert last["error"]["http_status_code"] == 424
            assert last["error_type"] == "generation"
            assert (whole["status"], whole["error_type"]) == (424, "generation")

    asyncio.run(scene())


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "", "/tokenize"])
def test_the_connection_to_the_server_is_closed_when_the_caller_leaves(path: str) -> None:
    heard = asyncio.Event()

    async def go_on(conversation: Conversation) -> None:
        heard.set()
        await asyncio.get_running_loop().create_future()

    async def scene() -> None:
        async with stage(go_on) as on:
            asked = asyncio.create_task(on.post(BASE + path, ASKED))
            await asyncio.wait_for(heard.wait(), 5)
            asked.cancel()

            await asyncio.wait_for(on.server.left.wait(), 5)
            await on.nothing_is_held()

    asyncio.run(scene())


def test_a_text_is_cut_into_tokens_under_a_lease() -> None:
    heard: list[Any] = []

    async def cut(conversation: Conversation) -> None:
        heard.append((conversation.head.partition(b" HTTP")[0], json.loads(conversation.body)["content"]))
        await conversation.say(answer(200, TOKENS))

    async def scene() -> None:
        async with stage(cut) as on:
            answered = await on.post(BASE + "/tokenize", {"inputs": "Once upon", "parameters": {"top_p": 9}})

            assert answered.json() == [
                {"id": 7, "text": "Once", "start": 0, "stop": 4},
                {"id": 8, "text": " upon", "start": 4, "stop": 9},
            ]
            assert heard == [(b"POST /tokenize", "Once upon")]
            assert on.instance.status.state is State.READY  # it was woken
            await on.nothing_is_held()

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("said", "status", "kind"),
    [
        (answer(500, b"no"), 502, "upstream_failed"),
        (answer(401, b"no"), 502, "upstream_failed"),
        (answer(200, b"no"), 502, "upstream_failed"),
        (b"", 502, "upstream_failed"),
    ],
)
def test_tokens_that_do_not_come(said: bytes, status: int, kind: str) -> None:
    async def fail(conversation: Conversation) -> None:
        await conversation.say(said)

    async def scene() -> None:
        async with stage(fail) as on:
            told = await refused(on, "/tokenize", {"inputs": "Once"})

            assert (told["status"], told["error_type"]) == (status, kind)
            await on.nothing_is_held()

    asyncio.run(scene())


def test_an_engine_that_cannot_cut_a_text_is_not_asked() -> None:
    async def scene() -> None:
        keys = {"engine": "openai", "runtime": "external", "url": "http://127.0.0.1:1", "weights": None}
        async with stage(two_tokens, **keys) as on:
            told = await refused(on, "/tokenize", {"inputs": "Once"})

            assert (told["status"], told["error_code"]) == (422, "UNSUPPORTED")
            assert on.server.requests == on.server.checks == []

    asyncio.run(scene())


@pytest.mark.parametrize("keys", [{"parameters": {"temperature": 0.5}}, {"overrides": {"temperature": 0.5}}])
def test_a_tgi_is_not_put_through_to_where_the_catalog_has_a_word_in_it(keys: dict[str, Any]) -> None:
    heard: list[Any] = []

    async def listen(conversation: Conversation) -> None:
        heard.append(json.loads(conversation.body))
        last = {"generated_text": "x", "details": {"finish_reason": "length", "generated_tokens": 1, "input_length": 1}}
        event = {"token": {"id": 1, "text": "x", "logprob": -0.1, "special": False}, **last}
        await conversation.say(HEAD + b"data: " + json.dumps(event).encode() + b"\n\n")

    async def scene() -> None:
        external = {
            "engine": "tgi",
            "hf_name": "gpt2",
            "runtime": "external",
            "url": "http://127.0.0.1:1",
            "weights": None,
        }
        async with stage(listen, **external, **keys) as on:
            answered = await on.post(BASE + "/generate", ASKED)

            assert answered.json() == {"generated_text": "x"}
            assert heard[0]["parameters"]["temperature"] == 0.5

    asyncio.run(scene())


@pytest.mark.parametrize("state", ["loading", "failed"])
def test_health_is_tgis_own_word_while_no_request_would_be_served(state: str) -> None:
    async def scene() -> None:
        async with stage(two_tokens, start_timeout="300ms") as on:
            assert (await _get(on, "/health")).status_code == 200
            on.server.well = answer(503, b"")
            starting = asyncio.create_task(on.instance.start())
            while on.instance.status.state is not State(state):
                await asyncio.sleep(0.005)
            sick = await _get(on, "/health")
            assert (sick.status_code, sick.json()) == (503, {"error": "unhealthy", "error_type": "healthcheck"})
            await asyncio.wait([starting])
            assert starting.exception()

    asyncio.run(scene())


async def _get(on: Stage, path: str) -> httpx.Response:
    async with httpx.AsyncClient(timeout=20) as client:
        return await client.get(on.url + BASE + path)


def test_a_model_that_is_not_there_is_404_in_tgis_shape() -> None:
    async def scene() -> None:
        async with stage(two_tokens) as on, httpx.AsyncClient() as client:
            for method, path in (
                ("GET", ""),
                ("GET", "/info"),
                ("POST", "/generate"),
                ("POST", "/v1/chat/completions"),
            ):
                answered = await client.request(method, f"{on.url}/models/n/tgi{path}", json=ASKED)
                assert (answered.status_code, answered.json()["error_type"]) == (404, "model_not_found")

    asyncio.run(scene())


def test_the_end_of_a_generation_has_the_headers_of_tgi() -> None:
    async def scene() -> None:
        async with stage(two_tokens) as on:
            answered = await on.post(BASE + "/generate", ASKED)

            assert answered.json() == {"generated_text": " upon a"}
            assert (answered.headers["x-prompt-tokens"], answered.headers["x-generated-tokens"]) == ("3", "2")
            for name in ("total", "queue", "inference", "validation"):
                assert answered.headers[f"x-{name}-time"].isdigit()

    asyncio.run(scene())


@pytest.mark.parametrize("path", ["", "/health", "/info", "/metrics", "/generate", "/v1/models", "/docs/x"])
def test_every_address_needs_the_right_to_generate(path: str) -> None:
    assert right_for(f"/models/m/tgi{path}") == "generate"


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/api-doc/openapi.json"])
def test_the_documentation_is_open_to_all(path: str) -> None:
    assert right_for(f"/models/m/tgi{path}") is None


def test_a_chat_that_is_not_valid_is_told_in_tgis_shape() -> None:
    async def scene() -> None:
        async with stage(two_tokens) as on:
            told = await refused(on, "/v1/chat/completions", {**CHAT, "temperature": 9})

            assert (told["status"], told["error_type"], told["error_code"]) == (
                422,
                "validation",
                "INVALID_TEMPERATURE",
            )
            assert told["error"].startswith("Input validation error: `temperature` ")
            regex = await refused(
                on, "/v1/chat/completions", {**CHAT, "response_format": {"type": "regex", "value": "x"}}
            )
            assert (regex["status"], regex["error_code"]) == (422, "UNSUPPORTED")

    asyncio.run(scene())


@pytest.mark.parametrize(("path", "asked"), [("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "Once"})])
def test_a_models_name_that_no_answer_could_repeat_is_refused(path: str, asked: dict[str, Any]) -> None:
    async def scene() -> None:
        async with stage(two_tokens) as on, httpx.AsyncClient(timeout=20) as client:
            body = json.dumps({**asked, "model": "\ud800"})
            answered = await client.post(
                on.url + BASE + path, content=body, headers={"Content-Type": "application/json"}
            )

            assert (answered.status_code, answered.json()["error_code"]) == (422, "VALIDATION_ERROR")
            assert "`model`" in answered.json()["error"]

    asyncio.run(scene())


def test_the_last_token_is_not_lost_where_a_stop_text_was_only_begun() -> None:
    async def begin(conversation: Conversation) -> None:
        await conversation.say(HEAD + token(" upon") + token(" a", 2) + end(2))

    async def scene() -> None:
        async with stage(begin) as on:
            asked = {"inputs": "Once", "parameters": {"stop": [" a time"], "details": True}}
            whole = (await on.post(BASE + "/generate", asked)).json()
            text = (await on.post(BASE + "/generate_stream", asked)).text

            assert whole["generated_text"] == " upon a"
            events = [json.loads(event[6:]) for event in text.split("\n\n")[:-1]]
            assert "".join(event["token"]["text"] for event in events) == events[-1]["generated_text"] == " upon a"

    asyncio.run(scene())
