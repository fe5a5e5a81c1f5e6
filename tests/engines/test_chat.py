"""Chats as OpenAI's API has them: what is said, and what is heard of several servers. Tables."""

from __future__ import annotations

import json
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.engines.chat import (
    ChatDecoder,
    messages_of,
    new_call_id,
    response_format_of,
    tool_choice_of,
    tools_of,
)
from gateway.engines.lines import EventLines
from gateway.engines.text_calls import TextCallDecoder, call_schema
from gateway.errors import GatewayError, GenerationFailed, Unsupported, UpstreamFailed
from gateway.generation import (
    Chat,
    Finished,
    GenerationRequest,
    GenerationResult,
    Image,
    JsonObject,
    JsonSchema,
    Message,
    TokenEvent,
    Tool,
    ToolCall,
    ToolCallPiece,
    collect,
)

HELLO = Message("user", ("Hello",))
WEATHER = Tool("weather", "Tells it.", {"type": "object"})
CLOCK = Tool("clock")


# ---- what is said ----


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (HELLO, {"role": "user", "content": "Hello"}),
        (Message("system", ("Be ", "kind")), {"role": "system", "content": "Be kind"}),
        (Message("user", ("Hi",), name="ann"), {"role": "user", "content": "Hi", "name": "ann"}),
        (Message("assistant"), {"role": "assistant", "content": ""}),
        (
            Message("user", ("See", Image("data:image/png;base64,AA"))),
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "See"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
                ],
            },
        ),
        (
            Message("assistant", tool_calls=(ToolCall("c1", "weather", '{"city": "Rome"}'),)),
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
                    }
                ],
            },
        ),
        (
            Message("tool", ("warm",), tool_call_id="c1"),
            {"role": "tool", "content": "warm", "tool_call_id": "c1"},
        ),
    ],
)
def test_a_message_is_said_as_openai_has_it(message: Message, said: dict[str, Any]) -> None:
    assert messages_of(Chat((message,))) == [said]


def test_tools_are_said_with_what_is_known_of_them() -> None:
    chat = Chat((HELLO,), (WEATHER, CLOCK))
    weather = {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}}

    assert tools_of(chat) == [
        {"type": "function", "function": weather},
        {"type": "function", "function": {"name": "clock"}},
    ]


def test_a_server_that_cannot_be_told_which_tool_is_told_of_no_other() -> None:
    chosen = Chat((HELLO,), (WEATHER, CLOCK), "required", "clock")

    assert tools_of(chosen, chosen_only=True) == [{"type": "function", "function": {"name": "clock"}}]
    assert len(tools_of(chosen)) == 2
    assert len(tools_of(Chat((HELLO,), (WEATHER, CLOCK)), chosen_only=True)) == 2


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        (Chat((HELLO,)), "auto"),
        (Chat((HELLO,), (CLOCK,), "none"), "none"),
        (Chat((HELLO,), (CLOCK,), "required"), "required"),
        (Chat((HELLO,), (CLOCK,), "required", "clock"), {"type": "function", "function": {"name": "clock"}}),
    ],
)
def test_whether_a_tool_is_called_is_said(chat: Chat, said: object) -> None:
    assert tool_choice_of(chat) == said


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (JsonObject(), {"type": "json_object"}),
        (
            JsonSchema({"type": "array"}, "list"),
            {"type": "json_schema", "json_schema": {"name": "list", "schema": {"type": "array"}}},
        ),
        (
            JsonSchema({"type": "array"}),
            {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "array"}}},
        ),
    ],
)
def test_a_form_of_the_answer_is_said(grammar: JsonObject | JsonSchema, said: dict[str, Any]) -> None:
    assert response_format_of(grammar) == said


# ---- lines ----


@given(st.data())
def test_lines_are_the_same_however_they_are_cut(data: st.DataObject) -> None:
    stream = "data: 🌍é\r\n: kept alive\n\ndata:{}\n event : x \nunfinished".encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    lines = EventLines()
    parts = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

    found = [line for part in parts for line in lines.feed(part)]

    assert found == [(b"data", "🌍é".encode()), (b"data", b"{}"), (b"event", b"x")]


# ---- what is heard ----


def ask(**more: Any) -> GenerationRequest:
    chat = {"prompt": "", "max_new_tokens": 50, "temperature": 0.0, "chat": Chat((HELLO,), (WEATHER,))}
    return GenerationRequest(**{**chat, **more})


def failure(frame: dict[str, Any], begun: bool) -> GatewayError:
    words = str(frame.get("error"))
    return GenerationFailed(words) if begun else UpstreamFailed(words)


def decoder(request: GenerationRequest | None = None, **more: Any) -> ChatDecoder:
    ids = count(1)
    return ChatDecoder(request or ask(), failure, **{"call_id": lambda: f"call_{next(ids)}", **more})


def frame(delta: dict[str, Any] | None = None, reason: str | None = None, **more: Any) -> dict[str, Any]:
    """Return one chunk; `logprobs` belongs to its choice, all else to the chunk itself."""
    choice = {"index": 0, "delta": delta or {}, "finish_reason": reason}
    for key in ("logprobs", "stop_reason", "matched_stop"):
        if key in more:
            choice[key] = more.pop(key)
    return {"object": "chat.completion.chunk", "choices": [choice], **more}


def text(content: str, reason: str | None = None, **more: Any) -> dict[str, Any]:
    return frame({"role": "assistant", "content": content}, reason, **more)


def call(index: int | None = None, id: str | None = None, name: str | None = None, arguments: Any = None) -> Any:  # noqa: A002
    said = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return frame({"tool_calls": [{key: value for key, value in said.items() if value is not None}]})


def usage(completion: int, prompt: int = 7) -> dict[str, Any]:
    return {"choices": [], "usage": {"completion_tokens": completion, "prompt_tokens": prompt}}


def stream(*frames: dict[str, Any] | str) -> bytes:
    return b"".join(b"data: %b\n\n" % _shown(each).encode() for each in frames)


def _shown(each: dict[str, Any] | str) -> str:
    return each if isinstance(each, str) else json.dumps(each, ensure_ascii=False)


def hear(*frames: dict[str, Any] | str, request: GenerationRequest | None = None, **more: Any) -> GenerationResult:
    *tokens, last = decoder(request, **more).feed(stream(*frames))
    assert isinstance(last, Finished)
    return collect([token for token in tokens if isinstance(token, TokenEvent)], last)


def test_an_answer_is_heard_with_its_usage() -> None:
    result = hear(frame({"role": "assistant", "content": ""}), text("Hi"), text("!"), frame({}, "stop"), usage(3))

    assert (result.text, result.reason, result.tokens_generated, result.prompt_tokens) == ("Hi!", "eos", 3, 7)
    assert [(token.text, token.token) for token in result.tokens] == [("Hi", None), ("!", None)]


def test_a_server_that_tells_no_usage_ends_with_done() -> None:
    result = hear(text("Hi"), text("!"), frame({}, "length"), "[DONE]")

    assert (result.text, result.reason, result.tokens_generated, result.prompt_tokens) == ("Hi!", "length", 2, 0)


@given(st.data())
def test_an_answer_is_the_same_however_it_is_cut(data: st.DataObject) -> None:
    whole = b": hello\n\n" + stream(text("🌍🌍"), text("é"), frame({}, "stop"), usage(5)).replace(b"data: ", b"data:")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)))))
    heard, parts = decoder(), zip([0, *cuts], [*cuts, len(whole)], strict=True)

    events = [event for start, end in parts for event in heard.feed(whole[start:end])]

    assert events == [TokenEvent(None, "🌍🌍"), TokenEvent(None, "é"), Finished("eos", 5, 7)]


@pytest.mark.parametrize(
    ("said", "more", "reason"),
    [
        ("stop", {}, "eos"),
        ("length", {}, "length"),
        ("model_length", {}, "length"),
        ("stop_sequence", {}, "stop"),
        ("eos_token", {}, "eos"),
        ("content_filter", {}, "eos"),
        ("tool_calls", {}, "tool_calls"),
        ("function_call", {}, "tool_calls"),
        ("stop", {"stop_reason": "END"}, "stop"),
        ("stop", {"stop_reason": None}, "eos"),
        ("stop", {"matched_stop": 2}, "eos"),
    ],
)
def test_why_an_answer_ended(said: str, more: dict[str, Any], reason: str) -> None:
    assert hear(text("a"), frame({}, said, **more), usage(1)).reason == reason


def test_a_server_that_was_told_of_stop_texts_means_one_by_stop() -> None:
    assert hear(text("a"), frame({}, "stop"), usage(1), stop_means="stop").reason == "stop"


@pytest.mark.parametrize("word", ["abort", "error"])
def test_an_answer_that_the_server_gave_up_has_failed(word: str) -> None:
    with pytest.raises(GenerationFailed, match=f"gave the answer up .{word}."):
        hear(text("a"), frame({}, word), usage(1))


# ---- stop texts and lengths ----


def test_a_stop_text_ends_the_answer_and_is_cut_off() -> None:
    result = hear(text("one E"), text("N"), text("D two"), text("never"), request=ask(stop=("END",)))

    assert (result.text, result.reason, result.stop, result.tokens_generated) == ("one ", "stop", "END", 3)


def test_what_did_not_become_a_stop_text_is_handed_out_at_the_end() -> None:
    result = hear(text("one E"), text("N"), frame({}, "stop"), usage(2), request=ask(stop=("END",)))

    assert (result.text, result.reason, result.stop) == ("one EN", "eos", "")


def test_a_prompt_that_must_be_counted_is_waited_for_in_silence() -> None:
    frames = (text("one END"), text("never"), frame({}, "stop"), usage(9))
    result = hear(*frames, request=ask(stop=("END",), count_prompt=True))

    assert (result.text, result.reason, result.tokens_generated, result.prompt_tokens) == ("one ", "stop", 1, 7)


def test_a_server_that_goes_beyond_the_length_is_not_followed() -> None:
    frames = [text(letter) for letter in "abcd"]
    result = hear(*frames, request=ask(max_new_tokens=3), chunk_is_token=True)

    assert (result.text, result.reason, result.tokens_generated) == ("abc", "length", 3)


def test_a_server_that_ends_at_the_length_says_why_and_counts() -> None:
    frames = (text("a"), text("", "eos_token"), usage(2))
    result = hear(*frames, request=ask(max_new_tokens=2), chunk_is_token=True)

    assert (result.text, result.reason, result.tokens_generated, result.prompt_tokens) == ("a", "eos", 2, 7)


def test_chunks_that_are_no_tokens_are_not_counted_against_the_length() -> None:
    frames = (*[text(letter) for letter in "abcd"], frame({}, "length"), usage(3))

    assert hear(*frames, request=ask(max_new_tokens=3)).text == "abcd"


# ---- tokens ----


def logprobs(*tokens: Any) -> dict[str, Any]:
    return {"logprobs": {"content": list(tokens)}}


def test_log_probabilities_tell_tokens_apart() -> None:
    top = [{"token": "x", "logprob": -2.0}, {"token": "Hi", "logprob": -0.5}, {"token": "y", "logprob": None}]
    said = logprobs({"token": "Hi", "logprob": -0.5, "top_logprobs": top, "id": 5}, {"token": "!", "logprob": -1.0})
    first, second = hear(text("Hi!", **said), frame({}, "stop"), usage(2), request=ask(logprobs=True)).tokens

    assert (first.id, first.text, first.token, first.logprob, first.top) == (5, "Hi", "Hi", -0.5, ())
    assert (second.id, second.text, second.logprob) == (None, "!", -1.0)


def test_the_likeliest_tokens_come_first_and_no_more_than_asked_for() -> None:
    top = [{"token": "x", "logprob": -2.0}, {"token": "Hi", "logprob": -0.5}, {"token": "z", "logprob": -3.0}]
    said = logprobs({"token": "Hi", "logprob": -0.5, "top_logprobs": top})
    (token,) = hear(text("Hi", **said), frame({}, "stop"), usage(1), request=ask(top_tokens=2)).tokens

    assert [(chance.text, chance.id, chance.logprob) for chance in token.top] == [("Hi", -1, -0.5), ("x", -1, -2.0)]
    assert token.top[0].probability == pytest.approx(0.60653, abs=1e-5)


def test_llama_cpp_may_tell_probabilities_in_place_of_their_logarithms() -> None:
    top = [{"id": 5, "token": "Hi", "prob": 0.5}, {"id": 6, "token": "x", "prob": 0.0}]
    said = logprobs({"id": 5, "token": "Hi", "prob": 0.5, "top_probs": top})
    (token,) = hear(text("Hi", **said), frame({}, "stop"), usage(1), request=ask(top_tokens=2)).tokens

    assert token.logprob == pytest.approx(-0.6931, abs=1e-4)
    assert [(chance.id, chance.probability) for chance in token.top] == [(5, 0.5), (6, 0.0)]


def test_a_server_that_reports_no_top_tokens_is_told_of() -> None:
    with pytest.raises(Unsupported, match="reports no top_tokens"):
        hear(text("Hi"), request=ask(top_tokens=2))


def test_tokens_that_are_parts_of_characters_add_up_to_the_chunks_text() -> None:
    said = logprobs(*({"token": "�", "logprob": -1.0} for _ in range(3)))
    result = hear(text("🌍", **said), frame({}, "stop"), usage(3))

    assert [(token.text, token.token) for token in result.tokens] == [("", "�"), ("", "�"), ("🌍", "�")]


def test_tgi_sends_its_special_tokens_as_empty_content() -> None:
    end = logprobs({"token": "</s>", "logprob": -0.1, "top_logprobs": []})
    told = hear(text("a"), text("", "stop", **end), usage(2), chunk_is_token=True)
    untold = hear(text("a"), text("", "stop"), usage(2), chunk_is_token=True)

    assert [(token.text, token.token, token.special) for token in told.tokens] == [
        ("a", "a", False),
        ("", "</s>", True),
    ]
    assert [(token.token, token.special) for token in untold.tokens] == [("a", False), (None, True)]


def test_llama_cpp_counts_tokens_that_it_does_not_send() -> None:
    def timed(content: str, tokens: int) -> dict[str, Any]:
        return text(content, timings={"predicted_n": tokens, "prompt_n": 3, "cache_n": 4})

    frames = (frame({"role": "assistant", "content": None}), timed("🌍", 3), timed("END", 4))
    result = hear(*frames, request=ask(stop=("END",)), chunk_is_token=True)

    assert [token.text for token in result.tokens] == ["", "", "🌍", ""]
    assert (result.reason, result.tokens_generated, result.prompt_tokens) == ("stop", 4, 7)


def test_one_token_in_two_chunks_is_counted_once() -> None:
    timings: dict[str, Any] = {"timings": {"predicted_n": 1, "prompt_n": 3}}
    frames = (text("a", **timings), text("b", **timings), frame({}, "length"), "[DONE]")
    result = hear(*frames, request=ask(max_new_tokens=1), chunk_is_token=True)

    assert (result.text, result.tokens_generated) == ("ab", 1)


# ---- calls of tools ----


def test_a_call_of_a_tool_adds_up() -> None:
    frames = (call(0, "x", "weather", ""), call(0, None, None, '{"city"'), call(0, arguments=': "Rome"}'))
    result = hear(*frames, frame({}, "tool_calls"), usage(9))

    assert result.tool_calls == (ToolCall("call_1", "weather", '{"city": "Rome"}'),)
    assert [token.tool_calls for token in result.tokens] == [
        (ToolCallPiece(0, "call_1", "weather", ""),),
        (ToolCallPiece(0, None, None, '{"city"'),),
        (ToolCallPiece(0, None, None, ': "Rome"}'),),
    ]
    assert (result.reason, result.text) == ("tool_calls", "")


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param((call(0, "a", "weather", "{}"), call(1, "b", "clock", "{}")), id="indices"),
        pytest.param((call(0, "a", "weather", "{}"), call(0, "b", "clock", "{}")), id="ids"),
        pytest.param((call(None, "a", "weather", "{}"), call(None, "b", "clock", {})), id="no index"),
        pytest.param((call(4, "0", "weather", "{}"), call(7, "0", "clock", "{}")), id="gaps"),
    ],
)
def test_several_calls_are_told_apart(frames: tuple[dict[str, Any], ...]) -> None:
    result = hear(*frames, frame({}, "tool_calls"), usage(9))

    assert result.tool_calls == (ToolCall("call_1", "weather", "{}"), ToolCall("call_2", "clock", "{}"))
    assert [token.tool_calls[0].index for token in result.tokens] == [0, 1]


def test_tgi_repeats_the_id_of_a_call_and_has_no_word_for_its_end() -> None:
    frames = (call(0, "0", "weather", ""), call(0, "0", None, "{"), call(0, "0", None, "}"))
    result = hear(*frames, frame({"content": ""}, "stop"), usage(4), chunk_is_token=True)

    assert (result.tool_calls, result.reason) == ((ToolCall("call_1", "weather", "{}"),), "tool_calls")


def test_a_call_that_was_cut_off_ended_at_the_length() -> None:
    assert hear(call(0, "x", "weather", "{"), frame({}, "length"), usage(2)).reason == "length"


def test_an_answer_of_one_call_ends_where_a_second_begins() -> None:
    frames = (call(0, "a", "weather", "{"), call(0, arguments="}"), call(1, "b", "clock", "{}"), text("never"))
    result = hear(*frames, one_call=True)

    assert (result.tool_calls, result.reason) == ((ToolCall("call_1", "weather", "{}"),), "tool_calls")
    assert result.text == ""


def test_every_id_is_new() -> None:
    made = {new_call_id() for _ in range(100)}

    assert len(made) == 100
    assert all(len(each) == len("call_") + 24 for each in made)


# ---- calls that are text ----


def test_the_schema_of_a_call_has_the_name_before_the_arguments() -> None:
    schema = call_schema((WEATHER, CLOCK))

    assert [list(each["properties"]) for each in schema["anyOf"]] == [["name", "arguments"]] * 2
    assert [each["properties"]["name"] for each in schema["anyOf"]] == [{"const": "weather"}, {"const": "clock"}]
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    assert schema["$defs"] == {"tool0": {"type": "object"}, "tool1": nothing}


def test_what_a_tools_parameters_refer_to_is_found_in_the_schema_of_a_call() -> None:
    city = {"type": "object", "properties": {"at": {"items": [{"$ref": "#/$defs/City"}, {"$ref": "#"}]}}}
    schema = call_schema((Tool("visit", None, {**city, "$defs": {"City": {"type": "string"}}}),))

    items = schema["$defs"]["tool0"]["properties"]["at"]["items"]
    assert items == [{"$ref": "#/$defs/tool0/$defs/City"}, {"$ref": "#/$defs/tool0"}]


def hear_call(*texts: str, reason: str = "stop", request: GenerationRequest | None = None) -> GenerationResult:
    heard = TextCallDecoder(decoder(request, chunk_is_token=True), lambda: "call_1")
    *tokens, last = heard.feed(stream(*map(text, texts), frame({}, reason), usage(9)))
    assert isinstance(last, Finished)
    return collect([token for token in tokens if isinstance(token, TokenEvent)], last)


ARGUMENTS = '{"city": "Ro\\"}me \\\\", "at": [{"x": "]"}, " "]}'


@given(st.data())
def test_a_text_becomes_a_call_however_it_is_cut(data: st.DataObject) -> None:
    whole = ' {\n "name": "weather" ,\n "arguments" : ' + ARGUMENTS + "\n }\n"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)))))
    result = hear_call(*(whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)))

    assert result.tool_calls == (ToolCall("call_1", "weather", ARGUMENTS),)
    assert (result.text, result.reason, result.tokens_generated) == ("", "tool_calls", 9)
    assert sum(bool(piece.name) for token in result.tokens for piece in token.tool_calls) == 1


@pytest.mark.parametrize(
    ("said", "calls"),
    [
        ('{"name": "wea', ()),
        ('{"name": "weather", "arguments": ', ()),
        ('{"name": "weather", "arguments": {"ci', (ToolCall("call_1", "weather", '{"ci'),)),
    ],
)
def test_a_text_that_is_cut_off_is_no_whole_call(said: str, calls: tuple[ToolCall, ...]) -> None:
    result = hear_call(said, reason="length")

    assert (result.tool_calls, result.reason, result.text) == (calls, "length", "")


# ---- failures ----


def test_a_failure_is_told_with_whether_the_answer_had_begun() -> None:
    broken = {"error": {"message": "out of luck"}}
    with pytest.raises(UpstreamFailed, match="out of luck"):
        decoder().feed(stream(broken))
    with pytest.raises(GenerationFailed, match="out of luck"):
        decoder().feed(stream(text("a"), broken))
    with pytest.raises(GenerationFailed, match="out of luck"):
        decoder().feed(stream(text("a")) + b'error: {"error": "out of luck"}\n')


@pytest.mark.parametrize(
    "said",
    [
        "{",
        "[]",
        "null",
        '"text"',
        "[DONE]",
        '{"choices": [1]}',
        '{"choices": [{"delta": {"content": 5}}]}',
        '{"choices": [{"delta": {"tool_calls": [7]}}]}',
        '{"choices": [{"delta": {}, "logprobs": {"content": [{}]}}]}',
        '{"choices": [], "timings": 5}',
        "[" * 100_000,
    ],
)
def test_what_is_no_chat_completion_is_told_of(said: str) -> None:
    with pytest.raises(GenerationFailed, match="not a chat completion"):
        decoder(chunk_is_token=True).feed(stream(said))


def test_nothing_is_heard_after_the_end() -> None:
    heard = decoder()
    assert heard.feed(stream(text("a"), frame({}, "stop"), usage(1), "[DONE]", text("b")))[-1] == Finished("eos", 1, 7)
    assert heard.feed(stream(text("c"), "{")) == []
