"""One model's LLM service: what may follow a prompt, and how likely (documents/llm-service.md, contract section 4).

Pure: a body in, a `GenerationRequest` out; a result in, bytes out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from pydantic import BaseModel, Field

from gateway.bodies import Body, Prompt, TokenProbability, as_json, candidates, request_of
from gateway.catalog import ModelSpec
from gateway.errors import GenerationFailed
from gateway.generation import FinishReason, GenerationRequest, GenerationResult, TokenChance

MOST_NEW_TOKENS = 100
RESHAPING = ("top_p", "top_k", "repetition_penalty", "frequency_penalty", "presence_penalty")
"""What would change the probabilities, so the catalog's `parameters` do not bring it in here."""
LEAST_LOGPROB = -1e9
"""Stands for all below: at a temperature close to 0 they would leave what JSON can express."""


class LlmServiceBody(Body):
    """What `generate` takes."""

    prompt: Prompt = Field(description="Input text prompt")
    temperature: float = Field(1.0, ge=0, le=2, description="Sampling temperature; 0 is greedy")
    max_tokens: int = Field(1, ge=1, le=MOST_NEW_TOKENS, description="Maximum tokens to generate")
    top_k: int = Field(5, ge=1, le=50, description="Number of top tokens to return")


class Metadata(BaseModel):
    """How the answer came about. null is what is not known."""

    model_config = {"protected_namespaces": ()}

    model_name: str
    prompt_length: int = Field(description="In characters")
    prompt_tokens: int | None
    tokens_generated: int
    finish_reason: FinishReason
    generation_time_ms: int = Field(description="Without the wait for a start or a free slot")
    temperature_used: float
    device: str | None


class LlmServiceAnswer(BaseModel):
    """What `generate` answers: the continuation, and the alternatives at its first token."""

    generated_text: str
    tokens: list[TokenProbability]
    metadata: Metadata


def to_request(spec: ModelSpec, body: LlmServiceBody) -> GenerationRequest:
    """Return what is to be generated. Nothing is filtered, so that the probabilities are the whole vocabulary's."""
    return request_of(
        spec,
        body.prompt,
        defaults={"temperature": body.temperature, "max_new_tokens": body.max_tokens},
        said=body.model_dump(include={"temperature", "max_tokens"} & body.model_fields_set),
        apart_from=RESHAPING,
        most_new_tokens=MOST_NEW_TOKENS,
        top_tokens=body.top_k,
    )


# ---- the alternatives at the first position -------------------------------------------------------------------------


def first_of(result: GenerationResult) -> tuple[TokenChance, ...]:
    """Return the alternatives at the first position, as far as the engine told them."""
    return result.tokens[0].top if result.tokens else ()


def lacks_alternatives(result: GenerationResult, request: GenerationRequest) -> bool:
    """Say whether the engine told fewer than were asked for.

    Some leave out what is so unlikely that its probability rounds to 0, and tell nothing where the token that was
    taken is only part of a character.
    """
    return len(first_of(result)) < request.top_tokens


def unsharpened(request: GenerationRequest) -> GenerationRequest:
    """Return the request whose answer tells the likeliest tokens at the same position at temperature 1."""
    return replace(request, max_new_tokens=1, temperature=0.0, stop=())  # 0 reads as 1, and takes the likeliest


def completed(
    known: Sequence[TokenChance], plain: Sequence[TokenChance], temperature: float
) -> tuple[TokenChance, ...]:
    """Return all alternatives, from those `known` at this temperature and the likeliest ones at temperature 1.

    log p_T(a) - log p_T(b) = (log p_1(a) - log p_1(b)) / T, so one that is known at T tells all others.

    Raises:
        GenerationFailed: nothing tells them.
    """
    if plain and temperature in (0.0, 1.0):
        return tuple(plain)
    if not known or not plain:
        raise GenerationFailed(
            "The model began with a token that is only part of a character (of an emoji, say), and its engine tells no "
            "alternatives there. Ask again, or end the prompt elsewhere."
        )
    best, told = known[0], {chance.id for chance in known}
    steps = {chance.id: (chance.logprob - plain[0].logprob) / temperature for chance in plain}
    return (*known, *(_moved(chance, best.logprob + steps[chance.id]) for chance in plain if chance.id not in told))


def _moved(chance: TokenChance, logprob: float) -> TokenChance:
    return replace(chance, probability=math.exp(logprob), logprob=max(logprob, LEAST_LOGPROB))


# ---- answers --------------------------------------------------------------------------------------------------------


def answer(
    spec: ModelSpec,
    request: GenerationRequest,
    result: GenerationResult,
    alternatives: Sequence[TokenChance],
    *,
    device: str | None,
) -> bytes:
    """Return the body of the answer."""
    metadata = Metadata(
        model_name=spec.hf_name or spec.name,
        prompt_length=len(request.prompt),
        prompt_tokens=result.prompt_tokens or None,
        tokens_generated=result.tokens_generated,
        finish_reason=result.reason,
        generation_time_ms=round(result.generation_s * 1000),
        temperature_used=request.temperature,
        device=device,
    )
    tokens = candidates(alternatives[: request.top_tokens])
    return as_json({"generated_text": result.text, "tokens": tokens, "metadata": metadata.model_dump()})
