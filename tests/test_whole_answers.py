"""Answers that are made of whole results, over real sockets: many prompts in one, and token probabilities."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack

import httpx
import pytest

from tests.scripted_server import HEAD, Conversation, end, scripted, token
from tests.test_relay import stage

LLM = "/models/m/llm-service/generate"
MANY = "/api/llm/inference"


def prompt_of(conversation: Conversation) -> str:
    return str(json.loads(conversation.body)["prompt"])


class Crowd:
    """A script that answers each prompt with itself once enough of them are there, and counts who is at it."""

    def __init__(self, at_once: int) -> None:
        self._full = asyncio.Barrier(at_once)
        self.now = self.most = 0

    async def __call__(self, conversation: Conversation) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self._full.wait()
            await conversation.say(HEAD + token(f" {prompt_of(conversation)}!") + end(1))
        finally:
            self.now -= 1


def test_prompts_are_answered_in_order_as_many_at_once_as_the_model_takes() -> None:
    async def scene() -> None:
        crowd = Crowd(at_once=2)
        async with stage(crowd, max_concurrency=2) as on:
            answer = await on.post(MANY, {"model_path": "m", "prompts": list("abcdef")})

            assert answer.json() == {
                "outputs": [" a!", " b!", " c!", " d!", " e!", " f!"],
                "model_path": "m",
                "num_prompts": 6,
            }
            assert crowd.most == 2
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
        if prompt_of(conversation) == "bad":
            return
        try:
            await asyncio.Event().wait()
        finally:
            self.left += 1


def test_the_first_failure_ends_all_prompts() -> None:
    async def scene() -> None:
        script = OneBreaks(others=2)
        async with stage(script, max_concurrency=3) as on:
            answer = await on.post(MANY, {"model_path": "m", "prompts": ["a", "bad", "b", "never begun"]})

            assert (answer.status_code, answer.json()["error_code"]) == (500, "GENERATION_FAILED")
            await on.nothing_is_held()
            assert len(on.server.requests) == 3
            async with asyncio.timeout(5):
                while script.left < 2:
                    await asyncio.sleep(0.005)

    asyncio.run(scene())


@pytest.mark.parametrize("address", [LLM, MANY, "/inference"])
def test_a_caller_who_leaves_ends_all_that_was_done_for_it(address: str) -> None:
    async def scene() -> None:
        left = 0

        async def silent(conversation: Conversation) -> None:
            nonlocal left
            await conversation.say(HEAD + token(" upon"))
            try:
                await asyncio.Event().wait()
            finally:
                left += 1

        async with stage(silent) as on:
            body = {"model_path": "m", "prompts": ["a", "b", "c"], "prompt": "a"}
            asking = asyncio.create_task(on.post(address, body))
            wanted = 3 if address == MANY else 1
            async with asyncio.timeout(5):
                while len(on.server.requests) < wanted:
                    await asyncio.sleep(0.005)
                asking.cancel()
                while left < wanted:
                    await asyncio.sleep(0.005)
            await on.nothing_is_held()

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("said", "status", "code"),
    [(HEAD, 502, "UPSTREAM_FAILED"), (HEAD + token(" upon"), 500, "GENERATION_FAILED")],
)
@pytest.mark.parametrize("address", [LLM, MANY, "/inference"])
def test_a_server_that_breaks_off_is_told_of(address: str, said: bytes, status: int, code: str) -> None:
    async def breaks(conversation: Conversation) -> None:
        await conversation.say(said)

    async def scene() -> None:
        async with stage(breaks) as on:
            answer = await on.post(address, {"model_path": "m", "prompts": ["a"], "prompt": "a"})

            assert (answer.status_code, answer.json()["error_code"]) == (status, code)
            await on.nothing_is_held()

    asyncio.run(scene())


@pytest.mark.parametrize("address", [LLM, MANY, "/inference"])
def test_a_server_that_is_too_slow_is_told_of(address: str) -> None:
    async def silent(conversation: Conversation) -> None:
        await asyncio.Event().wait()

    async def scene() -> None:
        async with stage(silent, generation_timeout_s=0.2) as on:
            answer = await on.post(address, {"model_path": "m", "prompts": ["a"], "prompt": "a"})

            assert (answer.status_code, answer.json()["error_code"]) == (504, "GENERATION_TIMEOUT")
            await on.nothing_is_held()

    asyncio.run(scene())


def test_a_server_that_takes_no_connection_fails_all_prompts() -> None:
    async def echo(conversation: Conversation) -> None:
        await conversation.say(HEAD + token(" upon") + end(1))

    async def scene() -> None:
        async with AsyncExitStack() as first:
            _, port = await first.enter_async_context(scripted(echo))
            async with stage(echo, port) as on:
                await on.instance.start()
                await first.aclose()
                answer = await on.post(MANY, {"model_path": "m", "prompts": ["a", "b"]})

                assert (answer.status_code, answer.json()["error_code"]) == (502, "UPSTREAM_FAILED")
                await on.nothing_is_held()

    asyncio.run(scene())


def test_a_forced_stop_fails_all_prompts() -> None:
    async def silent(conversation: Conversation) -> None:
        await asyncio.Event().wait()

    async def scene() -> None:
        async with stage(silent, max_concurrency=2) as on:
            answer = asyncio.create_task(on.post(MANY, {"model_path": "m", "prompts": ["a", "b", "c"]}))
            async with asyncio.timeout(5):
                while len(on.server.requests) < 2:
                    await asyncio.sleep(0.005)
            await on.instance.stop(force=True)

            told = await answer
            assert (told.status_code, told.json()["error_code"]) == (500, "GENERATION_FAILED")
            assert len(on.server.requests) == 2
            await on.nothing_is_held()

    asyncio.run(scene())


def reported(text: str, **chances: float) -> bytes:
    """Return a token with the likeliest ones, by probability or by logarithm, as llama.cpp tells them."""
    key = "prob" if all(0 <= chance <= 1 for chance in chances.values()) else "logprob"
    top = [{"id": number, "token": each, key: chance} for number, (each, chance) in enumerate(chances.items())]
    told = {"id": 0, "token": text, key: top[0][key], "top_probs" if key == "prob" else "top_logprobs": top}
    event = {"content": text, "tokens": [0], "stop": False, "tokens_predicted": 1, "tokens_evaluated": 3}
    return b"data: " + json.dumps({**event, "completion_probabilities": [told]}).encode() + b"\n\n"


def test_alternatives_that_an_engine_leaves_out_are_asked_for_once_more() -> None:
    async def leaves_out(conversation: Conversation) -> None:
        asked = json.loads(conversation.body)
        sharp = asked["temperature"] == 0.5
        told = reported("x", x=1.0) if sharp else reported("x", x=-0.1, y=-3.1, z=-5.1)
        await conversation.say(HEAD + told + end(1))

    async def scene() -> None:
        async with stage(leaves_out) as on:
            answer = await on.post(LLM, {"prompt": "a", "temperature": 0.5, "top_k": 3})

            told = answer.json()["tokens"]
            assert [each["token"] for each in told] == ["x", "y", "z"]
            assert [each["logprob"] for each in told] == pytest.approx([0.0, -6.0, -10.0])
            assert len(on.server.requests) == 2
            await on.nothing_is_held()

    asyncio.run(scene())


def test_a_stream_of_the_inference_api_ends_in_the_whole_or_in_one_error() -> None:
    async def breaks_on_demand(conversation: Conversation) -> None:
        whole = prompt_of(conversation) == "good"
        await conversation.say(HEAD + token(" upon") + (token(" a", 2) + end(2) if whole else b""))

    async def events(answer: httpx.Response) -> list[object]:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return [json.loads(event.removeprefix("data: ")) for event in answer.text.strip().split("\n\n")]

    async def scene() -> None:
        async with stage(breaks_on_demand) as on:
            good = await events(await on.post("/inference", {"prompt": "good", "stream": True}))
            bad = await events(await on.post("/inference", {"prompt": "bad", "stream": True}))

            last = {"generated_text": " upon a", "model": "m", "tokens_generated": 2, "finish_reason": "length"}
            assert good == [{"text": " upon"}, {"text": " a"}, last]
            assert bad[0] == {"text": " upon"}
            assert [sorted(event) for event in bad[1:]] == [["detail", "error_code"]]  # type: ignore[call-overload]
            await on.nothing_is_held()

    asyncio.run(scene())
