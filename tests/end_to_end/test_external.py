"""Gateways before servers that already run: TGI, llama.cpp and providers with OpenAI's API; up, down, and refusing."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.engines.llamacpp import SERVER
from tests.end_to_end.gateway import EMBEDDED, Gateway, serving
from tests.end_to_end.test_answers import refusal, weights
from tests.end_to_end.test_life import send
from tests.runtimes.processes import wait_until
from tests.scripted_server import HEAD, Conversation, ScriptedServer, refused, scripted
from tests.tgi_double.process import Double, answers, free_port
from tests.tls import certificate_in, serves_with

KEY = "sk-0123456789abcdef"
ASK = {"prompt": "The capital of France is", "max_new_tokens": 5, "temperature": 0}


def tgi(url: str, **keys: Any) -> dict[str, Any]:
    return {"engine": "tgi", "hf_name": "gpt2", "runtime": "external", "url": url, **keys}


def openai(url: str, **keys: Any) -> dict[str, Any]:
    return {"engine": "openai", "url": url, **keys}


def streamed(gateway: Gateway, **asked: Any) -> list[Any]:
    with httpx.stream("POST", f"{gateway.url}/generate_stream", json={**ASK, **asked}, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        return [json.loads(line[5:]) for line in answer.iter_lines() if line.startswith("data:")]


def text_of(gateway: Gateway, **asked: Any) -> str:
    answer = gateway.post("/generate", {**ASK, "return_full_text": False, **asked})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["generated_text"])


CONVERSATION = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
]


def inferred(gateway: Gateway, **asked: Any) -> dict[str, Any]:
    """Return what /inference answers (mode instruct, if not told otherwise), which is the same streamed and whole."""
    mode = {} if "messages" in asked else {"mode": "instruct"}
    parameters = {"temperature": 0, "max_tokens": asked.pop("max_tokens", 12)}
    body = {"prompt": "Name a fruit.", "parameters": parameters, **mode, **asked}
    whole = gateway.post("/inference", body)
    assert whole.status_code == 200, whole.text
    stream = gateway.post("/inference", {**body, "stream": True})
    *pieces, end = [json.loads(event.removeprefix("data: ")) for event in stream.text.strip().split("\n\n")]
    assert end == whole.json()
    assert "".join(piece["text"] for piece in pieces) == end["generated_text"]
    return dict(end)


# ---- TGI -------------------------------------------------------------------------------------------------------------


def test_a_tgi_that_already_runs_answers_by_either_engine(tmp_path: Path) -> None:
    with (
        Double("--api-key", KEY) as double,
        serving(
            tmp_path,
            m=tgi(double.url, api_key=KEY),
            by_openai=openai(double.url, api_key=KEY, aliases=["second"]),
            wrong=tgi(double.url, hf_name="gpt2-wrong", api_key="sk-wrong"),
        ) as gateway,
    ):
        text = text_of(gateway)
        assert text
        assert text_of(gateway, model_id="by_openai") == text
        for model in ("m", "by_openai"):
            frames = streamed(gateway, model_id=model)
            assert "".join(frame["token"]["text"] for frame in frames) == frames[-1]["generated_text"] == text
            assert frames[-1]["details"]["generated_tokens"] == 5
        assert gateway.model()["port"] == double.port
        assert gateway.model()["state"] == "ready"
        assert gateway.children() == []

        for asked in ({}, {"messages": CONVERSATION, "prompt": None}):
            answer = inferred(gateway, model="by_openai", **asked)
            assert answer["generated_text"]
            assert answer["model"] == "by_openai"
            assert answer["tokens_generated"] <= 12

        wrong = gateway.post("/generate", {**ASK, "model_id": "wrong"})
        assert "`api_key`" in refusal(wrong, 502, "UPSTREAM_FAILED")
        too_long = gateway.post("/generate", {**ASK, "model_id": "by_openai", "prompt": "word " * 9000})
        refusal(too_long, 400, "PROMPT_TOO_LONG")
        unsupported = gateway.post("/generate", {**ASK, "model_id": "by_openai", "temperature": 1, "top_k": 3})
        assert "top_k" in refusal(unsupported, 422, "UNSUPPORTED")
        lacking = gateway.post("/generate", {**ASK, "model_id": "by_openai", "top_tokens": 2})
        assert "reports no top_tokens" in refusal(lacking, 422, "UNSUPPORTED")
        assert KEY not in "".join(gateway.log)


def test_what_others_run_is_neither_stopped_nor_restarted_and_has_no_log_here(tmp_path: Path) -> None:
    with Double() as double, serving(tmp_path, m=tgi(double.url)) as gateway:
        for verb in ("stop", "restart", "stop?force=true"):  # never started yet
            assert "runs elsewhere" in refusal(gateway.post(f"/models/m/{verb}"), 404, "MODEL_NOT_RUNNING")
        started = gateway.post("/models/m/start").json()
        assert (started["port"], started["container_name"]) == (double.port, "tgi-m")
        for verb in ("stop", "restart", "stop?force=true"):
            assert double.url in refusal(gateway.post(f"/models/m/{verb}"), 404, "MODEL_NOT_RUNNING")
        assert gateway.model()["state"] == "ready"
        assert "where it runs" in gateway.get("/models/m/logs?follow=true").text
        assert gateway.post("/models/m/pull").text == "done: there is nothing to download\n"
        assert text_of(gateway)


def test_an_idle_one_is_let_go_and_the_next_request_finds_it_again(tmp_path: Path) -> None:
    with Double() as double, serving(tmp_path, m=tgi(double.url, idle_timeout="50ms")) as gateway:
        assert text_of(gateway)
        wait_until(lambda: gateway.model()["state"] == "stopped")
        assert answers(double.port)
        assert text_of(gateway)


def test_a_server_that_is_down_is_told_at_once_and_found_when_it_is_there(tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path, m=tgi(f"http://127.0.0.1:{port}", preload=True)) as gateway:
        wait_until(lambda: gateway.model()["state"] == "failed")
        detail = refusal(gateway.post("/models/m/start"), 503, "START_FAILED")
        assert f"http://127.0.0.1:{port}" in detail
        assert "`url`" in gateway.model()["last_error"]["fix"]
        waiting = gateway.post("/generate", ASK)
        refusal(waiting, 503, "START_FAILED")
        assert 1 <= int(waiting.headers["retry-after"]) <= 5

        with Double(port=port):
            assert gateway.post("/models/m/start").status_code == 200
            assert text_of(gateway)


def test_a_server_that_goes_and_comes_back_is_unhealthy_meanwhile_and_never_dead(tmp_path: Path) -> None:
    port = free_port()
    watched = tgi(f"http://127.0.0.1:{port}", health_interval="100ms", health_failures=2)
    with serving(tmp_path, m=watched) as gateway:
        with Double(port=port):
            assert text_of(gateway)
        wait_until(lambda: gateway.model()["state"] == "unhealthy")
        refusal(gateway.post("/generate", ASK), 503, "MODEL_UNHEALTHY")

        with Double(port=port):
            wait_until(lambda: gateway.model()["state"] == "ready")
            assert text_of(gateway)
        assert "failed" not in gateway.moves()


def test_a_server_that_stays_away_is_given_up_and_found_again_by_a_request(tmp_path: Path) -> None:
    port = free_port()
    bounds = {"health_interval": "50ms", "health_failures": 1, "unhealthy_timeout": "100ms"}
    with serving(tmp_path, m=tgi(f"http://127.0.0.1:{port}", **bounds)) as gateway:
        with Double(port=port):
            assert text_of(gateway)
        wait_until(lambda: gateway.model()["state"] == "failed")
        assert "given up" in gateway.model()["last_error"]["detail"]

        with Double(port=port):
            assert text_of(gateway)


# ---- llama.cpp's own server ------------------------------------------------------------------------------------------


@contextmanager
def llama_cpp() -> Iterator[str]:
    """Run llama.cpp's server as a plain process that the gateway knows nothing of; yield its address."""
    port = free_port()
    options = ("--model", str(weights()), "--port", str(port), "--slots", "2", "--context-tokens", "512")
    server = subprocess.Popen(
        [sys.executable, "-P", str(SERVER), *options, "--device", "cpu"],
        env={**os.environ, "EMBEDDED_API_KEY": KEY},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: answers(port))
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.mark.embedded
def test_llama_cpp_by_openais_api_says_what_it_says_by_its_own(tmp_path: Path) -> None:
    with llama_cpp() as url:
        keys = {"api_key": KEY, "args": {"server": "llama.cpp"}}
        with serving(tmp_path, m=openai(url, **keys), own=EMBEDDED, wrong=openai(url, api_key="sk-wrong")) as gateway:
            text = text_of(gateway)
            assert text.startswith(" Paris")
            assert text == text_of(gateway, model_id="own")
            frames = streamed(gateway, max_new_tokens=8)
            assert "".join(frame["token"]["text"] for frame in frames) == frames[-1]["generated_text"]
            assert frames[-1]["details"]["generated_tokens"] == 8
            assert text_of(gateway, stop=["ar"]) == text_of(gateway, stop=["ar"], model_id="own") == " P"

            asked = {**ASK, "top_tokens": 3, "max_new_tokens": 2}
            ours, theirs = (gateway.post("/generate", {**asked, "model_id": name}).json() for name in ("m", "own"))
            for here, there in zip(ours["tokens"], theirs["tokens"], strict=True):
                assert [each["token"] for each in here] == [each["token"] for each in there]
                assert [each["probability"] for each in here] == pytest.approx(
                    [each["probability"] for each in there], abs=1e-3
                )

            assert inferred(gateway, max_tokens=8)["tokens_generated"] == 8
            assert inferred(gateway, messages=CONVERSATION, prompt=None)["generated_text"].strip()
            continued = [*CONVERSATION, {"role": "assistant", "content": "The capital of France is"}]
            assert "Paris" in inferred(gateway, messages=continued, prompt=None)["generated_text"]

            too_long = gateway.post("/generate", {**ASK, "prompt": "word " * 700})
            assert "takes 512" in refusal(too_long, 400, "PROMPT_TOO_LONG")
            too_long = gateway.post("/inference", {"prompt": "word " * 700, "mode": "instruct"})
            assert "takes 512" in refusal(too_long, 400, "PROMPT_TOO_LONG")
            wrong = gateway.post("/generate", {**ASK, "model_id": "wrong"})
            assert "`api_key`" in refusal(wrong, 503, "START_FAILED")
            assert KEY not in "".join(gateway.log)


# ---- a provider ------------------------------------------------------------------------------------------------------


def chunk(text: str, reason: str | None = None) -> bytes:
    usage = {"prompt_tokens": 3, "completion_tokens": 2} if reason else None
    said = {"choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}], "usage": usage}
    return b"data: " + json.dumps(said).encode() + b"\n\n"


async def two_tokens(conversation: Conversation) -> None:
    await conversation.say(HEAD + chunk(" a") + chunk(" b", "length") + b"data: [DONE]\n\n")


def provider(port: int, **keys: Any) -> dict[str, Any]:
    return openai(f"http://127.0.0.1:{port}/v1", api_key=KEY, args={"model": "their-name"}, **keys)


def test_a_provider_is_shown_its_key_and_nothing_else_is(tmp_path: Path) -> None:
    async def scene() -> None:
        async with scripted(two_tokens) as (server, port):
            with serving(tmp_path, m=provider(port)) as gateway:
                ours = {"Authorization": "Bearer the-callers-own"}
                answer = await asyncio.to_thread(gateway.post, "/generate", ASK, **ours)
                assert answer.json()["generated_text"] == "The capital of France is a b"
                assert answer.json()["tokens_generated"] == 2
                for heads in (server.checks, server.requests):
                    assert f"Authorization: Bearer {KEY}".encode() in heads[0].replace(
                        b"authorization", b"Authorization"
                    )
                assert server.checks[0].startswith(b"GET /v1/models ")
                assert server.requests[0].startswith(b"POST /v1/completions ")
                assert b"accept-encoding: identity" in server.requests[0].lower()
                assert b"callers-own" not in b"".join([*server.checks, *server.requests])
                shown = [await asyncio.to_thread(gateway.get, path) for path in ("/models", "/models/m", "/events")[:2]]
                assert all(KEY not in each.text for each in shown)
            assert KEY not in "".join(gateway.log)

    asyncio.run(scene())


def spoken(text: str, reason: str | None = None) -> bytes:
    usage = {"prompt_tokens": 3, "completion_tokens": 2} if reason else None
    said = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}], "usage": usage}
    return b"data: " + json.dumps(said).encode() + b"\n\n"


@pytest.mark.parametrize(
    ("asked", "messages"),
    [
        ({"prompt": "Hi", "mode": "instruct"}, [{"role": "user", "content": "Hi"}]),
        ({"messages": CONVERSATION}, CONVERSATION),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            [{"role": "user", "content": "ab"}],
        ),
    ],
)
def test_a_conversation_goes_to_a_providers_chats(
    tmp_path: Path, asked: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    bodies: list[Any] = []

    async def answer(conversation: Conversation) -> None:
        bodies.append(json.loads(conversation.body))
        await conversation.say(HEAD + spoken("Good") + spoken(" day", "stop") + b"data: [DONE]\n\n")

    async def scene() -> None:
        async with scripted(answer) as (server, port):
            with serving(tmp_path, m=provider(port, parameters={"seed": 7})) as gateway:
                told = await asyncio.to_thread(inferred, gateway, **{"prompt": None, **asked}, max_tokens=9)
            assert told == {"generated_text": "Good day", "model": "m", "tokens_generated": 2, "finish_reason": "eos"}
            assert all(head.startswith(b"POST /v1/chat/completions ") for head in server.requests)

    asyncio.run(scene())
    assert len(bodies) == 2
    for body in bodies:
        assert (body["model"], body["messages"]) == ("their-name", messages)
        assert (body["max_tokens"], body["temperature"], body["stream"]) == (9, 0, True)
        assert "prompt" not in body


@pytest.mark.parametrize("stream", [False, True])
def test_a_provider_that_refuses_a_conversation_is_told_of(tmp_path: Path, stream: bool) -> None:
    async def refuse(conversation: Conversation) -> None:
        await conversation.say(refused(400, "roles must alternate"))

    async def scene() -> None:
        async with scripted(refuse) as (_, port):
            with serving(tmp_path, m=provider(port)) as gateway:
                body = {"messages": CONVERSATION, "stream": stream}
                answer = await asyncio.to_thread(gateway.post, "/inference", body)
                assert "roles must alternate" in refusal(answer, 422, "VALIDATION_ERROR")

    asyncio.run(scene())


def test_a_key_that_the_provider_does_not_take_is_told_at_once(tmp_path: Path) -> None:
    async def scene() -> None:
        async with scripted(two_tokens) as (server, port):
            server.well = refused(401, f"Incorrect API key provided: {KEY}")
            with serving(tmp_path, m=provider(port)) as gateway:
                answer = await asyncio.to_thread(gateway.post, "/generate", ASK)
                assert "`api_key`" in refusal(answer, 503, "START_FAILED")
                assert KEY not in answer.text + "".join(gateway.log)

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "status", "code", "retry_after"),
    [
        (refused(429, "Rate limit reached", "Retry-After: 7"), 503, "QUEUE_FULL", "7"),
        (refused(429, "Rate limit reached", "Retry-After: Fri, 31 Dec 1999 23:59:59 GMT"), 503, "QUEUE_FULL", "5"),
        (refused(503, "overloaded", "Retry-After: 9"), 502, "UPSTREAM_FAILED", "9"),
        (refused(500, f"you sent {KEY}"), 502, "UPSTREAM_FAILED", None),
        (refused(401, f"Incorrect API key provided: {KEY}"), 502, "UPSTREAM_FAILED", None),
        (refused(404, "no such model"), 502, "UPSTREAM_FAILED", None),
        (refused(400, "bad seed"), 422, "VALIDATION_ERROR", None),
        (refused(307, "", "Location: http://127.0.0.1:1/"), 502, "UPSTREAM_FAILED", None),
    ],
)
def test_what_a_provider_refuses_is_an_error_of_ours(
    tmp_path: Path, said: bytes, status: int, code: str, retry_after: str | None, stream: bool
) -> None:
    async def refuse(conversation: Conversation) -> None:
        await conversation.say(said)

    async def scene() -> None:
        async with scripted(refuse) as (_, port):
            with serving(tmp_path, m=provider(port)) as gateway:
                answer = await asyncio.to_thread(gateway.post, "/generate", {**ASK, "stream": stream})
                refusal(answer, status, code)
                assert answer.headers.get("retry-after") == retry_after
                assert KEY not in answer.text + "".join(gateway.log)

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("said", [b"", HEAD, HEAD + chunk(" a")])
def test_the_connection_to_a_provider_is_closed_when_the_caller_leaves(
    tmp_path: Path, said: bytes, stream: bool
) -> None:
    begun = asyncio.Event()

    async def hang(conversation: Conversation) -> None:
        await conversation.say(said)
        begun.set()
        await asyncio.Event().wait()

    async def scene() -> ScriptedServer:
        async with scripted(hang) as (server, port):
            with serving(tmp_path, m=provider(port)) as gateway:
                caller = await asyncio.to_thread(send, gateway, stream=stream)
                await begun.wait()
                caller.close()
                async with asyncio.timeout(5):
                    await server.left.wait()
            return server

    assert len(asyncio.run(scene()).requests) == 1


def test_a_provider_is_reached_by_tls_if_its_certificate_is_trusted(tmp_path: Path) -> None:
    certificate = certificate_in(tmp_path)

    async def scene() -> None:
        async with scripted(two_tokens, serves_with(certificate)) as (_, port):
            model = openai(f"https://127.0.0.1:{port}", api_key=KEY)
            for environ, trusted in (({"SSL_CERT_FILE": str(certificate)}, True), ({}, False)):
                with serving(tmp_path, environ, m=model) as gateway:
                    answer = await asyncio.to_thread(gateway.post, "/generate", ASK)
                    if trusted:
                        assert answer.json()["generated_text"].endswith(" a b")
                    else:
                        assert "not trusted" in refusal(answer, 503, "START_FAILED")

    asyncio.run(scene())
