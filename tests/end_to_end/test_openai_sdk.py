"""The official `openai` SDK before a real gateway: each feature, on each engine."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from gateway.keys import add_key
from tests.end_to_end.gateway import EMBEDDED, Gateway, serving
from tests.runtimes.processes import wait_until
from tests.tgi_double.process import Double, free_port

FRANCE = "The capital of France is"
ASKED: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
OTHER: Any = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}


class City(BaseModel):
    """What a typed answer is parsed into."""

    name: str
    is_capital: bool


@pytest.fixture(scope="module")
def slow() -> Iterator[Double]:
    """A server that takes its time: whoever leaves does so before it has ended by itself."""
    with Double(token_s=0.5) as double:
        yield double


def dropped(double: Double) -> int:
    """Return how many of its requests the double has lost to callers who left."""
    found = re.search(r'^tgi_request_failure\{err="dropped"\} (\d+)$', httpx.get(f"{double.url}/metrics").text, re.M)
    return int(found[1]) if found else 0


@pytest.fixture(scope="module")
def gateway(slow: Double, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with (
        Double() as double,
        serving(
            tmp_path_factory.mktemp("provider"),
            gpt={"engine": "tgi", "hf_name": "gpt2", "runtime": "external", "url": double.url},
        ) as provider,
        serving(
            tmp_path_factory.mktemp("models"),
            embedded=EMBEDDED,
            relayed={"engine": "openai", "url": provider.url, "args": {"model": "gpt"}},
            translated={"engine": "openai", "url": provider.url, "args": {"model": "gpt"}, "parameters": {"top_p": 1}},
            double={"engine": "tgi", "hf_name": "openai-community/gpt2", "runtime": "external", "url": double.url},
            slow={"engine": "tgi", "hf_name": "slow", "runtime": "external", "url": slow.url},
            down={"engine": "openai", "url": f"http://127.0.0.1:{free_port()}"},
        ) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@asynccontextmanager
async def asynchronous(gateway: Gateway) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


ENGINES = [pytest.param("embedded", marks=pytest.mark.embedded), "double", "relayed", "translated"]
"""The last two have another gateway as their provider."""
on_each_engine = pytest.mark.parametrize("model", ENGINES)


def say(client: OpenAI, model: str, messages: Any = ASKED, **fields: Any) -> ChatCompletion:
    asked = {"temperature": 0, "max_completion_tokens": 8, **fields}
    answer = client.chat.completions.create(model=model, messages=messages, **asked)
    assert isinstance(answer, ChatCompletion)
    return answer


def streamed(client: OpenAI, model: str, messages: Any = ASKED, **fields: Any) -> list[ChatCompletionChunk]:
    asked = {"temperature": 0, "max_completion_tokens": 8, "stream": True, **fields}
    with client.chat.completions.create(model=model, messages=messages, **asked) as chunks:
        return list(chunks)


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


# ---- models ----------------------------------------------------------------------------------------------------------


def test_models_are_listed_and_shown_by_each_of_their_names(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [
        "embedded",
        "relayed",
        "translated",
        "double",
        "slow",
        "down",
    ]
    for name in ("double", "openai-community/gpt2"):
        model = client.models.retrieve(name)
        assert (model.id, model.object, model.owned_by) == (name, "model", "openai-community")
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("openai-community/gpt")
    assert (refused.value.code, refused.value.type) == ("MODEL_NOT_FOUND", "invalid_request_error")
    assert "Near: double" in refused.value.message


# ---- chats -----------------------------------------------------------------------------------------------------------


@on_each_engine
def test_a_chat(client: OpenAI, model: str) -> None:
    answer = say(client, model)

    [choice] = answer.choices
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", model)
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert choice.message.content
    assert (choice.message.refusal, choice.message.tool_calls, choice.logprobs) == (None, None, None)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens > 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer._request_id


@on_each_engine
def test_a_streamed_chat_adds_up_to_the_whole_one(client: OpenAI, model: str) -> None:
    whole = say(client, model)
    *chunks, usage = streamed(client, model, stream_options={"include_usage": True})

    assert text_of(chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in [*chunks, usage]}) == 1
    assert {chunk.usage for chunk in chunks} == {None}
    assert (usage.choices, usage.usage) == ([], whole.usage)


@on_each_engine
def test_a_streams_own_helper_accumulates_the_answer(client: OpenAI, model: str) -> None:
    stop = (say(client, model).choices[0].message.content or "")[5:]  # it takes no answer that was cut by its length

    with client.chat.completions.stream(model=model, messages=ASKED, temperature=0, stop=stop) as stream:
        told = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()

    assert "".join(told) == final.choices[0].message.content == say(client, model, stop=stop).choices[0].message.content
    assert len("".join(told)) == 5


@on_each_engine
def test_asynchronous_clients_hear_the_same(gateway: Gateway, client: OpenAI, model: str) -> None:
    async def scene() -> tuple[str | None, str]:
        asked: dict[str, Any] = {"model": model, "messages": ASKED, "temperature": 0, "max_tokens": 8}
        async with asynchronous(gateway) as ours:
            whole = await ours.chat.completions.create(**asked)
            async with await ours.chat.completions.create(stream=True, **asked) as stream:
                pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return whole.choices[0].message.content, "".join(pieces)

    expected = say(client, model).choices[0].message.content
    assert asyncio.run(scene()) == (expected, expected)


@on_each_engine
def test_several_choices_are_what_each_of_their_seeds_gives_alone(client: OpenAI, model: str) -> None:
    free = {"temperature": 1, "max_completion_tokens": 12}

    together = say(client, model, n=3, seed=41, **free)
    alone = [say(client, model, seed=41 + number, **free).choices[0].message.content for number in range(3)]
    chunks = streamed(client, model, n=3, seed=41, **free)

    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [choice.message.content for choice in together.choices] == alone
    assert [text_of(chunks, index) for index in range(3)] == alone
    assert len(set(alone)) > 1
    assert together.usage is not None
    one = say(client, model, seed=41, **free).usage
    assert one is not None
    assert together.usage.prompt_tokens == one.prompt_tokens


@on_each_engine
def test_a_negative_seed_is_a_seed(client: OpenAI, model: str) -> None:
    said = [say(client, model, seed=-7, temperature=1).choices[0].message.content for _ in range(2)]

    assert said[0] == said[1]


@on_each_engine
@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 0.3},
        {"top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "n": 1, "logprobs": False, "stop": []},
        {"seed": 3},
        {"user": "somebody", "metadata": {"a": "b"}, "store": False, "parallel_tool_calls": True},
        {"extra_body": {"top_k": 5, "repetition_penalty": 1.0}},
        {"response_format": {"type": "text"}},
        {"tools": [TOOL], "tool_choice": "none", "messages": ASKED},
    ],
)
def test_what_does_not_matter_to_a_greedy_chat_changes_nothing(
    client: OpenAI, model: str, fields: dict[str, Any]
) -> None:
    answer = say(client, model, **fields)

    if "tools" in fields:  # the model may be told of them, and must not call them
        assert answer.choices[0].message.tool_calls is None
    else:
        assert answer.choices[0].message.content == say(client, model).choices[0].message.content


# ---- stop texts ------------------------------------------------------------------------------------------------------


@on_each_engine
def test_the_matched_stop_text_is_left_out(client: OpenAI, model: str) -> None:
    whole = say(client, model, max_completion_tokens=6).choices[0].message.content or ""
    stop = whole[2:5]
    before = whole[: whole.index(stop)]

    for said in (stop, [stop], ["never said", stop, "nor this", "nor that"]):
        answer = say(client, model, max_completion_tokens=6, stop=said)
        chunks = streamed(client, model, max_completion_tokens=6, stop=said)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (before, "stop")
        assert (text_of(chunks), chunks[-1].choices[0].finish_reason) == (before, "stop")
        assert answer.usage is not None
        assert answer.usage.prompt_tokens > 5


# ---- log-probabilities -----------------------------------------------------------------------------------------------


@on_each_engine
def test_logprobs_of_a_chat_tell_of_each_token(client: OpenAI, model: str) -> None:
    answer = say(client, model, logprobs=True, top_logprobs=3)
    chunks = streamed(client, model, logprobs=True, top_logprobs=3)

    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content or []
    told = [chunk.choices[0].logprobs for chunk in chunks]
    assert [token for logprobs in told if logprobs for token in logprobs.content or []] == tokens
    assert len(tokens) == 8
    assert "".join(token.token for token in tokens) == answer.choices[0].message.content
    for token in tokens:
        assert token.logprob <= 0
        assert bytes(token.bytes or ()).decode() == token.token
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # it is greedy
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob >= token.top_logprobs[2].logprob


@on_each_engine
def test_logprobs_of_a_completion(client: OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=FRANCE, max_tokens=5, temperature=0, logprobs=2)

    choice = answer.choices[0]
    assert choice.logprobs is not None
    tokens, offsets = choice.logprobs.tokens or [], choice.logprobs.text_offset or []
    tops, logprobs = choice.logprobs.top_logprobs or [], choice.logprobs.token_logprobs or []
    assert "".join(tokens) == choice.text
    assert len(tokens) == len(offsets) == len(tops) == len(logprobs) == 5
    for token, offset, top, logprob in zip(tokens, offsets, tops, logprobs, strict=True):
        assert choice.text[offset:].startswith(token)
        assert top[token] == logprob
        assert len(top) == 2


# ---- completions -----------------------------------------------------------------------------------------------------


@on_each_engine
def test_a_completion_and_its_stream(client: OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "prompt": FRANCE, "temperature": 0}

    whole = client.completions.create(**asked)
    with client.completions.create(stream=True, stream_options={"include_usage": True}, **asked) as stream:
        *chunks, usage = stream

    assert whole.id.startswith("cmpl-")
    assert (whole.object, whole.model) == ("text_completion", model)
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 16
    assert whole.choices[0].finish_reason == ("length" if whole.usage.completion_tokens == 16 else "stop")
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    ends = [chunk.choices[0].finish_reason for chunk in chunks]
    assert ends == [None] * (len(chunks) - 1) + [whole.choices[0].finish_reason]
    assert usage.usage == whole.usage


@on_each_engine
def test_several_prompts_are_answered_in_their_order(client: OpenAI, model: str) -> None:
    prompts = [FRANCE, "One two three", "Once upon", "I have", "You are"]
    asked: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 4}

    together = client.completions.create(prompt=prompts, **asked)
    alone = [client.completions.create(prompt=prompt, **asked) for prompt in prompts]

    assert [choice.text for choice in together.choices] == [each.choices[0].text for each in alone]
    assert together.usage is not None
    assert together.usage.prompt_tokens == sum(each.usage.prompt_tokens for each in alone if each.usage)


# ---- tools and forms -------------------------------------------------------------------------------------------------


@on_each_engine
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_tool_that_must_be_called_is_called(client: OpenAI, model: str, choice: Any) -> None:
    tools = [TOOL] if choice == "required" else [OTHER, TOOL]
    asked: dict[str, Any] = {"tools": tools, "tool_choice": choice, "max_completion_tokens": 200}

    answer = say(client, model, WEATHER, **asked)
    with client.chat.completions.stream(model=model, messages=WEATHER, temperature=0, **asked) as stream:
        final = stream.get_final_completion().choices[0]

    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, answer.choices[0].finish_reason) == ("get_weather", "tool_calls")
    assert set(json.loads(call.function.arguments)) == {"city"}
    assert answer.choices[0].message.content is None
    [told] = final.message.tool_calls or []
    assert (told.function.name, told.function.arguments) == (call.function.name, call.function.arguments)
    assert (final.finish_reason, final.message.content) == ("tool_calls", None)
    assert told.id.startswith("call_")
    assert told.id != call.id


@on_each_engine
def test_a_tools_answer_is_heard(client: OpenAI, model: str) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    turns = [*WEATHER, {"role": "assistant", "tool_calls": [call]}]
    turns.append({"role": "tool", "tool_call_id": "call_1", "content": "Sunny, 25 degrees"})

    answer = say(client, model, turns, tools=[TOOL], max_completion_tokens=80)

    assert answer.choices[0].message.content


@on_each_engine
def test_a_tool_that_may_be_called_is_called_or_not(client: OpenAI, model: str) -> None:
    choice = say(client, model, WEATHER, tools=[TOOL], max_completion_tokens=60).choices[0]

    if choice.message.tool_calls:
        assert choice.finish_reason == "tool_calls"
    else:
        assert choice.message.content
        assert choice.finish_reason in ("stop", "length")


@on_each_engine
def test_a_typed_answer_is_parsed(client: OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": ASKED, "temperature": 0, "max_tokens": 200}

    answer = client.chat.completions.parse(response_format=City, **asked)
    with client.chat.completions.stream(response_format=City, **asked) as stream:
        final = stream.get_final_completion()

    assert isinstance(answer.choices[0].message.parsed, City)
    assert final.choices[0].message.parsed == answer.choices[0].message.parsed


@on_each_engine
def test_an_asynchronous_typed_answer_is_parsed(gateway: Gateway, model: str) -> None:
    async def scene() -> City | None:
        asked: dict[str, Any] = {"messages": ASKED, "temperature": 0, "max_tokens": 200}
        async with asynchronous(gateway) as ours:
            answer = await ours.chat.completions.parse(model=model, response_format=City, **asked)
            return answer.choices[0].message.parsed

    assert isinstance(asyncio.run(scene()), City)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "code", "param"),
    [
        ({"model": "embeded"}, openai.NotFoundError, "MODEL_NOT_FOUND", None),
        ({"temperature": 3}, openai.BadRequestError, "INVALID_TEMPERATURE", "temperature"),
        ({"logit_bias": {"5": 10}}, openai.BadRequestError, "UNSUPPORTED", "logit_bias"),
        ({"messages": []}, openai.BadRequestError, "VALIDATION_ERROR", "messages"),
        ({"extra_body": {"functions": [{"name": "f"}]}}, openai.BadRequestError, "UNSUPPORTED", "functions"),
        ({"model": "down", "messages": ASKED}, openai.InternalServerError, "START_FAILED", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_error_is_of_the_sdks_own_kind(
    client: OpenAI,
    fields: dict[str, Any],
    error: type[openai.APIStatusError],
    code: str,
    param: str | None,
    stream: bool,
) -> None:
    asked: dict[str, Any] = {"model": "double", "messages": ASKED, **fields}

    with pytest.raises(error) as refused:
        client.chat.completions.create(stream=stream, **asked)

    assert (refused.value.code, refused.value.param) == (code, param)
    assert refused.value.request_id
    if code == "START_FAILED":
        assert refused.value.status_code == 503
        assert int(refused.value.response.headers["retry-after"]) >= 1


@on_each_engine
def test_a_prompt_beyond_the_context_is_a_bad_request(client: OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=model, prompt="word " * 9000)

    assert refused.value.code == "PROMPT_TOO_LONG"


def test_a_client_that_waits_no_longer_ends_the_generation(client: OpenAI, slow: Double) -> None:
    before = dropped(slow)

    with pytest.raises(openai.APITimeoutError):
        say(client.with_options(timeout=0.2), "slow")

    wait_until(lambda: dropped(slow) == before + 1)


def test_a_stream_that_is_closed_in_its_midst_ends_all_its_generations(client: OpenAI, slow: Double) -> None:
    before = dropped(slow)
    asked: dict[str, Any] = {"model": "slow", "prompt": FRANCE, "max_tokens": 100, "temperature": 0}

    with client.completions.create(stream=True, n=2, **asked) as stream:
        assert next(iter(stream)).choices

    wait_until(lambda: dropped(slow) == before + 2)


@pytest.mark.embedded
def test_a_stream_that_is_closed_in_its_midst_frees_the_slots_of_the_embedded_engine(
    gateway: Gateway, client: OpenAI
) -> None:
    asked: dict[str, Any] = {"model": "embedded", "prompt": FRANCE, "max_tokens": 1500, "temperature": 1, "seed": 1}
    with client.completions.create(stream=True, n=2, **asked) as stream:
        assert next(iter(stream)).choices
        wait_until(lambda: gateway.slots_busy("embedded") == 2)

    wait_until(lambda: gateway.slots_busy("embedded") == 0, bound_s=2.0)


def test_an_asynchronous_stream_that_is_cancelled_ends_the_generation(gateway: Gateway, slow: Double) -> None:
    before = dropped(slow)

    async def scene() -> None:
        begun = asyncio.Event()

        async def listen() -> None:
            asked: dict[str, Any] = {"model": "slow", "messages": ASKED, "temperature": 0, "max_tokens": 100}
            async with await ours.chat.completions.create(stream=True, **asked) as stream:
                async for _ in stream:
                    begun.set()

        async with asynchronous(gateway) as ours:
            listening = asyncio.create_task(listen())
            await asyncio.wait_for(begun.wait(), 20)
            listening.cancel()
            await asyncio.wait([listening])

    asyncio.run(scene())
    wait_until(lambda: dropped(slow) == before + 1)


def test_keys_are_the_sdks_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    alice, operator = add_key(file, "alice", ["generate"]), add_key(file, "operator", ["manage"])
    hasty = add_key(file, "hasty", ["generate"], requests_per_minute=1)
    keys: dict[str, type[openai.APIStatusError]] = {
        "wrong": openai.AuthenticationError,
        operator: openai.PermissionDeniedError,
        hasty: openai.RateLimitError,
    }
    with (
        Double() as double,
        serving(
            tmp_path,
            {"GATEWAY_API_KEYS_FILE": str(file)},
            m={"engine": "tgi", "hf_name": "gpt2", "runtime": "external", "url": double.url},
        ) as gateway,
        OpenAI(base_url=f"{gateway.url}/v1", api_key=alice, max_retries=0) as client,
    ):
        assert say(client, "m").choices[0].message.content
        hasty_one = client.with_options(api_key=hasty)
        assert hasty_one.models.retrieve("m").id == "m"
        for key, error in keys.items():
            with pytest.raises(error) as refused:
                say(client.with_options(api_key=key), "m")
            assert refused.value.code in ("UNAUTHORIZED", "FORBIDDEN", "RATE_LIMITED")
            assert key not in str(refused.value.body)
