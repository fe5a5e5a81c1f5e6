"""What TGI answers: the events of its streams, and its errors, which it sends as events too. Pure.

A stream's status is always 200: that a prompt is too long or the server overloaded is an event in place of the first
token. So an event and a refused call are read by the same rules.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from gateway.engines.base import Decoder
from gateway.engines.chat import ChatDecoder, not_understood
from gateway.engines.keys import key_refused
from gateway.engines.lines import EventLines
from gateway.engines.protocol import NOT_THE_PROTOCOL, count_in, each_json_in, json_in, object_in, text_in
from gateway.engines.stops import StopTexts
from gateway.errors import (
    BodyTooLarge,
    GatewayError,
    GenerationFailed,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    Unsupported,
    UpstreamFailed,
)
from gateway.generation import Finished, FinishReason, GenerationRequest, PromptToken, TokenChance, TokenEvent

OVERLOADED_RETRY_S = 1.0
UNKNOWN_PROMPT_TOKENS = 0
"""Stands for the prompt's length where the gateway ended the answer: TGI tells it in its own last event only."""

# ---- the events of an answer ----------------------------------------------------------------------------------------

_REASONS: Mapping[str, FinishReason] = {"length": "length", "eos_token": "eos", "stop_sequence": "stop"}
_new = tuple.__new__
"""Makes a `TokenEvent` of all of its fields, in a third of its own time."""


class StreamDecoder:
    """Reads the events of an answer to a prompt.

    It ends the answer itself at a stop text and at the length that was asked for: TGI works in blocks of 1,024 tokens
    and finishes a block that it has begun.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self._stop = StopTexts(request.stop)
        self._stops = any(request.stop)
        self._limit = math.inf if request.max_new_tokens is None else request.max_new_tokens
        self._top = request.top_tokens
        self._lines = EventLines()
        self._tokens = 0
        self._finished = False

    def feed(self, chunk: bytes) -> list[TokenEvent | Finished]:
        events: list[TokenEvent | Finished] = []
        try:
            values = self._lines.data(chunk)
            if not self._finished:
                self._read(each_json_in(values), events)
        except NOT_THE_PROTOCOL as error:
            raise _not_understood() from error
        return events

    def _read(self, found: Iterable[Any], events: list[TokenEvent | Finished]) -> None:
        """Add what these events stand for, up to the end of the answer. Nothing is called for a token like most."""
        for event in found:
            if "error" in event:
                raise self._failure(event)
            token = event["token"]
            id, text, logprob = token["id"], token["text"], token["logprob"]  # noqa: A001 - what it is
            if (
                token["special"] is False
                and type(id) is int
                and type(text) is str
                and type(logprob) is float
                and -math.inf < logprob < math.inf
                and not (self._stops or event.get("top_tokens"))
            ):
                events.append(_new(TokenEvent, (id, text, logprob, (), text, False, ())))
            else:
                events.append(self._token(token, event.get("top_tokens")))
            self._tokens += 1
            if self._tokens >= self._limit or event.get("generated_text") is not None or self._stop.found:
                events.append(self._end(self._reason(event), event.get("details")))
                return

    def _token(self, token: dict[str, Any], likeliest: Any) -> TokenEvent:
        own, special = text_in(token["text"]), bool(token["special"])
        text = self._stop.feed("" if special else own)
        chances = self._chances(likeliest) if likeliest else ()
        return TokenEvent(int(token["id"]), text, _logprob(token), chances, own, special)

    def _reason(self, event: dict[str, Any]) -> FinishReason:
        if self._stop.found:
            return "stop"
        if event.get("generated_text") is not None:
            return _REASONS[event["details"]["finish_reason"]]
        return "length"

    def _end(self, reason: FinishReason, details: dict[str, Any] | None) -> Finished:
        self._finished = True
        prompt_tokens = count_in(details["input_length"]) if details else UNKNOWN_PROMPT_TOKENS
        rest = "" if self._stop.found else self._stop.rest()
        return Finished(reason, self._tokens, prompt_tokens, rest, self._stop.matched)

    def _chances(self, tokens: Any) -> tuple[TokenChance, ...]:
        """Return the likeliest tokens: TGI sends more of them than asked for where some are equally likely."""
        found = ((token, _logprob(token)) for token in tokens)
        chances = [_chance(token, logprob) for token, logprob in found if logprob is not None]
        return tuple(chances[: self._top])

    def _failure(self, event: dict[str, Any]) -> GatewayError:
        return _failure(*_error_of(event), begun=self._tokens > 0)


def _chance(token: dict[str, Any], logprob: float) -> TokenChance:
    return TokenChance(int(token["id"]), text_in(token["text"]), math.exp(min(logprob, 0.0)), logprob)


def _logprob(token: dict[str, Any]) -> float | None:
    """Return the logarithm, or None where TGI has none: JSON cannot express that of 0."""
    logprob = token["logprob"]
    return None if logprob is None or not math.isfinite(logprob) else float(logprob)


def _not_understood() -> GenerationFailed:
    return GenerationFailed("The model's server sent something that is not its own protocol; see its log.")


# ---- the chunks of a chat -------------------------------------------------------------------------------------------


def chat_decoder(request: GenerationRequest) -> Decoder:
    """Return what reads the answer to a chat.

    It does not read on after a stop text to learn the prompt's length: TGI would go on to the end of its answer.
    """
    chat = ChatDecoder(replace(request, count_prompt=False), _chat_failure, chunk_is_token=True)
    return ToolCallMender(chat, request.max_new_tokens) if request.calls_tools else chat


class ToolCallMender:
    """Mends the chunks in which TGI tells of a call, which it cuts out of a text of its own, before `chat` reads them.

    - TGI begins the arguments with `{` in place of the token that ends the tool's name. If the comma behind the name is
      a token of its own, it stays in; if that token ends the text as well, the arguments are never closed.
    - It tells nothing of the tokens after the call, so the reason of the end is lost.
    """

    def __init__(self, chat: ChatDecoder, max_new_tokens: int | None) -> None:
        self._chat = chat
        self._limit = max_new_tokens
        self._lines = EventLines()
        self._arguments = ""
        self._has_reason = False

    def feed(self, chunk: bytes) -> list[TokenEvent | Finished]:
        lines = (b"%b: %b\n" % (field, self._mended(value)) for field, value in self._lines.feed(chunk))
        return [event for line in lines for event in self._chat.feed(line)]

    def _mended(self, value: bytes) -> bytes:
        """Return the chunk as it should be; as it is if it is none, which `chat` has words for."""
        try:
            chunk = object_in(value)
            self._mend(chunk)
            return json.dumps(chunk).encode()
        except NOT_THE_PROTOCOL:
            return value

    def _mend(self, chunk: dict[str, Any]) -> None:
        choices = chunk.get("choices")
        if not choices and chunk.get("usage") and not self._has_reason:
            chunk["choices"] = choices = [{"delta": {}, "finish_reason": self._reason(chunk["usage"])}]
        for choice in (choices or ())[:1]:
            self._mend_calls(choice["delta"].get("tool_calls") or ())
            reason = choice.get("finish_reason")
            self._has_reason |= bool(reason)
            if reason == "stop" and self._is_open():
                function = {"name": None, "arguments": "}"}
                choice["delta"]["tool_calls"] = [{"index": 0, "id": "0", "type": "function", "function": function}]

    def _mend_calls(self, calls: Any) -> None:
        for function in (call["function"] for call in calls):
            more = str(function["arguments"])
            if self._is_open() and more.lstrip().startswith(","):
                more = more.lstrip()[1:]
            self._arguments += more
            function["arguments"] = more

    def _is_open(self) -> bool:
        """Say whether nothing but `{` was told of the arguments."""
        return self._arguments.strip() == "{"

    def _reason(self, usage: Mapping[str, Any]) -> str:
        """Return the reason that TGI does not tell: a call that is not whole was cut off, as one that is not begun."""
        if self._arguments:
            return "stop" if self._is_open() or _is_json(self._arguments) else "length"
        return "length" if self._limit is not None and usage["completion_tokens"] >= self._limit else "stop"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _chat_failure(chunk: dict[str, Any], begun: bool) -> GatewayError:
    if not chunk.get("error"):
        return not_understood()
    kind, words = _error_of(chunk)
    return _failure(kind or _kind_of(words), words, begun=begun)


_KINDS = {
    "Model is overloaded": "overloaded",
    "Input validation error": "validation",
    "Template error": "template_error",
    "Tool error": "tool_error",
}


def _kind_of(words: str) -> str:
    """Return the kind of an error by its words: in the stream of a chat TGI tells it no other way."""
    return next((kind for start, kind in _KINDS.items() if words.startswith(start)), "")


# ---- tokens of a prompt ---------------------------------------------------------------------------------------------


def prompt_tokens(request: GenerationRequest, body: bytes) -> tuple[PromptToken, ...]:
    """Return the tokens of the prompt; of the conversation as the chat template wrote it."""
    try:
        found = json_in(body)
        found = found if request.chat is None else found["tokenize_response"]
        return tuple(_prompt_token(token) for token in found)
    except NOT_THE_PROTOCOL as error:
        raise UpstreamFailed("The model's server did not tell the prompt's tokens; see its log.") from error


def _prompt_token(token: Mapping[str, Any]) -> PromptToken:
    return PromptToken(int(token["id"]), text_in(token["text"]), int(token["start"]), int(token["stop"]))


# ---- errors ---------------------------------------------------------------------------------------------------------

_TOO_LONG = (
    re.compile(r"`inputs` must have less than (?P<most>\d{1,18}) tokens\. Given: (?P<prompt>\d{1,18})"),
    re.compile(
        r"`inputs` tokens \+ `max_new_tokens` must be <= (?P<most>\d{1,18})\. "
        r"Given: (?P<prompt>\d{1,18}) `inputs` tokens and (?P<new>\d{1,18}) `max_new_tokens`"
    ),
)
_RULE = re.compile(r"Input validation error: (`[a-z_]+`[^\n]{0,300})")
"""A rule about a parameter. Other words of TGI's may quote the request, which holds the prompt."""
_BAD_GRAMMAR = ("grammar is not valid", "cannot compile regex from schema")


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


def _failure(kind: str, words: str, *, begun: bool) -> GatewayError:
    """Return what an error in a stream stands for: before the first token, or in mid-answer."""
    if begun:
        return GenerationFailed(f"The model's server failed in mid-answer: {_plain(words)}.")
    return _error(kind, words) or GenerationFailed(f"The model's server failed: {_plain(words)}.")


def _error(kind: str, words: str) -> GatewayError | None:
    """Return what TGI's kind of error stands for, if it is known."""
    if kind == "validation":
        return _invalid(words)
    if kind == "template_error":
        return _no_template(words)
    if kind == "tool_error":
        return InvalidRequest(
            "The model's server cannot use these tools: name one of them in tool_choice, or none, and leave out "
            "response_format."
        )
    if kind == "overloaded":
        return _overloaded()
    if kind in ("generation", "incomplete_generation", "incomplete_generation_stream"):
        return GenerationFailed(f"The model's server failed: {_plain(words)}.")
    return None


def _invalid(words: str) -> GatewayError:
    for pattern in _TOO_LONG:
        if found := pattern.search(words):
            return _too_long({name: int(number) for name, number in found.groupdict().items()})
    if "grammar is not supported" in words:
        return Unsupported(
            "This model's server runs without tools and grammars (disable-grammar-support). Leave out tools and "
            "response_format."
        )
    if any(start in words for start in _BAD_GRAMMAR):
        return InvalidRequest(
            "The model's server cannot keep to this JSON schema or regular expression, or make a grammar of these "
            "tools. Make it simpler: no recursion, and plain types, enums, arrays and objects only."
        )
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


def _no_template(words: str) -> InvalidRequest:
    if "template not found" in words.lower():
        return InvalidRequest(
            "This model has no chat template. Send a prompt in place of messages, or give the template with args: "
            "{tokenizer-config-path: ...} in models.yaml."
        )
    said = _plain(words.removeprefix("Template error: "))
    return InvalidRequest(
        f"This model's chat template does not take this conversation: {said}. Change the roles or their order, or send "
        "a prompt in place of messages."
    )


def _overloaded() -> QueueFull:
    return QueueFull(
        "The model's server works on as many requests as it takes (max-concurrent-requests). Try again in a moment.",
        retry_after_s=OVERLOADED_RETRY_S,
    )


def _error_in(body: bytes) -> tuple[str, str]:
    """Return the kind and the words of an error; both are empty if the body is not TGI's JSON."""
    try:
        return _error_of(object_in(body))
    except NOT_THE_PROTOCOL:
        return "", ""


def _error_of(error: dict[str, Any]) -> tuple[str, str]:
    words = error.get("error")
    words = words.get("message") if isinstance(words, dict) else words
    return str(error.get("error_type") or ""), str(words or "")


def _plain(words: str) -> str:
    """Return the first line of the server's words, which tell of the server and not of the request."""
    first = words.strip().partition("\n")[0].removeprefix("Request failed during generation: ")
    return first[:300].rstrip(". ") or "no reason given"
