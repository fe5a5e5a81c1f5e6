"""What TGI answers: the events of `POST /generate_stream`, and its errors, which it sends as events too. Pure.

A stream's status is always 200: that a prompt is too long or the server overloaded is an event in place of the first
token. So an event and a refused call are read by the same rules.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gateway.engines.keys import key_refused
from gateway.engines.stops import StopTexts
from gateway.errors import (
    BodyTooLarge,
    GatewayError,
    GenerationFailed,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    UpstreamFailed,
)
from gateway.generation import Finished, FinishReason, GenerationRequest, TokenChance, TokenEvent

OVERLOADED_RETRY_S = 1.0
UNKNOWN_PROMPT_TOKENS = 0
"""Stands for the prompt's length where the gateway ended the answer: TGI tells it in its own last event only."""

# ---- the events of an answer ----------------------------------------------------------------------------------------

_REASONS: Mapping[str, FinishReason] = {"length": "length", "eos_token": "eos", "stop_sequence": "stop"}


class StreamDecoder:
    """Reads the events of an answer. Lines are cut as bytes, so characters never are.

    It ends the answer itself at a stop text and at the length that was asked for: TGI works in blocks of 1,024 tokens
    and finishes a block that it has begun.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self._stop = StopTexts(request.stop)
        self._limit = request.max_new_tokens
        self._top = request.top_tokens
        self._unread = b""
        self._tokens = 0
        self._finished = False

    def feed(self, chunk: bytes) -> list[TokenEvent | Finished]:
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        return [event for line in lines for event in self._line(line.strip())]

    def _line(self, line: bytes) -> Iterator[TokenEvent | Finished]:
        field, _, value = line.partition(b":")
        if self._finished or field != b"data":
            return  # a comment, which keeps the connection alive, or an empty line
        try:
            yield from self._event(_object_in(value))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise _not_understood() from error

    def _event(self, event: dict[str, Any]) -> Iterator[TokenEvent | Finished]:
        if "error" in event:
            raise self._failure(event)
        token = event["token"]
        text = self._stop.feed("" if token["special"] else token["text"])
        self._tokens += 1
        yield TokenEvent(int(token["id"]), text, _logprob(token), self._chances(event))
        if reason := self._reason(event):
            yield self._end(reason, event.get("details"))

    def _reason(self, event: dict[str, Any]) -> FinishReason | None:
        if self._stop.found:
            return "stop"
        if event.get("generated_text") is not None:
            return _REASONS[event["details"]["finish_reason"]]
        return "length" if self._tokens >= self._limit else None

    def _end(self, reason: FinishReason, details: dict[str, Any] | None) -> Finished:
        self._finished = True
        prompt_tokens = int(details["input_length"]) if details else UNKNOWN_PROMPT_TOKENS
        return Finished(reason, self._tokens, prompt_tokens, "" if self._stop.found else self._stop.rest())

    def _chances(self, event: dict[str, Any]) -> tuple[TokenChance, ...]:
        """Return the likeliest tokens: TGI sends more of them than asked for where some are equally likely."""
        found = ((token, _logprob(token)) for token in event.get("top_tokens") or ())
        chances = [_chance(token, logprob) for token, logprob in found if logprob is not None]
        return tuple(chances[: self._top])

    def _failure(self, event: dict[str, Any]) -> GatewayError:
        kind, words = _error_of(event)
        if self._tokens == 0:
            return _error(kind, words) or GenerationFailed(f"The model's server failed: {_plain(words)}.")
        return GenerationFailed(f"The model's server failed in mid-answer: {_plain(words)}.")


def _chance(token: dict[str, Any], logprob: float) -> TokenChance:
    return TokenChance(int(token["id"]), str(token["text"]), math.exp(min(logprob, 0.0)), logprob)


def _logprob(token: dict[str, Any]) -> float | None:
    """Return the logarithm, or None where TGI has none: JSON cannot express that of 0."""
    logprob = token["logprob"]
    return None if logprob is None or not math.isfinite(logprob) else float(logprob)


def _object_in(text: bytes) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise _not_understood()
    return found


def _not_understood() -> GenerationFailed:
    return GenerationFailed("The model's server sent something that is not its own protocol; see its log.")


# ---- errors ---------------------------------------------------------------------------------------------------------

_TOO_LONG = (
    re.compile(r"`inputs` must have less than (?P<most>\d+) tokens\. Given: (?P<prompt>\d+)"),
    re.compile(
        r"`inputs` tokens \+ `max_new_tokens` must be <= (?P<most>\d+)\. "
        r"Given: (?P<prompt>\d+) `inputs` tokens and (?P<new>\d+) `max_new_tokens`"
    ),
)
_RULE = re.compile(r"Input validation error: (`[a-z_]+`[^\n]{0,300})")
"""A rule about a parameter. Other words of TGI's may quote the request, which holds the prompt."""


def refusal(status: int, body: bytes) -> GatewayError:
    """Return the error that an answer other than 200 stands for."""
    kind, words = _error_in(body)
    if known := _error(kind, words):
        return known
    if status in (401, 403):
        return key_refused(status)
    if status == 413:
        return BodyTooLarge(
            "The request is longer than the model's server takes; raise args: {payload-limit: ...} in models.yaml."
        )
    if status == 422:
        return InvalidRequest("The model's server cannot read the request: it may be of another version.")
    if status == 429:
        return _overloaded()
    if status == 424:
        return GenerationFailed(f"The model's server failed: {_plain(words)}.")
    return UpstreamFailed(f"The model's server answered with status {status}: {_plain(words)}.")


def _error(kind: str, words: str) -> GatewayError | None:
    """Return what TGI's kind of error stands for, if it is known."""
    if kind == "validation":
        return _invalid(words)
    if kind == "overloaded":
        return _overloaded()
    if kind in ("generation", "incomplete_generation", "incomplete_generation_stream"):
        return GenerationFailed(f"The model's server failed: {_plain(words)}.")
    return None


def _invalid(words: str) -> GatewayError:
    for pattern in _TOO_LONG:
        if found := pattern.search(words):
            return _too_long({name: int(number) for name, number in found.groupdict().items()})
    rule = _RULE.search(words)
    return InvalidRequest(f"The model's server refuses the request: {rule[1].rstrip('. ') if rule else 'see its log'}.")


def _too_long(tokens: Mapping[str, int]) -> PromptTooLong:
    prompt, most, new = tokens["prompt"], tokens["most"], tokens.get("new")
    if new is None:
        limit = f"and this model takes {most} in a prompt. Shorten the prompt, or raise max-input-tokens in `args` or"
    else:
        limit = (
            f"and with {new} new ones they are more than the {most} that this model takes per request, prompt and "
            "answer together. Shorten the prompt, lower max_new_tokens, or raise"
        )
    words = f"The prompt has {prompt} tokens, {limit} context_tokens in models.yaml."
    return PromptTooLong(words, prompt_tokens=prompt, context_tokens=most)


def _overloaded() -> QueueFull:
    return QueueFull(
        "The model's server works on as many requests as it takes (max-concurrent-requests). Try again in a moment.",
        retry_after_s=OVERLOADED_RETRY_S,
    )


def _error_in(body: bytes) -> tuple[str, str]:
    """Return the kind and the words of an error; both are empty if the body is not TGI's JSON."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return "", ""
    return _error_of(found) if isinstance(found, dict) else ("", "")


def _error_of(error: dict[str, Any]) -> tuple[str, str]:
    words = error.get("error")
    words = words.get("message") if isinstance(words, dict) else words
    return str(error.get("error_type") or ""), str(words or "")


def _plain(words: str) -> str:
    """Return the first line of the server's words, which tell of the server and not of the request."""
    first = words.strip().partition("\n")[0].removeprefix("Request failed during generation: ")
    return first[:300].rstrip(". ") or "no reason given"
