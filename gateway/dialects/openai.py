"""What chats and completions under `/v1` have in common. Pure.

The source is OpenAI's reference of both. Its other fields (`user`, `metadata`, `store`, `service_tier`,
`prompt_cache_key`, `safety_identifier` and whatever is not known here) are ignored: they do not change the answer.
Those that do, and that no engine here can do, are refused as UNSUPPORTED, but for the value that changes nothing.
`top_k` and `repetition_penalty` are not OpenAI's: clients of TGI, vLLM and llama.cpp send them. So it is with what
`ForeignBody` has, but no engine can do that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from gateway.bodies import MOST_TOKENS, Body, StopTexts, as_json, is_unicode, json_text
from gateway.errors import GatewayError
from gateway.generation import Finished, FinishReason, GenerationRequest, GenerationResult, TokenEvent
from gateway.shapes import shown, tgi_stream_failure

MOST_N = 128
"""OpenAI's own bound."""
LEAST_TOP_P = 1e-6
"""Stands for a top_p of 0, which OpenAI takes: the likeliest token alone."""
SEEDS = 2**63

# ---- bodies ---------------------------------------------------------------------------------------------------------


def neutral(*values: object, words: str = "leave it out") -> AfterValidator:
    """Return what refuses a field that no engine here has, but for the values that change nothing."""

    def check(said: Any) -> Any:
        if said not in values:
            raise PydanticCustomError("unsupported", f"this gateway cannot do that; {words}")
        return said

    return AfterValidator(check)


FORM = neutral("", [], {}, words="give `response_format` instead")


def _no_bias(biases: dict[str, float]) -> dict[str, float]:
    if any(biases.values()):
        raise PydanticCustomError(
            "unsupported", "this gateway cannot change the chances of single tokens; leave it out"
        )
    return biases


class StreamOptions(Body):
    include_usage: bool = Field(False, description="Tell the usage in one more event, before [DONE]")


class Addressed(Body):
    """What every request says, whoever reads the rest of it."""

    model: Annotated[str, AfterValidator(is_unicode)] | None = Field(
        None, description="Model to use: an id, alias or hub name; default: the default model"
    )
    stream: bool = Field(False, description="Answer piece by piece, as server-sent events that end with [DONE]")


_NOT_SUPPORTED = "Not supported"


class ForeignBody(Addressed):
    """What other servers take beyond OpenAI's API and no engine here does, with the values that change nothing."""

    min_p: Annotated[Any, neutral(0)] = Field(0, description=_NOT_SUPPORTED)
    typical_p: Annotated[Any, neutral(1)] = Field(1, description=_NOT_SUPPORTED)
    min_tokens: Annotated[Any, neutral(0)] = Field(0, description=_NOT_SUPPORTED)
    ignore_eos: Annotated[Any, neutral(False)] = Field(False, description=_NOT_SUPPORTED)
    guided_json: Annotated[Any, FORM] = Field(None, description=_NOT_SUPPORTED)
    guided_regex: Annotated[Any, FORM] = Field(None, description=_NOT_SUPPORTED)
    guided_choice: Annotated[Any, FORM] = Field(None, description=_NOT_SUPPORTED)
    guided_grammar: Annotated[Any, FORM] = Field(None, description=_NOT_SUPPORTED)
    structured_outputs: Annotated[Any, FORM] = Field(None, description=_NOT_SUPPORTED)
    chat_template: Annotated[Any, neutral("")] = Field(None, description=_NOT_SUPPORTED)
    chat_template_kwargs: Annotated[Any, neutral({})] = Field(None, description=_NOT_SUPPORTED)


class SampledBody(ForeignBody):
    """The fields that chats and completions share."""

    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS, description="Most tokens to generate")
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS, description="The same as max_tokens")
    temperature: float = Field(1.0, ge=0, le=2, description="Sampling temperature; 0 is greedy")
    top_p: float = Field(1.0, ge=0, le=1, description="Nucleus sampling; 1 is off")
    top_k: int | None = Field(None, ge=-1, le=MOST_TOKENS, description="Not OpenAI's; null, 0 and -1 are off")
    repetition_penalty: float = Field(1.0, gt=0, le=100, description="Not OpenAI's; 1 is off")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="0 is off")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="0 is off")
    stop: StopTexts = Field(default=[], description="Texts that end the answer, left out of it; or one of them")
    seed: int | None = Field(
        None, ge=-SEEDS, lt=SEEDS, description="Makes sampling repeatable; choice i of n has seed + i"
    )
    n: int = Field(1, ge=1, le=MOST_N, description="How many choices to generate")
    stream_options: StreamOptions | None = Field(None, description="Only with stream")
    logit_bias: Annotated[dict[str, float], AfterValidator(_no_bias)] = Field({}, description="Not supported")

    @field_validator("max_completion_tokens")
    @classmethod
    def _says_the_same(cls, said: int | None, info: ValidationInfo) -> int | None:
        if said is not None and info.data.get("max_tokens", said) not in (said, None):
            raise PydanticCustomError("two_names", "means the same as max_tokens, and says another number")
        return said

    @field_validator("stream_options")
    @classmethod
    def _goes_with_stream(cls, said: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if said is not None and info.data.get("stream") is False:
            raise PydanticCustomError("stream_options", "goes with stream: true only")
        return said

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def tells_usage(self) -> bool:
        """Whether the answer tells how long the prompt was."""
        return self.include_usage or not self.stream


DEFAULTS: Mapping[str, Any] = {"max_new_tokens": None, "temperature": 1.0, "top_p": 1.0}
_SAID = ("temperature", "top_k", "repetition_penalty", "frequency_penalty", "presence_penalty", "stop")


def said_of(body: SampledBody) -> dict[str, Any]:
    """Return the parameters that the caller gave, by their names in models.yaml."""
    given = body.model_fields_set
    said = {name: getattr(body, name) for name in _SAID if name in given}
    if "top_k" in said:
        said["top_k"] = said["top_k"] if said["top_k"] > 0 else None
    if "top_p" in given:
        said["top_p"] = max(body.top_p, LEAST_TOP_P)
    if body.seed is not None:
        said["seed"] = body.seed % SEEDS
    if length := body.max_tokens or body.max_completion_tokens:
        said["max_new_tokens"] = length
    return said


def choices_of(request: GenerationRequest, n: int) -> list[GenerationRequest]:
    """Return a request for each of `n` choices. One of them is enough to tell how long their prompt is."""
    return [
        replace(
            request,
            seed=None if request.seed is None else (request.seed + number) % SEEDS,
            count_prompt=request.count_prompt and number == 0,
        )
        for number in range(n)
    ]


# ---- answers --------------------------------------------------------------------------------------------------------

FinishWord = Literal["stop", "length", "tool_calls", "content_filter"]
"""The last one comes from providers alone, whose answers are put through."""
FINISH_WORDS: Mapping[FinishReason, FinishWord] = {
    "stop": "stop",
    "eos": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
}


class Usage(BaseModel):
    """How many tokens it took. A prompt counts once, however many choices there are to it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


def usage(ends: Sequence[Finished | GenerationResult], n: int) -> dict[str, int]:
    """Return the usage of choices that come in groups of `n` to one prompt."""
    prompts = [ends[first : first + n] for first in range(0, len(ends), n)]
    prompt = sum(max(each.prompt_tokens for each in choices) for choices in prompts)
    completion = sum(each.tokens_generated for each in ends)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@dataclass(frozen=True, slots=True)
class Heading:
    """What an answer and each of its chunks say of themselves. `model` is the name asked for.

    Under TGI's own `/v1` there is a fingerprint, which its clients ask for, and a failure in a stream has TGI's shape.
    """

    id: str
    created: int
    model: str
    tgi_fingerprint: str | None = None


class Reported:
    """Which tokens of one choice its log-probabilities tell of, as they come.

    A token whose text is held back waits: if it turns out to be of the stop text, it is no part of the answer.
    """

    def __init__(self) -> None:
        self._waiting: list[TokenEvent] = []

    def take(self, event: TokenEvent) -> list[TokenEvent]:
        """Return the tokens that are known to be of the answer now."""
        if event.logprob is not None and not event.special:
            self._waiting.append(event)
        return self._release() if event.text or event.tool_calls else []

    def end(self, finished: Finished, *, keep_stop: bool) -> list[TokenEvent]:
        """Return the rest of them."""
        return self._release() if keep_stop or finished.text or finished.reason != "stop" else []

    def of(self, result: GenerationResult, *, keep_stop: bool) -> list[TokenEvent]:
        """Return all of them, of an answer that is whole."""
        released = [token for event in result.tokens for token in self.take(event)]
        rest = result.text[sum(len(event.text) for event in result.tokens) :]
        return released + self.end(Finished(result.reason, 0, 0, rest), keep_stop=keep_stop)

    def _release(self) -> list[TokenEvent]:
        released, self._waiting = self._waiting, []
        return released


class Choice(Protocol):
    """Writes one choice, whole or piece by piece; its index is not its affair. Used once."""

    def whole(self, result: GenerationResult) -> dict[str, Any]:
        """Return it as a whole."""

    def event(self, event: TokenEvent) -> list[dict[str, Any]]:
        """Return what a stream says of one token."""

    def end(self, finished: Finished) -> list[dict[str, Any]]:
        """Return what a stream says of its end."""


class OpenAiChoices:
    """Writes the answer to one request: the choices of each prompt, one prompt after the other.

    `kinds` are what the answer is called as a whole, and a chunk of it.
    """

    def __init__(
        self, heading: Heading, body: SampledBody, kinds: tuple[str, str], new_choice: Callable[[], Choice]
    ) -> None:
        self.stream = body.stream
        self._heading = heading
        self._include_usage = body.include_usage
        self._n = body.n
        self._whole_kind, self._chunk_kind = kinds
        self._chunk_begins = json_text(self._head(self._chunk_kind))[:-1]
        self._choices: defaultdict[int, Choice] = defaultdict(new_choice)

    def whole(self, results: Sequence[GenerationResult]) -> bytes:
        choices = [{"index": index, **self._choices[index].whole(result)} for index, result in enumerate(results)]
        return as_json({**self._head(self._whole_kind), "choices": choices, "usage": usage(results, self._n)})

    def event(self, index: int, event: TokenEvent, *, last: bool = False) -> bytes:  # noqa: ARG002 - the end is apart
        return self._chunks(index, self._choices[index].event(event))

    def end(self, index: int, finished: Finished) -> bytes:
        return self._chunks(index, self._choices[index].end(finished))

    def done(self, finished: Sequence[Finished]) -> bytes:
        last = {**self._head(self._chunk_kind), "choices": [], "usage": usage(finished, self._n)}
        return (_event(last) if self._include_usage else b"") + b"data: [DONE]\n\n"

    def failure(self, error: GatewayError) -> bytes:
        is_tgi = self._heading.tgi_fingerprint is not None
        return _event(tgi_stream_failure(error) if is_tgi else shown(error, "openai").body)

    def _head(self, kind: str) -> dict[str, Any]:
        about = self._heading
        head = {"id": about.id, "object": kind, "created": about.created, "model": about.model}
        return {**head, "system_fingerprint": about.tgi_fingerprint} if about.tgi_fingerprint else head

    def _chunks(self, index: int, pieces: Sequence[dict[str, Any]]) -> bytes:
        told = map(_as_tgi, pieces) if self._heading.tgi_fingerprint else pieces
        return b"".join([self._chunk(index, each) for each in told])

    def _chunk(self, index: int, piece: dict[str, Any]) -> bytes:
        """Return a piece of a choice as an event. What all of them begin with is written once."""
        usage_so_far = ',"usage":null' if self._include_usage else ""
        choice = f'{{"index":{index},{json_text(piece)[1:]}'
        return f'data: {self._chunk_begins},"choices":[{choice}]{usage_so_far}}}\n\n'.encode(errors="replace")


def _as_tgi(piece: dict[str, Any]) -> dict[str, Any]:
    """Return a piece of a choice with what TGI's clients look for in each delta of a chat: role, and text or calls."""
    if "delta" not in piece:
        return piece
    text = {} if "tool_calls" in piece["delta"] else {"content": ""}
    return {**piece, "delta": {"role": "assistant", **text, **piece["delta"]}}


def _event(data: Mapping[str, Any]) -> bytes:
    return b"data: " + as_json(data) + b"\n\n"
