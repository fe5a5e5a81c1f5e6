"""How an error is answered, and how it stands in the OpenAPI document (contract section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from http import HTTPMethod
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette._utils import get_route_path
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from gateway.api.rights import right_for
from gateway.errors import (
    BodyTimeout,
    BodyTooLarge,
    EmptyPrompt,
    GatewayError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    Unsupported,
)
from gateway.outcome import note
from gateway.shapes import Api, api_of, shown


class Complaint(BaseModel):
    """What is wrong with one field."""

    loc: list[str | int]
    msg: str
    type: str


class Problem(BaseModel):
    """Every error. `detail` is a list where fields of the request are wrong; `error_code` is stable."""

    detail: str | list[Complaint]
    error_code: str


class OpenAiError(BaseModel):
    """What went wrong. `code` is stable, and the same as everywhere in this gateway."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAiProblem(BaseModel):
    """Every error under `/v1`."""

    error: OpenAiError


class TgiProblem(BaseModel):
    """Every error under `/models/{id}/tgi`. `error_code` is stable, and the same as everywhere in this gateway.

    It lacks where a TGI that callers are put through to speaks for itself.
    """

    error: str
    error_type: str
    error_code: str | None = None


_WHEN = {
    400: "The prompt is empty or too long",
    401: "There is no key, or it is not known here",
    403: "The key lacks the right, or there are no keys and you are not on this machine",
    404: "There is no such model, or it is not running",
    408: "The body did not come",
    413: "The body is too large",
    422: "The request is not valid, or this model's engine cannot do it",
    424: "The model's server failed",
    429: "The key's own limit is reached; Retry-After says when to ask again",
    500: "It failed while it was under way",
    502: "The model's server broke off before its first token",
    503: "Not now; Retry-After says when to ask again",
    504: "The start or the generation took too long",
}


_SCHEMAS: Mapping[Api, type[BaseModel]] = {"documents": Problem, "openai": OpenAiProblem, "tgi": TgiProblem}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return how these errors stand in the OpenAPI document: as JSON, whatever the route answers else.

    Each status is that of the documents' APIs. `with_problem` gives each operation those of its own API.
    """
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": _WHEN[status], "content": content} for status in statuses}


def openapi_of(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """Return what makes the application's OpenAPI document, with the shape of errors in it."""
    without = app.openapi

    def document() -> dict[str, Any]:
        return with_problem(without())

    return document


def with_problem(document: dict[str, Any]) -> dict[str, Any]:
    """Return an OpenAPI document with the shapes of errors in it, those of any address that asks for a key included."""
    for path, item in document["paths"].items():
        for operation in item.values():
            asks = right_for(path) is not None
            keys = documented(401, 403, 429) if asks else {}
            operation["responses"] = _in_shape(api_of(path), {**keys, **operation["responses"]})
            operation["security"] = [{"key": []}, {}] if asks else []
    kinds = [(model, "serialization") for model in _SCHEMAS.values()]
    schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")[1]["$defs"]  # type: ignore[arg-type]
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(schemas)
    components["securitySchemes"] = {"key": _KEY}
    return document


_KEY = {"type": "http", "scheme": "bearer", "description": "One that `gateway keys add` has made, where there are any"}


def _in_shape(api: Api, responses: dict[int | str, Any]) -> dict[int | str, Any]:
    """Return an operation's answers with errors as callers of `api` see them."""
    if api == "documents":
        return responses
    statuses = sorted(map(int, responses))
    sent = {status for each in statuses if each >= 400 for status in _STATUSES[api].get(each, (each,))}
    errors: dict[int | str, Any] = {str(status): _error(api, status) for status in sorted(sent)}
    return {**{status: answer for status, answer in responses.items() if int(status) < 400}, **errors}


def _error(api: Api, status: int) -> dict[str, Any]:
    """Return an error of an API as it stands in the document. A TGI itself may use plain words."""
    content: dict[str, Any] = {
        "application/json": {"schema": {"$ref": f"#/components/schemas/{_SCHEMAS[api].__name__}"}}
    }
    if api == "tgi" and status in _TGIS_PLAIN:
        content["text/plain"] = {"schema": {"type": "string"}}
    return {"description": _WHEN_THERE.get((api, status)) or _WHEN[status], "content": content}


_TGIS_PLAIN = (400, 413, 415, 422)
_WHEN_THERE: Mapping[tuple[Api, int], str] = {
    ("openai", 400): "The request is not valid, its prompt is empty or too long, or this model's engine cannot do it",
    ("tgi", 400): "The body is not JSON, in the words of a TGI",
    ("tgi", 415): "The body is not sent as JSON, in the words of a TGI",
    ("tgi", 422): "The request is not valid, its prompt is empty or too long, or this model's engine cannot do it",
    ("tgi", 429): "Too many ask at once, or the key's own limit is reached",
}
_STATUSES: Mapping[Api, Mapping[int, tuple[int, ...]]] = {
    "documents": {},
    "openai": {422: (400,)},
    "tgi": {400: (422,), 413: (400, 413, 415), 500: (424,), 503: (429, 503)},
}
"""What becomes of a status of the documents' APIs in another one."""


_FIELD_CODES = {
    "temperature": "INVALID_TEMPERATURE",
    "max_tokens": "INVALID_MAX_TOKENS",
    "max_new_tokens": "INVALID_MAX_TOKENS",
    "max_completion_tokens": "INVALID_MAX_TOKENS",
    "top_k": "INVALID_TOP_K",
}
"""The code of a body in which nothing but this field is wrong."""


def render(error: GatewayError, scope: Scope, headers: Mapping[str, str] | None = None) -> Response:
    """Return the answer for an error: the shape of the API, with `Retry-After` in whole seconds where waiting helps."""
    note(scope, error.code)
    shape = shown(error, api_of(get_route_path(scope)))
    headers = dict(headers or {})
    if error.retry_after_s:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    return JSONResponse(shape.body, shape.status, headers)


def install(app: FastAPI) -> None:
    """Let `app` answer every error in the shape of the API that was asked."""
    app.add_exception_handler(GatewayError, _raised)
    app.add_exception_handler(RequestValidationError, _raised)
    app.add_exception_handler(HTTPException, _http)
    app.openapi = openapi_of(app)  # type: ignore[method-assign]


def answer_to(error: GatewayError | RequestValidationError, scope: Scope) -> Response:
    """Return the answer for what a route has raised."""
    if isinstance(error, GatewayError):
        return render(error, scope, _of_unread_body(error))
    return _invalid(error, scope)


async def _raised(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError | RequestValidationError)  # registered for them
    return answer_to(error, request.scope)


def _invalid(error: RequestValidationError, scope: Scope) -> Response:
    complaints = [_complaint(each) for each in error.errors()]
    code, api = _code(complaints), api_of(get_route_path(scope))
    if blank := [each for each in complaints if each["type"] == "empty_prompt"]:
        words = _tgi_words(blank) if api == "tgi" else f"Prompt cannot be empty: {blank[0]['msg']}."
        note(scope, EmptyPrompt.code)
        shape = shown(EmptyPrompt(words), api, param=str(blank[0]["loc"][1]))
        return JSONResponse(shape.body, shape.status)
    note(scope, code)
    if api == "documents":
        return JSONResponse({"detail": complaints, "error_code": code}, 422)
    words = _tgi_words(complaints) if api == "tgi" else _words(complaints)
    param = next(filter(None, map(_openai_field, complaints)), None)
    shape = shown(InvalidRequest(words), api, code=code, param=param)
    return JSONResponse(shape.body, shape.status)


def _words(complaints: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(": ".join(filter(None, (_openai_field(each), each["msg"]))) for each in complaints) + "."


def _tgi_words(complaints: Sequence[Mapping[str, Any]]) -> str:
    """Return what is wrong as TGI says it: ``Input validation error: `temperature` must be strictly positive``."""
    return f"Input validation error: {'; '.join(map(_tgi_rule, complaints))}"


def _tgi_rule(complaint: Mapping[str, Any]) -> str:
    field, words = ".".join(map(str, complaint["loc"][1:])).removeprefix("parameters."), complaint["msg"]
    if not field or complaint["type"] == "grammar":  # whose words name it
        return str(words)
    return f"`{field}` {words[:1].lower()}{words[1:]}"


def _openai_field(complaint: Mapping[str, Any]) -> str:
    """Return where in the body it is, as OpenAI writes it: `messages[0].role`."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in complaint["loc"][1:])
    return "".join(steps).removeprefix(".")


def _complaint(error: Mapping[str, Any]) -> dict[str, Any]:
    """Return where, what and which rule; never the value, which may be a prompt."""
    message = error["msg"]
    if error["type"] in ("model_attributes_type", "model_type") and error["loc"] == ("body",):
        message = "the body must be a JSON object, sent with Content-Type: application/json"
    if error["loc"] == ("body",) and error["type"] == "missing":
        message = 'the body is empty; send a JSON object such as {"prompt": "Once upon a time"}'
    return {"loc": list(error["loc"]), "msg": message, "type": error["type"]}


def _code(complaints: Sequence[Mapping[str, Any]]) -> str:
    if all(each["type"] == "unsupported" for each in complaints):
        return Unsupported.code
    fields = {next((part for part in each["loc"][1:] if part != "parameters"), None) for each in complaints}
    codes = {_FIELD_CODES.get(str(field)) for field in fields}
    return codes.pop() or InvalidRequest.code if len(codes) == 1 and len(fields) == 1 else InvalidRequest.code


async def _http(request: Request, error: Exception) -> Response:
    """Answer what FastAPI itself refuses. What it could not read of a body may be an error of ours underneath."""
    assert isinstance(error, HTTPException)  # registered for it
    scope = request.scope
    if isinstance(error.__cause__, GatewayError):
        return render(error.__cause__, scope, _of_unread_body(error.__cause__))
    match error.status_code:
        case 400:
            return render(InvalidRequest("The body could not be read."), scope)
        case 404:
            return render(NotFound(f"There is nothing at {request.url.path}; GET /docs shows what there is."), scope)
        case 405:
            words = f"{request.method} is not possible here; see the Allow header, or GET /docs."
            return render(MethodNotAllowed(words), scope, {"allow": ", ".join(_methods(request))})
        case _:
            return JSONResponse({"detail": error.detail, "error_code": "INTERNAL_ERROR"}, error.status_code)


def _of_unread_body(error: GatewayError) -> dict[str, str]:
    """Return the headers of an answer to a request whose body was not read to its end."""
    return {"connection": "close"} if isinstance(error, BodyTimeout | BodyTooLarge) else {}


def _methods(request: Request) -> list[str]:
    """Return the methods that an address has, of all its routes: Starlette itself tells of the first one only."""
    routes: Sequence[BaseRoute] = request.app.routes
    scopes = {method.value: {**request.scope, "method": method.value} for method in HTTPMethod}
    return [name for name, scope in scopes.items() if any(each.matches(scope)[0] is Match.FULL for each in routes)]


def our_fault(error: Exception, scope: Scope) -> Response:
    """Return the answer when the gateway itself failed; the log has the rest."""
    words = f"The gateway itself failed ({type(error).__name__}); its log says where."
    return render(GatewayError(words), scope)
