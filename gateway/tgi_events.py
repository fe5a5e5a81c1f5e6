"""A generation as TGI's server-sent events (router/src/server.rs), which two dialects write. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from json.encoder import encode_basestring
from math import isfinite
from typing import Any, NamedTuple

from gateway.bodies import as_json
from gateway.generation import Finished, FinishReason, GenerationRequest, TokenChance, TokenEvent

FINISH_REASONS: Mapping[FinishReason, str] = {
    "length": "length",
    "stop": "stop_sequence",
    "eos": "eos_token",
    "tool_calls": "eos_token",
}
"""TGI's words, which its clients compare."""


class Unknown(NamedTuple):
    """What stands for id and logprob of a token of which the engine tells nothing: part of a character, say."""

    id: int
    logprob: float | None


class TokenFrames:
    """One token an event, the last one with the whole text besides."""

    def __init__(self, request: GenerationRequest, unknown: Unknown) -> None:
        self._limit = request.max_new_tokens
        self._top_tokens = request.top_tokens
        self._unknown = unknown
        self._index = 0
        self._text: list[str] = []
        self._held: TokenEvent | None = None

    def event(self, event: TokenEvent, *, last: bool = False) -> bytes:
        """Return the events that can be sent now.

        TGI's last event is the last token and the whole text in one. So a token waits for the next if it may be the
        last: one that reaches the limit, or one without text, such as the model's own end.
        """
        sent = self._release() if self._held else b""
        self._index += 1
        self._text.append(event.text)
        if last or not event.text or self._index == self._limit:
            self._held = event
            return sent
        return sent + self._frame(event)

    def end(
        self, finished: Finished, details: Mapping[str, Any] | None, *, prompt: str = "", with_stop: bool = False
    ) -> bytes:
        """Return the last event; where no token was kept for it, one that stands for the model's own end.

        The whole text begins with `prompt`, and ends with the stop text that ended it if that is wanted.
        """
        if self._held is None:
            self._index += 1
        rest = rest_of(finished, with_stop=with_stop)
        last = ended(self._held or TokenEvent(None, ""), finished.reason, rest)
        text = "".join((prompt, *self._text, rest))
        return as_event({**self._head(last), "generated_text": text, "details": details})

    def _release(self) -> bytes:
        held, self._held = self._held, None
        return self._frame(held) if held else b""

    def _frame(self, event: TokenEvent) -> bytes:
        """Return the event of a token. Nearly every one is put together here, in a third of the time of JSON."""
        logprob = self._unknown.logprob if event.logprob is None else event.logprob
        if event.top or logprob is None or not isfinite(logprob):
            return as_event({**self._head(event), "generated_text": None, "details": None})
        frame = (
            f'data: {{"index":{self._index},"token":{{"id":{_known(event.id, self._unknown)},'
            f'"text":{encode_basestring(_text(event))},"logprob":{logprob!r},'
            f'"special":{"true" if event.special else "false"}}},"generated_text":null,"details":null}}\n\n'
        )
        return frame.encode(errors="replace")

    def _head(self, event: TokenEvent) -> dict[str, Any]:
        head = {"index": self._index, "token": token(event, self._unknown)}
        if event.top and self._top_tokens:
            head["top_tokens"] = [likely(chance, self._unknown) for chance in event.top]
        return head


def rest_of(finished: Finished, *, with_stop: bool) -> str:
    """Return what follows the last token's text: what was held back, and the stop text if it is wanted."""
    return finished.text + finished.stop if with_stop else finished.text


def ended(last: TokenEvent, reason: FinishReason, rest: str) -> TokenEvent:
    """Return the last token with what follows it. Without any text, it is the model's own end where there is one."""
    text = last.text + rest
    return last._replace(text=text, special=not text and (last.special or reason == "eos"))


def token(event: TokenEvent, unknown: Unknown) -> dict[str, Any]:
    """Return a token as TGI shows it. A special one has its own text, which is no part of the answer."""
    return {
        "id": _known(event.id, unknown),
        "text": _text(event),
        "logprob": unknown.logprob if event.logprob is None else event.logprob,
        "special": event.special,
    }


def _text(event: TokenEvent) -> str:
    return event.token or "" if event.special else event.text


def likely(chance: TokenChance, unknown: Unknown) -> dict[str, Any]:
    """Return one of the likeliest tokens at a position as TGI shows it."""
    return {"id": _known(chance.id, unknown), "text": chance.text, "logprob": chance.logprob, "special": False}


def _known(id: int | None, unknown: Unknown) -> int:  # noqa: A002 - what it is
    return unknown.id if id is None or id < 0 else id


def as_event(frame: Mapping[str, Any]) -> bytes:
    """Return a server-sent event of JSON."""
    return b"data: " + as_json(frame) + b"\n\n"
