"""What a call tells of itself: its wait, its first token, its length and its end, over real sockets."""

from __future__ import annotations

import asyncio

import pytest

from tests.runtimes.processes import until
from tests.scripted_server import HEAD, WELL, Conversation, token
from tests.test_openai_api import provider, whole
from tests.test_relay import stage, two_tokens
from tests.test_tgi_passage import answer, send, tgi

LOADING = b"HTTP/1.1 503 Loading\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
TGIS_END = b'data: {"token":{"text":" b"},"generated_text":"","details":{"generated_tokens":2,"input_length":3}}\n\n'


class Heard:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.first_tokens: list[float] = []
        self.lengths: list[tuple[int, int]] = []
        self.ends: list[str] = []

    def waited(self, seconds: float) -> None:
        self.waits.append(seconds)

    def first_token(self, seconds: float) -> None:
        self.first_tokens.append(seconds)

    def generated(self, tokens: int, prompt_tokens: int) -> None:
        self.lengths.append((tokens, prompt_tokens))

    def ended(self, outcome: str) -> None:
        self.ends.append(outcome)


@pytest.mark.parametrize("stream", [False, True])
def test_a_good_call_is_told_once_and_only_a_stream_has_a_first_token(stream: bool) -> None:
    async def scene() -> None:
        async with stage(two_tokens) as on:
            heard = on.instance.figures = Heard()
            await on.ask(stream=stream)

            assert (heard.ends, heard.lengths, len(heard.waits)) == (["ok"], [(2, 3)], 1)
            assert len(heard.first_tokens) == stream
            assert all(0 <= wait <= first for wait, first in zip(heard.waits, heard.first_tokens, strict=False))

    asyncio.run(scene())


def test_the_wait_for_a_cold_start_is_part_of_the_wait() -> None:
    async def scene() -> None:
        async with stage(two_tokens) as on:
            on.server.well = LOADING
            heard = on.instance.figures = Heard()
            asked_at = asyncio.get_running_loop().time()
            asking = asyncio.create_task(on.ask())
            await until(lambda: len(on.server.checks) >= 2)
            assert heard.waits == []
            on.server.well = WELL
            await asking

            assert 0 < heard.waits[0] <= asyncio.get_running_loop().time() - asked_at

    asyncio.run(scene())


def test_a_batch_tells_of_each_of_its_calls() -> None:
    async def scene() -> None:
        async with stage(two_tokens) as on:
            heard = on.instance.figures = Heard()
            await on.post("/api/llm/inference", {"model_path": "m", "prompts": ["Once"] * 3})

            assert (heard.ends, heard.lengths) == (["ok"] * 3, [(2, 3)] * 3)

    asyncio.run(scene())


def test_a_call_that_breaks_off_is_told_by_its_code_and_has_no_length() -> None:
    async def break_off(conversation: Conversation) -> None:
        await conversation.say(HEAD + (token(" upon") if b"upon" in conversation.body else b""))

    async def scene() -> None:
        async with stage(break_off) as on:
            heard = on.instance.figures = Heard()
            await on.ask(stream=True)
            await on.ask(stream=True, prompt="Once upon")

            assert heard.ends == ["UPSTREAM_FAILED", "GENERATION_FAILED"]
            assert (heard.lengths, len(heard.first_tokens)) == ([], 1)

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_leaves_is_told_from_a_failure(stream: bool) -> None:
    begun = asyncio.Event()

    async def hang(conversation: Conversation) -> None:
        await conversation.say(HEAD + token(" upon"))
        begun.set()
        await asyncio.Event().wait()

    async def scene() -> None:
        async with stage(hang) as on:
            heard = on.instance.figures = Heard()
            asking = asyncio.create_task(on.ask(stream=stream))
            await begun.wait()
            asking.cancel()
            await until(lambda: heard.ends)

            assert heard.ends == ["cancelled"]

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_an_operator_cuts_is_told_by_its_code(stream: bool) -> None:
    begun = asyncio.Event()

    async def hang(conversation: Conversation) -> None:
        await conversation.say(HEAD + token(" upon"))
        begun.set()
        await asyncio.Event().wait()

    async def scene() -> None:
        async with stage(hang) as on:
            heard = on.instance.figures = Heard()
            asking = asyncio.create_task(on.ask(stream=stream))
            await begun.wait()
            await on.instance.stop(force=True)
            await asking

            assert heard.ends == ["GENERATION_FAILED"]

    asyncio.run(scene())


def test_a_call_that_never_gets_a_server_has_no_wait() -> None:
    async def scene() -> None:
        async with stage(two_tokens, start_timeout="200ms") as on:
            on.server.well = LOADING
            heard = on.instance.figures = Heard()
            assert (await on.ask()).status_code == 504

            assert (heard.ends, heard.waits) == (["START_TIMEOUT"], [])

    asyncio.run(scene())


# ---- put through ----


def test_a_stream_that_is_put_through_is_told_by_what_its_server_says() -> None:
    async def two(conversation: Conversation) -> None:
        await conversation.say(HEAD + b'data: {"token":{"text":" a"}}\n\n' + TGIS_END)

    async def scene() -> None:
        async with tgi(two) as on:
            heard = on.instance.figures = Heard()
            await send(on, "/generate_stream")

            assert (heard.ends, heard.lengths, len(heard.first_tokens)) == (["ok"], [(2, 3)], 1)

    asyncio.run(scene())


def test_a_whole_answer_that_is_put_through_is_told_by_its_headers() -> None:
    async def whole(conversation: Conversation) -> None:
        counts = ("X-Generated-Tokens: 7", "X-Prompt-Tokens: 3")
        await conversation.say(answer(200, b'{"generated_text":" a"}', "application/json", *counts))

    async def scene() -> None:
        async with tgi(whole) as on:
            heard = on.instance.figures = Heard()
            await send(on, "/generate")

            assert (heard.ends, heard.lengths, heard.first_tokens) == (["ok"], [(7, 3)], [])

    asyncio.run(scene())


def test_what_a_server_refuses_in_its_own_words_is_no_good_call() -> None:
    async def refuse(conversation: Conversation) -> None:
        await conversation.say(answer(422, b'{"error":"no","error_type":"validation"}'))

    async def scene() -> None:
        async with tgi(refuse) as on:
            heard = on.instance.figures = Heard()
            assert (await send(on, "/generate")).status_code == 422

            assert (heard.ends, heard.lengths) == (["refused"], [])

    asyncio.run(scene())


def test_a_providers_answer_is_told_by_its_usage() -> None:
    async def say(conversation: Conversation) -> None:
        await conversation.say(whole(b'{"model":"x","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":7}}'))

    async def scene() -> None:
        async with provider(say) as on:
            heard = on.instance.figures = Heard()
            await on.post("/v1/completions", {"model": "m", "prompt": "Once"})

            assert (heard.ends, heard.lengths) == (["ok"], [(7, 3)])

    asyncio.run(scene())
