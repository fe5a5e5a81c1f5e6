"""How an error looks on the wire: the only place that knows (contract section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from gateway.api.rights import right_for
from gateway.errors import EmptyPrompt, GatewayError, InvalidRequest, MethodNotAllowed, NotFound


class Complaint(BaseModel):
    """What is wrong with one field."""

    loc: list[str | int]
    msg: str
    type: str


class Problem(BaseModel):
    """Every error. `detail` is a list where fields of the request are wrong; `error_code` is stable."""

    detail: str | list[Complaint]
    error_code: str


_WHEN = {
    400: "The prompt is empty or too long",
    401: "There is no key, or it is not known here",
    403: "The key lacks the right, or there are no keys and you are not on this machine",
    404: "There is no such model, or it is not running",
    408: "The body did not come",
    413: "The body is too large",
    422: "The request is not valid, or this model's engine cannot do it",
    429: "The key's own limit is reached; Retry-After says when to ask again",
    500: "It failed while it was under way",
    502: "The model's server broke off before its first token",
    503: "Not now; Retry-After says when to ask again",
    504: "The start or the generation took too long",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return how these errors stand in the OpenAPI document: as JSON, whatever the route answers else."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _WHEN[status], "content": content} for status in statuses}


def openapi_of(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """Return what makes the application's OpenAPI document, with the shape of errors in it."""
    without = app.openapi

    def document() -> dict[str, Any]:
        return with_problem(without())

    return document


def with_problem(document: dict[str, Any]) -> dict[str, Any]:
    """Return an OpenAPI document with the shape of errors in it, and those that any address has that asks for a key."""
    for path, item in document["paths"].items():
        for operation in item.values() if right_for(path) else ():
            operation["responses"] = {**documented(401, 403, 429), **operation["responses"]}
    schemas = models_json_schema([(Problem, "serialization")], ref_template="#/components/schemas/{model}")[1]["$defs"]
    document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
    return document


_FIELD_CODES = {
    "temperature": "INVALID_TEMPERATURE",
    "max_tokens": "INVALID_MAX_TOKENS",
    "max_new_tokens": "INVALID_MAX_TOKENS",
    "top_k": "INVALID_TOP_K",
}
"""The code of a body in which nothing but this field is wrong."""


def render(error: GatewayError, headers: Mapping[str, str] | None = None) -> Response:
    """Return the answer for an error: the documents' shape, with `Retry-After` in whole seconds where waiting helps."""
    body = {"detail": error.detail, "error_code": error.code, **error.extra}
    headers = dict(headers or {})
    if error.retry_after_s:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    return JSONResponse(body, error.status, headers)


def install(app: FastAPI) -> None:
    """Let `app` answer every error in one shape."""
    app.add_exception_handler(GatewayError, _gateway_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.openapi = openapi_of(app)  # type: ignore[method-assign]


async def _gateway_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)  # registered for it
    return render(error)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # registered for it
    complaints = [_complaint(each) for each in error.errors()]
    if blank := [each for each in complaints if each["type"] == "empty_prompt"]:
        return render(EmptyPrompt(f"Prompt cannot be empty: {blank[0]['msg']}."))
    return JSONResponse({"detail": complaints, "error_code": _code(complaints)}, 422)


def _complaint(error: Mapping[str, Any]) -> dict[str, Any]:
    """Return where, what and which rule; never the value, which may be a prompt."""
    message = error["msg"]
    if error["type"] == "model_attributes_type":
        message = "the body must be a JSON object, sent with Content-Type: application/json"
    if error["loc"] == ("body",) and error["type"] == "missing":
        message = 'the body is empty; send a JSON object such as {"prompt": "Once upon a time"}'
    return {"loc": list(error["loc"]), "msg": message, "type": error["type"]}


def _code(complaints: Sequence[Mapping[str, Any]]) -> str:
    fields = {next((part for part in each["loc"][1:] if part != "parameters"), None) for each in complaints}
    codes = {_FIELD_CODES.get(str(field)) for field in fields}
    return codes.pop() or InvalidRequest.code if len(codes) == 1 and len(fields) == 1 else InvalidRequest.code


async def _http(request: Request, error: Exception) -> Response:
    """Answer what FastAPI itself refuses. What it could not read of a body may be an error of ours underneath."""
    assert isinstance(error, HTTPException)  # registered for it
    if isinstance(error.__cause__, GatewayError):
        return render(error.__cause__, {"connection": "close"} if error.__cause__.status in (408, 413) else None)
    match error.status_code:
        case 400:
            return render(InvalidRequest("The body could not be read."))
        case 404:
            return render(NotFound(f"There is nothing at {request.url.path}; GET /docs shows what there is."))
        case 405:
            words = f"{request.method} is not possible here; see the Allow header, or GET /docs."
            return render(MethodNotAllowed(words), error.headers)
        case _:
            return JSONResponse({"detail": error.detail, "error_code": "INTERNAL_ERROR"}, error.status_code)


def our_fault(error: Exception) -> Response:
    """Return the answer when the gateway itself failed; the log has the rest."""
    return render(GatewayError(f"The gateway itself failed ({type(error).__name__}); its log says where."))
