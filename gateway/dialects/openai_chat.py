"""`/v1/chat/completions`, as OpenAI's reference has it, on every engine.

Pure: a body in, requests out; events in, bytes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from gateway.bodies import request_of
from gateway.catalog import ModelSpec
from gateway.conversation import ChatBody, chat_of, grammar_of
from gateway.dialects.openai import (
    DEFAULTS,
    FINISH_WORDS,
    FinishWord,
    Heading,
    OpenAiChoices,
    Reported,
    SampledBody,
    Usage,
    choices_of,
    neutral,
    said_of,
)
from gateway.generation import (
    Finished,
    GenerationRequest,
    GenerationResult,
    TokenEvent,
    ToolCall,
    ToolCallPiece,
)

KINDS = ("chat.completion", "chat.completion.chunk")
_NOT_SUPPORTED = "Not supported"

# ---- asking ---------------------------------------------------------------------------------------------------------


class ChatCompletionBody(ChatBody, SampledBody):
    """What `POST /v1/chat/completions` takes."""

    logprobs: bool = Field(False, description="Tell how likely each token of the answer was")
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="And this many of the likeliest ones; only with logprobs"
    )
    modalities: Annotated[list[str], neutral(["text"], words="ask for text")] = Field(
        ["text"], description="Nothing but text is supported"
    )
    audio: Annotated[Any, neutral()] = Field(None, description=_NOT_SUPPORTED)
    prediction: Annotated[Any, neutral()] = Field(None, description=_NOT_SUPPORTED)
    web_search_options: Annotated[Any, neutral()] = Field(None, description=_NOT_SUPPORTED)
    functions: Annotated[list[Any], neutral([], words="give `tools` instead")] = Field(
        [], description="Not supported: `tools` took its place"
    )
    function_call: Annotated[Any, neutral("none", "auto", words="give `tool_choice` instead")] = Field(
        "auto", description="Not supported: `tool_choice` took its place"
    )
    reasoning_effort: Annotated[str, neutral("none", "medium")] = Field(
        "medium", description="Nothing but OpenAI's defaults, none and medium"
    )
    verbosity: Annotated[str, neutral("medium")] = Field("medium", description="Nothing but OpenAI's default, medium")

    @field_validator("top_logprobs")
    @classmethod
    def _goes_with_logprobs(cls, said: int | None, info: ValidationInfo) -> int | None:
        if said and info.data.get("logprobs") is False:
            raise PydanticCustomError("top_logprobs", "goes with logprobs: true only")
        return said


def to_requests(spec: ModelSpec, body: ChatCompletionBody, *, keep_stop: bool = False) -> list[GenerationRequest]:
    """Return what is to be generated for each choice. Without a limit an answer ends where the context does."""
    request = replace(
        request_of(spec, "", defaults=DEFAULTS, said=said_of(body), top_tokens=body.top_logprobs or 0),
        chat=chat_of(body),
        grammar=grammar_of(body.response_format),
        logprobs=body.logprobs,
        count_prompt=body.tells_usage,
        keep_stop=keep_stop,
    )
    return choices_of(request, body.n)


# ---- answering ------------------------------------------------------------------------------------------------------


class TopLogprob(BaseModel):
    """One candidate. `bytes` are those of UTF-8; null where the token is part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """One token, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob] | None
    refusal: list[TokenLogprob] | None = None


class CalledFunction(BaseModel):
    name: str
    arguments: str = Field(description="JSON, as the model wrote it: it may not be valid")


class ChatToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None = Field(description="null where there are tool_calls alone")
    refusal: str | None = Field(None, description="In place of the content; only providers refuse")
    tool_calls: list[ChatToolCall] = Field([], description="Not there without calls")


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishWord


class ChatCompletion(BaseModel):
    """What `POST /v1/chat/completions` answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChoices(OpenAiChoices):
    """Writes one answer. With `keep_stop` the matched stop text stays in it, as TGI has it."""

    def __init__(self, heading: Heading, body: ChatCompletionBody, *, keep_stop: bool = False) -> None:
        most = (body.top_logprobs or 0) if body.logprobs else None
        super().__init__(heading, body, KINDS, lambda: _ChatChoice(most, keep_stop=keep_stop))


class _ChatChoice:
    """Writes one choice. `most` is how many of the likeliest tokens it tells of; None: of no token at all."""

    def __init__(self, most: int | None, *, keep_stop: bool) -> None:
        self._most = most
        self._keep_stop = keep_stop
        self._reported = Reported()
        self._has_begun = False

    def whole(self, result: GenerationResult) -> dict[str, Any]:
        text = result.text + (result.stop if self._keep_stop else "")
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if result.tool_calls and not text else text,
            "refusal": None,
        }
        if result.tool_calls:
            message["tool_calls"] = [_call(call) for call in result.tool_calls]
        tokens = self._reported.of(result, keep_stop=self._keep_stop)
        return {"message": message, "logprobs": self._logprobs(tokens), "finish_reason": FINISH_WORDS[result.reason]}

    def event(self, event: TokenEvent) -> list[dict[str, Any]]:
        delta: dict[str, Any] = {"content": event.text} if event.text else {}
        if calls := [_call_piece(piece) for piece in event.tool_calls if piece.id is not None or piece.arguments]:
            delta["tool_calls"] = calls
        return self._said(delta, self._reported.take(event))

    def end(self, finished: Finished) -> list[dict[str, Any]]:
        text = finished.text + (finished.stop if self._keep_stop else "")
        tokens = self._reported.end(finished, keep_stop=self._keep_stop)
        rest = self._said({"content": text} if text or not self._has_begun else {}, tokens)
        return [*rest, {"delta": {}, "logprobs": None, "finish_reason": FINISH_WORDS[finished.reason]}]

    def _said(self, delta: dict[str, Any], tokens: Sequence[TokenEvent]) -> list[dict[str, Any]]:
        """Return a piece of the choice, if there is one. The first one says whose turn it is."""
        logprobs = self._logprobs(tokens) if tokens else None
        if not delta and not logprobs:
            return []
        if not self._has_begun:
            self._has_begun = True
            delta = {"role": "assistant", "content": None if "tool_calls" in delta else "", **delta}
        return [{"delta": delta, "logprobs": logprobs, "finish_reason": None}]

    def _logprobs(self, tokens: Iterable[TokenEvent]) -> dict[str, Any] | None:
        if self._most is None:
            return None
        return {"content": [_token(token, self._most) for token in tokens], "refusal": None}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _call_piece(piece: ToolCallPiece) -> dict[str, Any]:
    """Return a part of a call: what it is called stands in the first one alone."""
    if piece.id is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    return {"index": piece.index, **_call(ToolCall(piece.id, piece.name or "", piece.arguments))}


def _token(event: TokenEvent, most: int) -> dict[str, Any]:
    chosen = _candidate(event.text if event.token is None else event.token, event.logprob or 0.0)
    return {**chosen, "top_logprobs": [_candidate(each.text, each.logprob) for each in event.top[:most]]}


def _candidate(token: str, logprob: float) -> dict[str, Any]:
    return {
        "token": token,
        "logprob": logprob,
        "bytes": None if "\N{REPLACEMENT CHARACTER}" in token else [*token.encode()],
    }
