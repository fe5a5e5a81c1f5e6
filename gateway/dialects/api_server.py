"""The API server of one model (documents/api-server.md, contract section 4).

Pure: a body in, a `GenerationRequest` out; a result in, bytes out.
"""

from __future__ import annotations

from pydantic import BaseModel, Field

from gateway.bodies import MOST_TOKENS, Body, Prompt, as_json, request_of
from gateway.catalog import ModelSpec
from gateway.generation import GenerationRequest, GenerationResult

MOST_NEW_TOKENS = 2048


class ApiServerBody(Body):
    """What `generate` takes."""

    prompt: Prompt = Field(description="Input text to continue from")
    max_tokens: int = Field(100, ge=1, le=MOST_NEW_TOKENS, description="Maximum tokens to generate")
    temperature: float = Field(0.8, ge=0, le=2, description="Sampling temperature; 0 is greedy")
    top_k: int | None = Field(
        None,
        ge=1,
        le=MOST_TOKENS,
        description="Sample from the k likeliest tokens, up to the vocabulary; null uses all",
    )
    stop_on_newline: bool = Field(False, description="Stop generation at a new line")


class ApiServerAnswer(BaseModel):
    """What `generate` answers."""

    prompt: str
    generated_text: str = Field(description="The prompt, and what follows it")
    tokens_generated: int
    model: str


def to_request(spec: ModelSpec, body: ApiServerBody) -> GenerationRequest:
    """Return what is to be generated."""
    said = {"temperature", "max_tokens", "top_k", "stop_on_newline"} & body.model_fields_set
    return request_of(
        spec,
        body.prompt,
        defaults={"temperature": body.temperature, "max_new_tokens": body.max_tokens},
        said=body.model_dump(include=said),
        most_new_tokens=MOST_NEW_TOKENS,
    )


def answer(spec: ModelSpec, body: ApiServerBody, result: GenerationResult) -> bytes:
    """Return the body of the answer."""
    return as_json(
        {
            "prompt": body.prompt,
            "generated_text": body.prompt + result.text,
            "tokens_generated": result.tokens_generated,
            "model": spec.id,
        }
    )
