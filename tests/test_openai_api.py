"""OpenAI's API over real sockets: several choices in one answer, answers that are put through, and errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.scripted_server import HEAD, Conversation, Script, end, refused, token
from tests.test_relay import Stage, stage, two_tokens

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
ASK: dict[str, Any] = {"model": "m", "prompt": "Once"}
SAY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}


def events(answer: httpx.Response) -> list[Any]:
    """Return the events of a stream; `[DONE]` as it stands."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    told = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
    return [each if each == "[DONE]" else json.loads(each) for each in told]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert list(body) == ["error"]
    return dict(body["error"])


def asked(conversation: Conversation) -> dict[str, Any]:
    return dict(json.loads(conversation.body))


async def until_open(on: Stage, wanted: int) -> None:
    async with asyncio.timeout(5):
        while len(on.server.requests) < wanted:
            await asyncio.sleep(0.005)


# ---- several choices -------------------------------------------------------------------------------------------------


async def its_prompt_and_seed(conversation: Conversation) -> None:
    said = asked(conversation)
    await conversation.say(HEAD + token(f" {said['prompt']}") + token(f" {said['seed']}", 2) + end(2))


def test_choices_are_told_in_the_order_of_prompts_and_seeds() -> None:
    async def scene() -> None:
        async with stage(its_prompt_and_seed, max_concurrency=2) as on:
            answer = (await on.post(TEXT, {**ASK, "prompt": ["a", "b"], "n": 2, "seed": 7})).json()

            assert [each["text"] for each in answer["choices"]] == [" a 7", " a 8", " b 7", " b 8"]
            assert [each["index"] for each in answer["choices"]] == [0, 1, 2, 3]
            assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 8, "total_tokens": 14}
            await on.nothing_is_held()

    asyncio.run(scene())


def test_choices_of_a_stream_come_as_they_are_made_and_end_together() -> None:
    async def scene() -> None:
        async with stage(its_prompt_and_seed) as on:
            body = {"prompt": ["a", "b"], "n": 2, "seed": 7, "stream": True, "stream_options": {"include_usage": True}}
            *told, usage, done = events(await on.post(TEXT, {**ASK, **body}))

            texts = ["", "", "", ""]
            for event in told:
                [choice] = event["choices"]
                texts[choice["index"]] += choice["text"]
            assert texts == [" a 7", " a 8", " b 7", " b 8"]
            ends = [event["choices"][0]["finish_reason"] for event in told]
            assert sorted(filter(None, ends)) == ["length"] * 4
            assert usage["usage"] == {"prompt_tokens": 6, "completion_tokens": 8, "total_tokens": 14}
            assert done == "[DONE]"
            await on.nothing_is_held()

    asyncio.run(scene())


class HeldSlots:
    """A script in which the prompt `hold` is not answered until it may be."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(self, conversation: Conversation) -> None:
        if asked(conversation)["prompt"] == "hold":
            await self.go.wait()
        await conversation.say(HEAD + token(" a") + end(1))


@pytest.mark.parametrize("address", [TEXT, "/api/llm/inference"])
def test_no_part_of_a_request_that_was_let_in_is_turned_away_at_a_full_queue(address: str) -> None:
    async def scene() -> None:
        script = HeldSlots()
        async with stage(script, max_concurrency=3, max_queue=1) as on:
            holders = [asyncio.create_task(on.post(TEXT, {**ASK, "prompt": "hold"})) for _ in range(2)]
            await until_open(on, 2)
            # one slot is left and one may wait: for the third prompt there is no place, but for its request there is
            body = {"prompts": ["a"] * 3, "model_path": "m"} if address != TEXT else {**ASK, "prompt": ["a"] * 3}
            answer = await on.post(address, body)
            script.go.set()

            assert answer.status_code == 200
            assert len(answer.json()["outputs" if address != TEXT else "choices"]) == 3
            assert [each.status_code for each in await asyncio.gather(*holders)] == [200, 200]
            await on.nothing_is_held()

    asyncio.run(scene())


def tgi_event(text: str, number: int) -> bytes:
    said = {"id": number, "text": text, "logprob": -0.1, "special": False}
    frame = {"index": number, "token": said, "generated_text": None, "details": None}
    return b"data:" + json.dumps(frame).encode() + b"\n\n"


async def stops_and_counts_for_ever(conversation: Conversation) -> None:
    if b"/tokenize" not in conversation.head:
        await conversation.say(HEAD + tgi_event(" a", 1) + tgi_event(" b", 2))
    await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_not_lost_where_nobody_counts_its_prompt(stream: bool) -> None:
    async def scene() -> None:
        model = {"engine": "tgi", "hf_name": "x", "runtime": "external", "url": "http://127.0.0.1:1"}
        async with stage(stops_and_counts_for_ever, **model, generation_timeout="500ms") as on:
            options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
            answer = await on.post(TEXT, {**ASK, "stop": [" b"], **options})

            usage = events(answer)[-2]["usage"] if stream else answer.json()["usage"]
            assert usage == {"prompt_tokens": 0, "completion_tokens": 2, "total_tokens": 2}
            assert len(on.server.requests) == 2
            await on.nothing_is_held()

    asyncio.run(scene())


class OneBreaks:
    """A script in which the prompt `bad` breaks off after its first token, and all others never end."""

    def __init__(self, others: int) -> None:
        self._all_here = asyncio.Barrier(others + 1)
        self.left = 0

    async def __call__(self, conversation: Conversation) -> None:
        await conversation.say(HEAD + token(" upon"))
        await self._all_here.wait()
        if asked(conversation)["prompt"] == "bad":
            return
        try:
            await asyncio.Event().wait()
        finally:
            self.left += 1

    async def all_left(self, others: int) -> None:
        async with asyncio.timeout(5):
            while self.left < others:
                await asyncio.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
def test_the_first_failure_ends_all_choices(stream: bool) -> None:
    async def scene() -> None:
        script = OneBreaks(others=2)
        async with stage(script, max_concurrency=3) as on:
            body = {**ASK, "prompt": ["a", "bad", "b", "never begun"], "stream": stream}
            answer = await on.post(TEXT, body)

            if stream:
                *told, last = events(answer)
                assert {event["choices"][0]["text"] for event in told} == {" upon"}
                assert last["error"]["code"] == "GENERATION_FAILED"
            else:
                assert (answer.status_code, error_of(answer)["code"]) == (500, "GENERATION_FAILED")
            await on.nothing_is_held()
            assert len(on.server.requests) == 3
            await script.all_left(2)

    asyncio.run(scene())


class NeverEnds:
    """A script that says something and then waits for ever; it counts who left."""

    def __init__(self, said: bytes) -> None:
        self._said = said
        self.left = 0

    async def __call__(self, conversation: Conversation) -> None:
        await conversation.say(self._said)
        try:
            await asyncio.Event().wait()
        finally:
            self.left += 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("said", [b"", HEAD, HEAD + token(" upon")])
def test_a_caller_who_leaves_ends_all_choices(stream: bool, said: bytes) -> None:
    async def scene() -> None:
        script = NeverEnds(said)
        async with stage(script) as on:
            asking = asyncio.create_task(on.post(TEXT, {**ASK, "prompt": ["a", "b"], "n": 2, "stream": stream}))
            await until_open(on, 4)
            asking.cancel()
            async with asyncio.timeout(5):
                while script.left < 4:
                    await asyncio.sleep(0.005)
            await on.nothing_is_held()

    asyncio.run(scene())


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "body", "status", "code", "param"),
    [
        (TEXT, {**ASK, "model": "mm"}, 404, "MODEL_NOT_FOUND", None),
        (CHAT, {**SAY, "model": "mm"}, 404, "MODEL_NOT_FOUND", None),
        (TEXT, {**ASK, "model": 5}, 400, "VALIDATION_ERROR", "model"),
        (TEXT, {**ASK, "prompt": " "}, 400, "EMPTY_PROMPT", "prompt"),
        (TEXT, {**ASK, "prompt": ["a", " "]}, 400, "EMPTY_PROMPT", "prompt"),
        (TEXT, {**ASK, "prompt": ["a", 5.5]}, 400, "VALIDATION_ERROR", "prompt[1]"),
        (TEXT, {**ASK, "stop": ""}, 400, "VALIDATION_ERROR", "stop"),
        (TEXT, {**ASK, "stop": ["a", ""]}, 400, "VALIDATION_ERROR", "stop[1]"),
        (TEXT, {"model": "m"}, 400, "VALIDATION_ERROR", "prompt"),
        (TEXT, {**ASK, "prompt": [1, 2]}, 400, "UNSUPPORTED", "prompt"),
        (TEXT, {**ASK, "logit_bias": {"5": 1}}, 400, "UNSUPPORTED", "logit_bias"),
        (TEXT, {**ASK, "echo": True, "suffix": "x"}, 400, "UNSUPPORTED", "echo"),
        (TEXT, {**ASK, "echo": True, "n": 0}, 400, "VALIDATION_ERROR", "n"),
        (TEXT, {**ASK, "temperature": 3}, 400, "INVALID_TEMPERATURE", "temperature"),
        (TEXT, {**ASK, "max_tokens": 5000}, 400, "INVALID_MAX_TOKENS", "max_tokens"),
        (CHAT, {**SAY, "max_completion_tokens": 5000}, 400, "INVALID_MAX_TOKENS", "max_completion_tokens"),
        (CHAT, {**SAY, "messages": []}, 400, "VALIDATION_ERROR", "messages"),
        (CHAT, {**SAY, "messages": [{"role": "king", "content": "x"}]}, 400, "VALIDATION_ERROR", "messages[0].role"),
        (CHAT, {**SAY, "stream": 1}, 400, "VALIDATION_ERROR", "stream"),
        (CHAT, [SAY], 400, "VALIDATION_ERROR", None),
        (CHAT, None, 400, "VALIDATION_ERROR", None),
    ],
)
def test_a_bad_request_is_refused_in_openais_shape(
    address: str, body: object, status: int, code: str, param: str | None
) -> None:
    async def scene() -> None:
        async with stage(two_tokens, context_tokens=2048) as on:
            answer = await on.post(address, body)

            error = error_of(answer)
            assert (answer.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error")
            if param:
                assert error["param"] == param
                assert param in error["message"].lower()
            assert on.server.requests == []

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("content", "kind"),
    [(each, "application/json") for each in (b"[]", b'"x"', b"null", b"5", b"true")] + [(b"{}", "text/plain")],
)
def test_a_body_that_is_no_object_is_told_what_it_must_be(content: bytes, kind: str) -> None:
    async def scene() -> None:
        async with stage(two_tokens) as on, httpx.AsyncClient() as client:
            for address in (CHAT, TEXT):
                answer = await client.post(on.url + address, content=content, headers={"content-type": kind})

                words = "the body must be a JSON object, sent with Content-Type: application/json."
                assert (answer.status_code, error_of(answer)["message"]) == (400, words)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"{", "application/json"), (b"\xff", "application/json"), (b"{}", "text/plain"), (b"", "application/json")],
)
def test_a_body_that_is_no_json_is_refused(content: bytes, kind: str) -> None:
    async def scene() -> None:
        async with stage(two_tokens) as on, httpx.AsyncClient() as client:
            for address in (CHAT, TEXT):
                answer = await client.post(on.url + address, content=content, headers={"content-type": kind})

                assert (answer.status_code, error_of(answer)["code"]) == (400, "VALIDATION_ERROR")

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", CHAT, 405, "METHOD_NOT_ALLOWED"),
        ("POST", "/v1/models", 405, "METHOD_NOT_ALLOWED"),
        ("GET", "/v1", 404, "NOT_FOUND"),
        ("POST", "/v1/embeddings", 404, "NOT_FOUND"),
    ],
)
def test_what_is_not_there_is_told_in_openais_shape(method: str, path: str, status: int, code: str) -> None:
    async def scene() -> None:
        async with stage(two_tokens) as on, httpx.AsyncClient() as client:
            answer = await client.request(method, on.url + path)

            assert (answer.status_code, error_of(answer)["code"]) == (status, code)

    asyncio.run(scene())


def test_a_model_may_be_left_out_and_is_echoed_as_it_was_asked_for() -> None:
    async def scene() -> None:
        async with stage(two_tokens, aliases=["an/alias"], hf_name="who/what") as on:
            for name in ("m", "an/alias", "who/what"):
                assert (await on.post(TEXT, {**ASK, "model": name})).json()["model"] == name
            assert (await on.post(TEXT, {"prompt": "Once"})).json()["model"] == "m"

    asyncio.run(scene())


def test_the_status_of_an_early_failure_is_not_lost_to_a_stream() -> None:
    async def break_off(conversation: Conversation) -> None:
        await conversation.say(HEAD)

    async def scene() -> None:
        async with stage(break_off) as on:
            answer = await on.post(TEXT, {**ASK, "stream": True})

            assert (answer.status_code, error_of(answer)["type"]) == (502, "server_error")

    asyncio.run(scene())


def test_a_stream_that_fails_ends_in_one_error_event_and_without_done() -> None:
    async def break_off(conversation: Conversation) -> None:
        await conversation.say(HEAD + token(" upon"))

    async def scene() -> None:
        async with stage(break_off) as on:
            first, last = events(await on.post(TEXT, {**ASK, "stream": True}))

            assert first["choices"][0]["text"] == " upon"
            assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "GENERATION_FAILED")

    asyncio.run(scene())


# ---- models ----------------------------------------------------------------------------------------------------------


def test_models_are_listed_and_shown_without_being_woken() -> None:
    async def scene() -> None:
        async with stage(two_tokens, aliases=["an/alias"], hf_name="who/what") as on, httpx.AsyncClient() as client:
            listed = (await client.get(f"{on.url}/v1/models")).json()

            [model] = listed["data"]
            assert listed["object"] == "list"
            assert {key: model[key] for key in ("id", "object", "created", "owned_by", "state")} == {
                "id": "m",
                "object": "model",
                "created": 0,
                "owned_by": "who",
                "state": "stopped",
            }
            for name in ("m", "an/alias", "who/what"):
                assert (await client.get(f"{on.url}/v1/models/{name}")).json() == {**model, "id": name}
            unknown = await client.get(f"{on.url}/v1/models/who/whit")
            assert (unknown.status_code, error_of(unknown)["code"]) == (404, "MODEL_NOT_FOUND")
            assert "Near: m." in error_of(unknown)["message"]
            assert on.server.checks == []

    asyncio.run(scene())


# ---- answers that are put through ------------------------------------------------------------------------------------

OURS: dict[str, Any] = {"engine": "openai", "runtime": "external", "url": "http://127.0.0.1:1", "hf_name": "who/what"}
KEY = "sk-0123456789abcdef"


@asynccontextmanager
async def provider(script: Script, **keys: Any) -> AsyncIterator[Stage]:
    async with stage(script, **{"weights": None, **OURS, **keys}) as on:
        yield on


@asynccontextmanager
async def put(on: Stage, body: object) -> AsyncIterator[AsyncIterator[bytes]]:
    """Ask for a stream, and yield the pieces of it as they come."""
    async with (
        httpx.AsyncClient(timeout=20) as client,
        client.stream("POST", on.url + CHAT, json=body) as answer,
        aclosing(answer.aiter_bytes()) as chunks,  # type: ignore[type-var]
    ):
        assert answer.status_code == 200
        yield chunks


def whole(body: bytes, *headers: bytes) -> bytes:
    head = [b"HTTP/1.1 200 OK", b"Content-Type: application/json", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join([*head, b"Connection: close", b"", body])


ODD = b'{ "id":"x",  "odd":1e2, "choices":[{"text":"\\"model\\": \\"what\\""}], "model" : "what-7b", "z":"\\u00e9"}\n'


@pytest.mark.parametrize(("address", "path"), [(CHAT, "/chat/completions"), (TEXT + "/", "/completions")])
def test_a_whole_answer_is_put_through_with_nothing_but_the_models_name_changed(address: str, path: str) -> None:
    bodies: list[dict[str, Any]] = []

    async def answers(conversation: Conversation) -> None:
        bodies.append(asked(conversation))
        await conversation.say(whole(ODD, b"X-Request-ID: theirs", b"Set-Cookie: a=b"))

    async def scene() -> None:
        async with provider(answers, aliases=["an/alias"], api_key=KEY) as on:
            answer = await on.post(address.rstrip("/"), {"model": "an/alias", "unknown": [1.5], "messages": 5})

            assert answer.content == ODD.replace(b'"what-7b"', b'"an/alias"')
            assert answer.headers["content-type"] == "application/json"
            assert "set-cookie" not in answer.headers
            assert bodies == [{"model": "who/what", "unknown": [1.5], "messages": 5}]
            assert on.server.requests[0].startswith(b"POST %s HTTP/1.1\r\n" % path.encode())
            assert b"authorization: bearer %s\r\n" % KEY.encode() in on.server.requests[0].lower()
            await on.nothing_is_held()

    asyncio.run(scene())


CHUNKS = [
    b'data: {"id":"1","model":"what","choices":[{"delta":{"content":"\\"model\\":\\"x\\""}}]}\r\n\r\n',
    b": a comment\n\n",
    'data: {"choices":[{"delta":{"content":"\N{EURO SIGN}"}}],"model":"what"}\n\n'.encode(),
    b"data: [DONE]\n\n",
]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_stream_is_put_through_however_it_is_cut(size: int) -> None:
    async def answers(conversation: Conversation) -> None:
        await conversation.say(HEAD)
        sent = b"".join(CHUNKS)
        for start in range(0, len(sent), size):
            await conversation.say(sent[start : start + size])
            await asyncio.sleep(0)

    async def scene() -> None:
        async with provider(answers) as on:
            answer = await on.post(CHAT, {"model": "m", "stream": True})

            assert answer.content == b"".join(CHUNKS).replace(b'"model":"what"', b'"model":"m"')
            assert answer.headers["content-type"].startswith("text/event-stream")
            await on.nothing_is_held()

    asyncio.run(scene())


def test_each_event_is_put_through_as_it_comes() -> None:
    may_go_on = asyncio.Event()

    async def answers(conversation: Conversation) -> None:
        await conversation.say(HEAD + CHUNKS[0])
        await may_go_on.wait()
        await conversation.say(CHUNKS[3])

    async def scene() -> None:
        async with provider(answers) as on, put(on, {"model": "m", "stream": True}) as chunks:
            assert b'"model":"m"' in await anext(chunks)
            may_go_on.set()
            assert await anext(chunks) == CHUNKS[3]

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "status", "code"),
    [
        (refused(400, "top_p is wrong"), 400, "VALIDATION_ERROR"),
        (refused(401, f"wrong key {KEY}"), 502, "UPSTREAM_FAILED"),
        (refused(404, "no such model"), 502, "UPSTREAM_FAILED"),
        (refused(429, "slow down", "Retry-After: 7"), 503, "QUEUE_FULL"),
        (refused(500, "oh no"), 502, "UPSTREAM_FAILED"),
        (b"", 502, "UPSTREAM_FAILED"),
        (HEAD, 502, "UPSTREAM_FAILED"),
        (HEAD + b'data: {"error": {"message": "out of memory"}}\n\n', 500, "GENERATION_FAILED"),
    ],
)
def test_a_failure_before_the_first_byte_has_a_status_of_ours(
    stream: bool, said: bytes, status: int, code: str
) -> None:
    async def fails(conversation: Conversation) -> None:
        await conversation.say(said)

    async def scene() -> None:
        async with provider(fails, api_key=KEY) as on:
            answer = await on.post(CHAT, {"model": "m", "stream": stream})

            assert (answer.status_code, error_of(answer)["code"]) == (status, code)
            assert KEY not in answer.text
            assert answer.headers.get("retry-after") == ("7" if code == "QUEUE_FULL" else None)
            await on.nothing_is_held()

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("head", "then"),
    [
        (HEAD, b""),
        (HEAD, CHUNKS[2][:20]),
        (HEAD.replace(b"Connection", b"Content-Length: 999\r\nConnection"), b""),
        (HEAD, b'data: {"error": {"message": "out of memory"}}\n\n' + CHUNKS[3]),
    ],
)
def test_a_stream_that_breaks_off_ends_in_one_error_event_and_without_done(head: bytes, then: bytes) -> None:
    heard = asyncio.Event()

    async def breaks_off(conversation: Conversation) -> None:
        await conversation.say(head + CHUNKS[2])
        await heard.wait()
        await conversation.say(then)

    async def scene() -> None:
        async with provider(breaks_off) as on, put(on, {"model": "m", "stream": True}) as chunks:
            assert b'"model":"m"' in await anext(chunks)
            heard.set()
            rest = [chunk async for chunk in chunks]

            [last] = [event for event in b"".join(rest).split(b"\n\n") if event]
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "GENERATION_FAILED"
            await on.nothing_is_held()

    asyncio.run(scene())


@pytest.mark.parametrize("done", [CHUNKS[3], b"data:[DONE]\r\n\r\n"])
@pytest.mark.parametrize("then", [b"", b": still here\n\n", b'data: {"error": "too late"}\n\n'])
def test_a_stream_ends_with_done_though_its_provider_keeps_the_connection(done: bytes, then: bytes) -> None:
    async def scene() -> None:
        async with provider(NeverEnds(HEAD + CHUNKS[2] + done + then)) as on:
            answer = await on.post(CHAT, {"model": "m", "stream": True})

            assert answer.content == CHUNKS[2].replace(b"what", b"m") + done
            await asyncio.wait_for(on.server.left.wait(), 5)

    asyncio.run(scene())


async def counts(conversation: Conversation) -> None:
    """Say one, two and so on until a stop text that it was told of, as OpenAI does."""
    said = asked(conversation)
    stops = said.get("stop", [])
    is_chat = "messages" in said
    for word in (" one", " two", " three"):
        if word.strip() in stops:
            break
        choice = {"delta": {"content": word}} if is_chat else {"text": word}
        await conversation.say(b"data: " + json.dumps({"choices": [{"index": 0, **choice}]}).encode() + b"\n\n")
    end_of_it = {"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}], "usage": {}}
    await conversation.say(b"data: " + json.dumps(end_of_it).encode() + b"\n\ndata: [DONE]\n\n")


async def counts_as_a_stream(conversation: Conversation) -> None:
    await conversation.say(HEAD)
    await counts(conversation)


@pytest.mark.parametrize("prompt", ["", " \n", ["Once", " "]])
def test_no_provider_is_asked_to_continue_nothing(prompt: object) -> None:
    async def scene() -> None:
        async with provider(counts_as_a_stream) as on:
            answer = await on.post(TEXT, {**ASK, "prompt": prompt})

            assert (answer.status_code, error_of(answer)["code"]) == (400, "EMPTY_PROMPT")
            assert on.server.requests == []
            assert (await on.post(TEXT, {**ASK, "prompt": [1, 2]})).status_code == 200  # tokens are its own affair

    asyncio.run(scene())


def test_the_field_that_a_provider_finds_wrong_is_told() -> None:
    body = json.dumps({"error": {"message": "no", "param": "top_p"}}).encode()

    async def refuses(conversation: Conversation) -> None:
        await conversation.say(whole(body).replace(b"200 OK", b"400 Bad Request"))

    async def scene() -> None:
        async with provider(refuses) as on:
            answer = await on.post(CHAT, SAY)

            assert (answer.status_code, error_of(answer)["param"]) == (400, "top_p")

    asyncio.run(scene())


def test_tgis_clients_get_the_stop_text_of_a_provider_too() -> None:
    async def scene() -> None:
        async with provider(counts_as_a_stream) as on:
            base = "/models/m/tgi"
            parameters = {"stop": ["two"], "max_new_tokens": 9}
            generated = (await on.post(base + "/generate", {"inputs": "Once", "parameters": parameters})).json()
            text = (await on.post(base + TEXT, {**ASK, "stop": ["two"], "max_tokens": 9})).json()
            chat = (await on.post(base + CHAT, {**SAY, "stop": ["two"]})).json()

            assert generated["generated_text"] == " one two"
            assert text["choices"][0]["text"] == " one two"
            assert chat["choices"][0]["message"]["content"] == " one two"
            await on.nothing_is_held()

    asyncio.run(scene())


def test_a_connection_that_breaks_after_done_is_no_failure() -> None:
    said = CHUNKS[2] + CHUNKS[3]
    head = HEAD.replace(b"Connection: close", b"Transfer-Encoding: chunked")

    async def breaks_off(conversation: Conversation) -> None:
        await conversation.say(head + b"%x\r\n%b\r\n" % (len(said), said))

    async def scene() -> None:
        async with provider(breaks_off) as on:
            answer = await on.post(CHAT, {"model": "m", "stream": True})

            assert answer.content == said.replace(b"what", b"m")

    asyncio.run(scene())


def test_what_came_before_an_error_is_not_lost_with_it() -> None:
    async def fails(conversation: Conversation) -> None:
        await conversation.say(HEAD + CHUNKS[2] + b'data: {"error": {"message": "out of memory"}}\n\n')

    async def scene() -> None:
        async with provider(fails) as on:
            first, last = events(await on.post(CHAT, {"model": "m", "stream": True}))

            assert first["model"] == "m"
            assert "out of memory" in last["error"]["message"]

    asyncio.run(scene())


def test_an_error_shows_no_part_of_the_gateways_key() -> None:
    lengths = list(range(280, 300))

    async def fails(conversation: Conversation) -> None:
        words = "x" * lengths.pop() + KEY
        await conversation.say(HEAD + f'data: {{"error": {{"message": "{words}"}}}}\n\n'.encode())

    async def scene() -> None:
        async with provider(fails, api_key=KEY) as on:
            while lengths:
                answer = await on.post(CHAT, {"model": "m", "stream": True})

                assert answer.status_code == 500
                assert KEY[:1] not in answer.text.partition("xxx")[2].partition(".")[0]

    asyncio.run(scene())


def test_a_provider_without_top_k_answers_the_document_whose_default_it_is() -> None:
    async def scene() -> None:
        async with provider(counts_as_a_stream) as on:
            body = {"model_path": "m", "prompts": ["Once"]}
            answer = await on.post("/api/llm/inference", body)
            asked_for = await on.post("/api/llm/inference", {**body, "top_k": 50})

            assert answer.json()["outputs"] == [" one two three"]
            assert (asked_for.status_code, asked_for.json()["error_code"]) == (422, "UNSUPPORTED")

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
def test_a_silent_provider_is_given_up_at_the_generation_timeout(stream: bool) -> None:
    async def scene() -> None:
        async with provider(NeverEnds(b""), generation_timeout="200ms") as on:
            answer = await on.post(CHAT, {"model": "m", "stream": stream})

            assert (answer.status_code, error_of(answer)["code"]) == (504, "GENERATION_TIMEOUT")
            await asyncio.wait_for(on.server.left.wait(), 5)
            await on.nothing_is_held()

    asyncio.run(scene())


def test_a_provider_that_falls_silent_in_mid_stream_is_told_of_in_the_stream() -> None:
    async def scene() -> None:
        async with provider(NeverEnds(HEAD + CHUNKS[2]), generation_timeout="200ms") as on:
            first, last = events(await on.post(CHAT, {"model": "m", "stream": True}))

            assert first["model"] == "m"
            assert last["error"]["code"] == "GENERATION_TIMEOUT"
            await asyncio.wait_for(on.server.left.wait(), 5)
            await on.nothing_is_held()

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("said", [b"", HEAD, HEAD + CHUNKS[0]])
def test_the_connection_to_a_provider_is_closed_when_the_caller_leaves(stream: bool, said: bytes) -> None:
    async def scene() -> None:
        script = NeverEnds(said)
        async with provider(script) as on:
            asking = asyncio.create_task(on.post(CHAT, {"model": "m", "stream": stream}))
            await until_open(on, 1)
            asking.cancel()
            await asyncio.wait_for(on.server.left.wait(), 5)
            await on.nothing_is_held()

    asyncio.run(scene())


@pytest.mark.parametrize("keys", [{"parameters": {"temperature": 0}}, {"overrides": {"temperature": 0}}])
def test_nothing_is_put_through_where_the_catalog_has_a_word_in_it(keys: dict[str, Any]) -> None:
    bodies: list[dict[str, Any]] = []

    async def answers(conversation: Conversation) -> None:
        bodies.append(asked(conversation))
        chunk = {"choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}]}
        last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        usage = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 1}}
        told = b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in (chunk, last, usage))
        await conversation.say(HEAD + told + b"data: [DONE]\n\n")

    async def scene() -> None:
        async with provider(answers, **keys) as on:
            answer = (await on.post(CHAT, SAY)).json()

            assert answer["choices"][0]["message"]["content"] == "Hi"
            assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}
            assert bodies[0]["temperature"] == 0
            assert (await on.post(CHAT, {**SAY, "messages": 5})).status_code == 400

    asyncio.run(scene())
