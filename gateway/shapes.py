"""How an error looks in each of the APIs (contract section 5): its status there, and its body. Pure.

The documents' APIs and the control plane have one shape, OpenAI's another and TGI's a third; all have the same codes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from gateway.errors import (
    BadRequest,
    EmptyPrompt,
    Forbidden,
    GatewayError,
    GenerationFailed,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    RateLimited,
    Unauthorized,
    Unsupported,
)

Api = Literal["documents", "openai", "tgi"]
_OPENAI = re.compile(r"/v1(/.*)?", re.DOTALL)
_TGI = re.compile(r"/models/[^/]+/tgi(/.*)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Shown:
    """An error as a caller sees it."""

    status: int
    body: dict[str, Any]


def api_of(path: str) -> Api:
    """Return which API an address belongs to; `path` is below the root path."""
    if _OPENAI.fullmatch(path):
        return "openai"
    return "tgi" if _TGI.fullmatch(path) else "documents"


def shown(error: GatewayError, api: Api, *, code: str | None = None, param: str | None = None) -> Shown:
    """Return an error as callers of `api` see it. `code` is a narrower one than the error's own, `param` the field."""
    code = code or error.code
    if api == "openai":
        return _openai(error, code, param)
    return _tgi(error, code) if api == "tgi" else _documents(error, code)


def _documents(error: GatewayError, code: str) -> Shown:
    return Shown(error.status, {"detail": error.detail, "error_code": code, **error.extra})


# ---- OpenAI's -------------------------------------------------------------------------------------------------------


def _openai(error: GatewayError, code: str, param: str | None) -> Shown:
    status = 400 if error.status == 422 else error.status
    param = param or error.extra.get("param")  # a provider's own
    about = {"message": error.detail, "type": _openai_type(error), "param": param, "code": code}
    return Shown(status, {"error": {**error.extra, **about}})


def _openai_type(error: GatewayError) -> str:
    """Return the kind of error in OpenAI's words."""
    if isinstance(error, Unauthorized):
        return "authentication_error"
    if isinstance(error, Forbidden):
        return "permission_error"
    if isinstance(error, RateLimited):
        return "rate_limit_error"
    return "invalid_request_error" if isinstance(error, BadRequest) else "server_error"


# ---- TGI's ----------------------------------------------------------------------------------------------------------


def _tgi(error: GatewayError, code: str) -> Shown:
    """TGI's own statuses (router/src/server.rs): 422 for what is invalid, 429 when too many ask, 424 for a failure."""
    kind, status = _tgi_kind(error)
    return Shown(status, {**error.extra, "error": error.detail, "error_type": kind, "error_code": code})


def tgi_stream_failure(error: GatewayError) -> dict[str, Any]:
    """Return what a stream under TGI's own `/v1` says of a failure: another shape than everywhere else in TGI.

    TGI always says 422 there; this says the status that it would have been.
    """
    told = shown(error, "tgi")
    return {**told.body, "error": {"message": error.detail, "http_status_code": told.status}}


def _tgi_kind(error: GatewayError) -> tuple[str, int]:
    if isinstance(error, EmptyPrompt | PromptTooLong | InvalidRequest | Unsupported):
        return "validation", 422
    if isinstance(error, QueueFull | RateLimited):
        return "overloaded", 429
    if isinstance(error, GenerationFailed):
        return "generation", 424
    return error.code.lower(), error.status
