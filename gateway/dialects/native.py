"""The gateway's own `/generate` and `/generate_stream` (documents/api-reference.md 5, contract section 4).

Pure: a body in, a `GenerationRequest` out; events in, bytes out. Streams have TGI's event shape
(router/src/server.rs): one token an event, the last one with the whole continuation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from gateway.bodies import MOST_TOKENS, Body, Prompt, StopTexts, TokenProbability, as_json, candidates
from gateway.catalog import ModelSpec
from gateway.errors import GatewayError, InvalidRequest
from gateway.generation import Finished, GenerationRequest, GenerationResult, TokenEvent
from gateway.tgi_events import FINISH_REASONS, TokenFrames, Unknown, as_event

DEFAULT_NEW_TOKENS = 200
UNKNOWN = Unknown(id=-1, logprob=0.0)


class GenerateBody(Body):
    """What `POST /generate` takes."""

    model_id: str | None = Field(None, description="Model to use: an id, alias or hub name; default: the default model")
    model: str | None = Field(None, description="The same as model_id")
    prompt: Prompt = Field(description="Text to continue")
    max_new_tokens: int | None = Field(
        None, ge=1, le=MOST_TOKENS, description="Most tokens to generate, 1 to the context; default 200"
    )
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS, description="The same as max_new_tokens")
    temperature: float = Field(0.7, ge=0, le=2, description="Sampling temperature; 0 is greedy")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus sampling; 1 is off, and the default with top_tokens")
    top_k: int | None = Field(None, ge=1, le=MOST_TOKENS, description="Sample from the k likeliest tokens; null is off")
    stop: StopTexts = Field(
        default_factory=list,  # a list would be copied part by part for every request
        json_schema_extra={"default": []},
        description="Texts that end the generation, left out of it; one may stand without a list",
    )
    stop_on_newline: bool = Field(False, description="End at the first new line")
    seed: int | None = Field(None, ge=0, le=2**64 - 1, description="Makes sampling repeatable")
    repetition_penalty: float = Field(1.0, gt=0, le=100, description="1 is off")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="0 is off")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="0 is off")
    top_tokens: int = Field(
        0,
        ge=0,
        le=50,
        description="Report this many likeliest tokens at each position; none where it is part of a character",
    )
    return_full_text: bool = Field(True, description="Begin generated_text with the prompt (not in streams)")
    stream: bool = Field(False, description="Answer token by token, as server-sent events")

    @model_validator(mode="after")
    def _one_name_each(self) -> GenerateBody:
        if self.max_new_tokens is not None and self.max_tokens is not None:
            raise PydanticCustomError("two_names", "give max_new_tokens or max_tokens, not both: they mean the same")
        if self.model_id is not None and self.model is not None and self.model_id != self.model:
            raise PydanticCustomError("two_names", "model_id and model name different models; give one of them")
        return self

    @property
    def model_name(self) -> str | None:
        return self.model_id or self.model


class GenerateAnswer(BaseModel):
    """What `POST /generate` answers."""

    model_config = ConfigDict(protected_namespaces=())

    generated_text: str
    model_id: str
    model: str
    prompt: str
    tokens_generated: int
    finish_reason: str
    tokens: list[list[TokenProbability]] | None = None


def with_catalog(spec: ModelSpec, body: GenerateBody) -> GenerateBody:
    """Return the body with the catalog's `parameters` where the caller gave none, and its `overrides` in any case.

    Raises:
        InvalidRequest: together they make no valid request; says which entry of models.yaml to mend.
    """
    if not spec.parameters and not spec.overrides:
        return body
    said = body.model_dump(include=body.model_fields_set)
    merged = {**_not_said(spec.parameters, said), **said}
    merged = {**{key: value for key, value in merged.items() if key not in _others(spec.overrides)}, **spec.overrides}
    try:
        return GenerateBody.model_validate(merged)
    except ValueError:
        words = f"`parameters` and `overrides` of {spec.id} in models.yaml do not go together with this request"
        raise InvalidRequest(f"{words}; ask whoever keeps the catalog.") from None


def _not_said(defaults: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in defaults.items() if not {key, *_others([key])} & said.keys()}


def _others(keys: Iterable[str]) -> set[str]:
    """Return the other names of these parameters."""
    twins = {"max_tokens": "max_new_tokens", "max_new_tokens": "max_tokens"}
    return {twins[key] for key in keys if key in twins}


def to_request(spec: ModelSpec, body: GenerateBody) -> GenerationRequest:
    """Return what is to be generated."""
    limit = body.max_new_tokens or body.max_tokens or min(DEFAULT_NEW_TOKENS, spec.context_tokens or DEFAULT_NEW_TOKENS)
    return GenerationRequest(
        prompt=body.prompt,
        max_new_tokens=limit,
        temperature=body.temperature,
        top_p=_top_p(body) if body.top_tokens else body.top_p,
        top_k=body.top_k,
        stop=(*body.stop, "\n") if body.stop_on_newline else tuple(body.stop),
        seed=body.seed,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        top_tokens=body.top_tokens,
        logprobs=body.stream,
    )


def _top_p(body: GenerateBody) -> float:
    """Return the nucleus of who asks for probabilities. Without one named, none: they are of the whole vocabulary."""
    return body.top_p if "top_p" in body.model_fields_set else 1.0


class NativeReply:
    """Writes one answer as `/generate` gives it: whole, or as a stream of TGI's events."""

    def __init__(self, spec: ModelSpec, body: GenerateBody, request: GenerationRequest) -> None:
        self.stream = body.stream
        self._spec = spec
        self._body = body
        self._frames = TokenFrames(request, UNKNOWN)

    def whole(self, result: GenerationResult) -> bytes:
        full = self._body.prompt if self._body.return_full_text else ""
        answer: dict[str, Any] = {
            "generated_text": full + result.text,
            "model_id": self._spec.id,
            "model": self._spec.id,
            "prompt": self._body.prompt,
            "tokens_generated": result.tokens_generated,
            "finish_reason": FINISH_REASONS[result.reason],
        }
        if self._body.top_tokens:
            answer["tokens"] = [candidates(token.top) for token in result.tokens]
        return as_json(answer)

    def event(self, event: TokenEvent, *, last: bool = False) -> bytes:
        # the texts of a stream's tokens make the answer: the model's own end has none here, as TGI's would
        return self._frames.event(event._replace(token="") if event.special else event, last=last)

    def end(self, finished: Finished) -> bytes:
        details = {
            "finish_reason": FINISH_REASONS[finished.reason],
            "generated_tokens": finished.tokens_generated,
            "seed": self._body.seed,
            "input_length": finished.prompt_tokens,
        }
        return self._frames.end(finished, details)

    def failure(self, error: GatewayError) -> bytes:
        return as_event({"error": error.detail, "error_type": error.code, "error_code": error.code})
