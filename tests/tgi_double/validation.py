"""What TGI accepts (tgi.md 1.1, 1.2, 2 and 3.1): first the types, as serde reads them, then the rules.

A wrong type is `Unreadable` (422, plain text); a broken rule is `Refused` (422, JSON, `error_type` validation).
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .arguments import Args
from .generation import CHUNK_TOKENS, Sampling, budget
from .grammar import BadGrammar, smallest
from .model import EOS, tokenize

Reader = Callable[[Any, str], Any]
REQUIRED = object()


class Unreadable(Exception):
    """The body does not have the types of the request: plain text."""


class Refused(Exception):
    """TGI's JSON error: `{"error": ..., "error_type": ...}`."""

    def __init__(self, words: str, kind: str, status: int = 422) -> None:
        super().__init__(words)
        self.words = words
        self.kind = kind
        self.status = status


def invalid(rule: str) -> Refused:
    return Refused(f"Input validation error: {rule}", "validation")


@dataclass(frozen=True)
class Field:
    """How one field of a body is read, and what it is when it is absent."""

    read: Reader
    default: Any = REQUIRED
    nullable: bool = False


def _whole(low: int, high: int, name: str) -> Reader:
    def read(value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _mistyped(value, name, where)
        return value

    return read


def f32(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _mistyped(value, "f32", where)
    try:
        narrow: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return narrow


def boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _mistyped(value, "a boolean", where)
    return value


def text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _mistyped(value, "a string", where)
    return value


def anything(value: Any, where: str) -> Any:
    return value


def list_of(read: Reader) -> Reader:
    def read_all(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list):
            raise _mistyped(value, "a sequence", where)
        return [read(each, f"{where}[{number}]") for number, each in enumerate(value)]

    return read_all


def body_of(fields: Mapping[str, Field]) -> Reader:
    """Return what reads an object of these fields; others are ignored."""

    def read(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _mistyped(value, "struct", where)
        return {name: _field(value, name, field, f"{where}.{name}".lstrip(".")) for name, field in fields.items()}

    return read


def _field(value: Mapping[str, Any], name: str, field: Field, where: str) -> Any:
    if name not in value:
        if field.default is REQUIRED:
            raise Unreadable(f"missing field `{name}`")
        return field.default
    if value[name] is None and field.nullable:
        return field.default
    return field.read(value[name], where)


def _mistyped(value: Any, expected: str, where: str) -> Unreadable:
    kinds = {bool: "boolean", int: "integer", float: "floating point", str: "string", list: "sequence", dict: "map"}
    found = "null" if value is None else f"{kinds[type(value)]}"
    return Unreadable(f"{where}: invalid type: {found}, expected {expected}".removeprefix(": "))


def prompts(value: Any, where: str) -> list[str]:
    if value == []:
        raise Unreadable(f"{where}: Empty array detected. Do not use an empty array for the prompt.")
    return [value] if isinstance(value, str) else list_of(text)(value, where)


def grammar(value: Any, where: str) -> dict[str, Any]:
    kinds = ("json", "json_object", "regex", "json_schema")
    found: dict[str, Any] = body_of({"type": Field(text), "value": Field(anything)})(value, where)
    if found["type"] not in kinds:
        raise Unreadable(f"{where}: unknown variant `{found['type']}`, expected one of `json`, `regex`, `json_schema`")
    if found["type"] == "regex":
        text(found["value"], where)
    if found["type"] == "json_schema":
        body_of({"name": _optional(text), "schema": Field(anything)})(found["value"], where)
    return found


def tool(value: Any, where: str) -> dict[str, Any]:
    """Read a tool as its function; TGI knows `parameters` as `arguments` too, and needs one of them."""
    function = body_of({"type": Field(text), "function": Field(anything)})(value, where)["function"]
    found: dict[str, Any] = body_of({"name": Field(text), "description": _optional(text)})(function, where)
    arguments = next((function[name] for name in ("arguments", "parameters") if name in function), REQUIRED)
    if arguments is REQUIRED:
        raise Unreadable(f"{where}: missing field `arguments`")
    return {**found, "arguments": arguments}


def tool_choice(value: Any, where: str) -> str:
    """Read it as a word: `auto`, `none`, `required`, or the name of the function."""
    if isinstance(value, str):
        return value
    function = body_of({"function": Field(body_of({"name": Field(text)}))})(value, where)["function"]
    return str(function["name"])


def message(value: Any, where: str) -> dict[str, Any]:
    fields = {
        "role": Field(text),
        "content": Field(content, default=None),
        "tool_calls": Field(list_of(anything), default=None, nullable=True),
        "name": Field(text, default=None, nullable=True),
    }
    if isinstance(value, dict) and value.get("content", ...) is None:
        value = {name: each for name, each in value.items() if name != "content"}
    found: dict[str, Any] = body_of(fields)(value, where)
    if found["content"] is None and found["tool_calls"] is None:
        raise Unreadable(f"{where}: data did not match any variant of untagged enum MessageBody")
    if found["content"] is None:  # the template is shown the calls as JSON; beside a content they are lost
        found["content"] = json.dumps(found["tool_calls"], ensure_ascii=False)
    return found


def content(value: Any, where: str) -> str:
    """Read a message's content as the one text that the prompt gets; images become markdown."""
    if isinstance(value, str):
        return value
    parts: list[dict[str, Any]] = list_of(body_of({"type": Field(text)}))(value, where)
    texts = []
    for part, chunk in zip(parts, value, strict=True):
        if part["type"] == "text":
            texts.append(_field(chunk, "text", Field(text), where))
        elif part["type"] == "image_url":
            url = _field(chunk, "image_url", Field(body_of({"url": Field(text)})), where)["url"]
            texts.append(f"![]({url})")
        else:
            raise Unreadable(f"{where}: unknown variant `{part['type']}`, expected `text` or `image_url`")
    return "".join(texts)


u32 = _whole(0, 2**32 - 1, "u32")
u64 = _whole(0, 2**64 - 1, "u64")
i32 = _whole(-(2**31), 2**31 - 1, "i32")


def _optional(read: Reader) -> Field:
    return Field(read, default=None, nullable=True)


PARAMETERS = {
    "best_of": _optional(u64),
    "temperature": _optional(f32),
    "repetition_penalty": _optional(f32),
    "frequency_penalty": _optional(f32),
    "top_k": _optional(i32),
    "top_p": _optional(f32),
    "typical_p": _optional(f32),
    "do_sample": Field(boolean, default=False),
    "max_new_tokens": _optional(u32),
    "return_full_text": _optional(boolean),
    "stop": Field(list_of(text), default=[]),
    "truncate": _optional(u64),
    "watermark": Field(boolean, default=False),
    "details": Field(boolean, default=False),
    "decoder_input_details": Field(boolean, default=False),
    "seed": _optional(u64),
    "top_n_tokens": _optional(u32),
    "grammar": _optional(grammar),
    "adapter_id": _optional(text),
}
ABSENT_PARAMETERS = {**{name: field.default for name, field in PARAMETERS.items()}, "do_sample": True}
"""The trap of tgi.md 1.1: without `parameters` TGI samples, with `{}` it does not."""
GENERATE = {"inputs": Field(text), "parameters": Field(body_of(PARAMETERS), default=ABSENT_PARAMETERS)}
COMPATIBLE = {**GENERATE, "stream": Field(boolean, default=False)}
STREAM_OPTIONS = body_of({"include_usage": Field(boolean, default=False)})
CHAT = {
    "messages": Field(list_of(message)),
    "model": _optional(text),
    "frequency_penalty": _optional(f32),
    "presence_penalty": _optional(f32),
    "logit_bias": _optional(list_of(f32)),
    "logprobs": _optional(boolean),
    "top_logprobs": _optional(u32),
    "max_tokens": _optional(u32),
    "n": _optional(u32),
    "stop": _optional(list_of(text)),
    "stream": Field(boolean, default=False),
    "stream_options": Field(STREAM_OPTIONS, default={"include_usage": False}),
    "seed": _optional(u64),
    "temperature": _optional(f32),
    "top_p": _optional(f32),
    "tools": _optional(list_of(tool)),
    "tool_choice": _optional(tool_choice),
    "response_format": _optional(grammar),
}
COMPLETION = {
    "prompt": Field(prompts),
    "model": _optional(text),
    "max_tokens": _optional(u32),
    "temperature": _optional(f32),
    "top_p": _optional(f32),
    "stream": Field(boolean, default=False),
    "seed": _optional(u64),
    "suffix": _optional(text),
    "repetition_penalty": _optional(f32),
    "frequency_penalty": _optional(f32),
    "stop": _optional(list_of(text)),
}


@dataclass(frozen=True)
class Limits:
    """What this server allows: the flags, with the defaults that TGI finds at warm-up."""

    max_input_tokens: int
    max_total_tokens: int
    args: Args


@dataclass(frozen=True)
class Job:
    """A request that passed every rule."""

    prompt: Sequence[int]
    sampling: Sampling
    limit: int
    seed: int
    stop: Sequence[str]
    top_n: int
    parameters: Mapping[str, Any]
    forced: Sequence[int] | None = None
    """The only tokens that a grammar lets through, in their order."""


def validated(inputs: str, parameters: Mapping[str, Any], limits: Limits) -> Job:
    """Return what is to be generated.

    Raises:
        Refused: a rule of tgi.md 3.1 is broken; the first in TGI's order.
    """
    _check_best_of(parameters)
    _check_sampling(parameters)
    _check_counts(parameters, limits.args)
    if not inputs:
        raise invalid("`inputs` cannot be empty")
    prompt = _prompt(inputs, parameters["truncate"], limits)
    limit = _limit(len(prompt), parameters["max_new_tokens"], limits)
    forced = _forced(parameters["grammar"], limits.args)
    seed = parameters["seed"] if parameters["seed"] is not None else random.SystemRandom().getrandbits(64)
    stop, top_n = parameters["stop"], parameters["top_n_tokens"] or 0
    return Job(prompt, _sampling(parameters), limit, seed, stop, top_n, parameters, forced)


def _forced(given: Mapping[str, Any] | None, args: Args) -> Sequence[int] | None:
    if given is None:
        return None
    if args.disable_grammar_support:
        raise invalid("grammar is not supported")
    try:
        text = smallest(given)
    except BadGrammar as error:
        raise invalid(str(error)) from None
    return [*(piece.id for piece in tokenize(text)), EOS]


def checked_best_of(parameters: Mapping[str, Any], args: Args) -> int:
    """Return how many sequences are wanted."""
    best_of = 1 if parameters["best_of"] is None else int(parameters["best_of"])
    if args.max_best_of == 1 and best_of != 1:
        raise invalid("`best_of` != 1 is not allowed for this endpoint")
    if best_of > args.max_best_of:
        raise invalid(f"`best_of` must be > 0 and <= {args.max_best_of}. Given: {best_of}")
    return best_of


def check_streamable(parameters: Mapping[str, Any]) -> None:
    if parameters["best_of"] not in (None, 1):
        raise invalid("`best_of` != 1 is not supported when streaming tokens")
    if parameters["decoder_input_details"]:
        raise invalid("`decoder_input_details` == true is not supported when streaming tokens")


def _check_best_of(given: Mapping[str, Any]) -> None:
    sampling = given["do_sample"] or any(
        given[name] is not None for name in ("temperature", "top_k", "top_p", "typical_p")
    )
    if (given["best_of"] or 1) > 1 and not sampling:
        raise invalid("you must use sampling when `best_of` is > 1")


def _check_sampling(given: Mapping[str, Any]) -> None:
    rules: list[tuple[str, Callable[[float], bool], str]] = [
        ("temperature", lambda value: value > 0, "must be strictly positive"),
        ("repetition_penalty", lambda value: value > 0, "must be strictly positive"),
        ("frequency_penalty", lambda value: -2 <= value <= 2, "must be >= -2.0 and <= 2.0"),
        ("top_p", lambda value: 0 < value < 1, "must be > 0.0 and < 1.0"),
        ("typical_p", lambda value: 0 < value < 1, "must be > 0.0 and < 1.0"),
        ("top_k", lambda value: value > 0, "must be strictly positive"),
        ("max_new_tokens", lambda value: value > 0, "must be strictly positive"),
    ]
    for name, holds, words in rules:
        if given[name] is not None and not holds(given[name]):
            raise invalid(f"`{name}` {words}")


def _check_counts(given: Mapping[str, Any], args: Args) -> None:
    stops, top_n = len(given["stop"]), given["top_n_tokens"] or 0
    if stops > args.max_stop_sequences:
        raise invalid(f"`stop` supports up to {args.max_stop_sequences} stop sequences. Given: {stops}")
    if given["seed"] is not None and (given["best_of"] or 1) > 1:
        raise invalid("`seed` must not be set when `best_of` > 1")
    if top_n > args.max_top_n_tokens:
        raise invalid(f"`top_n_tokens` must be >= 0 and <= {args.max_top_n_tokens}. Given: {top_n}")


def _prompt(inputs: str, truncate: int | None, limits: Limits) -> list[int]:
    most = limits.max_input_tokens
    if truncate is not None and not 0 < truncate <= most:
        raise invalid(f"`truncate` must be strictly positive and less than {most}. Given: {truncate}")
    ids = [piece.id for piece in tokenize(inputs)]
    return ids[-truncate:] if truncate else ids


def _limit(input_tokens: int, asked: int | None, limits: Limits) -> int:
    total = limits.max_total_tokens
    first = min(CHUNK_TOKENS, max(0, total - input_tokens) if asked is None else asked)
    if input_tokens + first > total:
        raise invalid(
            f"`inputs` tokens + `max_new_tokens` must be <= {total}. "
            f"Given: {input_tokens} `inputs` tokens and {first} `max_new_tokens`"
        )
    if input_tokens > limits.max_input_tokens:
        raise invalid(f"`inputs` must have less than {limits.max_input_tokens} tokens. Given: {input_tokens}")
    return budget(input_tokens, asked, total)


def _sampling(given: Mapping[str, Any]) -> Sampling:
    said = {name: given[name] for name in Sampling.__dataclass_fields__ if given.get(name) is not None}
    return Sampling(**said)
