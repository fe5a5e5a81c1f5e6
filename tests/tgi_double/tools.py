"""Tools as TGI has them (tgi.md 1.2): one call, `{"function":{"_name":NAME,...}}`, under a grammar of its own.

The model's choice is the double's: the first function of the list that the last user message names; without one,
`required` takes the first and `auto` takes none. Then TGI asks again without tools, and so does the double.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .validation import Refused

NO_TOOL = "no_tool"
ID = "0"
TOOL_PROMPT = (
    "Given the functions available, please respond with a JSON for a function call with its proper arguments that best "
    "answers the given prompt. Respond in the format {name: function name, parameters: dictionary of argument name and "
    "its value}.Do not use variables."
)
Body = Mapping[str, Any]


def chosen(body: Body) -> str | None:
    """Return the name of the function that is called, `no_tool` among them; None if tools are out of the question.

    Raises:
        Refused: there is no function of that name.
    """
    names = [tool["name"] for tool in body["tools"] or ()]
    choice = body["tool_choice"] or "auto"
    if choice == "none" or not names:
        return None
    if choice == "auto":
        return next(iter(_named(names, body)), NO_TOOL)
    if choice == "required":
        return next(iter(_named(names, body)), names[0])
    if choice not in names:
        raise Refused(f"Tool error: Tool with name {choice} not found", "tool_error")
    return str(choice)


def _named(names: Sequence[str], body: Body) -> list[str]:
    said = [message["content"] for message in body["messages"] if message["role"] == "user"]
    return [name for name in names if said and name in said[-1]]


def grammar(body: Body, name: str) -> dict[str, Any]:
    """Return the grammar of a call. Definitions beside `properties` are lost, as in TGI."""
    given = next((tool["arguments"] for tool in body["tools"] if tool["name"] == name), None)
    arguments: dict[str, Any] = given if isinstance(given, dict) else {}
    properties = {"_name": {"type": "string", "const": name}, **arguments.get("properties", {})}
    required = ["_name", *arguments.get("required", ())]
    return {
        "type": "json",
        "value": {
            "$functions": {name: {"properties": properties, "required": required}},
            "properties": {"function": {"$ref": f"#/$functions/{name.replace('~', '~0').replace('/', '~1')}"}},
            "required": ["function"],
        },
    }


def shown(body: Body) -> str:
    """Return what the prompt is told of the tools, at the end of its last message."""
    return f"\n---\n{json.dumps(body['tools'], ensure_ascii=False)}\n{TOOL_PROMPT}"


def call_of(text: str) -> dict[str, Any]:
    """Return the call that a whole answer is.

    Raises:
        Refused: it was cut off.
    """
    try:
        function = json.loads(text)["function"]
    except ValueError as error:
        raise Refused(f"Tool error: Failed to parse generated text: {error} {json.dumps(text)}", "tool_error") from None
    name, arguments = function.pop("_name"), json.dumps(function, ensure_ascii=False, separators=(",", ":"))
    return {
        "id": ID,
        "type": "function",
        "function": {"description": None, "name": name, "arguments": arguments},
    }


class CallStream:
    """Cuts a call out of the text as it grows, in TGI's way.

    Nothing is told until the name is complete; then `{` in place of the token that completed it, then every token,
    the last one without its last brace, and then nothing more, a reason neither.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._text = ""
        self._calling = False

    def feed(self, text: str) -> tuple[str | None, str] | None:
        """Return the name, if this token completes it, and the piece of the arguments; None for no chunk at all."""
        self._text += text
        if not self._calling:
            name = _name_in(self._text.rstrip(" \t\n,}") + "}}")
            self._calling = name is not None
            self.name = self.name or name
            return (name, "{") if self._calling else None
        if _name_in(self._text) is None:
            return None, text
        self._calling = False
        return None, text.rstrip().removesuffix("}")


def _name_in(text: str) -> str | None:
    try:
        name = json.loads(text)["function"]["_name"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(name)
