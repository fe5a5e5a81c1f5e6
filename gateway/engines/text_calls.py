"""Calls of tools as text, for servers that can be held to a form of text, but not to a call itself. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gateway.engines.base import Decoder
from gateway.engines.chat import new_call_id, not_understood
from gateway.engines.protocol import json_in
from gateway.generation import Finished, TokenEvent, Tool, ToolCallPiece

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\S)')

MOST_LEVELS = 100
"""How deeply parameters may be nested, so that a schema is surely written before Python's stack is full."""


def is_too_deep(tools: Sequence[Tool]) -> bool:
    """Say whether the parameters of a tool are nested too deeply for `call_schema`."""
    return any(_levels(tool.parameters) > MOST_LEVELS for tool in tools)


def _levels(schema: Any) -> int:
    level, found = 0, [schema]
    while found:
        level += 1
        found = [each for value in found for each in _within(value)]
    return level


def _within(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """Return the JSON Schema of a call of one of these tools: an object with its name and then its arguments."""
    keys = [f"tool{index}" for index in range(len(tools))]
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": {"$ref": f"#/$defs/{key}"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for key, tool in zip(keys, tools, strict=True)
    ]
    found = {key: _moved(_parameters(tool), f"#/$defs/{key}") for key, tool in zip(keys, tools, strict=True)}
    return {"anyOf": calls, "$defs": found}


def _parameters(tool: Tool) -> dict[str, Any]:
    nothing = {"properties": {}, "additionalProperties": False} if tool.parameters is None else {}
    return {"type": "object", **nothing, **(tool.parameters or {})}


def _moved(schema: Any, place: str) -> Any:
    """Return a schema that stands at another place: what it refers to within itself has moved with it."""
    if isinstance(schema, Mapping):
        moved = {key: _moved(value, place) for key, value in schema.items()}
        reference = schema.get("$ref")
        is_own = isinstance(reference, str) and reference.startswith("#")
        return {**moved, "$ref": place + str(reference)[1:]} if is_own else moved
    return [_moved(each, place) for each in schema] if isinstance(schema, list | tuple) else schema


class TextCallDecoder:
    """Reads an answer whose text is one call of a tool, of the form of `call_schema`: the text becomes the call."""

    def __init__(self, decoder: Decoder, call_id: Callable[[], str] = new_call_id) -> None:
        self._decoder, self._call_id = decoder, call_id
        self._head = ""
        self._has_begun = False
        self._arguments = _Arguments()

    def feed(self, chunk: bytes) -> list[TokenEvent | Finished]:
        return [self._translated(event) for event in self._decoder.feed(chunk)]

    def _translated(self, event: TokenEvent | Finished) -> TokenEvent | Finished:
        if isinstance(event, TokenEvent):
            return event._replace(text="", tool_calls=self._pieces(event.text))
        reason = "tool_calls" if self._has_begun and event.reason != "length" else event.reason
        return replace(event, reason=reason, text="")

    def _pieces(self, text: str) -> tuple[ToolCallPiece, ...]:
        if self._has_begun:
            arguments = self._arguments.feed(text)
            return (ToolCallPiece(0, arguments=arguments),) if arguments else ()
        self._head += text
        found = _HEAD.match(self._head)
        if not found:
            return ()
        self._has_begun = True
        arguments = self._arguments.feed(self._head[found.end() :])
        return (ToolCallPiece(0, self._call_id(), _name_in(found["name"]), arguments),)


def _name_in(text: str) -> str:
    try:
        return str(json_in(text.encode()))
    except ValueError as error:
        raise not_understood() from error


class _Arguments:
    """Passes on the last value of a JSON object, without the brace that ends the object."""

    def __init__(self) -> None:
        self._depth = 1
        self._in_text = self._escaped = False
        self._space = ""

    def feed(self, text: str) -> str:
        end = next((at for at, character in enumerate(text) if self._is_end(character)), len(text))
        found = self._space + text[:end]
        passed = found.rstrip() if not self._in_text else found
        self._space = found[len(passed) :]
        return passed

    def _is_end(self, character: str) -> bool:
        """Say whether the object has ended, with this character or before."""
        if self._in_text:
            self._in_text = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._in_text = True
        else:
            self._depth += (character in "{[") - (character in "}]")
        return self._depth <= 0
