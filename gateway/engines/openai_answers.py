"""What servers with OpenAI's API answer: the chunks of completions and chats, and errors in many shapes. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from typing import Any, NamedTuple

from gateway.engines.chat import UNKNOWN_PROMPT_TOKENS, ChatDecoder, Piece, reported, with_text
from gateway.engines.keys import key_refused
from gateway.engines.lines import EventLines
from gateway.engines.protocol import NOT_THE_PROTOCOL, count_in, json_in, number_in
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
from gateway.generation import Finished, FinishReason, GenerationRequest, TokenEvent

BUSY_RETRY_S = 5.0
"""What a caller is told to wait where the server does not say."""

# ---- the chunks of an answer ----------------------------------------------------------------------------------------

_FAILED = ("abort", "error")
_OVER: Mapping[str, FinishReason] = {
    "length": "length",
    "model_length": "length",
    "stop_sequence": "stop",
    "eos_token": "eos",
    "eos": "eos",
}


def chat_decoder(request: GenerationRequest) -> ChatDecoder:
    """Return what reads the answer to a chat. One that was told of stop texts means one of them by `stop`."""
    return ChatDecoder(request, failure, stop_means="stop" if _tells_stops(request) else "eos")


def _tells_stops(request: GenerationRequest) -> bool:
    """Say whether the server was told of stop texts (`openai_calls`)."""
    return any(request.stop) and not request.keep_stop


class CompletionDecoder:
    """Reads the chunks of an answer to a prompt.

    A chunk holds any number of tokens: one each where log-probabilities tell them apart, else it counts as one, until
    the server tells how many there were. It may end at a stop text without saying so: an answer that was asked to end
    at one, and ended by itself, is taken to have met it, unless the server knows better. If the prompt's length must
    be known, it reads on in silence after a stop text until the server tells.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self._lines, self._stop = EventLines(), StopTexts(request.stop)
        self._is_plain = not (any(request.stop) or request.top_tokens)
        self._tokens = 0
        self._usage: Mapping[str, Any] = {}
        self._reason: FinishReason | None = None
        self._stopped_by = ""
        self._finished = False

    def feed(self, chunk: bytes) -> list[TokenEvent | Finished]:
        events: list[TokenEvent | Finished] = []
        try:
            for value in self._lines.data(chunk):
                if not self._finished:
                    said = value.strip()
                    events += [self._end()] if said == b"[DONE]" else self._chunk(json_in(said))
        except NOT_THE_PROTOCOL as error:
            raise _not_understood() from error
        return events

    def _chunk(self, chunk: dict[str, Any]) -> Sequence[TokenEvent | Finished]:
        """Return the events of a chunk. Little is called for one like most: a text and nothing else."""
        if chunk.get("error") or "choices" not in chunk or chunk.get("object") == "error":
            raise failure(chunk, self._tokens > 0)
        self._usage = chunk.get("usage") or self._usage
        choices = chunk["choices"][:1]
        if self._is_plain and self._reason is None and choices and (text := _only_text(choices[0])):
            self._tokens += 1
            return [TokenEvent(None, text)]
        events = [event for choice in choices for event in self._choice(choice)]
        return [*events, self._end()] if self._is_over() else events

    def _is_over(self) -> bool:
        if self._stop.found:
            return not self._request.count_prompt or bool(self._usage.get("prompt_tokens"))
        return bool(self._reason and self._usage)

    def _choice(self, choice: dict[str, Any]) -> Iterator[TokenEvent]:
        for piece in _pieces(choice):
            if not self._stop.found:
                yield self._token(piece)
        if not self._stop.found and (reason := choice.get("finish_reason")):
            self._reason = self._reason_of(str(reason), choice)

    def _token(self, piece: Piece) -> TokenEvent:
        if self._request.top_tokens and not piece.top:
            raise Unsupported("This model's server reports no top_tokens, though it was asked to. Leave them out.")
        self._tokens += 1
        top = piece.top[: self._request.top_tokens]
        return TokenEvent(piece.id, self._stop.feed(piece.text), piece.logprob, top, piece.token)

    def _reason_of(self, said: str, choice: Mapping[str, Any]) -> FinishReason:
        """Return why the answer ended. vLLM and SGLang also say which stop text it was, if it was one."""
        if said in _FAILED:
            raise GenerationFailed(f"The model's server gave the answer up ({said}).")
        if said in _OVER:
            return _OVER[said]
        for key in ("stop_reason", "matched_stop"):
            if key in choice:
                self._stopped_by = choice[key] if isinstance(choice[key], str) else ""
                return "stop" if self._stopped_by else "eos"
        return "stop" if _tells_stops(self._request) and said == "stop" else "eos"

    def _end(self) -> Finished:
        reason = "stop" if self._stop.found else self._reason
        if reason is None:
            raise _not_understood()
        self._finished = True
        counted = 0 if self._stop.found else count_in(self._usage.get("completion_tokens"))
        prompt_tokens = count_in(self._usage.get("prompt_tokens")) or UNKNOWN_PROMPT_TOKENS
        rest = "" if self._stop.found else self._stop.rest()
        return Finished(reason, counted or self._tokens, prompt_tokens, rest, self._stop.matched or self._stopped_by)


def failure(chunk: Mapping[str, Any], begun: bool) -> GatewayError:
    """Return the error that a chunk in an answer stands for. `begun`: there were tokens before."""
    error = _error_of(chunk) or _Error()
    status = error.facts.get("http_status_code") or error.facts.get("code")
    if not begun and isinstance(status, int) and status >= 400:  # TGI and vLLM: 200 was said too soon
        return _refusal(status, error)
    if not begun and (known := _known(error)):
        return known
    return GenerationFailed(f"The model's server failed in mid-answer: {error.words}.")


def _only_text(choice: Mapping[str, Any]) -> str | None:
    """Return the text of a choice that tells nothing else; None if it does, or is not the protocol."""
    text = choice.get("text")
    return text if type(text) is str and not (choice.get("logprobs") or choice.get("finish_reason")) else None


def _pieces(choice: Mapping[str, Any]) -> list[Piece]:
    text, said = choice.get("text") or "", choice.get("logprobs") or {}
    tokens = said.get("content") or (_as_in_chats(said) if said.get("tokens") else ())  # llama.cpp: as in a chat
    return with_text([reported(token) for token in tokens], text) or ([Piece(text)] if text else [])


def _as_in_chats(said: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the tokens as a chat reports them, each with its likeliest; prompts have a list of each kind."""
    lists = said["tokens"], said.get("token_logprobs") or (), said.get("top_logprobs") or ()
    for token, logprob, top in islice(zip_longest(*lists), len(said["tokens"])):
        likeliest = [{"token": text, "logprob": each} for text, each in (top or {}).items()]
        yield {"token": token, "logprob": logprob, "top_logprobs": likeliest}


def _not_understood() -> GenerationFailed:
    return GenerationFailed("The model's server sent something that is not OpenAI's protocol; see its log.")


# ---- errors ---------------------------------------------------------------------------------------------------------


class _Error(NamedTuple):
    """What a server says of a failure. `words` tell of the server and not of the request, as far as can be told."""

    code: str = ""
    words: str = "no reason given"
    facts: Mapping[str, Any] = {}


_LENGTH_CODES = {"context_length_exceeded", "exceed_context_size_error", "PROMPT_TOO_LONG"}
"""OpenAI's, llama.cpp's, and that of a gateway like this one."""
_QUOTA_CODES = {"insufficient_quota", "billing_hard_limit_reached"}
_TOO_LONG = re.compile(r"(?i)context (?:length|size|window)|longer than the (?:model|maximum)|maximum allowed length")
_MOST = re.compile(
    r"(?i)(?:context (?:length|size|window)|allowed length) ?(?:is|of|\()? ?(?P<tokens>\d+)|must be <= (?P<also>\d+)"
)
_PROMPT = re.compile(
    r"(?i)(?P<tokens>\d+) (?:tokens )?(?:in (?:your|the) (?:prompt|messages?)|(?:tokens )?from the input|input tokens|"
    r"`inputs` tokens)|(?:input(?: length)?|request) \((?P<also>\d+)|prompt has (?P<third>\d+)"
)
"""How servers put it: OpenAI, vLLM, SGLang, TGI, llama.cpp."""


def refusal(status: int, body: bytes) -> GatewayError:
    """Return the error that an answer other than 200 stands for."""
    return _refusal(status, _error_in(body))


def _refusal(status: int, error: _Error) -> GatewayError:
    if status in (401, 403):
        return key_refused(status)
    if 300 <= status < 400:
        return moved(status)
    if known := _known(error):
        return known
    if status == 404:
        return _nothing_there(error)
    if status == 413:
        return BodyTooLarge("The request is longer than the model's server takes; shorten the prompt.")
    if status in (400, 422):
        return InvalidRequest(f"The model's server refuses the request: {error.words}.", **_param(error))
    if status == 402:
        return _no_quota()
    if status == 429:
        return _too_many()
    retry_after_s = BUSY_RETRY_S if status == 503 else None
    words = f"The model's server answered with status {status}: {error.words}."
    return UpstreamFailed(words, retry_after_s=retry_after_s)


def moved(status: int) -> UpstreamFailed:
    """Return what a redirection means. It is not followed: the key would go where the catalog does not say."""
    return UpstreamFailed(
        f"The model's server is at another address (status {status}). Correct `url` of this model in models.yaml."
    )


def _known(error: _Error) -> GatewayError | None:
    """Return what the error stands for, if its code or words tell."""
    if "image input is not supported" in error.words:  # llama.cpp, with status 500
        return Unsupported("This model takes no images. Leave them out.")
    if error.code in _LENGTH_CODES or _TOO_LONG.search(error.words) or "`max_new_tokens` must be <=" in error.words:
        return _too_long(error)
    return _no_quota() if error.code in _QUOTA_CODES else None


def _too_long(error: _Error) -> PromptTooLong:
    most = number_in(error.facts.get("n_ctx")) or _number(_MOST, error.words)
    prompt = number_in(error.facts.get("n_prompt_tokens")) or _number(_PROMPT, error.words)
    if most is None or prompt is None:
        words = f"The prompt is too long for this model: {error.words}. Shorten it, or ask for fewer new tokens."
    else:
        words = (
            f"The prompt has {prompt} tokens, and this model takes {most} per request, prompt and answer together. "
            "Shorten the prompt, or ask for fewer new tokens."
        )
    return PromptTooLong(words, prompt_tokens=prompt, context_tokens=most)


def _number(pattern: re.Pattern[str], words: str) -> int | None:
    found = pattern.search(words)
    return next((int(group) for group in found.groups() if group), None) if found else None


_FIELD = re.compile(r"[a-z_]{1,40}(?:\.[a-z_]{1,40}|\.\d{1,5}|\[\d{1,5}\]){0,9}")


def _param(error: _Error) -> dict[str, Any]:
    """Return the field that the server finds wrong, if what it says is the name of one and nothing else."""
    said = error.facts.get("param")
    return {"param": said} if isinstance(said, str) and _FIELD.fullmatch(said) else {}


def _nothing_there(error: _Error) -> UpstreamFailed:
    return UpstreamFailed(
        f"The model's server has no such model, or nothing at this address: {error.words}. Correct `url`, or name the "
        "model as its server does with args: {model: ...} in models.yaml."
    )


def _no_quota() -> UpstreamFailed:
    return UpstreamFailed("The model's provider refuses: the account has no credit or quota left.")


def _too_many() -> QueueFull:
    return QueueFull(
        "The model's server takes no more requests for now (its rate limit, or all its slots are busy). Try again "
        "later, or lower max_concurrency of this model in models.yaml.",
        retry_after_s=BUSY_RETRY_S,
    )


def _error_in(body: bytes) -> _Error:
    try:
        found = json_in(body)
        found = found[0] if isinstance(found, list) and found else found  # Google's
        return (_error_of(found) if isinstance(found, dict) else None) or _Error()
    except NOT_THE_PROTOCOL:
        return _Error()


def _error_of(found: Mapping[str, Any]) -> _Error | None:
    """Return the error that an object stands for, if it is one: OpenAI's, vLLM's older ones, TGI's and FastAPI's."""
    error = found.get("error") or (found if found.get("object") == "error" or "choices" not in found else None)
    if error is None:
        return None
    if not isinstance(error, dict):
        return _Error(str(found.get("error_type") or ""), _plain(error))
    words = error.get("message") or error.get("detail")
    code = next((str(error[key]) for key in ("code", "type") if error.get(key) in _LENGTH_CODES | _QUOTA_CODES), "")
    return _Error(code, _plain(words), error)


_QUOTES = re.compile(r"'input':|\"input\":|; last read|\binput_value=")
"""Where words begin to quote the request, which holds the prompt."""


def _plain(words: object) -> str:
    """Return the first line of the server's words, as far as they do not quote the request."""
    first = _QUOTES.split(str(words or "").strip().partition("\n")[0])[0]
    return first[:300].rstrip("., {[(") or "no reason given"
