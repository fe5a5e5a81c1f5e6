"""TGI's own API over any engine: `/models/{id}/tgi` (contract section 4). Pure.

The source is TGI 3 (router/src/lib.rs, validation.rs, server.rs). Its rules and their words are kept, its defaults too:
- Without `parameters` it samples, with `{}` it does not.
- It samples, whatever `do_sample` says, where a temperature other than 1, a top_k or a top_p is given.
- Without `max_new_tokens` it fills the context.
- The stop text that ended an answer is part of it.
Its numbers have 32 bits, in which a top_p that is all but 1 is 1. Null stands only where TGI takes it.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, RootModel
from pydantic_core import PydanticCustomError

from gateway.bodies import as_json, is_unicode, request_of
from gateway.catalog import ModelSpec
from gateway.errors import GatewayError
from gateway.facts import Facts
from gateway.generation import (
    Finished,
    GenerationRequest,
    GenerationResult,
    JsonSchema,
    PromptToken,
    Regex,
    TokenEvent,
)
from gateway.generation import Grammar as Form
from gateway.shapes import shown, tgi_stream_failure
from gateway.tgi_events import FINISH_REASONS, TokenFrames, Unknown, as_event, ended, likely, token

MOST_STOPS = 64
MOST_TOP_TOKENS = 50
MOST_PROMPTS = 256
"""Of one request to `/v1/completions`."""
FIRST_TOKENS = 1024
"""TGI works in blocks of this many tokens, and only the first one must fit into the context."""

# ---- rules ----------------------------------------------------------------------------------------------------------

T = TypeVar("T")


def _rule(holds: Callable[[Any], bool], words: str) -> AfterValidator:
    """Return one of TGI's rules; its words follow the field's name."""

    def check(value: Any) -> Any:
        if value is not None and not holds(value):
            raise PydanticCustomError("rule", "{words}", {"words": words})
        return value

    return AfterValidator(check)


def _neutral(*values: object) -> AfterValidator:
    """Return what refuses a parameter that only TGI has, but for the values that change nothing."""

    def check(value: Any) -> Any:
        if value not in (None, *values):
            raise PydanticCustomError("unsupported", "is not supported: this model's engine cannot do it; leave it out")
        return value

    return AfterValidator(check)


def _narrow(value: float) -> float:
    """Return the number as TGI reads it, in 32 bits."""
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return float("inf")


NOT_EMPTY = _rule(bool, "cannot be empty")
"""Not in the OpenAPI document: a TGI that callers are put through to takes it."""


def _few(stops: list[str]) -> list[str]:
    if len(stops) > MOST_STOPS:
        words = f"supports up to {MOST_STOPS} stop sequences. Given: {len(stops)}"
        raise PydanticCustomError("rule", "{words}", {"words": words})
    return stops


POSITIVE = _rule(lambda value: _narrow(value) > 0, "must be strictly positive")
BELOW_ONE = _rule(lambda value: 0 < _narrow(value) < 1, "must be > 0.0 and < 1.0")
U32, U64, I32 = Field(ge=0, lt=2**32), Field(ge=0, lt=2**64), Field(ge=-(2**31), lt=2**31)


class _TgiBody(BaseModel):
    """Unknown fields are ignored; null is not the same as not given."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


# ---- grammars -------------------------------------------------------------------------------------------------------


def _schema(value: Any) -> Any:
    """Return a JSON Schema, of which TGI wants `properties`."""
    if not isinstance(value, dict) or "properties" not in value:
        raise PydanticCustomError("grammar", "grammar is not valid: Grammar must have a 'properties' field")
    return value


def _schema_or_text(value: dict[str, Any] | str) -> Any:
    try:
        schema = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise PydanticCustomError("grammar", "grammar is not valid: its value is text, and that is not JSON") from None
    return _schema(schema)


class JsonGrammar(_TgiBody):
    type: Literal["json", "json_object"]
    value: Annotated[dict[str, Any] | str, AfterValidator(_schema_or_text)] = Field(
        description="A JSON Schema with `properties`, or its text"
    )


class RegexGrammar(_TgiBody):
    type: Literal["regex"]
    value: Annotated[str, AfterValidator(is_unicode)]


class NamedSchema(_TgiBody):
    name: str | None = None
    # `schema` would hide a method of pydantic's
    json_schema: Annotated[dict[str, Any], AfterValidator(_schema)] = Field(alias="schema")


class JsonSchemaGrammar(_TgiBody):
    type: Literal["json_schema"]
    value: NamedSchema


Grammar = Annotated[JsonGrammar | RegexGrammar | JsonSchemaGrammar, Field(discriminator="type")]


def _form(grammar: JsonGrammar | RegexGrammar | JsonSchemaGrammar | None) -> Form | None:
    match grammar:
        case JsonGrammar(value=dict() as schema):
            return JsonSchema(_of_object(schema))
        case RegexGrammar(value=pattern):
            return Regex(pattern)
        case JsonSchemaGrammar(value=named):
            return JsonSchema(_of_object(named.json_schema), named.name)
    return None


def _of_object(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object, as TGI takes it: without a `type`, `properties` alone would bind nothing."""
    return {"type": "object", **schema}


# ---- bodies ---------------------------------------------------------------------------------------------------------


class GenerateParameters(_TgiBody):
    """How to generate."""

    best_of: Annotated[int | None, U64, _rule(lambda n: n > 0, "must be > 0 and <= 1"), _neutral(1)] = Field(
        None, description="1; more are not supported"
    )
    temperature: Annotated[float | None, POSITIVE] = Field(None, description="Above 0")
    repetition_penalty: Annotated[float | None, POSITIVE] = Field(None, description="Above 0; 1 is off")
    frequency_penalty: Annotated[float | None, _rule(lambda value: -2 <= value <= 2, "must be >= -2.0 and <= 2.0")] = (
        Field(None, description="-2 to 2; 0 is off")
    )
    top_k: Annotated[int | None, I32, POSITIVE] = Field(None, description="Sample from the k likeliest tokens")
    top_p: Annotated[float | None, BELOW_ONE] = Field(None, description="Nucleus sampling, above 0 and below 1")
    typical_p: Annotated[float | None, BELOW_ONE, _neutral()] = Field(None, description="Not supported")
    do_sample: bool = Field(False, description="Sample; a temperature other than 1, top_k and top_p imply it")
    max_new_tokens: Annotated[int | None, U32, POSITIVE] = Field(
        None, description="Most tokens to generate; default: as many as the context has room for"
    )
    return_full_text: bool | None = Field(None, description="Begin generated_text with the prompt")
    stop: Annotated[list[Annotated[str, NOT_EMPTY, AfterValidator(is_unicode)]], AfterValidator(_few)] = Field(
        [], description="Texts that end the generation, and are its end"
    )
    truncate: Annotated[int | None, U64, POSITIVE, _neutral()] = Field(None, description="Not supported")
    watermark: Annotated[bool, _neutral(False)] = Field(False, description="Not supported")
    details: bool = Field(False, description="Tell of each token, and how it ended")
    decoder_input_details: Annotated[bool, _neutral(False)] = Field(False, description="Not supported")
    seed: Annotated[int | None, U64] = Field(None, description="Makes sampling repeatable")
    top_n_tokens: Annotated[
        int | None, U32, _rule(lambda n: n <= MOST_TOP_TOKENS, f"must be >= 0 and <= {MOST_TOP_TOKENS}")
    ] = Field(None, description="Report this many likeliest tokens at each position; with details")
    grammar: Grammar | None = Field(None, description="What form the answer must have")
    adapter_id: Annotated[str | None, _neutral()] = Field(None, description="Not supported")

    @property
    def samples(self) -> bool:
        """Whether TGI samples, as its server decides it (server/text_generation_server/utils/tokens.py)."""
        warped = self.temperature not in (None, 1.0) or self.top_k is not None or self.top_p is not None
        return self.do_sample or warped


class AbsentParameters(GenerateParameters):
    """What TGI takes where there are no `parameters` at all."""

    do_sample: bool = True


def _not_empty(text: str) -> str:
    if not text:
        raise PydanticCustomError("empty_prompt", "cannot be empty")
    return is_unicode(text)


class GenerateBody(_TgiBody):
    """What `/generate` and `/generate_stream` take."""

    inputs: Annotated[str, AfterValidator(_not_empty)] = Field(description="Text to continue")
    parameters: GenerateParameters = Field(default_factory=lambda: AbsentParameters.model_validate({}))


class CompatibleBody(GenerateBody):
    """What `POST /` takes: TGI keeps it for clients of Hugging Face's older servers."""

    stream: bool = Field(False, description="Answer token by token, as server-sent events")

    def with_defaults(self) -> CompatibleBody:
        """Return the body with the full text in the answer, unless it says otherwise."""
        if self.parameters.return_full_text is not None:
            return self
        return self.model_copy(update={"parameters": self.parameters.model_copy(update={"return_full_text": True})})


class TokenizeBody(_TgiBody):
    """What `/tokenize` takes. Whatever else clients send is ignored."""

    inputs: Annotated[str, AfterValidator(is_unicode)] = Field(description="Text to cut into tokens")


# ---- requests -------------------------------------------------------------------------------------------------------


def to_request(spec: ModelSpec, body: GenerateBody, *, stream: bool = False) -> GenerationRequest:
    """Return what is to be generated. `parameters` and `overrides` of the catalog apply as everywhere."""
    asked = body.parameters
    request = request_of(
        spec,
        body.inputs,
        defaults={"temperature": 1.0 if asked.samples else 0.0, "max_new_tokens": None},
        said=_said(asked),
        top_tokens=asked.top_n_tokens or 0,
    )
    told = asked.details and stream
    return replace(
        request,
        grammar=_form(asked.grammar),
        logprobs=stream or asked.details,
        count_prompt=told,
        keep_stop=True,
    )


def _said(asked: GenerateParameters) -> dict[str, Any]:
    """Return the parameters that the caller gave, by their names in models.yaml."""
    plain = ("max_new_tokens", "repetition_penalty", "frequency_penalty", "seed")
    said = {name: value for name in plain if (value := getattr(asked, name)) is not None}
    return {**said, **_sampling(asked), **({"stop": asked.stop} if asked.stop else {})}


def _sampling(asked: GenerateParameters) -> dict[str, Any]:
    """Return how to sample, if the caller says anything of it."""
    given = {name for name in asked.model_fields_set if getattr(asked, name) is not None}
    if not given & {"do_sample", "temperature", "top_k", "top_p"}:
        return {}
    if not asked.samples:
        return {"temperature": 0.0}
    wanted = {"temperature": asked.temperature or 1.0, "top_k": asked.top_k, "top_p": asked.top_p}
    return {name: value for name, value in wanted.items() if value is not None}


def to_tokenize(body: TokenizeBody) -> GenerationRequest:
    """Return what is to be cut into tokens, as the prompt of a request."""
    return GenerationRequest(prompt=body.inputs, max_new_tokens=1, temperature=0.0)


def exceeds_context(spec: ModelSpec, body: GenerateBody) -> bool:
    """Say whether the first tokens asked for leave no room for a prompt, which TGI refuses."""
    asked = body.parameters.max_new_tokens
    return asked is not None and spec.context_tokens is not None and min(asked, FIRST_TOKENS) >= spec.context_tokens


def as_openai(said: Any) -> Any:
    """Return a body of `/v1/chat/completions` with what TGI writes otherwise as OpenAI does, as far as it can be done.

    TGI's `response_format` has its schema under `value`, and its `tool_choice` may be a function's bare name.
    """
    if not isinstance(said, dict):
        return said
    form, choice = said.get("response_format"), said.get("tool_choice")
    changed = dict(said)
    if isinstance(form, dict) and "value" in form:
        changed["response_format"] = _openai_form(form)
    if isinstance(choice, str) and choice not in ("auto", "none", "required"):
        changed["tool_choice"] = {"type": "function", "function": {"name": choice}}
    return changed


def _openai_form(form: dict[str, Any]) -> dict[str, Any]:
    match form:
        case {"type": "json" | "json_object", "value": value}:
            return _named_schema({"schema": _of_object(_schema_or_text(value))})
        case {"type": "json_schema", "value": {"schema": {"properties": _} as schema} as named}:
            return _named_schema(named | {"schema": _of_object(schema)})
        case {"type": "json_schema", "value": dict() as named}:
            return _named_schema(named)
    return form


def _named_schema(named: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", **named}}


# ---- answers --------------------------------------------------------------------------------------------------------


class Token(BaseModel):
    """One token. `id` is 0 and `logprob` null where the engine does not tell: types that TGI's clients can read."""

    id: int
    text: str
    logprob: float | None
    special: bool


class Details(BaseModel):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None = Field(description="The one that was asked for")
    prefill: list[Token] = Field(description="Always empty")
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = None


class GenerateAnswer(BaseModel):
    """What `/generate` answers."""

    generated_text: str
    details: Details | None = None


class CompatibleAnswer(RootModel[list[GenerateAnswer]]):
    """What `POST /` answers: one, in a list."""


UNKNOWN = Unknown(id=0, logprob=None)


class SimpleToken(BaseModel):
    """One token of a text. `start` and `stop` are where it stands there, in bytes."""

    id: int
    text: str
    start: int
    stop: int


class Tokens(RootModel[list[SimpleToken]]):
    """What `/tokenize` answers."""


class TgiReply:
    """Writes one answer as TGI gives it: whole, or as a stream of events."""

    def __init__(self, body: GenerateBody, request: GenerationRequest, *, stream: bool) -> None:
        self.stream = stream
        self._in_list = isinstance(body, CompatibleBody)
        self._asked = body.parameters
        self._prompt = body.inputs if body.parameters.return_full_text else ""
        self._seed = request.seed if request.temperature > 0 else None
        self._frames = TokenFrames(request, UNKNOWN)

    def whole(self, result: GenerationResult) -> bytes:
        answer: dict[str, Any] = {"generated_text": self._prompt + result.text + result.stop}
        if self._asked.details:
            answer["details"] = self._details(result)
        return as_json([answer] if self._in_list else answer)

    def _details(self, result: GenerationResult) -> dict[str, Any]:
        tokens = _with_end(result)
        details = {
            "finish_reason": FINISH_REASONS[result.reason],
            "generated_tokens": result.tokens_generated,
            "seed": self._seed,
            "prefill": [],
            "tokens": [token(event, UNKNOWN) for event in tokens],
        }
        if self._asked.top_n_tokens:
            details["top_tokens"] = [[likely(chance, UNKNOWN) for chance in event.top] for event in tokens]
        return details

    def event(self, event: TokenEvent, *, last: bool) -> bytes:
        return self._frames.event(event, last=last)

    def end(self, finished: Finished) -> bytes:
        details = {
            "finish_reason": FINISH_REASONS[finished.reason],
            "generated_tokens": finished.tokens_generated,
            "seed": self._seed,
            "input_length": finished.prompt_tokens,
        }
        told = details if self._asked.details else None
        return self._frames.end(finished, told, prompt=self._prompt, with_stop=True)

    def failure(self, error: GatewayError) -> bytes:
        return as_event(shown(error, "tgi").body)


def _with_end(result: GenerationResult) -> list[TokenEvent]:
    """Return the tokens of an answer, each with its own text if the engine tells it, however much was held back.

    Else the last one has what was held back until the end.
    """
    if not result.tokens:
        return []
    *others, last = result.tokens
    told = "".join(event.text for event in result.tokens)
    end = ended(last, result.reason, result.text.removeprefix(told) + result.stop)
    return [each if each.token is None or each.special else each._replace(text=each.token) for each in (*others, end)]


def headers(inputs: str, result: GenerationResult, *, total_s: float, device: str | None) -> dict[str, str]:
    """Return what TGI tells of an answer in headers: in milliseconds, but for `x-compute-time`.

    What was no inference was a wait: for a start, or for a free slot.
    """
    work_ms, total_ms = _ms(result.generation_s), _ms(total_s)
    return {
        **({"x-compute-type": device} if device else {}),
        "x-compute-time": f"{total_s:.6f}",
        "x-compute-characters": str(len(inputs)),
        "x-total-time": str(total_ms),
        "x-validation-time": "0",
        "x-queue-time": str(max(total_ms - work_ms, 0)),
        "x-inference-time": str(work_ms),
        "x-time-per-token": str(round(work_ms / max(result.tokens_generated, 1))),
        **({"x-prompt-tokens": str(result.prompt_tokens)} if result.prompt_tokens else {}),
        "x-generated-tokens": str(result.tokens_generated),
    }


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def tokenized(tokens: tuple[PromptToken, ...]) -> bytes:
    """Return the answer of `/tokenize`."""
    return as_json([{"id": each.id, "text": each.text, "start": each.start, "stop": each.stop} for each in tokens])


# ---- what is told of the model --------------------------------------------------------------------------------------


class Info(BaseModel):
    """What `/info` answers. null is what is not known."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int | None
    max_total_tokens: int | None = Field(description="Of prompt and answer together")
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None


def info(spec: ModelSpec, facts: Facts, *, version: str) -> Info:
    """Return what TGI's `/info` would say of a model."""
    total = min((tokens for tokens in (spec.context_tokens, facts.context_tokens) if tokens), default=None)
    return Info(
        model_id=served_name(spec),
        model_sha=None,
        model_pipeline_tag="text-generation",
        max_concurrent_requests=spec.max_concurrency,
        max_best_of=1,
        max_stop_sequences=MOST_STOPS,
        max_input_tokens=total and total - 1,
        max_total_tokens=total,
        validation_workers=1,
        max_client_batch_size=MOST_PROMPTS,
        router="tgi-gateway",
        version=version,
        sha=None,
        docker_label=None,
    )


def served_name(spec: ModelSpec) -> str:
    """Return what TGI calls the model that it serves."""
    return spec.hf_name or spec.id


# ---- what is put through --------------------------------------------------------------------------------------------


_DONE = re.compile(rb"data:\s*\[DONE\]\s*")
_LAST_FRAME, _ERROR = (re.compile(rb'"%b"\s*:\s*".*\n' % key, re.DOTALL) for key in (b"generated_text", b"error"))
"""Both are null or absent before. Within a text the quotes of the keys would be escaped."""
_OPENAI_ERROR = re.compile(rb'"error"\s*:\s*\{.*\n', re.DOTALL)


class Untouched:
    """Lets an answer of TGI's pass as it is; tells of a failure in the words of the address."""

    keeps_refusals = True

    def __init__(self, *, as_openai: bool) -> None:
        """`as_openai`: under TGI's own `/v1`, whose streams tell of errors in another way."""
        self._as_openai = as_openai
        self.may_end = False
        self.is_over = False

    def whole(self, body: bytes) -> bytes:
        return body

    def line(self, line: bytes) -> bytes:
        """Return the line. After an error under `/v1`, [DONE] still follows."""
        if line.startswith(b"data:"):
            self.is_over = self.is_over or bool(
                _DONE.fullmatch(line) or _LAST_FRAME.search(line) or _ERROR.search(line)
            )
            self.may_end = self.may_end or self.is_over or bool(_OPENAI_ERROR.search(line))
        return line

    def failure(self, error: GatewayError) -> bytes:
        return as_event(tgi_stream_failure(error) if self._as_openai else shown(error, "tgi").body)
