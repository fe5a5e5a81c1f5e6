"""What llama.cpp's server answers: the events of `POST /completion`, the tokens of a prompt, and errors. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gateway.engines.chat import reported
from gateway.engines.lines import EventLines
from gateway.engines.protocol import NOT_THE_PROTOCOL, count_in, json_in, number_in, object_in, text_in, unseen
from gateway.engines.stops import StopTexts
from gateway.errors import (
    GatewayError,
    GenerationFailed,
    InvalidRequest,
    ModelNotLoaded,
    PromptTooLong,
    UpstreamFailed,
)
from gateway.generation import Finished, FinishReason, PromptToken, TokenEvent

LOADING_RETRY_S = 2.0
NO_TEMPLATE = "it has none"
"""What `embedded_server.py` has the template say that stands for a missing one."""

# ---- the events of an answer ----------------------------------------------------------------------------------------

_REASONS: Mapping[str, FinishReason] = {"limit": "length", "word": "stop", "eos": "eos"}


class CompletionDecoder:
    """Reads the server-sent events of POST /completion."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._lines, self._stop = EventLines(), StopTexts(stop)
        self._tokens = 0
        self._finished = False

    def feed(self, chunk: bytes) -> list[TokenEvent | Finished]:
        return [event for field, value in self._lines.feed(chunk) for event in self._line(field, value)]

    def _line(self, field: bytes, value: bytes) -> Iterator[TokenEvent | Finished]:
        if self._finished or field not in (b"data", b"error"):
            return
        try:
            frame = object_in(value)
            if field == b"error" or "error" in frame:
                raise failure(frame)
            yield from self._frame(frame)
        except NOT_THE_PROTOCOL as error:
            raise _not_understood() from error

    def _frame(self, frame: dict[str, Any]) -> Iterator[TokenEvent | Finished]:
        counted = count_in(frame["tokens_predicted"])
        if frame["stop"]:
            yield from self._catch_up(counted)
            text = self._stop.feed(frame["content"]) + self._stop.rest()
            yield self._end("stop" if self._stop.found else _REASONS[frame["stop_type"]], frame, text)
            return
        yield from self._catch_up(counted - 1)
        self._tokens += 1
        yield _token(frame, self._stop.feed(frame["content"]))
        if self._stop.found:
            yield self._end("stop", frame, "")

    def _catch_up(self, counted: int) -> Iterator[TokenEvent]:
        """Yield what stands for the tokens that were counted and not sent."""
        yield from unseen(counted - self._tokens)
        self._tokens = max(self._tokens, counted)

    def _end(self, reason: FinishReason, frame: dict[str, Any], text: str) -> Finished:
        self._finished = True
        counted, prompt_tokens = count_in(frame["tokens_predicted"]), count_in(frame["tokens_evaluated"])
        return Finished(reason, counted, prompt_tokens, text, self._stop.matched)


def _token(frame: dict[str, Any], text: str) -> TokenEvent:
    ids, own = frame["tokens"], text_in(frame["content"])
    probabilities = frame.get("completion_probabilities")
    if not probabilities:
        return TokenEvent(int(ids[-1]) if ids else None, text, token=own)
    token = reported(probabilities[0])
    return TokenEvent(token.id, text, token.logprob, token.top, own)


def _not_understood() -> GenerationFailed:
    return GenerationFailed("The model's server sent something that is not its own protocol; see its log.")


# ---- errors ---------------------------------------------------------------------------------------------------------


def failure(frame: dict[str, Any]) -> GenerationFailed:
    """Return the error that an event in place of a token stands for."""
    return GenerationFailed(f"The model's server failed in mid-answer: {_plain_words(_error_of(frame))}.")


def refusal(status: int, body: bytes) -> GatewayError:
    """Return the error that an answer other than 200 stands for."""
    error = _error_in(body)
    words = _plain_words(error)
    if error.get("type") == "exceed_context_size_error":
        return _too_long(error)
    if found := _TEMPLATE.search(error.get("message", "")):
        return _no_chat(found["words"])
    if "tool call arguments" in words:  # status 500
        return InvalidRequest("The arguments of a tool call in the messages are not JSON. Correct or leave them out.")
    if status == 400:
        return InvalidRequest(f"The model's server refuses the request: {words}.")
    if status == 503:
        return ModelNotLoaded("The model is still loading.", retry_after_s=LOADING_RETRY_S)
    return UpstreamFailed(f"The model's server answered with status {status}: {words}.")


_TEMPLATE = re.compile(r"Error: (?:Jinja Exception: )?(?P<words>[^\n]{0,300})\s*\Z")
"""The last line that llama.cpp says where a chat template fails. Those before it quote the template."""


def _no_chat(words: str) -> InvalidRequest:
    if words == NO_TEMPLATE:
        return InvalidRequest(
            "This model has no chat template, so it cannot chat. Send a prompt instead of messages, or give it a "
            "template with chat_template in models.yaml."
        )
    return InvalidRequest(
        f"The model's chat template does not take this conversation: {words.rstrip('. ')}. Change the messages, or "
        "chat_template in models.yaml."
    )


def _error_in(body: bytes) -> dict[str, Any]:
    try:
        return _error_of(json_in(body))
    except NOT_THE_PROTOCOL:
        return {}


def _error_of(frame: Any) -> dict[str, Any]:
    error = frame.get("error", frame) if isinstance(frame, dict) else None
    error = error if isinstance(error, dict) else {"message": error}
    return {**error, "message": str(error.get("message") or "")}


_AROUND = re.compile(
    r"\[json\.exception\.[^]]*\] |Unable to generate parser for this template\. Automatic parser generation failed: "
)
"""Words that tell of llama.cpp's inside, and mislead where a schema is at fault."""


def _plain_words(error: dict[str, Any]) -> str:
    """Return the server's words without what they may quote of the request, which holds the prompt."""
    words = _AROUND.sub("", error.get("message") or "no reason given")
    return words.partition("; last read")[0][:300].rstrip(". ")


def _too_long(error: dict[str, Any]) -> PromptTooLong:
    prompt_tokens, context_tokens = number_in(error.get("n_prompt_tokens")), number_in(error.get("n_ctx"))
    if prompt_tokens is None or context_tokens is None:
        how_long = "The prompt is too long for this model."
    else:
        how_long = (
            f"The prompt has {prompt_tokens} tokens, and this model takes {context_tokens} per request, prompt and "
            "answer together."
        )
    words = f"{how_long} Shorten the prompt, or raise context_tokens in models.yaml."
    return PromptTooLong(words, prompt_tokens=prompt_tokens, context_tokens=context_tokens)


# ---- tokens of a prompt ---------------------------------------------------------------------------------------------


def prompt_tokens(prompt: str, body: bytes) -> tuple[PromptToken, ...]:
    """Return the tokens that the answer to POST /tokenize tells of, and where they stand in the prompt.

    Raises:
        UpstreamFailed: it is not the server's own protocol.
    """
    try:
        told = [(int(token["id"]), _bytes_of(token["piece"])) for token in json_in(body)["tokens"]]
    except NOT_THE_PROTOCOL as error:
        raise UpstreamFailed("The model's server sent something that is not its own protocol; see its log.") from error
    return tuple(_placed(told, prompt.encode(errors="surrogatepass")))


def _bytes_of(piece: Any) -> bytes:
    """Return a token's bytes: llama.cpp writes a part of a character as a list of numbers."""
    return piece.encode() if isinstance(piece, str) else bytes([*piece])


def _placed(told: Iterable[tuple[int, bytes]], prompt: bytes) -> Iterator[PromptToken]:
    """Yield each token with its place. Some are not in the prompt: its begin, or a space that the model wants first."""
    at = 0
    for id_, piece in told:
        own = next((text for text in (piece, piece.removeprefix(b" ")) if text and prompt.startswith(text, at)), b"")
        yield PromptToken(id_, piece.decode(errors="replace"), at, at + len(own))
        at += len(own)
