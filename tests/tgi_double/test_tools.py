"""Tools, with TGI's ways: one call, no reason at the end of a stream, and a second pass where none is called."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.tgi_double.schemas import problems
from tests.tgi_double.test_openai_routes import Json, chat, events
from tests.tgi_double.tools import CallStream

WEATHER: Json = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string"},
                "unit": {"enum": ["C", "F"]},
                "days": {"type": "integer"},
            },
            "required": ["place", "unit"],
        },
    },
}
CLOCK: Json = {"type": "function", "function": {"name": "tell_time", "arguments": {"type": "object", "properties": {}}}}
TOOLS = [WEATHER, CLOCK]
PLAIN = [{"role": "user", "content": "hello"}]
NAMES_CLOCK = [{"role": "user", "content": "please tell_time"}]
CALLS = "/v1/chat/completions"


def called(client: httpx.Client, **body: Any) -> list[tuple[str, str]]:
    """Return the calls of a whole answer."""
    choice = chat(client, tools=TOOLS, **body)["choices"][0]
    assert choice["finish_reason"] == "stop"
    calls = choice["message"].get("tool_calls", [])
    assert all((call["id"], call["type"], call["function"]["description"]) == ("0", "function", None) for call in calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


@pytest.mark.parametrize(
    ("body", "calls"),
    [
        ({"messages": PLAIN, "tool_choice": "required"}, [("get_weather", '{"place":"","unit":"C"}')]),
        ({"messages": NAMES_CLOCK, "tool_choice": "required"}, [("tell_time", "{}")]),
        ({"messages": PLAIN, "tool_choice": "tell_time"}, [("tell_time", "{}")]),
        (
            {"messages": PLAIN, "tool_choice": {"type": "function", "function": {"name": "tell_time"}}},
            [("tell_time", "{}")],
        ),
        ({"messages": NAMES_CLOCK}, [("tell_time", "{}")]),
        ({"messages": NAMES_CLOCK, "tool_choice": "auto"}, [("tell_time", "{}")]),
        ({"messages": [*NAMES_CLOCK, {"role": "tool", "content": "get_weather"}]}, [("tell_time", "{}")]),
        ({"messages": PLAIN, "max_tokens": 40}, []),
    ],
)
def test_a_call_is_the_choice_s_or_the_one_that_is_named(client: httpx.Client, body: Json, calls: Any) -> None:
    assert called(client, **body) == calls


def test_where_none_is_called_the_answer_is_that_without_tools(client: httpx.Client) -> None:
    plain = chat(client, messages=PLAIN, max_tokens=40)["choices"][0]["message"]
    assert chat(client, messages=PLAIN, max_tokens=40, tools=TOOLS)["choices"][0]["message"] == plain
    none = chat(client, messages=NAMES_CLOCK, max_tokens=40, tools=TOOLS, tool_choice="none")
    assert none["choices"][0]["message"] == chat(client, messages=NAMES_CLOCK, max_tokens=40)["choices"][0]["message"]
    body = {"messages": PLAIN, "temperature": 0, "max_tokens": 40, "tools": TOOLS}
    chunks = events(client, CALLS, body)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == plain["content"]


def test_a_stream_has_the_name_first_then_pieces_and_no_reason(client: httpx.Client) -> None:
    body = {"messages": PLAIN, "tools": TOOLS, "tool_choice": "required", "stream_options": {"include_usage": True}}
    *chunks, last = events(client, CALLS, body)
    assert all(problems(chunk, "ChatCompletionChunk") == [] for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert {choice["finish_reason"] for choice in choices} == {None}
    calls = [choice["delta"]["tool_calls"][0] for choice in choices]
    assert {(call["index"], call["id"], call["type"]) for call in calls} == {(0, "0", "function")}
    assert [call["function"]["name"] for call in calls] == ["get_weather"] + [None] * (len(calls) - 1)
    # The comma behind the name is a token of its own here: TGI leaves it in.
    assert "".join(call["function"]["arguments"] for call in calls) == '{,"place":"","unit":"C"}'
    assert last["choices"] == []
    whole = chat(client, messages=PLAIN, tools=TOOLS, tool_choice="required")
    assert last["usage"] == whole["usage"]


def test_a_stream_that_is_cut_off_says_so_unless_the_name_was_not_complete(client: httpx.Client) -> None:
    body = {"messages": PLAIN, "tools": TOOLS, "tool_choice": "required"}
    assert events(client, CALLS, {**body, "max_tokens": 5}) == []
    *_, last = events(client, CALLS, {**body, "max_tokens": 40})
    assert last["choices"][0]["finish_reason"] == "length"
    whole = client.post(CALLS, json={**body, "max_tokens": 40})
    assert (whole.status_code, whole.json()["error_type"]) == (422, "tool_error")


@pytest.mark.parametrize(
    ("tokens", "name", "arguments"),
    [
        (['{"function":{"_name":"', "f", '",', ' "a', '":', "1", "}}"], "f", '{ "a":1}'),
        (['{"function":{"_name":"', "f", '"', ",", '"a":1', "}", "}"], "f", '{,"a":1}'),
        (['{"function":{"_name":"', "f", '"', "}", "}"], "f", "{}"),
        (['{"function":{"_name":"', 'f"}}'], "f", "{"),
    ],
)
def test_a_call_is_cut_out_of_its_tokens_in_tgi_s_way(tokens: list[str], name: str, arguments: str) -> None:
    stream = CallStream()
    pieces = [piece for token in tokens if (piece := stream.feed(token))]
    assert stream.name == name
    assert "".join(piece for _, piece in pieces) == arguments


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"tools": TOOLS, "tool_choice": "no_such"}, "tool_error"),
        ({"tools": TOOLS, "response_format": {"type": "json", "value": {"properties": {}}}}, "tool_error"),
        ({"tools": [], "response_format": {"type": "json", "value": {"properties": {}}}}, "tool_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_is_refused_before_a_stream(client: httpx.Client, body: Json, kind: str, stream: bool) -> None:
    answer = client.post(CALLS, json={"messages": PLAIN, "stream": stream, **body})
    assert (answer.status_code, answer.json()["error_type"]) == (422, kind)


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": {"name": "f"}},
        {"type": "function"},
        {"function": {"name": "f", "parameters": {}}},
        "f",
    ],
)
def test_a_tool_needs_a_name_and_parameters(client: httpx.Client, tool: Any) -> None:
    answer = client.post(CALLS, json={"messages": PLAIN, "tools": [tool]})
    assert answer.status_code == 422
    assert answer.headers["content-type"].startswith("text/plain")


def test_definitions_beside_the_properties_are_lost(client: httpx.Client) -> None:
    parameters = {
        "$defs": {"A": {"type": "null"}},
        "properties": {"a": {"$ref": "#/$defs/A"}},
        "required": ["a"],
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    answer = client.post(CALLS, json={"messages": PLAIN, "tools": [tool], "tool_choice": "required"})
    assert answer.json()["error"].startswith("Input validation error: cannot compile regex from schema: ")


def test_the_prompt_is_told_of_tools_and_of_earlier_calls(client: httpx.Client) -> None:
    call = {"id": "0", "type": "function", "function": {"name": "tell_time", "arguments": "{}"}}
    for content, shown in (({}, True), ({"content": None}, True), ({"content": ""}, False)):
        messages = [*PLAIN, {"role": "assistant", "tool_calls": [call], **content}, {"role": "tool", "content": "9:00"}]
        text = client.post("/chat_tokenize", json={"messages": messages}).json()["templated_text"]
        assert (json.dumps([call]) in text) is shown
    told = client.post("/chat_tokenize", json={"messages": PLAIN, "tools": TOOLS}).json()["templated_text"]
    assert "get_weather" in told
    silent = client.post("/chat_tokenize", json={"messages": PLAIN, "tools": TOOLS, "tool_choice": "none"}).json()
    assert "get_weather" not in silent["templated_text"]
