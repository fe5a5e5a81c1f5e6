"""Conversations as OpenAI's API writes them: turns, tools and the form of the answer. A body in, a `Chat` out. Pure.

The shapes and rules are those of OpenAI's reference of chat completions. What is wrong is told at its own place, as in
`messages[2].content[0].image_url.url`: so what has several shapes (a turn, a part of it, a choice) is one model each.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

from gateway.bodies import Body, is_unicode
from gateway.generation import Chat, Grammar, Image, JsonObject, JsonSchema, Message, Regex, Tool, ToolCall

MOST_TOOLS = 128
"""OpenAI's own bound."""


def _is_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return the object, which Python may have read from more than JSON allows: NaN, lone surrogates."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        words = "this is not valid JSON (NaN, Infinity, a lone surrogate, or nested too deeply)"
        raise PydanticCustomError("json_invalid", words) from None
    return value


def _is_reachable(url: str) -> str:
    if not url.lower().startswith(("https://", "http://", "data:image/")):
        raise PydanticCustomError("url_scheme", "must begin with https://, http:// or data:image/")
    return url


Text = Annotated[str, AfterValidator(is_unicode)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
"""What OpenAI takes as the name of a function or a schema."""
JsonDict = Annotated[dict[str, Any], AfterValidator(_is_json)]

# ---- turns ----------------------------------------------------------------------------------------------------------


class ImageUrl(Body):
    url: Annotated[Text, AfterValidator(_is_reachable)] = Field(description="https, or data:image/...;base64,...")
    detail: Literal["auto", "low", "high"] = Field("auto", description="Accepted; the model's server decides")


class Part(Body):
    """A part of a turn."""

    type: Literal["text", "image_url", "refusal"]
    text: Text | None = Field(None, validate_default=True)
    image_url: ImageUrl | None = Field(None, validate_default=True)
    refusal: Text | None = Field(None, validate_default=True)

    @field_validator("text", "image_url", "refusal")
    @classmethod
    def _has_what_its_type_says(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("type") == info.field_name:
            raise PydanticKnownError("missing")
        return value

    def content(self) -> str | Image:
        if self.image_url:
            return Image(self.image_url.url)
        return self.text or self.refusal or ""


def _parts(said: Any) -> Any:
    """Return the parts of a content that may be text alone."""
    if isinstance(said, str):
        return [{"type": "text", "text": said}]
    if not isinstance(said, list):
        raise PydanticCustomError("content_type", "must be a text or a list of parts")
    return said


Content = Annotated[list[Part], BeforeValidator(_parts, json_schema_input_type=str | list[Part])]


class CalledFunction(Body):
    name: Text = Field(min_length=1)
    arguments: Text = Field("", description="JSON, as the model wrote it")


class CallBody(Body):
    """A call of a tool in an assistant's turn."""

    id: Text = Field(min_length=1)
    type: Literal["function"] = "function"
    function: CalledFunction


def _role(said: Any) -> Any:
    if said == "function":
        words = "the role function has become tool: answer with role tool and the call's id as tool_call_id"
        raise PydanticCustomError("role_function", words)
    return said


Role = Annotated[Literal["system", "developer", "user", "assistant", "tool"], BeforeValidator(_role)]
_ONLY_IN = {"image_url": "user", "refusal": "assistant"}
"""Parts that only one role's turns have."""


class MessageBody(Body):
    """One turn of a conversation."""

    role: Role = Field(description="developer is another word for system")
    name: Text | None = Field(None, description="Tells apart several who speak in one role")
    tool_calls: list[CallBody] = Field([], description="What an assistant's turn called")
    tool_call_id: Text | None = Field(None, validate_default=True, description="Which call a tool's turn answers")
    refusal: Text | None = Field(None, description="In an assistant's turn, in place of its content")
    content: Content = Field(
        [], validate_default=True, description="Text or parts; may lack where there are tool_calls"
    )

    @field_validator("tool_calls")
    @classmethod
    def _are_an_assistants(cls, calls: list[CallBody], info: ValidationInfo) -> list[CallBody]:
        if calls and info.data.get("role") != "assistant":
            raise PydanticCustomError("tool_calls_role", "only an assistant's turn calls tools")
        return calls

    @field_validator("tool_call_id")
    @classmethod
    def _is_given_for_a_tool(cls, call_id: str | None, info: ValidationInfo) -> str | None:
        if call_id is None and info.data.get("role") == "tool":
            raise PydanticKnownError("missing")
        return call_id

    @field_validator("content")
    @classmethod
    def _is_what_the_role_has(cls, content: list[Part], info: ValidationInfo) -> list[Part]:
        role = info.data.get("role", "")
        for part in content:
            if role and role != _ONLY_IN.get(part.type, role):
                words = f"parts of type {part.type} are for the role {_ONLY_IN[part.type]} only"
                raise PydanticCustomError("part_role", words)
        says_otherwise = role == "assistant" and (info.data.get("tool_calls") or info.data.get("refusal"))
        if role and not content and not says_otherwise:
            raise PydanticKnownError("missing")
        return content


Messages = Annotated[list[MessageBody], Field(min_length=1)]


def messages_of(bodies: Iterable[MessageBody]) -> tuple[Message, ...]:
    """Return the turns in the words of the vocabulary."""
    return tuple(_message(body) for body in bodies)


def _message(body: MessageBody) -> Message:
    refusal = (body.refusal,) if body.refusal and not body.content else ()
    return Message(
        role="system" if body.role == "developer" else body.role,
        content=(*(part.content() for part in body.content), *refusal),
        name=body.name,
        tool_calls=tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in body.tool_calls),
        tool_call_id=body.tool_call_id if body.role == "tool" else None,
    )


# ---- tools ----------------------------------------------------------------------------------------------------------


class FunctionBody(Body):
    name: Name
    description: Text | None = None
    parameters: JsonDict | None = Field(None, description="JSON Schema of its arguments; default: it takes none")
    strict: bool = Field(
        False, description="Accepted: how far arguments are bound to the schema is the engine's affair"
    )


class ToolBody(Body):
    """A function that the model may call."""

    type: Literal["function"]
    function: FunctionBody


class NamedFunction(Body):
    name: Text


class ToolChoice(Body):
    """Whether the model may, must not or must call a tool; or which one it must."""

    type: Literal["auto", "none", "required", "function"]
    function: NamedFunction | None = Field(None, validate_default=True)

    @field_validator("function")
    @classmethod
    def _is_given_if_it_is_the_type(cls, function: NamedFunction | None, info: ValidationInfo) -> NamedFunction | None:
        if function is None and info.data.get("type") == "function":
            raise PydanticKnownError("missing")
        return function


def _choice(said: Any) -> Any:
    """Return a choice as an object; a word stands for itself."""
    if not isinstance(said, str):
        return said
    if said not in ("auto", "none", "required"):
        words = 'must be auto, none, required or {"type": "function", "function": {"name": ...}}'
        raise PydanticCustomError("tool_choice", words)
    return {"type": said}


Choice = Annotated[
    ToolChoice, BeforeValidator(_choice, json_schema_input_type=Literal["auto", "none", "required"] | ToolChoice)
]

# ---- the form of the answer -----------------------------------------------------------------------------------------


class SchemaBody(Body):
    name: Name
    description: Text | None = None
    schema_: JsonDict | None = Field(None, alias="schema", description="JSON Schema; default: any object")
    strict: bool = Field(False, description="Accepted: a schema always binds the whole answer")


class ResponseFormat(Body):
    """What form the whole answer must have."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: SchemaBody | None = Field(None, validate_default=True)
    value: Text | None = Field(None, validate_default=True, description="Not OpenAI's but TGI's: the regex")

    @field_validator("json_schema", "value")
    @classmethod
    def _is_given_if_it_is_the_type(cls, said: Any, info: ValidationInfo) -> Any:
        needed_by = {"json_schema": "json_schema", "value": "regex"}[info.field_name or ""]
        if said is None and info.data.get("type") == needed_by:
            raise PydanticKnownError("missing")
        return said


def grammar_of(response_format: ResponseFormat | None) -> Grammar | None:
    """Return what form the answer must have; None for any text."""
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "regex":
        return Regex(response_format.value or "")
    body = response_format.json_schema
    if response_format.type == "json_object" or body is None or body.schema_ is None:
        return JsonObject()
    return JsonSchema(body.schema_, body.name)


# ---- the whole ------------------------------------------------------------------------------------------------------


class ChatBody(Body):
    """The fields of OpenAI's chats that say what is spoken of; a dialect's own body adds the rest."""

    messages: Messages = Field(description="The conversation; the answer is its next turn")
    tools: list[ToolBody] = Field([], max_length=MOST_TOOLS, description="Functions that the model may call")
    tool_choice: Choice | None = Field(None, description="auto (the default), none, required, or one function by name")
    parallel_tool_calls: bool | None = Field(None, description="Whether one answer may call several tools")
    response_format: ResponseFormat | None = Field(None, description="What form the whole answer must have")

    @field_validator("tool_choice")
    @classmethod
    def _is_among_the_tools(cls, choice: ToolChoice | None, info: ValidationInfo) -> ToolChoice | None:
        if choice is None or choice.type in ("auto", "none") or "tools" not in info.data:
            return choice
        names = [tool.function.name for tool in info.data["tools"]]
        if not names:
            raise PydanticCustomError("no_tools", "there are no `tools` to call")
        if choice.function and choice.function.name not in names:
            raise PydanticCustomError("unknown_tool", "names none of the `tools`")
        return choice


def chat_of(body: ChatBody) -> Chat:
    """Return the conversation in the words of the vocabulary."""
    choice = body.tool_choice.type if body.tool_choice else "auto"
    named = body.tool_choice.function if body.tool_choice and choice == "function" else None
    return Chat(
        messages=messages_of(body.messages),
        tools=tuple(_tool(tool.function) for tool in body.tools),
        tool_choice="required" if choice == "function" else choice,
        tool_name=named.name if named else None,
        parallel_tool_calls=body.parallel_tool_calls,
    )


def _tool(function: FunctionBody) -> Tool:
    return Tool(function.name, function.description, function.parameters)
