"""`/v1/completions`, as OpenAI's reference has it, on every engine.

Pure: a body in, requests out; events in, bytes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from gateway.bodies import Prompt, request_of
from gateway.catalog import ModelSpec
from gateway.conversation import ResponseFormat, grammar_of
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
from gateway.generation import Finished, GenerationRequest, GenerationResult, TokenEvent

KINDS = ("text_completion", "text_completion")
DEFAULT_NEW_TOKENS = 16
"""OpenAI's own."""
MOST_PROMPTS = 256
MOST_CHOICES = 256
"""Of one request: so many lists of tokens may be here at once."""

# ---- asking ---------------------------------------------------------------------------------------------------------


def _as_list(said: Any) -> Any:
    if isinstance(said, list) and any(isinstance(each, int | list) for each in said):
        words = "this gateway takes no numbers of tokens; give the prompt as text"
        raise PydanticCustomError("unsupported", words)
    return [said] if isinstance(said, str) else said


Prompts = Annotated[
    list[Prompt],
    Field(min_length=1, max_length=MOST_PROMPTS),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]


class CompletionBody(SampledBody):
    """What `POST /v1/completions` takes."""

    prompt: Prompts = Field(description="Text to continue, or several texts")
    logprobs: int | None = Field(
        None, ge=0, le=50, description="Tell how likely each token was, and this many of the likeliest ones"
    )
    best_of: int | None = Field(None, ge=1, description="Not supported, but for n")
    echo: Annotated[bool, neutral(False)] = Field(False, description="Not supported")
    suffix: Annotated[str, neutral("")] = Field("", description="Not supported")
    response_format: ResponseFormat | None = Field(
        None, description="Not OpenAI's here: what form the whole answer must have"
    )

    @field_validator("prompt")
    @classmethod
    def _are_not_too_many(cls, prompts: list[str], info: ValidationInfo) -> list[str]:
        if len(prompts) * info.data.get("n", 1) > MOST_CHOICES:
            raise PydanticCustomError("too_many", f"n choices to each prompt are more than {MOST_CHOICES} in all")
        return prompts

    @field_validator("best_of")
    @classmethod
    def _is_n(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        if best_of is not None and best_of != info.data.get("n", best_of):
            raise PydanticCustomError("unsupported", "this gateway keeps every choice; leave it out, or give n alone")
        return best_of


def to_requests(
    spec: ModelSpec,
    body: CompletionBody,
    *,
    default_new_tokens: int | None = DEFAULT_NEW_TOKENS,
    keep_stop: bool = False,
) -> list[GenerationRequest]:
    """Return what is to be generated for each choice: those of the first prompt, those of the next one, and so on."""
    request = replace(
        request_of(
            spec,
            "",
            defaults={**DEFAULTS, "max_new_tokens": default_new_tokens},
            said=said_of(body),
            top_tokens=body.logprobs or 0,
        ),
        grammar=grammar_of(body.response_format),
        logprobs=body.logprobs is not None,
        count_prompt=body.tells_usage,
        keep_stop=keep_stop,
    )
    return [each for prompt in body.prompt for each in choices_of(replace(request, prompt=prompt), body.n)]


# ---- answering ------------------------------------------------------------------------------------------------------


class CompletionLogprobs(BaseModel):
    """The tokens of a choice. `text_offset` says where in its text each begins, in characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None = Field(description="The likeliest ones, and the one that was taken")
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishWord


class Completion(BaseModel):
    """What `POST /v1/completions` answers."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChoices(OpenAiChoices):
    """Writes one answer. With `keep_stop` the matched stop text stays in it, as TGI has it."""

    def __init__(self, heading: Heading, body: CompletionBody, *, keep_stop: bool = False) -> None:
        super().__init__(heading, body, KINDS, lambda: _CompletionChoice(body.logprobs, keep_stop=keep_stop))


class _CompletionChoice:
    """Writes one choice. `most` is how many of the likeliest tokens it tells of; None: of no token at all."""

    def __init__(self, most: int | None, *, keep_stop: bool) -> None:
        self._most = most
        self._keep_stop = keep_stop
        self._reported = Reported()
        self._offset = 0

    def whole(self, result: GenerationResult) -> dict[str, Any]:
        text = result.text + (result.stop if self._keep_stop else "")
        tokens = self._reported.of(result, keep_stop=self._keep_stop)
        return self._piece(text, tokens, FINISH_WORDS[result.reason])

    def event(self, event: TokenEvent) -> list[dict[str, Any]]:
        tokens = self._reported.take(event)
        return [self._piece(event.text, tokens, None)] if event.text else []

    def end(self, finished: Finished) -> list[dict[str, Any]]:
        text = finished.text + (finished.stop if self._keep_stop else "")
        tokens = self._reported.end(finished, keep_stop=self._keep_stop)
        return [self._piece(text, tokens, FINISH_WORDS[finished.reason])]

    def _piece(self, text: str, tokens: Sequence[TokenEvent], reason: FinishWord | None) -> dict[str, Any]:
        return {"text": text, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def _logprobs(self, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        if self._most is None:
            return None
        tokens = [event.text if event.token is None else event.token for event in events]
        return {
            "tokens": tokens,
            "token_logprobs": [event.logprob for event in events],
            "top_logprobs": [_top(*each, self._most) for each in zip(events, tokens, strict=True)]
            if self._most
            else None,
            "text_offset": [self._next_offset(token) for token in tokens],
        }

    def _next_offset(self, token: str) -> int:
        offset, self._offset = self._offset, self._offset + len(token)
        return offset


def _top(event: TokenEvent, token: str, most: int) -> dict[str, float]:
    """Return the likeliest tokens and the one that was taken; of several that read alike the likeliest one."""
    found: dict[str, float] = {}
    for chance in event.top[:most]:
        found.setdefault(chance.text, chance.logprob)
    found.setdefault(token, event.logprob or 0.0)
    return found
