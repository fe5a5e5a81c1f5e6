"""The JSON that TGI answers, and the bytes of its events."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

from .generation import Generation, Token
from .model import token_text
from .service import Answer
from .validation import Refused
from .web import Response

JSON_HEADERS = {"content-type": "application/json"}
TEXT_HEADERS = {"content-type": "text/plain; charset=utf-8"}
COMPUTE_TYPE = {"x-compute-type": "gpu+optimized"}
DONE = b"data: [DONE]\n\n"


def dumps(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(errors="replace")


def event(value: object) -> bytes:
    """Return one server-sent event as axum 0.7 writes it."""
    return b"data: " + dumps(value) + b"\n\n"


def answer(value: object, headers: Mapping[str, str] | None = None, status: int = 200) -> Response:
    return Response(status, dumps(value), {**JSON_HEADERS, **(headers or {})})


def plain(status: int, words: str) -> Response:
    return Response(status, words.encode(), TEXT_HEADERS)


def refusal(refused: Refused) -> Response:
    return answer({"error": refused.words, "error_type": refused.kind}, status=refused.status)


def native_error(refused: Refused) -> bytes:
    """Return the frame in which `/generate_stream` tells of an error: its status was 200 long ago."""
    return event({"error": refused.words, "error_type": refused.kind})


def openai_error(refused: Refused) -> bytes:
    """Return the frame of the two OpenAI-like routes: always 422, whatever happened."""
    return event({"error": {"message": refused.words, "http_status_code": 422}})


def number(value: float) -> float | None:
    """Return a 32-bit float as serde writes it: the shortest digits that give the same one; null if not finite."""
    if not math.isfinite(value):
        return None
    narrow: float = struct.unpack("f", struct.pack("f", value))[0]
    for digits in range(6, 9):
        short = float(f"{narrow:.{digits}g}")
        if struct.unpack("f", struct.pack("f", short))[0] == narrow:
            return short
    return float(f"{narrow:.9g}")


def token(one: Token) -> dict[str, Any]:
    return {"id": one.id, "text": one.text, "logprob": number(one.logprob), "special": one.special}


def sequence(generation: Generation, *, prefill: bool = False) -> dict[str, Any]:
    """Return what `details` says of one sequence."""
    found: dict[str, Any] = {
        "finish_reason": generation.finish_reason,
        "generated_tokens": len(generation.steps),
        "seed": generation.reported_seed,
        "prefill": _prefill(generation) if prefill else [],
        "tokens": [token(step.token) for step in generation.steps],
    }
    if generation.top_n:
        found["top_tokens"] = [[token(one) for one in step.top] for step in generation.steps]
    return found


def _prefill(generation: Generation) -> list[dict[str, Any]]:
    return [
        {"id": one, "text": token_text(one), "logprob": None if logprob is None else number(logprob)}
        for one, logprob in generation.prefill()
    ]


def times(whole: Answer, characters: int) -> dict[str, str]:
    """Return the headers that tell how long it took: milliseconds, but for `x-compute-time`."""
    tokens = len(whole.best.steps)
    total_ms = round(whole.total_s * 1000)
    return {
        **compute(characters),
        "x-compute-time": str(whole.total_s),
        "x-total-time": str(total_ms),
        "x-validation-time": "0",
        "x-queue-time": "0",
        "x-inference-time": str(total_ms),
        "x-time-per-token": str(round(total_ms / tokens)),
        "x-prompt-tokens": str(len(whole.best.prompt)),
        "x-generated-tokens": str(tokens),
    }


def compute(characters: int) -> dict[str, str]:
    return {**COMPUTE_TYPE, "x-compute-characters": str(characters)}


def stream_headers(characters: int) -> dict[str, str]:
    return {**compute(characters), "x-accel-buffering": "no"}
