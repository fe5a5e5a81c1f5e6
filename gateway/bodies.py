"""What dialects have in common: kinds of field, what the catalog adds to a request, candidates for a token. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, to_json

from gateway.catalog import ModelSpec
from gateway.generation import GenerationRequest, TokenChance

# ---- bodies ---------------------------------------------------------------------------------------------------------


def not_blank(prompt: str) -> str:
    """Return the prompt, which must be text and hold more than white space."""
    if not prompt or prompt.isspace():
        raise PydanticCustomError("empty_prompt", "write what the model shall continue")
    return prompt if prompt.isascii() else is_unicode(prompt)


def is_unicode(text: str) -> str:
    """Return the text, which JSON may have given a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("string_unicode", "this is not valid Unicode (a lone surrogate)") from None
    return text


Prompt = Annotated[str, AfterValidator(not_blank), Field(json_schema_extra={"pattern": r"\S"})]
MOST_TOKENS = 10_000_000
"""Beyond any model: what bounds a count of tokens where nothing better is known."""
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
_STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": 1000}
StopTexts = Annotated[
    list[StopText],
    Field(max_length=64),
    BeforeValidator(lambda said: [said] if isinstance(said, str) else said),
    WithJsonSchema({"anyOf": [_STOP_SCHEMA, {"type": "array", "items": _STOP_SCHEMA, "maxItems": 64}]}),
]
"""Texts that end the generation; one may stand without a list."""


class Body(BaseModel):
    """A request's body. Unknown fields are ignored, null means not given, and 5.0 is an integer, as in JSON Schema."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for value in body.values():
            if value is None or (type(value) is float and value.is_integer()):
                return {name: _plain(each) for name, each in body.items() if each is not None}
        return body

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        required = schema.get("required", ())
        schema["properties"] = {
            name: field if name in required else _or_null(field) for name, field in schema.get("properties", {}).items()
        }
        return reference


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _or_null(field: JsonSchemaValue) -> JsonSchemaValue:
    """Return the JSON Schema of a field that may be null as well."""
    about: JsonSchemaValue = {key: field[key] for key in ("title", "description", "default") if key in field}
    rule = {key: value for key, value in field.items() if key not in about}
    kinds = rule["anyOf"] if rule.keys() == {"anyOf"} else [rule]
    null = {"type": "null"}
    return {**about, "anyOf": kinds if null in kinds else [*kinds, null]}


# ---- requests -------------------------------------------------------------------------------------------------------


def request_of(
    spec: ModelSpec,
    prompt: str,
    *,
    defaults: Mapping[str, Any],
    said: Mapping[str, Any],
    apart_from: Collection[str] = (),
    most_new_tokens: int | None = None,
    top_tokens: int = 0,
) -> GenerationRequest:
    """Return what is to be generated, from parameters by their names in models.yaml.

    The catalog's `parameters` (`apart_from` some) beat the document's `defaults`, what the caller `said` beats these,
    and `overrides` beat all. No length is beyond the context, nor beyond what the document allows at most; a default of
    None is no limit.
    """
    parameters = {name: value for name, value in spec.parameters.items() if name not in apart_from}
    merged = {**defaults, **_named(parameters), **_named(said), **_named(spec.overrides)}
    if merged["max_new_tokens"] is not None:
        bounds = (merged["max_new_tokens"], spec.context_tokens, most_new_tokens)
        merged["max_new_tokens"] = min(bound for bound in bounds if bound is not None)
    stop = tuple(merged.pop("stop", ()))
    newline = ("\n",) if merged.pop("stop_on_newline", False) else ()
    sampling = {name: value for name, value in merged.items() if name not in _NOT_FOR_ALL}
    return GenerationRequest(prompt=prompt, stop=(*stop, *newline), **sampling, top_tokens=top_tokens)


_NOT_FOR_ALL = {"return_full_text", "top_tokens"}
"""Parameters of the gateway's own API: other documents say themselves what they answer."""


def _named(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters by the one name that the vocabulary has for each."""
    return {"max_new_tokens" if name == "max_tokens" else name: value for name, value in parameters.items()}


# ---- answers --------------------------------------------------------------------------------------------------------


class TokenProbability(BaseModel):
    """One candidate for a position, and how likely it was."""

    token: str
    probability: float
    percentage: float
    logprob: float
    rank: int


def candidates(chances: Sequence[TokenChance]) -> list[dict[str, Any]]:
    """Return the likeliest tokens of one position as the documents show them, the likeliest first."""
    return [
        {
            "token": chance.text,
            "probability": chance.probability,
            "percentage": round(100 * chance.probability, 2),
            "logprob": chance.logprob,
            "rank": rank,
        }
        for rank, chance in enumerate(chances, 1)
    ]


def as_json(answer: Mapping[str, Any] | Sequence[Any]) -> bytes:
    """Return a body of JSON, in UTF-8. What is no Unicode in it, a lone surrogate, becomes a question mark."""
    try:
        return to_json(answer)  # in a third of the time of json
    except ValueError:  # a text that is no Unicode, or too deep
        return _WRITER.encode(answer).encode(errors="replace")


def json_text(value: Any) -> str:
    """Return the same as text, of any value: for what is put together of pieces of JSON."""
    try:
        return to_json(value).decode()
    except ValueError:
        return _WRITER.encode(value)


_WRITER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
