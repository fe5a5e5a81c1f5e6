"""Conversations as OpenAI's API writes them: tables of bodies in, chats out; and what is wrong, told at its place."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.conversation import ChatBody, chat_of, grammar_of
from gateway.generation import Chat, Grammar, Image, JsonObject, JsonSchema, Message, Tool, ToolCall

USER = {"role": "user", "content": "Hello"}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a town", "parameters": {"a": [1]}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Rome'}}
NAMED = {"type": "function", "function": {"name": "weather"}}
PICTURE = "data:image/png;base64,AAAA"


def body(*messages: Any, **fields: Any) -> ChatBody:
    return ChatBody.model_validate({"messages": list(messages), **fields})


def wrong(*messages: Any, **fields: Any) -> list[tuple[str, str]]:
    """Return what is wrong: where, and of which kind."""
    with pytest.raises(ValidationError) as caught:
        body(*messages, **fields)
    return [(".".join(map(str, each["loc"])), each["type"]) for each in caught.value.errors()]


# ---- turns ----


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (USER, Message("user", ("Hello",))),
        ({"role": "system", "content": "Be brief."}, Message("system", ("Be brief.",))),
        ({"role": "developer", "content": "Be brief."}, Message("system", ("Be brief.",))),
        ({"role": "assistant", "content": "Hi"}, Message("assistant", ("Hi",))),
        ({"role": "user", "content": ""}, Message("user", ("",))),
        ({"role": "user", "content": " \n"}, Message("user", (" \n",))),
        ({"role": "user", "content": "x", "name": "Ann"}, Message("user", ("x",), "Ann")),
        ({"role": "user", "content": "x", "tool_call_id": "c1"}, Message("user", ("x",))),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]},
            Message("user", ("a", "")),
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}}]},
            Message("user", (Image(PICTURE),)),
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            Message("assistant", ("No.",)),
        ),
        ({"role": "assistant", "content": None, "refusal": "No."}, Message("assistant", ("No.",))),
        (
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            Message("assistant", (), tool_calls=(ToolCall("c1", "weather", '{"town": "Rome'),)),
        ),
        (
            {"role": "assistant", "content": "Wait", "tool_calls": [CALL]},
            Message("assistant", ("Wait",), tool_calls=(ToolCall("c1", "weather", '{"town": "Rome'),)),
        ),
        (
            {"role": "assistant", "content": "Hi", "tool_calls": None, "refusal": None, "annotations": []},
            Message("assistant", ("Hi",)),
        ),
        ({"role": "tool", "tool_call_id": "c1", "content": "21°"}, Message("tool", ("21°",), tool_call_id="c1")),
    ],
)  # fmt: skip
def test_a_turn_is_read(said: dict[str, Any], message: Message) -> None:
    assert chat_of(body(said)) == Chat((message,))


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ("Hello", ("", "model_type")),
        ({"content": "x"}, ("role", "missing")),
        ({"role": "poet", "content": "x"}, ("role", "literal_error")),
        ({"role": ["user"], "content": "x"}, ("role", "literal_error")),
        ({"role": "function", "name": "weather", "content": "x"}, ("role", "role_function")),
        ({"role": "user"}, ("content", "missing")),
        ({"role": "user", "content": None}, ("content", "missing")),
        ({"role": "user", "content": []}, ("content", "missing")),
        ({"role": "assistant"}, ("content", "missing")),
        ({"role": "assistant", "tool_calls": []}, ("content", "missing")),
        ({"role": "user", "content": 7}, ("content", "content_type")),
        ({"role": "user", "content": {"type": "text", "text": "a"}}, ("content", "content_type")),
        ({"role": "user", "content": ["a"]}, ("content.0", "model_type")),
        ({"role": "user", "content": "\ud800"}, ("content.0.text", "string_unicode")),
        ({"role": "user", "content": [{"type": "text"}]}, ("content.0.text", "missing")),
        ({"role": "user", "content": [{"type": "input_audio"}]}, ("content.0.type", "literal_error")),
        ({"role": "user", "content": [{"text": "a"}]}, ("content.0.type", "missing")),
        ({"role": "user", "content": [{"type": "image_url"}]}, ("content.0.image_url", "missing")),
        ({"role": "user", "content": [{"type": "image_url", "image_url": ""}]}, ("content.0.image_url", "model_type")),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
            ("content.0.image_url.url", "url_scheme"),
        ),
        (
            {"role": "system", "content": [{"type": "image_url", "image_url": {"url": PICTURE}}]},
            ("content", "part_role"),
        ),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "No."}]}, ("content", "part_role")),
        ({"role": "user", "content": "x", "name": 7}, ("name", "string_type")),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, ("tool_calls", "tool_calls_role")),
        ({"role": "tool", "content": "21"}, ("tool_call_id", "missing")),
        ({"role": "assistant", "tool_calls": [{**CALL, "id": ""}]}, ("tool_calls.0.id", "string_too_short")),
        ({"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}, ("tool_calls.0.type", "literal_error")),
        (
            {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": {}}}]},
            ("tool_calls.0.function.arguments", "string_type"),
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_turn_is_told_at_its_place(said: Any, complaint: tuple[str, str]) -> None:
    where, kind = complaint

    assert (".".join(filter(None, ["messages", "1", where])), kind) in wrong(USER, said)


def test_a_conversation_has_at_least_one_turn() -> None:
    assert wrong() == [("messages", "too_short")]
    assert wrong(messages=None) == [("messages", "missing")]


# ---- tools ----


def function(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **fields}}]}


def chosen(choice: Any) -> dict[str, Any]:
    return {"tools": [WEATHER], "tool_choice": choice}


def form(**schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def test_tools_are_read() -> None:
    bare = {"type": "function", "function": {"name": "now", "strict": True}}

    chat = chat_of(body(USER, tools=[WEATHER, bare], parallel_tool_calls=False))

    assert chat.tools == (Tool("weather", "of a town", {"a": [1]}), Tool("now"))
    assert (chat.tool_choice, chat.tool_name, chat.parallel_tool_calls) == ("auto", None, False)


@pytest.mark.parametrize(
    ("said", "choice", "name"),
    [
        (None, "auto", None),
        ("auto", "auto", None),
        ("none", "none", None),
        ("required", "required", None),
        (NAMED, "required", "weather"),
    ],
)
def test_the_choice_of_a_tool_is_read(said: Any, choice: str, name: str | None) -> None:
    chat = chat_of(body(USER, tools=[WEATHER], tool_choice=said))

    assert (chat.tool_choice, chat.tool_name) == (choice, name)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"tools": "weather"}, ("tools", "list_type")),
        ({"tools": [{"function": {"name": "f"}}]}, ("tools.0.type", "missing")),
        ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, ("tools.0.type", "literal_error")),
        ({"tools": [{"type": "function"}]}, ("tools.0.function", "missing")),
        (function(name="no blanks"), ("tools.0.function.name", "string_pattern_mismatch")),
        (function(name="f\n"), ("tools.0.function.name", "string_pattern_mismatch")),
        (function(parameters=[]), ("tools.0.function.parameters", "dict_type")),
        (function(parameters={"a": [float("nan")]}), ("tools.0.function.parameters", "json_invalid")),
        (function(parameters={"\ud800": 1}), ("tools.0.function.parameters", "json_invalid")),
        ({"tools": [WEATHER] * 129}, ("tools", "too_long")),
        (chosen("weather"), ("tool_choice", "tool_choice")),
        (chosen(7), ("tool_choice", "model_type")),
        (chosen({"type": "function"}), ("tool_choice.function", "missing")),
        (chosen({"type": "allowed_tools"}), ("tool_choice.type", "literal_error")),
        (chosen({"type": "function", "function": {"name": "f"}}), ("tool_choice", "unknown_tool")),
        ({"tool_choice": "required"}, ("tool_choice", "no_tools")),
        ({"tool_choice": NAMED}, ("tool_choice", "no_tools")),
        ({"parallel_tool_calls": "no"}, ("parallel_tool_calls", "bool_type")),
        ({"response_format": "json"}, ("response_format", "model_type")),
        ({"response_format": {"type": "xml"}}, ("response_format.type", "literal_error")),
        ({"response_format": {"type": "json_schema"}}, ("response_format.json_schema", "missing")),
        (form(schema={}), ("response_format.json_schema.name", "missing")),
        (form(name="a", schema="{}"), ("response_format.json_schema.schema", "dict_type")),
    ],
)
def test_what_is_wrong_with_tools_and_forms_is_told_at_its_place(
    fields: dict[str, Any], complaint: tuple[str, str]
) -> None:
    assert wrong(USER, **fields) == [complaint]


def test_a_wrong_tool_is_the_only_complaint_even_if_it_is_the_one_chosen() -> None:
    nameless = {"type": "function", "function": {"name": "no blanks"}}

    assert len(wrong(USER, tools=[nameless], tool_choice=NAMED)) == 1


# ---- the form of the answer ----


@pytest.mark.parametrize(
    ("said", "grammar"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, JsonObject()),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, JsonObject()),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}, "strict": True}},
            JsonSchema({"type": "object"}, "a"),
        ),
        ({"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}, JsonSchema({}, "a")),
    ],
)
def test_the_form_of_the_answer_is_read(said: Any, grammar: Grammar | None) -> None:
    assert grammar_of(body(USER, response_format=said).response_format) == grammar


def test_the_schema_shows_every_shape_that_is_taken() -> None:
    schema = ChatBody.model_json_schema()
    content = schema["$defs"]["MessageBody"]["properties"]["content"]["anyOf"]

    assert [each["type"] for each in content] == ["string", "array", "null"]
    assert "schema" in schema["$defs"]["SchemaBody"]["properties"]
    assert "required" in json.dumps(schema["properties"]["tool_choice"])
