"""The words of generation, the same for every dialect and every engine. Values only.

A dialect makes a `GenerationRequest` of a caller's body; an engine turns it into its own HTTP
call, and its own answer into `TokenEvent`s that end with one `Finished`; a dialect renders those.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["length", "stop", "eos"]
"""`length`: max_new_tokens or the context was reached; `stop`: a stop text; `eos`: the model ended by itself."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What is to be generated. Every sampling value is explicit: an engine's own defaults are never ours."""

    prompt: str
    max_new_tokens: int
    temperature: float
    """0 to 2; 0 is greedy."""
    top_p: float = 1.0
    """Above 0, at most 1; 1 is off."""
    top_k: int | None = None
    """At least 1; None is off."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation and are cut from the answer."""
    seed: int | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    top_tokens: int = 0
    """How many of the likeliest tokens to report at each position, with probabilities; 0 to 50."""
    logprobs: bool = False
    """Whether to report how likely each generated token was."""


@dataclass(frozen=True, slots=True)
class TokenChance:
    """One candidate at one position.

    The probability is softmax(logits / T) over the whole vocabulary, before any filter; T = 0 reads as 1.
    """

    id: int
    text: str
    probability: float
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token. `text` may be empty: part of a character, or held back as a possible stop text."""

    id: int | None
    text: str
    logprob: float | None = None
    top: tuple[TokenChance, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a generation. `text` is what was still held back and belongs to the answer after all."""

    reason: FinishReason
    tokens_generated: int
    """The engine's own count."""
    prompt_tokens: int
    """0 where the engine does not tell."""
    text: str = ""
    generation_s: float = 0.0
    """How long the server worked on it, without start and queue; measured by the relay."""


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A whole answer: the continuation without the prompt and without the stop text that ended it."""

    text: str
    tokens: tuple[TokenEvent, ...]
    reason: FinishReason
    tokens_generated: int
    prompt_tokens: int
    generation_s: float = 0.0


def collect(events: Iterable[TokenEvent], finished: Finished) -> GenerationResult:
    """Return the whole answer that the events of a finished generation add up to."""
    tokens = tuple(events)
    return GenerationResult(
        text="".join(token.text for token in tokens) + finished.text,
        tokens=tokens,
        reason=finished.reason,
        tokens_generated=finished.tokens_generated,
        prompt_tokens=finished.prompt_tokens,
        generation_s=finished.generation_s,
    )
