"""Chats as OpenAI's API has them, which every engine's server speaks more or less: what is said, what is heard. Pure.

The source of the rules is OpenAI's reference of chat completions. Where TGI and llama.cpp differ, the parameters of
`ChatDecoder` say how.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from gateway.engines.lines import EventLines
from gateway.engines.protocol import NOT_THE_PROTOCOL, count_in, object_in, text_in, unseen
from gateway.engines.stops import StopTexts
from gateway.errors import GatewayError, GenerationFailed, Unsupported
from gateway.generation import (
    Chat,
    Finished,
    FinishReason,
    GenerationRequest,
    Image,
    JsonObject,
    JsonSchema,
    Message,
    TokenChance,
    TokenEvent,
    Tool,
    ToolCall,
    ToolCallPiece,
)

UNKNOWN_ID = -1
"""Stands for the number of a token, where texts only are told."""
UNKNOWN_PROMPT_TOKENS = 0
"""Stands for the prompt's length, where the gateway ended the answer before it was told."""
LEAST_PROBABILITY = 1e-45
"""The smallest number that llama.cpp can tell from 0; stands for 0, whose logarithm JSON cannot express."""
DEFAULT_SCHEMA_NAME = "answer"
"""OpenAI's API wants a name for every schema."""

# ---- what is said ---------------------------------------------------------------------------------------------------


def messages_of(chat: Chat) -> list[dict[str, Any]]:
    """Return the turns of a conversation as JSON."""
    return [_message(message) for message in chat.messages]


def _message(message: Message) -> dict[str, Any]:
    said: dict[str, Any] = {"role": message.role}
    if message.content or not message.tool_calls:
        said["content"] = _content(message)
    if message.name is not None:
        said["name"] = message.name
    if message.tool_calls:
        said["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        said["tool_call_id"] = message.tool_call_id
    return said


def _content(message: Message) -> str | list[dict[str, Any]]:
    """Return plain text where there is nothing else: not every server and template takes parts."""
    if any(isinstance(part, Image) for part in message.content):
        return [_part(part) for part in message.content]
    return message.text


def _part(part: str | Image) -> dict[str, Any]:
    if isinstance(part, Image):
        return {"type": "image_url", "image_url": {"url": part.url}}
    return {"type": "text", "text": part}


def _tool_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def tools_of(chat: Chat, *, chosen_only: bool = False) -> list[dict[str, Any]]:
    """Return the tools as JSON; with `chosen_only` nothing but the one that must be called, if it is named.

    That is for servers that cannot be told by `tool_choice` which one it is.
    """
    wanted = chat.tool_name if chosen_only else None
    return [_tool(tool) for tool in chat.tools if wanted in (None, tool.name)]


def _tool(tool: Tool) -> dict[str, Any]:
    said: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        said["description"] = tool.description
    if tool.parameters is not None:
        said["parameters"] = dict(tool.parameters)
    return {"type": "function", "function": said}


def tool_choice_of(chat: Chat) -> Literal["auto", "none", "required"] | dict[str, Any]:
    """Return whether a tool may, must not or must be called, or which one must."""
    if chat.tool_choice == "required" and chat.tool_name is not None:
        return {"type": "function", "function": {"name": chat.tool_name}}
    return chat.tool_choice


def response_format_of(grammar: JsonObject | JsonSchema) -> dict[str, Any]:
    """Return what asks for JSON, as OpenAI's API has it. TGI has its own form."""
    if isinstance(grammar, JsonObject):
        return {"type": "json_object"}
    schema = {"name": grammar.name or DEFAULT_SCHEMA_NAME, "schema": dict(grammar.schema)}
    return {"type": "json_schema", "json_schema": schema}


# ---- what is heard --------------------------------------------------------------------------------------------------

_FAILED = ("abort", "error")
_REASONS: Mapping[str, FinishReason] = {
    "length": "length",
    "model_length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "stop_sequence": "stop",
    "eos_token": "eos",
    "eos": "eos",
}


def new_call_id() -> str:
    """Return a random id for a call of a tool, in OpenAI's form."""
    return f"call_{secrets.token_hex(12)}"


class ChatDecoder:
    """Reads the chunks of a streamed chat completion.

    It ends the answer itself at a stop text, and at the length that was asked for where a server goes beyond. If the
    prompt's length must be known and was not told, it then reads on in silence until the server tells.

    Args:
        request: what was asked.
        failure: returns the error that a frame which is no chunk stands for; also told whether tokens came before.
        chunk_is_token: each chunk with content is one token, as TGI's and llama.cpp's are, TGI's special ones included.
            Else it is one token each where log-probabilities tell them apart, and any number of them where not.
        stop_means: what the server's word `stop` stands for. TGI and a server that was told of no stop texts mean the
            model's own end.
        one_call: the answer ends where a second call of a tool begins.
        call_id: returns the ids of tools' calls: TGI calls each of them "0".
    """

    def __init__(
        self,
        request: GenerationRequest,
        failure: Callable[[dict[str, Any], bool], GatewayError],
        *,
        chunk_is_token: bool = False,
        stop_means: FinishReason = "eos",
        one_call: bool = False,
        call_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._request, self._failure = request, failure
        self._chunk_is_token, self._stop_means, self._one_call = chunk_is_token, stop_means, one_call
        self._lines, self._stop, self._calls = EventLines(), StopTexts(request.stop), _Calls(call_id)
        self._tokens = 0
        self._usage: Mapping[str, Any] = {}
        self._reason: FinishReason | None = None
        self._ended_here = False
        self._finished = False

    def feed(self, chunk: bytes) -> list[TokenEvent | Finished]:
        events: list[TokenEvent | Finished] = []
        try:
            for field, value in self._lines.feed(chunk):
                if not self._finished and field in (b"data", b"error"):
                    events += self._end() if value == b"[DONE]" else self._frame(field, object_in(value))
        except NOT_THE_PROTOCOL as error:
            raise not_understood() from error
        return events

    def _frame(self, field: bytes, frame: dict[str, Any]) -> Iterator[TokenEvent | Finished]:
        if field == b"error" or frame.get("error") or "choices" not in frame:
            raise self._failure(frame, self._tokens > 0)
        self._usage = frame.get("usage") or self._usage
        told = _told(timings) if (timings := frame.get("timings")) else NOTHING_TOLD
        if told.prompt_tokens:
            self._usage = {"prompt_tokens": told.prompt_tokens, **self._usage}
        for choice in frame["choices"][:1]:
            if not self._ended_here:
                yield from self._choice(choice, told)
        if self._is_over():
            yield from self._end()

    def _is_over(self) -> bool:
        if self._ended_here:
            return not self._request.count_prompt or bool(self._usage.get("prompt_tokens"))
        return bool(self._reason and self._usage.get("completion_tokens") is not None)

    def _choice(self, choice: dict[str, Any], told: _Told) -> Iterator[TokenEvent]:
        pieces = self._pieces(choice)
        if pieces and told.tokens:
            yield from self._catch_up(told.tokens - len(pieces))
        for piece in pieces:
            yield from self._event(piece, told.tokens)
        if (said := choice.get("finish_reason")) and not self._ended_here:
            self._reason = self._reason_of(str(said), choice)

    def _pieces(self, choice: dict[str, Any]) -> list[Piece]:
        delta = choice.get("delta") or {}
        calls = self._calls.pieces(delta.get("tool_calls") or ())
        content = delta.get("content")
        tokens = (choice.get("logprobs") or {}).get("content") or ()
        pieces = with_text([reported(token) for token in tokens], content or "")
        if not pieces and (content or calls or (self._chunk_is_token and content is not None)):
            token = content if self._chunk_is_token and content and not calls else None
            pieces = [Piece(content or "", token)]
        if calls:
            pieces[-1] = pieces[-1]._replace(calls=calls)
        if self._chunk_is_token and content == "" and not calls:
            pieces = [piece._replace(special=bool(piece.token or choice.get("finish_reason"))) for piece in pieces]
        return pieces

    def _catch_up(self, counted: int) -> Iterator[TokenEvent]:
        """Yield what stands for the tokens that were counted and not sent."""
        yield from unseen(counted - self._tokens)
        self._tokens = max(self._tokens, counted)

    def _event(self, piece: Piece, told: int) -> Iterator[TokenEvent]:
        if not told and self._is_beyond_length():
            self._end_here("length")
        if self._ended_here:
            return
        if self._request.top_tokens and piece.text and not piece.top:
            raise Unsupported("This model's server reports no top_tokens, though it was asked to. Leave them out.")
        self._tokens = told or self._tokens + 1
        top = piece.top[: self._request.top_tokens]
        text = self._stop.feed(piece.text)
        if self._stop.found:
            self._end_here("stop")
        yield TokenEvent(piece.id, text, piece.logprob, top, piece.token, piece.special, self._wanted(piece.calls))

    def _wanted(self, calls: tuple[ToolCallPiece, ...]) -> tuple[ToolCallPiece, ...]:
        if not calls:
            return ()
        wanted = tuple(piece for piece in calls if piece.index == 0) if self._one_call else calls
        if len(wanted) < len(calls):
            self._end_here("tool_calls")
        return wanted

    def _is_beyond_length(self) -> bool:
        """Say whether another token would be one too many. Where chunks are no tokens, the server knows better."""
        limit = self._request.max_new_tokens
        return self._chunk_is_token and limit is not None and self._tokens >= limit

    def _end_here(self, reason: FinishReason) -> None:
        self._reason, self._ended_here = reason, True

    def _reason_of(self, said: str, choice: Mapping[str, Any]) -> FinishReason:
        """Return why the answer ended. TGI has no word of its own for tools; vLLM and SGLang tell the stop text."""
        if said in _FAILED:
            raise GenerationFailed(f"The model's server gave the answer up ({said}).")
        reason = _REASONS.get(said) or self._stop_or_end(said, choice)
        return "tool_calls" if reason != "length" and self._calls else reason

    def _stop_or_end(self, said: str, choice: Mapping[str, Any]) -> FinishReason:
        for key in ("stop_reason", "matched_stop"):
            if key in choice:
                return "stop" if isinstance(choice[key], str) else "eos"
        return self._stop_means if said == "stop" else "eos"

    def _end(self) -> Iterator[TokenEvent | Finished]:
        if self._reason is None:
            raise not_understood()
        self._finished = True
        counted = 0 if self._ended_here else count_in(self._usage.get("completion_tokens"))
        if self._chunk_is_token:
            yield from self._catch_up(counted)  # the model's own mark of its end, say
        prompt_tokens = count_in(self._usage.get("prompt_tokens")) or UNKNOWN_PROMPT_TOKENS
        rest = "" if self._stop.found else self._stop.rest()
        yield Finished(self._reason, counted or self._tokens, prompt_tokens, rest, self._stop.matched)


class _Told(NamedTuple):
    """What llama.cpp tells with each chunk, if asked for `timings_per_token`: tokens so far, and of the prompt."""

    tokens: int = 0
    prompt_tokens: int = 0


NOTHING_TOLD = _Told()


def _told(timings: Mapping[str, Any]) -> _Told:
    prompt_tokens = count_in(timings.get("prompt_n")) + count_in(timings.get("cache_n"))
    return _Told(count_in(timings.get("predicted_n")), prompt_tokens)


class _Calls:
    """Tells the calls of an answer apart, and gives each an id of its own."""

    def __init__(self, call_id: Callable[[], str]) -> None:
        self._call_id = call_id
        self._known: dict[Any, str | None] = {}
        """The server's indices and what it calls the last call there. Google's servers give every call the index 0."""
        self._indices: dict[Any, int] = {}
        self._count = 0

    def __bool__(self) -> bool:
        return self._count > 0

    def pieces(self, said: Any) -> tuple[ToolCallPiece, ...]:
        return tuple(self._piece(call) for call in said)

    def _piece(self, call: Mapping[str, Any]) -> ToolCallPiece:
        function, place, said_id = call.get("function") or {}, call.get("index"), call.get("id")
        arguments = _arguments(function.get("arguments"))
        another = bool(said_id and function.get("name") and self._known.get(place) != said_id)
        if place in self._indices and not another:
            return ToolCallPiece(self._indices[place], arguments=arguments)
        self._known[place], self._indices[place] = said_id, self._count
        self._count += 1
        return ToolCallPiece(self._indices[place], self._call_id(), str(function.get("name") or ""), arguments)


def _arguments(said: Any) -> str:
    """Return arguments as text: some servers send a whole object."""
    return said if isinstance(said, str) else "" if said is None else json.dumps(said)


class Piece(NamedTuple):
    """One token, or what a chunk holds that does not tell its tokens apart."""

    text: str
    token: str | None = None
    """The token's own text, if the piece is one."""
    id: int | None = None
    logprob: float | None = None
    top: tuple[TokenChance, ...] = ()
    special: bool = False
    calls: tuple[ToolCallPiece, ...] = ()


def with_text(pieces: list[Piece], text: str) -> list[Piece]:
    """Return the pieces with the chunk's own text: those of tokens that are parts of characters do not add up to it."""
    if not pieces or "".join(piece.text for piece in pieces) == text:
        return pieces
    return [*(piece._replace(text="") for piece in pieces[:-1]), pieces[-1]._replace(text=text)]


def reported(said: Mapping[str, Any]) -> Piece:
    """Return a token as it was reported with its log-probability, the likeliest in its place first.

    The token that was taken may be among them even if it is a less likely one.
    """
    text, number = text_in(said["token"]), said.get("id")
    found = (_chance(each) for each in said.get("top_logprobs") or said.get("top_probs") or ())
    top = sorted((chance for chance in found if chance), key=lambda chance: -chance.logprob)
    return Piece(text, text, None if number is None else int(number), _logprob(said), tuple(top))


def _chance(said: Mapping[str, Any]) -> TokenChance | None:
    logprob = _logprob(said)
    if logprob is None:
        return None
    probability = min(max(float(said["prob"]), 0.0), 1.0) if "prob" in said else math.exp(min(logprob, 0.0))
    return TokenChance(int(said.get("id", UNKNOWN_ID)), text_in(said["token"]), probability, logprob)


def _logprob(said: Mapping[str, Any]) -> float | None:
    """Return the logarithm, or None where there is none: JSON cannot express that of 0. llama.cpp may tell `prob`."""
    logprob = math.log(max(float(said["prob"]), LEAST_PROBABILITY)) if "prob" in said else said.get("logprob")
    return None if logprob is None or not math.isfinite(logprob) else float(logprob)


def not_understood() -> GenerationFailed:
    """Return the error for an answer that is none."""
    return GenerationFailed("The model's server sent something that is not a chat completion; see its log.")
