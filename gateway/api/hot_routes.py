"""The busy addresses, whose requests do not pass through FastAPI: it has the same routes, and documents them.

Body model, endpoint and errors are those of FastAPI's own route, and both give the same bytes (a test compares them).
What is not exactly one of these addresses, asked by POST, goes on to FastAPI.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any, TypeGuard

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api import problems
from gateway.api.headers import header, route_path
from gateway.api.json_body import Handler, JsonRequest, JsonRoute, is_json, json_in, refuse_compressed
from gateway.errors import GatewayError, InvalidRequest

MODELS = "/models/"
OF_A_MODEL = "/models/{model_id}/"


class HotRoutes:
    """Answers what is posted to one of `routes` that take JSON, and lets everything else pass."""

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._handlers = {route.path: straight(route) for route in routes if _takes_json(route)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handle, parameters = self._found(scope)
        if handle is None:
            await self._app(scope, receive, send)
            return
        scope["path_params"] = parameters
        try:
            response = await handle(JsonRequest(scope, receive))
            await response(scope, receive, send)
        except (GatewayError, RequestValidationError) as error:
            await problems.answer_to(error, scope)(scope, receive, send)
            error.__traceback__ = None  # the failure of a model is raised for each caller: its traceback would grow

    def _found(self, scope: Scope) -> tuple[Handler | None, Mapping[str, str]]:
        """Return what answers, if the request is for here, with what its path names."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return None, {}
        path = route_path(scope)
        if not path.startswith(MODELS):
            return self._handlers.get(path), {}
        model_id, _, rest = path.removeprefix(MODELS).partition("/")
        return self._handlers.get(OF_A_MODEL + rest) if model_id else None, {"model_id": model_id}


def _takes_json(route: BaseRoute) -> TypeGuard[JsonRoute]:
    return isinstance(route, JsonRoute) and route.methods == {"POST"} and route.body_field is not None


def straight(route: JsonRoute) -> Handler:
    """Return what answers as the route does.

    Raises:
        TypeError: its path names more than a model, or its endpoint takes something else than that, the request, its
            body and `prefer`.
    """
    named = {"model_id"} if route.path.startswith(OF_A_MODEL) else set()
    taken = signature(route.endpoint).parameters.keys()
    if route.param_convertors.keys() != named or taken != {"request", "body", "prefer", *named}:
        raise TypeError(f"{route.path}: nobody gives {route.endpoint} its parameters")

    async def handle(request: Request) -> Response:
        body = _checked(route, await _said(request))
        prefer = header(request.scope, b"prefer")
        response = await route.endpoint(**request.path_params, request=request, body=body, prefer=prefer)
        assert isinstance(response, Response)  # nothing is left to be rendered
        return response

    return route.answering(handle)


async def _said(request: Request) -> Any:
    """Return the value of a body that is sent as JSON, else its bytes.

    Raises:
        RequestValidationError: there is none.
        InvalidRequest: its caller left, or it is not what it was sent as.
    """
    try:
        sent = await request.body()
    except ClientDisconnect:
        raise InvalidRequest("The body could not be read.") from None
    if not sent:
        raise RequestValidationError([{"loc": ("body",), "msg": "Field required", "type": "missing"}])
    if not is_json(header(request.scope, b"content-type")):
        return sent
    refuse_compressed(request)
    return json_in(sent)


def _checked(route: JsonRoute, said: Any) -> Any:
    """Return the body as the route's model has it.

    Raises:
        RequestValidationError: it does not fit.
    """
    assert route.body_field is not None
    body, errors = route.body_field.validate(said, {}, loc=("body",))
    if errors:
        raise RequestValidationError(errors)
    return body
