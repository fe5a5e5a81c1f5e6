"""Callers of `/models/{id}/tgi` that are put through, over real sockets, to a server that does what a test tells it."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import httpx
import pytest

from gateway.lifecycle import State
from gateway.runtimes.base import Exit
from tests.scripted_server import WELL, Conversation, Script, scripted
from tests.test_relay import Stage, stage

BASE = "/models/m/tgi"
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Compute-Type: gpu+optimized\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
CLOSED_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
OLD_HEAD = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
EVENTS = [
    b'data: {"index":1,"token":{"id":7,"text":" \xe2\x98\x95","logprob":-0.1,"special":false}}\n\n',
    b":\n\n",
    b'data: {"index":2,"token":{"id":2,"text":"</s>","logprob":-0.5,"special":true},"generated_text":" "}\n\n',
]
JSON, TEXT = "application/json", "text/plain; charset=utf-8"
ASKED = {"inputs": "Once", "parameters": {"max_new_tokens": 3}, "stream": True}
POSTS = ["", "/generate", "/generate_stream", "/v1/chat/completions", "/v1/completions", "/invocations", "/vertex",
         "/tokenize", "/chat_tokenize"]  # fmt: skip
STREAMED = ["", "/generate_stream", "/v1/chat/completions", "/v1/completions", "/invocations"]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def answer(status: int, body: bytes, kind: str = "application/json", *headers: str) -> bytes:
    head = (f"HTTP/1.1 {status} Said", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers)
    return ("\r\n".join(head) + "\r\n\r\n").encode() + body


@asynccontextmanager
async def tgi(script: Script, *other_ports: int, **keys: Any) -> AsyncIterator[Stage]:
    kept = {"engine": "tgi", "hf_name": "gpt2", "runtime": "external", "url": "http://127.0.0.1:1", "weights": None}
    async with stage(script, *other_ports, **{**kept, **keys}) as on:
        yield on


async def send(on: Stage, path: str, content: bytes = b"", **headers: str) -> httpx.Response:
    headers = {"content-type": "application/json", **{name.replace("_", "-"): said for name, said in headers.items()}}
    async with httpx.AsyncClient(timeout=20) as client:
        return await client.post(on.url + BASE + path, content=content or json.dumps(ASKED), headers=headers)


async def ask(on: Stage, path: str, method: str = "GET") -> httpx.Response:
    async with httpx.AsyncClient(timeout=20) as client:
        return await client.request(method, on.url + BASE + path)


async def for_ever(conversation: Conversation) -> None:
    await asyncio.get_running_loop().create_future()


async def all_events(conversation: Conversation) -> None:
    await conversation.say(HEAD + b"".join(map(chunk, EVENTS)) + b"0\r\n\r\n")


# ---- there ----------------------------------------------------------------------------------------------------------


def test_a_call_arrives_as_it_was_sent() -> None:
    heard: list[Conversation] = []

    async def listen(conversation: Conversation) -> None:
        heard.append(conversation)
        await conversation.say(answer(200, b"{}"))

    async def scene() -> None:
        async with tgi(listen) as on:
            for path in POSTS:
                content = b'{ "inputs" : "\xc3\xa9",\n "parameters": {"top_p": 0.30000000000000004}}'
                theirs = {"authorization": "Bearer theirs", "cookie": "session=theirs", "x_forwarded_for": "10.0.0.1"}
                await send(on, path + "?token=theirs", content, x_request_id="mine-1", **theirs)

                call = heard.pop()
                first, *lines = call.head.decode().split("\r\n")
                assert first == f"POST {path or '/'} HTTP/1.1"
                said = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines}
                assert (said["x-request-id"], said["content-type"]) == ("mine-1", "application/json")
                assert "x-forwarded-for" not in said
                assert b"theirs" not in call.head + call.body
                assert call.body == content
            await on.nothing_is_held()

    asyncio.run(scene())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/invocations"])
def test_under_v1_the_model_is_called_tgi(path: str) -> None:
    heard: list[Any] = []

    async def listen(conversation: Conversation) -> None:
        heard.append(json.loads(conversation.body))
        await conversation.say(answer(200, b'{"model":"gpt2"}'))

    async def scene() -> None:
        async with tgi(listen) as on:
            sent = {"model": "m", "messages": [{"role": "user", "content": "the model is m"}], "seed": 2**64 - 1}
            answered = await send(on, path, json.dumps(sent).encode())

            assert heard == [{**sent, "model": "tgi"}]
            assert answered.content == b'{"model":"gpt2"}'

    asyncio.run(scene())


@pytest.mark.parametrize("path", ["", "/generate", "/v1/completions"])
@pytest.mark.parametrize("content", [b"no json", b"\xff\x00", b"[1]", b"{" * 5000 + b'"stream"', b'{"stream": 1}'])
def test_what_is_no_json_arrives_as_well(path: str, content: bytes) -> None:
    heard: list[bytes] = []
    words = answer(400, b"Failed to parse the request body as JSON", "text/plain; charset=utf-8")

    async def listen(conversation: Conversation) -> None:
        heard.append(conversation.body)
        await conversation.say(words)

    async def scene() -> None:
        async with tgi(listen) as on:
            answered = await send(on, path, content, content_type="text/weird")

            assert heard == [content]
            assert b"text/weird" in on.server.requests[0]
            assert (answered.status_code, answered.content) == (400, words.rpartition(b"\r\n\r\n")[2])
            assert answered.headers["content-type"] == "text/plain; charset=utf-8"

    asyncio.run(scene())


def test_a_body_of_two_megabytes_goes_there_and_back() -> None:
    async def echo(conversation: Conversation) -> None:
        await conversation.say(answer(200, conversation.body))

    async def scene() -> None:
        async with tgi(echo) as on:
            content = json.dumps({"inputs": "é" * 333_000}).encode()
            assert len(content) > 1_990_000

            assert (await send(on, "/generate", content)).content == content

    asyncio.run(scene())


# ---- and back -------------------------------------------------------------------------------------------------------


def test_an_answer_comes_back_as_it_was_given() -> None:
    body = b'{"generated_text" : " caf\xc3\xa9", "seed":18446744073709551615, "logprob":-0.10000001}'
    told = {"x-total-time": "12", "x-time-per-token": "4", "x-compute-type": "gpu+optimized", "x-prompt-tokens": "3"}
    lines = [f"{name}: {value}" for name, value in told.items()]

    async def give(conversation: Conversation) -> None:
        await conversation.say(answer(200, body, "application/json", *lines, "Set-Cookie: a=b", "Server: hyper"))

    async def scene() -> None:
        async with tgi(give) as on:
            for path in POSTS:
                answered = await send(on, path, b'{"inputs": "Once"}')

                assert (answered.status_code, answered.content) == (200, body)
                assert told.items() <= dict(answered.headers).items()
                assert answered.headers["content-type"] == "application/json"
                assert answered.headers["x-request-id"]
                assert "set-cookie" not in answered.headers

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (422, b'{"error":"Input validation error: no","error_type":"validation"}', JSON),
        (422, b"Failed to deserialize the JSON body into the target type", TEXT),
        (400, b"Failed to parse", TEXT),
        (413, b"Failed to buffer the request body", TEXT),
        (415, b"Expected request with `Content-Type: application/json`", TEXT),
        (424, b'{"error":"Request failed during generation: no memory","error_type":"generation"}', JSON),
        (429, b'{"error":"Model is overloaded","error_type":"overloaded"}', JSON),
        (500, b'{"error":"Incomplete generation","error_type":"Incomplete generation"}', JSON),
        (404, b"", "text/plain"),
    ],
)
def test_a_refusal_keeps_its_status_and_bytes(stream: bool, status: int, body: bytes, kind: str) -> None:
    async def refuse(conversation: Conversation) -> None:
        await conversation.say(answer(status, body, kind))

    async def scene() -> None:
        async with tgi(refuse) as on:
            answered = await send(on, "/generate_stream" if stream else "/generate")

            assert (answered.status_code, answered.content) == (status, body)
            assert answered.headers["content-type"] == kind
            await on.nothing_is_held()

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_the_gateways_own_and_never_the_callers(stream: bool, status: int) -> None:
    async def refuse(conversation: Conversation) -> None:
        await conversation.say(answer(status, b"the key was k-123"))

    async def scene() -> None:
        async with tgi(refuse, api_key="k-123") as on:
            answered = await send(on, "/generate_stream" if stream else "/generate")

            assert b"uthorization: Bearer k-123" in on.server.requests[0]
            assert answered.status_code == 502
            assert answered.json()["error_type"] == "upstream_failed"
            assert "k-123" not in answered.text

    asyncio.run(scene())


def test_a_refusal_that_repeats_the_gateways_key_does_not_show_it() -> None:
    async def refuse(conversation: Conversation) -> None:
        await conversation.say(answer(400, b"not with k-123"))

    async def scene() -> None:
        async with tgi(refuse, api_key="k-123") as on:
            answered = await send(on, "/generate")

            assert (answered.status_code, answered.text) == (400, "not with [key]")

    asyncio.run(scene())


@pytest.mark.parametrize("path", STREAMED)
def test_a_stream_comes_back_as_it_was_given(path: str) -> None:
    async def scene() -> None:
        async with tgi(all_events) as on:
            answered = await send(on, path)

            assert answered.content == b"".join(EVENTS)
            assert answered.headers["content-type"] == "text/event-stream"
            assert answered.headers["x-compute-type"] == "gpu+optimized"
            assert answered.headers.get_list("x-accel-buffering") == ["no"]
            assert "content-length" not in answered.headers
            await on.nothing_is_held()

    asyncio.run(scene())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_a_stream_may_be_cut_anywhere(size: int) -> None:
    whole = b"".join(EVENTS)

    async def in_pieces(conversation: Conversation) -> None:
        await conversation.say(HEAD)
        for start in range(0, len(whole), size):
            await conversation.say(chunk(whole[start : start + size]))
            await asyncio.sleep(0)
        await conversation.say(b"0\r\n\r\n")

    async def scene() -> None:
        async with tgi(in_pieces) as on:
            assert (await send(on, "/generate_stream")).content == whole

    asyncio.run(scene())


def test_an_event_is_passed_on_before_the_next_one_comes() -> None:
    heard = asyncio.Event()

    async def one_by_one(conversation: Conversation) -> None:
        await conversation.say(HEAD + chunk(EVENTS[0]))
        await heard.wait()
        await conversation.say(chunk(EVENTS[2]) + b"0\r\n\r\n")

    async def scene() -> None:
        async with (
            tgi(one_by_one) as on,
            httpx.AsyncClient(timeout=20) as client,
            client.stream("POST", f"{on.url}{BASE}/generate_stream", json={"inputs": "Once"}) as answered,
        ):
            chunks = answered.aiter_raw()
            assert await anext(chunks) == EVENTS[0]
            heard.set()
            assert [each async for each in chunks] == [EVENTS[2]]

    asyncio.run(scene())


# ---- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\n", HEAD, HEAD + b"5\r\nda"])
def test_a_server_that_breaks_off_before_its_first_byte_is_502(stream: bool, said: bytes) -> None:
    async def break_off(conversation: Conversation) -> None:
        await conversation.say(said)

    async def scene() -> None:
        async with tgi(break_off) as on:
            answered = await send(on, "/generate_stream" if stream else "/generate")

            assert (answered.status_code, answered.json()["error_type"]) == (502, "upstream_failed")
            assert len(on.server.requests) == 1  # what was sent is not sent again
            await on.nothing_is_held()

    asyncio.run(scene())


HALVES = [b"", b'data: {"ind', EVENTS[2][:-20], b"data: [DO"]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("said", [HEAD + chunk(EVENTS[0]), CLOSED_HEAD + EVENTS[0], OLD_HEAD + EVENTS[0]])
@pytest.mark.parametrize("path", STREAMED)
def test_a_stream_that_breaks_off_ends_with_one_event_in_the_shape_of_its_address(
    path: str, said: bytes, half: bytes
) -> None:
    begun = EVENTS[0]

    async def break_off(conversation: Conversation) -> None:
        await conversation.say(said + (chunk(half) if half and said.startswith(HEAD) else half))

    async def scene() -> None:
        async with tgi(break_off) as on:
            answered = await send(on, path)

            assert answered.status_code == 200
            assert answered.content.startswith(begun)
            event = json.loads(answered.content.removeprefix(begun + b"data: "))
            assert (event["error_type"], event["error_code"]) == ("generation", "GENERATION_FAILED")
            if path.startswith("/v1"):
                assert "broke off" in event["error"]["message"]
                assert event["error"]["http_status_code"] == 424
            else:
                assert "broke off" in event["error"]
            await on.nothing_is_held()

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("said", [b"", HEAD])
def test_a_silent_server_is_given_up(stream: bool, said: bytes) -> None:
    async def say_little(conversation: Conversation) -> None:
        await conversation.say(said)
        await for_ever(conversation)

    async def scene() -> None:
        async with tgi(say_little, generation_timeout="200ms") as on:
            answered = await send(on, "/generate_stream" if stream else "/generate")

            assert (answered.status_code, answered.json()["error_type"]) == (504, "generation_timeout")
            await asyncio.wait_for(on.server.left.wait(), 5)
            await on.nothing_is_held()

    asyncio.run(scene())


@pytest.mark.parametrize("pieces", [[b":\n\n"], [b": pi", b"ng\n\n"], [b":", b"\r", b"\n\r\n"], [b"\n"], [b"x"]])
def test_a_server_that_sends_no_more_events_is_given_up_as_well(pieces: list[bytes]) -> None:
    async def go_on(conversation: Conversation) -> None:
        await conversation.say(HEAD + chunk(EVENTS[0]))
        while True:
            for piece in pieces:
                await asyncio.sleep(0.02)
                await conversation.say(chunk(piece))

    async def scene() -> None:
        async with tgi(go_on, generation_timeout="300ms") as on:
            answered = await send(on, "/generate_stream")

            assert answered.content.startswith(EVENTS[0])
            if pieces == [b"x"]:  # half a line would spoil the event after it
                assert answered.content.startswith(EVENTS[0] + b"data: ")
            assert json.loads(answered.text.rpartition("data: ")[2])["error_code"] == "GENERATION_TIMEOUT"
            await on.nothing_is_held()

    asyncio.run(scene())


def test_a_stream_may_last_longer_than_the_time_between_two_events() -> None:
    async def slowly(conversation: Conversation) -> None:
        await conversation.say(HEAD)
        for _ in range(6):
            await asyncio.sleep(0.1)
            await conversation.say(chunk(EVENTS[0]))
        await conversation.say(chunk(EVENTS[2]) + b"0\r\n\r\n")

    async def scene() -> None:
        async with tgi(slowly, generation_timeout="400ms") as on:
            assert (await send(on, "/generate_stream")).content == EVENTS[0] * 6 + EVENTS[2]

    asyncio.run(scene())


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize("said", [b"", HEAD, HEAD + chunk(EVENTS[0]), HEAD + b"5\r\nda"])
def test_the_connection_to_the_server_is_closed_when_the_caller_leaves(path: str, said: bytes) -> None:
    heard = asyncio.Event()

    async def go_on(conversation: Conversation) -> None:
        await conversation.say(said)
        heard.set()
        await for_ever(conversation)

    async def scene() -> None:
        async with tgi(go_on) as on:
            asked = asyncio.create_task(send(on, path))
            await asyncio.wait_for(heard.wait(), 5)
            asked.cancel()

            await asyncio.wait_for(on.server.left.wait(), 5)
            await on.nothing_is_held()

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_takes_no_connection_is_502(stream: bool) -> None:
    async def scene() -> None:
        async with AsyncExitStack() as first:
            _, port = await first.enter_async_context(scripted(all_events))
            async with tgi(all_events, port) as on:
                await on.instance.start()
                await first.aclose()
                answered = await send(on, "/generate_stream" if stream else "/generate")

                assert (answered.status_code, answered.json()["error_type"]) == (502, "upstream_failed")
                assert on.server.requests == []

    asyncio.run(scene())


def test_the_end_of_the_server_ends_a_stream_with_words() -> None:
    async def go_on(conversation: Conversation) -> None:
        await conversation.say(HEAD + chunk(EVENTS[0]))
        await for_ever(conversation)

    async def scene() -> None:
        async with (
            tgi(go_on) as on,
            httpx.AsyncClient(timeout=20) as client,
            client.stream("POST", f"{on.url}{BASE}/generate_stream", json=ASKED) as answered,
        ):
            chunks = answered.aiter_raw()
            assert await anext(chunks) == EVENTS[0]
            on.runtime.ends.set_result(Exit(1, "exit status 1"))
            rest = b"".join([each async for each in chunks])

            assert json.loads(rest[6:])["error_code"] == "GENERATION_FAILED"
            await asyncio.wait_for(on.server.left.wait(), 5)

    asyncio.run(scene())


LAST_EVENTS = [
    EVENTS[2],
    EVENTS[2].replace(b"\n", b"\r\n"),
    b"data: [DONE]\n\n",
    b"data:[DONE]\r\n\r\n",
    b'data: {"error":"Incomplete generation","error_type":"Incomplete generation"}\n\n',
    b'data: {"error":{"message":"no","http_status_code":422}}\n\ndata: [DONE]\n\n',
]


@pytest.mark.parametrize("last", LAST_EVENTS)
@pytest.mark.parametrize("head", [CLOSED_HEAD, OLD_HEAD])
@pytest.mark.parametrize("after", [b"", b": still here\n\n"])
def test_a_stream_ends_with_its_last_event_though_its_server_keeps_the_connection(
    head: bytes, last: bytes, after: bytes
) -> None:
    async def linger(conversation: Conversation) -> None:
        await conversation.say(head + EVENTS[0])
        for byte in last + after:
            await conversation.say(bytes([byte]))
        await for_ever(conversation)

    async def scene() -> None:
        async with tgi(linger) as on:
            answered = await send(on, "/generate_stream")

            assert answered.content == EVENTS[0] + last
            await asyncio.wait_for(on.server.left.wait(), 5)
            await on.nothing_is_held()

    asyncio.run(scene())


@pytest.mark.parametrize("last", [*LAST_EVENTS, LAST_EVENTS[-1].partition(b"data: [")[0]])
@pytest.mark.parametrize("said", [HEAD, CLOSED_HEAD])
def test_a_connection_that_breaks_after_the_last_event_is_no_failure(said: bytes, last: bytes) -> None:
    async def break_off(conversation: Conversation) -> None:
        await conversation.say(said + (chunk(EVENTS[0] + last) if said == HEAD else EVENTS[0] + last))

    async def scene() -> None:
        async with tgi(break_off) as on:
            assert (await send(on, "/generate_stream")).content == EVENTS[0] + last

    asyncio.run(scene())


def test_a_token_that_speaks_of_the_end_is_not_the_end() -> None:
    event = json.dumps({"token": {"text": 'data: [DONE] "generated_text":"x","error":"y"'}, "generated_text": None})

    async def speak(conversation: Conversation) -> None:
        await conversation.say(CLOSED_HEAD + f"data: {event}\n\n".encode())
        await conversation.say(b"".join(EVENTS))

    async def scene() -> None:
        async with tgi(speak) as on:
            answered = await send(on, "/generate_stream")

            assert answered.content == f"data: {event}\n\n".encode() + b"".join(EVENTS)

    asyncio.run(scene())


def test_a_line_without_end_is_not_kept_for_ever() -> None:
    async def go_on(conversation: Conversation) -> None:
        await conversation.say(CLOSED_HEAD + EVENTS[0] + b"data: ")
        while True:
            await conversation.say(b"x" * 2**20)

    async def scene() -> None:
        async with tgi(go_on) as on:
            answered = await send(on, "/generate_stream")

            error = json.loads(answered.content.removeprefix(EVENTS[0] + b"data: "))
            assert error["error_code"] == "GENERATION_FAILED"
            await asyncio.wait_for(on.server.left.wait(), 5)

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [101, 600, 999])
def test_a_status_that_is_none_of_an_answer_is_502(stream: bool, status: int) -> None:
    async def scene() -> None:
        async with tgi(lambda conversation: conversation.say(answer(status, b"{}"))) as on:
            answered = await send(on, "/generate_stream" if stream else "/generate")

            assert (answered.status_code, answered.json()["error_type"]) == (502, "upstream_failed")
            on.server.well = answer(status, b"{}")
            assert (await ask(on, "/info")).status_code == 502

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [200, 422])
def test_an_answer_that_is_compressed_is_502(stream: bool, status: int) -> None:
    compressed = answer(status, gzip.compress(b"{}"), "application/json", "Content-Encoding: gzip")
    plain = answer(status, b"{}", "application/json", "Content-Encoding: Identity")

    async def scene() -> None:
        said = [compressed, plain]
        async with tgi(lambda conversation: conversation.say(said.pop(0))) as on:
            answered = await send(on, "/generate_stream" if stream else "/generate")

            assert (answered.status_code, answered.json()["error_type"]) == (502, "upstream_failed")
            assert (await send(on, "/generate")).status_code == status
            on.server.well = compressed
            assert (await ask(on, "/info")).status_code == 502

    asyncio.run(scene())


@pytest.mark.parametrize("path", POSTS)
def test_a_body_that_is_compressed_is_refused_and_wakes_nobody(path: str) -> None:
    async def scene() -> None:
        async with tgi(all_events) as on:
            answered = await send(on, path, gzip.compress(b"{}"), content_encoding="gzip")

            assert (answered.status_code, answered.json()["error_type"]) == (422, "validation")
            assert "Content-Encoding 'gzip'" in answered.json()["error"]
            assert on.instance.status.state is State.STOPPED

    asyncio.run(scene())


@pytest.mark.parametrize("kind", ["Text/Event-Stream", "TEXT/EVENT-STREAM; charset=utf-8", "text/event-stream ;x=y"])
def test_a_stream_is_one_however_its_media_type_is_written(kind: str) -> None:
    heard = asyncio.Event()

    async def one_by_one(conversation: Conversation) -> None:
        await conversation.say(CLOSED_HEAD.replace(b"text/event-stream", kind.encode()) + EVENTS[0])
        await heard.wait()
        await conversation.say(EVENTS[2])

    async def scene() -> None:
        async with (
            tgi(one_by_one) as on,
            httpx.AsyncClient(timeout=20) as client,
            client.stream("POST", f"{on.url}{BASE}/generate_stream", json=ASKED) as answered,
        ):
            chunks = answered.aiter_raw()
            assert await anext(chunks) == EVENTS[0]
            heard.set()
            assert [each async for each in chunks] == [EVENTS[2]]

    asyncio.run(scene())


# ---- the gateway's key ----------------------------------------------------------------------------------------------

KEY = b"sk-secret-of-the-gateway"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("engine", ["tgi", "openai"])
@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (200, b'{"model":"x","generated_text":"%b"}', "application/json"),
        (200, b'{"error":{"message":"%b has no credit"}}', "application/json; key=%b"),
        (200, b'{"error":{"message":"%b has no credit"}}\n', "text/event-stream"),
        (400, b'{"error":{"message":"%b"}}', "application/json"),
        (400, b"x" * 290 + b"%b", "text/plain"),
        (500, b"<html>%b</html>", "text/html"),
        (429, b"%b", "text/plain"),
    ],
)
def test_whatever_a_server_answers_does_not_show_the_gateways_key(
    engine: str, stream: bool, status: int, body: bytes, kind: str
) -> None:
    said = answer(status, body, kind, "X-Time-Per-Token: %b").replace(b"%b", KEY)
    said = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(body.replace(b"%b", KEY)), said)

    async def scene() -> None:
        async with tgi(lambda conversation: conversation.say(said), engine=engine, api_key=KEY.decode()) as on:
            answered = await send(on, "/generate_stream" if stream else "/generate")
            if engine == "openai":
                answered = await on.post("/v1/completions", {"model": "m", "prompt": "Once", "stream": stream})
            assert KEY in on.server.requests[-1]
            assert KEY[:8] not in answered.content + str(answered.headers).encode()
            if engine == "tgi" and kind != "text/event-stream":
                assert answered.content == body.replace(b"%b", b"[key]")
                assert answered.headers["x-time-per-token"] == "[key]"

    asyncio.run(scene())


@pytest.mark.parametrize("size", [1, 2, 7, 23, 24, 25, 1000])
def test_a_stream_does_not_show_the_gateways_key_however_it_is_cut(size: int) -> None:
    told = b'data: {"token":{"text":"sk-s %b sk-secret-of sk-%b s"}}\n\n'
    last = b'data: {"error":"%b","error_type":"sk-secret"}\n\n'
    whole = (told + last).replace(b"%b", KEY)

    async def in_pieces(conversation: Conversation) -> None:
        await conversation.say(HEAD)
        for start in range(0, len(whole), size):
            await conversation.say(chunk(whole[start : start + size]))
            await asyncio.sleep(0)

    async def scene() -> None:
        async with tgi(in_pieces, api_key=KEY.decode()) as on:
            answered = await send(on, "/generate_stream")

            assert answered.content == (told + last).replace(b"%b", b"[key]")

    asyncio.run(scene())


def test_a_question_is_not_answered_with_the_gateways_key() -> None:
    async def scene() -> None:
        async with tgi(all_events, api_key=KEY.decode()) as on:
            await on.instance.start()
            for status in (200, 500):
                on.server.well = answer(status, KEY, "text/plain", f"X-Time-A: {KEY.decode()}")
                answered = await ask(on, "/info")

                assert (answered.status_code, answered.text) == (status, "[key]")
                assert answered.headers["x-time-a"] == "[key]"

    asyncio.run(scene())


def test_a_word_that_stands_in_the_place_of_a_key_may_be_said() -> None:
    async def scene() -> None:
        async with tgi(lambda conversation: conversation.say(answer(200, b'"EMPTY"')), api_key="EMPTY") as on:
            assert (await send(on, "/generate")).content == b'"EMPTY"'

    asyncio.run(scene())


# ---- what does not wake it ------------------------------------------------------------------------------------------

LOOKED_UP = ["/info", "/metrics", "/v1/models", "/api-doc/openapi.json"]
HEALTH = ["", "/health", "/ping"]


@pytest.mark.parametrize("path", LOOKED_UP)
def test_a_model_that_does_not_run_is_not_woken_by_a_question(path: str) -> None:
    async def scene() -> None:
        async with tgi(all_events) as on:
            answered = await ask(on, path)

            assert (answered.status_code, answered.json()["error_type"]) == (503, "model_not_loaded")
            assert answered.json()["error_code"] == "MODEL_NOT_LOADED"
            assert on.instance.status.state is State.STOPPED
            assert on.server.checks == []

    asyncio.run(scene())


@pytest.mark.parametrize("path", HEALTH)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_health_of_a_model_that_does_not_run_is_tgis_own_word_for_it(path: str, method: str) -> None:
    async def scene() -> None:
        async with tgi(all_events) as on:
            answered = await ask(on, path, method)

            assert answered.status_code == 503
            if method == "GET":
                assert answered.json() == {"error": "unhealthy", "error_type": "healthcheck"}
            assert on.instance.status.state is State.STOPPED

    asyncio.run(scene())


@pytest.mark.parametrize("path", [*LOOKED_UP, *HEALTH])
def test_a_question_is_answered_by_the_server_itself_without_a_lease(path: str) -> None:
    told = answer(200, b'{"model_id" : "gpt2"}', "application/json", "X-Compute-Type: gpu")

    async def scene() -> None:
        async with tgi(all_events) as on:
            await on.instance.start()
            on.server.well = told
            answered = await ask(on, path)

            assert (answered.status_code, answered.content) == (200, b'{"model_id" : "gpt2"}')
            assert answered.headers["x-compute-type"] == "gpu"
            head = on.server.checks[-1].decode()
            assert head.startswith(f"GET {path or '/'} HTTP/1.1\r\n")
            assert answered.headers["x-request-id"] in head
            assert on.instance.status.idle_s is not None

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("told", "status"),
    [(answer(404, b"", "text/plain"), 404), (answer(401, b"key"), 502), (b"", 502), (b"HTTP/1.1 200 OK\r\n", 502)],
)
def test_a_question_that_the_server_does_not_answer_well(told: bytes, status: int) -> None:
    async def scene() -> None:
        async with tgi(all_events) as on:
            await on.instance.start()
            on.server.well = told

            assert (await ask(on, "/info")).status_code == status
            assert (await ask(on, "/health")).status_code == (404 if status == 404 else 503)

    asyncio.run(scene())


def test_a_question_is_given_up_when_its_caller_leaves() -> None:
    heard, left = asyncio.Event(), asyncio.Event()

    async def be_well_and_tell_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            if (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /info"):
                heard.set()
                await reader.read()
                left.set()
            else:
                writer.write(WELL)
        writer.close()

    async def scene() -> None:
        listener = await asyncio.start_server(be_well_and_tell_nothing, "127.0.0.1", 0)
        async with listener, tgi(all_events, listener.sockets[0].getsockname()[1]) as on:
            await on.instance.start()
            asked = asyncio.create_task(ask(on, "/info"))
            await asyncio.wait_for(heard.wait(), 5)
            asked.cancel()

            await asyncio.wait_for(left.wait(), 5)  # and not only when the gateway has waited long enough

    asyncio.run(scene())


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_tgi_does_not_have_is_404_in_its_shape_and_reaches_nobody(method: str) -> None:
    async def scene() -> None:
        async with tgi(all_events) as on:
            for path in ("/nothing", "/v2/models", "/generate/more", "/v1/chat", "/docs/swagger.css"):
                answered = await ask(on, path, method)

                assert answered.status_code == 404
                assert (answered.json()["error_type"], answered.json()["error_code"]) == ("not_found", "NOT_FOUND")
            assert on.server.requests == []
            assert (await ask(on, "/generate")).status_code == 405

    asyncio.run(scene())


def test_a_caller_may_bound_its_wait_for_a_cold_model() -> None:
    async def scene() -> None:
        async with tgi(all_events) as on:
            on.server.well = answer(503, b"", "text/plain")
            answered = await send(on, "/generate", prefer="wait=0")

            assert (answered.status_code, answered.json()["error_code"]) == (503, "MODEL_NOT_LOADED")
            assert int(answered.headers["retry-after"]) > 0
            await on.nothing_is_held()

    asyncio.run(scene())
