"""Engine `tgi` before the double, over a socket: what is sent is taken, and what comes back is understood."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from gateway.catalog import ModelSpec
from gateway.engines.base import Call
from gateway.engines.tgi import Tgi
from gateway.errors import (
    GatewayError,
    GenerationFailed,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    Unsupported,
)
from gateway.generation import (
    Chat,
    Finished,
    GenerationRequest,
    GenerationResult,
    Image,
    JsonSchema,
    Message,
    Regex,
    TokenEvent,
    Tool,
    ToolCall,
    collect,
)
from tests.tgi_double.process import Double

ENGINE = Tgi()
SPEC = ModelSpec(id="m", hf_name="org/toy")
WEATHER = Tool(
    "get_weather",
    "Tells the weather",
    {
        "$defs": {"Unit": {"enum": ["C", "F"]}},
        "type": "object",
        "properties": {"place": {"type": "string"}, "unit": {"$ref": "#/$defs/Unit"}},
        "required": ["place", "unit"],
    },
)
TOOLS = (WEATHER, Tool("tell_time"))
PERSON = {
    "$defs": {"Pet": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}},
    "type": "object",
    "properties": {
        "age": {"type": "integer"},
        "pets": {"type": "array", "items": {"$ref": "#/$defs/Pet"}, "minItems": 1},
    },
    "required": ["age", "pets"],
}


def said(*texts: str) -> tuple[Message, ...]:
    """Return a conversation in which user and assistant take turns."""
    return tuple(Message("assistant" if turn % 2 else "user", (text,)) for turn, text in enumerate(texts))


HELLO = Chat(said("hello"))
ENDS = Chat(said("hi", "say good"))
"""Its last turn is continued, and the continuation ends by itself."""


@pytest.fixture(scope="module")
def double() -> Iterator[Double]:
    flags = ("--max-top-n-tokens", "50", "--max-total-tokens", "4096")
    with Double("--model-id", "org/toy", *flags) as running:
        yield running


def ask(chat: Chat | None = None, **more: Any) -> GenerationRequest:
    asked = {"prompt": "", "max_new_tokens": 200, "temperature": 0.0, "chat": chat, **more}
    return GenerationRequest(**asked)


@contextmanager
def sent(double: Double, call: Call) -> Iterator[httpx.Response]:
    with httpx.stream(
        call.method, double.url + call.path, content=call.body, headers=dict(call.headers), timeout=20
    ) as answer:
        yield answer


def answered(double: Double, request: GenerationRequest) -> GenerationResult:
    """Return the whole answer; leave as soon as it is finished, as the gateway does."""
    ENGINE.check(SPEC, request)
    decoder = ENGINE.decoder(request)
    events: list[TokenEvent] = []
    with sent(double, ENGINE.call(SPEC, request, "s")) as answer:
        if answer.status_code != 200:
            raise ENGINE.refusal(answer.status_code, answer.read())
        chunks = answer.iter_raw()
        for chunk in chunks:
            for event in decoder.feed(chunk):
                if isinstance(event, Finished):
                    return collect(events, event)
                events.append(event)
    raise AssertionError("never finished")


# ---- texts ----


def test_a_chat_ends_by_itself_with_both_counts(double: Double) -> None:
    result = answered(double, ask(ENDS))
    assert (result.text, result.reason, result.tokens_generated) == (" bye.", "eos", 3)
    prompt = "user: hi\nassistant: say good"
    assert result.prompt_tokens == len(ENGINE.tokens(ask(), tokenized(double, ask(prompt=prompt))))


def tokenized(double: Double, request: GenerationRequest) -> bytes:
    with sent(double, ENGINE.tokenize(SPEC, request, "s")) as answer:
        assert answer.status_code == 200
        return answer.read()


def test_chats_and_prompts_have_one_text(double: Double) -> None:
    prompt = ask(prompt="user: hello\nassistant:", max_new_tokens=30)
    chat = answered(double, ask(HELLO, max_new_tokens=30))
    assert chat.text == answered(double, prompt).text != ""
    assert (chat.reason, chat.tokens_generated) == ("eos", 14)


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 2.0, "top_p": 1.0, "seed": 3},
        {"temperature": 0.5, "top_p": 0.5, "frequency_penalty": -1.0, "logprobs": True},
        {"temperature": 0.0, "top_p": 0.5, "top_k": 3, "top_tokens": 50},
        {"temperature": 1e-9, "max_new_tokens": 1, "stop": ("a", "b", "c", "d", "e")},
    ],
)
@pytest.mark.parametrize("chat", [HELLO, Chat(HELLO.messages, TOOLS), Chat(HELLO.messages, TOOLS, "required")])
def test_whatever_passes_the_check_is_taken(double: Double, asked: dict[str, Any], chat: Chat) -> None:
    assert answered(double, ask(chat, **{"max_new_tokens": 20, **asked})).tokens_generated > 0


def test_without_a_length_an_answer_fills_the_context(double: Double) -> None:
    for request in (ask(ENDS, max_new_tokens=None), ask(prompt="say good", max_new_tokens=None)):
        assert answered(double, request).text == " bye."
    endless = answered(double, ask(prompt="go round and", max_new_tokens=None))
    assert (endless.reason, endless.tokens_generated + endless.prompt_tokens) == ("length", 4096)


def test_the_gateway_ends_an_answer_and_the_prompt_is_counted_apart(double: Double) -> None:
    chat = Chat(said("hi", "go round and"))
    stopped = answered(double, ask(chat, stop=(" and round",), max_new_tokens=None))
    assert (stopped.text, stopped.reason, stopped.stop) == (" round", "stop", " and round")
    assert stopped.prompt_tokens == 0
    prompt = ENGINE.tokens(ask(chat), tokenized(double, ask(chat)))
    assert len(prompt) == answered(double, ask(chat, max_new_tokens=1)).prompt_tokens
    # TGI would go on to 2,048, the end of the block.
    assert answered(double, ask(chat, max_new_tokens=1500)).tokens_generated == 1500


def test_probabilities_of_chats_are_those_of_prompts(double: Double) -> None:
    asked: dict[str, Any] = {"top_tokens": 5, "logprobs": True, "max_new_tokens": 4}
    chat = answered(double, ask(HELLO, **asked)).tokens
    prompt = answered(double, ask(prompt="user: hello\nassistant:", **asked)).tokens
    assert [(event.token, event.logprob) for event in chat] == [(event.token, event.logprob) for event in prompt]
    for one, other in zip(chat, prompt, strict=True):
        assert len(one.top) == 5
        assert [(each.text, each.probability) for each in one.top] == [
            (each.text, each.probability) for each in other.top
        ]


def test_special_tokens_and_halves_of_characters_are_told_apart(double: Double) -> None:
    tokens = answered(double, ask(ENDS, logprobs=True)).tokens
    assert [(event.text, event.token, event.special) for event in tokens] == [
        (" bye", " bye", False),
        (".", ".", False),
        ("", "</s>", True),
    ]
    cup = answered(double, ask(Chat(said("hi", "a cup of")), logprobs=True, max_new_tokens=4)).tokens
    assert "".join(event.text for event in cup) == " \u2615"
    assert not any(event.special for event in cup)
    native = answered(double, ask(prompt="say good")).tokens
    assert [event.special for event in native] == [False, False, True]


def test_images_are_passed_on(double: Double) -> None:
    chat = Chat((Message("user", ("What is ", Image("data:image/png;base64,AA"))),))
    body = json.loads(tokenized(double, ask(chat)))
    assert body["templated_text"] == "user: What is ![](data:image/png;base64,AA)\nassistant:"


# ---- grammars ----


@pytest.mark.parametrize("where", [{"chat": HELLO}, {"prompt": "The"}])
def test_an_answer_keeps_to_its_grammar(double: Double, where: dict[str, Any]) -> None:
    person = answered(double, ask(**where, grammar=JsonSchema(PERSON, "person")))
    assert json.loads(person.text) == {"age": 0, "pets": [{"name": ""}]}
    assert person.reason == "eos"
    assert answered(double, ask(**where, grammar=Regex("(yes|no)!"))).text == "no!"
    cut = answered(double, ask(**where, grammar=JsonSchema(PERSON), max_new_tokens=4))
    assert (cut.text, cut.reason) == ('{"ag', "length")


@pytest.mark.parametrize("grammar", [Regex("("), JsonSchema({"properties": {"a": {"$ref": "#"}}, "required": ["a"]})])
@pytest.mark.parametrize("where", [{"chat": HELLO}, {"prompt": "The"}])
def test_a_grammar_that_is_none_can_be_mended(double: Double, grammar: Any, where: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="Make it simpler"):
        answered(double, ask(**where, grammar=grammar))


# ---- tools ----


@pytest.mark.parametrize(
    ("chat", "calls"),
    [
        (Chat(HELLO.messages, TOOLS, "required"), [("get_weather", {"place": "", "unit": "C"})]),
        (Chat(HELLO.messages, TOOLS, "required", "tell_time"), [("tell_time", {})]),
        (Chat(said("please tell_time"), TOOLS), [("tell_time", {})]),
        (
            Chat(said("get_weather, please"), TOOLS, parallel_tool_calls=False),
            [("get_weather", {"place": "", "unit": "C"})],
        ),
        (Chat(HELLO.messages, TOOLS), []),
        (Chat(said("please tell_time"), TOOLS, "none"), []),
    ],
)
def test_a_tool_is_called_or_not(double: Double, chat: Chat, calls: list[Any]) -> None:
    result = answered(double, ask(chat, max_new_tokens=70))
    assert [(call.name, json.loads(call.arguments)) for call in result.tool_calls] == calls
    assert (result.reason, result.text == "") == (("tool_calls", True) if calls else ("eos", False))
    assert result.prompt_tokens > 0
    if not calls:
        assert result.text == answered(double, ask(Chat(chat.messages), max_new_tokens=70)).text


def test_a_call_that_is_cut_off_ends_with_length(double: Double) -> None:
    chat = Chat(HELLO.messages, TOOLS, "required")
    early = answered(double, ask(chat, max_new_tokens=5))
    assert (early.reason, early.tokens_generated, early.tool_calls) == ("length", 5, ())
    late = answered(double, ask(chat, max_new_tokens=40))
    assert (late.reason, late.tokens_generated, late.tool_calls[0].name) == ("length", 40, "get_weather")


def test_a_conversation_goes_on_after_a_call(double: Double) -> None:
    call = ToolCall("call_1", "tell_time", "{}")
    turns = (
        *said("What time is it?"),
        Message("assistant", ("I look.",), tool_calls=(call,)),
        Message("tool", ("9:00",), tool_call_id="call_1"),
    )
    shown = json.loads(tokenized(double, ask(Chat(turns))))["templated_text"]
    assert all(words in shown for words in ("I look.", '"tell_time"', "tool: 9:00"))
    assert answered(double, ask(Chat(turns), max_new_tokens=3)).tokens_generated == 3


def test_the_tokens_of_a_chat_are_those_of_its_generation(double: Double) -> None:
    for chat in (HELLO, Chat(HELLO.messages, TOOLS, "required"), Chat(HELLO.messages, TOOLS, "none")):
        tokens = ENGINE.tokens(ask(chat), tokenized(double, ask(chat)))
        assert len(tokens) == answered(double, ask(chat)).prompt_tokens
    text = "Gr\u00fc\u00df the cat"
    tokens = ENGINE.tokens(ask(), tokenized(double, ask(prompt=text)))
    assert (
        "".join(text.encode()[token.start : token.stop].decode(errors="replace") for token in tokens[-2:]) == " the cat"
    )
    assert [token.text for token in tokens[-2:]] == [" the", " cat"]


# ---- errors ----


@pytest.mark.parametrize("chat", [HELLO, Chat(HELLO.messages, TOOLS, "required"), Chat(HELLO.messages, TOOLS)])
@pytest.mark.parametrize(
    ("flags", "personality", "error", "words"),
    [
        ((), {"overloaded": True}, QueueFull, "Try again"),
        ((), {"no_template": True}, InvalidRequest, "no chat template"),
        (("--max-total-tokens", "8"), {}, PromptTooLong, "more than the 8|takes 7 in a prompt"),
        ((), {"oom_after_tokens": 0}, GenerationFailed, "server failed: .*CUDA out of memory"),
    ],
)
def test_what_a_server_cannot_do_for_a_chat_is_told_as_it_is(
    flags: tuple[str, ...], personality: dict[str, Any], error: type[GatewayError], words: str, chat: Chat
) -> None:
    with Double(*flags, **personality) as failing, pytest.raises(error, match=words) as raised:
        answered(failing, ask(chat))
    assert type(raised.value) is error


def test_a_server_that_fails_in_mid_answer_is_a_failed_generation() -> None:
    with Double(oom_after_tokens=2) as failing, pytest.raises(GenerationFailed, match="in mid-answer"):
        answered(failing, ask(HELLO))


@pytest.mark.parametrize("asked", [{"chat": Chat(HELLO.messages, TOOLS)}, {"chat": HELLO, "grammar": Regex("a")}])
def test_a_server_without_grammars_says_so(asked: dict[str, Any]) -> None:
    with Double("--disable-grammar-support") as plain, pytest.raises(Unsupported, match="disable-grammar-support"):
        answered(plain, ask(**asked))


# ---- what is put through ----


def test_a_caller_s_own_call_reaches_the_model_by_tgi_s_name(double: Double) -> None:
    body = {"model": "a-name-of-ours", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    theirs = Call("/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with sent(double, ENGINE.forward(SPEC, theirs, "s")) as answer:
        assert json.loads(answer.read())["model"] == "org/toy"
    with sent(double, ENGINE.forward(SPEC, Call("/info", method="GET"), "s")) as answer:
        assert json.loads(answer.read())["model_id"] == "org/toy"


def test_a_stream_s_events_are_tokens_one_each(double: Double) -> None:
    request = ask(ENDS)
    with sent(double, ENGINE.call(SPEC, request, "s")) as answer:
        events = ENGINE.decoder(request).feed(answer.read())
    assert [type(event) for event in events] == [TokenEvent, TokenEvent, TokenEvent, Finished]
