"""One generation: sampling (tgi.md section 3), log-probabilities (section 4), and when it ends."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from . import model

CHUNK_TOKENS = 1024
"""TGI generates this much, then puts what it has back into its queue as a new request."""
STOP_WINDOW_CHARACTERS = 300
REMOVED = -math.inf


@dataclass(frozen=True)
class Sampling:
    """What changes the distribution, with the values that change nothing as defaults."""

    temperature: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    do_sample: bool = False

    @property
    def samples(self) -> bool:
        """Whether a token is drawn. Any warper turns that on, whatever `do_sample` says (tgi.md 3.2)."""
        warps = self.temperature != 1.0 or self.top_k != 0 or self.top_p < 1.0 or self.typical_p < 1.0
        return self.do_sample or warps


@dataclass(frozen=True)
class Token:
    """One token as TGI reports it. `text` is empty while a character is incomplete."""

    id: int
    text: str
    logprob: float
    special: bool


@dataclass(frozen=True)
class Step:
    token: Token
    top: tuple[Token, ...] = ()


@dataclass
class Generation:
    """A text that grows by `step()` until `finish_reason` says why it ended."""

    prompt: Sequence[int]
    sampling: Sampling
    limit: int
    seed: int
    stop: Sequence[str] = ()
    top_n: int = 0
    forced: Sequence[int] | None = None
    """The only token that may come at each place, where a grammar rules."""
    steps: list[Step] = field(default_factory=list)
    text: str = ""
    """Without special tokens, but with the stop text that ended it."""
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self._context = list(self.prompt)
        self._random = random.Random(self.seed)
        self._detokenizer = model.Detokenizer()

    @property
    def reported_seed(self) -> int | None:
        return self.seed if self.sampling.samples else None

    @property
    def mean_logprob(self) -> float:
        return sum(step.token.logprob for step in self.steps) / len(self.steps)

    def prefill(self) -> list[tuple[int, float | None]]:
        """Return the prompt's tokens and how likely each was after those before it."""
        if not self.prompt:
            return []
        before = (self.prompt[:end] for end in range(1, len(self.prompt)))
        likely = [model.log_softmax(model.logits(context)) for context in before]
        later = zip(self.prompt[1:], likely, strict=True)
        return [(self.prompt[0], None), *((token, logprobs[token]) for token, logprobs in later)]

    def step(self) -> Step:
        """Make one more token."""
        logprobs = model.log_softmax(warped(self._allowed(), self._context, self.sampling))
        chosen = self._choose(logprobs)
        self._context.append(chosen)
        text = self._detokenizer.feed(chosen)
        step = Step(Token(chosen, text, logprobs[chosen], model.is_special(chosen)), most_likely(logprobs, self.top_n))
        self.steps.append(step)
        self.text += "" if step.token.special else text
        self.finish_reason = self._reason(chosen)
        if self.finish_reason:
            self.text += self._detokenizer.rest()
        return step

    def _allowed(self) -> Sequence[float]:
        """Return the logits of what the grammar lets through."""
        scores = model.logits(self._context)
        if self.forced is None:
            return scores
        only = self.forced[len(self.steps)]
        return [score if token == only else REMOVED for token, score in enumerate(scores)]

    def _choose(self, logprobs: Sequence[float]) -> int:
        if not self.sampling.samples:
            return max(range(len(logprobs)), key=logprobs.__getitem__)
        weights = [math.exp(each) for each in logprobs]
        return self._random.choices(range(len(weights)), weights)[0]

    def _reason(self, chosen: int) -> str | None:
        if chosen == model.EOS:
            return "eos_token"
        if any(self.text[-STOP_WINDOW_CHARACTERS:].endswith(each) for each in self.stop):
            return "stop_sequence"
        return "length" if len(self.steps) >= self.limit else None


def budget(input_tokens: int, asked: int | None, max_total_tokens: int) -> int:
    """Return how many tokens TGI really makes at most (tgi.md 3.3): chunks are whole, and must fit the context."""
    room = max_total_tokens - input_tokens
    if asked is None or asked <= CHUNK_TOKENS:
        return room if asked is None else asked
    return CHUNK_TOKENS * min(math.ceil(asked / CHUNK_TOKENS), room // CHUNK_TOKENS)


def most_likely(logprobs: Sequence[float], count: int) -> tuple[Token, ...]:
    """Return the likeliest tokens, those as likely as the last of them included, those removed left out."""
    if not count:
        return ()
    ranked = sorted(range(len(logprobs)), key=lambda token: -logprobs[token])
    least = logprobs[ranked[min(count, len(ranked)) - 1]]
    kept = [token for token in ranked if logprobs[token] >= least and logprobs[token] != REMOVED]
    return tuple(Token(each, model.token_text(each), logprobs[each], model.is_special(each)) for each in kept)


def warped(scores: Sequence[float], context: Sequence[int], sampling: Sampling) -> list[float]:
    """Return the logits after penalties, temperature, top_k, top_p and typical_p, in TGI's order."""
    warm = _penalized(list(scores), context, sampling)
    if not sampling.samples:
        return warm
    warm = [score / sampling.temperature for score in warm]
    if sampling.top_k:
        least = sorted(warm, reverse=True)[min(sampling.top_k, len(warm)) - 1]
        warm = [score if score >= least else REMOVED for score in warm]
    if sampling.top_p < 1.0:
        logprobs = model.log_softmax(warm)
        warm = _mass(warm, sorted(range(len(warm)), key=lambda token: -warm[token]), logprobs, sampling.top_p)
    if sampling.typical_p < 1.0:
        logprobs = model.log_softmax(warm)
        entropy = -sum(math.exp(each) * each for each in logprobs if each != REMOVED)
        typical = sorted(range(len(warm)), key=lambda token: abs(-logprobs[token] - entropy))
        warm = _mass(warm, typical, logprobs, sampling.typical_p)
    return warm


def _penalized(scores: list[float], context: Sequence[int], sampling: Sampling) -> list[float]:
    """Return the logits with what was said already, the prompt included, made less likely."""
    if sampling.repetition_penalty == 1.0 and sampling.frequency_penalty == 0.0:
        return scores
    for token, count in Counter(context).items():
        factor = sampling.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        scores[token] -= sampling.frequency_penalty * count / len(context)
    return scores


def _mass(scores: list[float], order: Sequence[int], logprobs: Sequence[float], share: float) -> list[float]:
    """Return the logits with all tokens removed but the first of `order` that together have this share."""
    kept, mass = set(), 0.0
    for token in order:
        kept.add(token)
        mass += math.exp(logprobs[token])
        if mass >= share:
            break
    return [score if token in kept else REMOVED for token, score in enumerate(scores)]
