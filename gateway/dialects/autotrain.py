"""`/api/llm/inference` (documents/autotrain-inference.md, contract section 4): many prompts, one answer.

Pure: a body in, a `GenerationRequest` for each prompt out; results in, bytes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydantic import BaseModel, Field

from gateway.bodies import MOST_TOKENS, Body, Prompt, as_json, request_of
from gateway.catalog import ModelSpec
from gateway.generation import GenerationRequest, GenerationResult

MOST_PROMPTS = 256
SAMPLING = ("temperature", "top_p", "top_k")


class AutotrainBody(Body):
    """What `POST /api/llm/inference` takes."""

    model_path: str = Field(description="Model to use: an id, alias, hub name or the path of its weights")
    prompts: list[Prompt] = Field(min_length=1, max_length=MOST_PROMPTS, description="Texts to continue")
    max_new_tokens: int = Field(
        100, ge=1, le=MOST_TOKENS, description="Most tokens to generate for each prompt, up to the context"
    )
    temperature: float = Field(0.7, ge=0, le=2, description="Sampling temperature; 0 is greedy")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus sampling; 1 is off")
    top_k: int = Field(50, ge=1, le=MOST_TOKENS, description="Sample from the k likeliest tokens")
    do_sample: bool = Field(True, description="false is greedy, whatever the three above say")
    device: str | None = Field(None, description="Without effect: the catalog says where a model runs")


class AutotrainAnswer(BaseModel):
    """What `POST /api/llm/inference` answers: the continuations, in the order of the prompts."""

    model_config = {"protected_namespaces": ()}

    outputs: list[str]
    model_path: str
    num_prompts: int


def to_requests(spec: ModelSpec, body: AutotrainBody) -> list[GenerationRequest]:
    """Return what is to be generated for each prompt."""
    defaults = body.model_dump(include={"max_new_tokens", *SAMPLING})
    said = body.model_dump(include={"max_new_tokens", *SAMPLING} & body.model_fields_set)
    greedy = {} if body.do_sample else {"temperature": 0.0, "top_p": 1.0, "top_k": None}
    # OpenAI's API has no top_k: without this, nobody could use the address there who leaves it to the document.
    unasked = frozenset({"top_k"} - {*said, *greedy, *spec.parameters, *spec.overrides})
    requests = [request_of(spec, prompt, defaults=defaults, said={**said, **greedy}) for prompt in body.prompts]
    return [replace(request, defaults=unasked) for request in requests]


def answer(body: AutotrainBody, results: Sequence[GenerationResult]) -> bytes:
    """Return the body of the answer."""
    outputs = [result.text for result in results]
    return as_json({"outputs": outputs, "model_path": body.model_path, "num_prompts": len(outputs)})
