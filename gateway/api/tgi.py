"""`/models/{id}/tgi`: TGI's own API for one model, whatever its engine (contract section 4).

Where a TGI answers and the catalog adds nothing, callers are put through to it: bytes, statuses and headers are its
own. Elsewhere the gateway speaks TGI's API itself. Only what generates or cuts into tokens wakes the model.
"""

from __future__ import annotations

import json
import time
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from gateway.api import openai
from gateway.api.asking import Prefer, exchange, invalid, max_wait_s
from gateway.api.headers import header
from gateway.api.json_body import Handler, JsonRoute, refuse_compressed
from gateway.api.middleware import request_id_of
from gateway.api.pages import add_pages
from gateway.api.problems import documented
from gateway.api.reports import Reports
from gateway.api.streams import EVENTS, EventStream
from gateway.dialects import tgi
from gateway.dialects.openai_chat import ChatCompletion, ChatCompletionBody
from gateway.dialects.openai_completions import Completion, CompletionBody
from gateway.dialects.tgi import (
    CompatibleAnswer,
    CompatibleBody,
    GenerateAnswer,
    GenerateBody,
    Info,
    TgiReply,
    TokenizeBody,
    Tokens,
    Untouched,
)
from gateway.engines.base import Call
from gateway.errors import InvalidRequest, ModelNotLoaded, NotFound, UpstreamFailed
from gateway.fleet.fleet import Fleet
from gateway.fleet.replicas import Served
from gateway.lifecycle import State
from gateway.passage import Passage, PutThrough, Whole, look
from gateway.relay import Client, Relay, Tokenization, Worked
from gateway.writers import Alone

BASE = "/models/{model_id}/tgi"
HEALTH = ("", "/health", "/ping")
ONLY_OF_TGI = (("POST", "/invocations"), ("POST", "/vertex"), ("POST", "/chat_tokenize"), ("GET", "/metrics"))
OWN_PAGES = ("/docs", "/redoc")
"""TGI's own page would look for its parts where the gateway is."""
NEVER_STREAMED = ("/generate", "/tokenize", "/chat_tokenize", "/vertex")
_WELL = {State.READY, State.STOPPED}


class ServedModel(BaseModel):
    id: str
    object: str
    created: int
    owned_by: str


class ServedModels(BaseModel):
    """The one model that there is at this address."""

    object: str
    data: list[ServedModel]


_ERRORS = documented(400, 404, 408, 413, 422, 500, 502, 503, 504)
_STREAM = {"content": EVENTS, "description": "The text; streamed, its tokens as they come"}
_CHUNKS = {"content": openai.CHUNKS, "description": "The answer; streamed, its pieces as they come"}
_NO_GENERATION = documented(404, 422, 503)


def tgi_router(fleet: Fleet, client: Client, reports: Reports) -> APIRouter:
    router = APIRouter(tags=["tgi"], route_class=_route_class(fleet, client))
    _add_generation(router, fleet, client, reports)
    _add_tokens(router, fleet, client)
    _add_openai(router, fleet, client)
    _add_reports(router, fleet, reports)
    add_pages(
        router,
        fleet,
        base=BASE,
        title="TGI",
        version=reports.version,
        openapi_at="/api-doc/openapi.json",
    )
    _add_what_only_tgi_has(router, fleet)
    return router


def _add_generation(router: APIRouter, fleet: Fleet, client: Client, reports: Reports) -> None:
    async def answered(model_id: str, request: Request, body: GenerateBody, prefer: str | None, *, stream: bool) -> Any:
        began_at = time.monotonic()
        spec = fleet.catalog.by_id(model_id)
        if tgi.exceeds_context(spec, body):
            words = f"must leave room for `inputs` in the {spec.context_tokens} tokens that this model takes"
            raise invalid(words, "less_than", "parameters", "max_new_tokens")
        wanted = tgi.to_request(spec, body, stream=stream)
        asked = exchange(fleet.get(spec), wanted, client, request, prefer)
        reply = TgiReply(body, wanted, stream=stream)
        if stream:
            return Relay([asked], Alone(reply))

        async def work() -> Response:
            result = await asked.whole()
            took_s = time.monotonic() - began_at
            headers = tgi.headers(body.inputs, result, total_s=took_s, device=reports.device(spec))
            return Response(reply.whole(result), media_type="application/json", headers=headers)

        return Worked(work)

    @router.post(
        BASE, summary="Generate text, in a list", response_model=CompatibleAnswer, responses={**_ERRORS, 200: _STREAM}
    )
    async def compatible(model_id: str, request: Request, body: CompatibleBody, prefer: Prefer = None) -> Any:
        """As `/generate`, or `/generate_stream` with `stream: true`; the text begins with the prompt by default."""
        return await answered(model_id, request, body.with_defaults(), prefer, stream=body.stream)

    @router.post(BASE + "/generate", summary="Generate text", response_model=GenerateAnswer, responses=_ERRORS)
    async def generate(model_id: str, request: Request, body: GenerateBody, prefer: Prefer = None) -> Any:
        """Generate text as TGI does. Starts the model if it is not running, which may take minutes."""
        return await answered(model_id, request, body, prefer, stream=False)

    @router.post(
        BASE + "/generate_stream",
        summary="Generate text, streamed",
        response_class=EventStream,
        responses={**_ERRORS, 200: _STREAM},
    )
    async def generate_stream(model_id: str, request: Request, body: GenerateBody, prefer: Prefer = None) -> Any:
        """Generate text as TGI does, token by token; the last event has the whole text."""
        return await answered(model_id, request, body, prefer, stream=True)


def _add_tokens(router: APIRouter, fleet: Fleet, client: Client) -> None:
    @router.post(
        BASE + "/tokenize",
        summary="Cut a text into tokens",
        response_model=Tokens,
        responses=documented(404, 408, 413, 422, 500, 502, 503, 504),
    )
    async def tokenize(model_id: str, request: Request, body: TokenizeBody, prefer: Prefer = None) -> Any:
        """Tell the tokens of a text. Starts the model if it is not running."""
        asked = Tokenization(
            fleet.get(fleet.catalog.by_id(model_id)),
            tgi.to_tokenize(body),
            client,
            request_id=request_id_of(request.scope),
            max_wait_s=max_wait_s(prefer),
        )

        async def work() -> bytes:
            return tgi.tokenized(await asked.tokens())

        return Worked(work)


def _add_openai(router: APIRouter, fleet: Fleet, client: Client) -> None:
    @router.post(
        BASE + "/v1/chat/completions",
        summary="Answer a conversation",
        response_model=ChatCompletion,
        responses={**_ERRORS, 200: _CHUNKS},
    )
    async def chat_completions(
        model_id: str,
        request: Request,
        body: Annotated[ChatCompletionBody, BeforeValidator(tgi.as_openai)],
        prefer: Prefer = None,
    ) -> Any:
        """As the gateway's `/v1`, with the model of this address and the stop text kept."""
        instance = fleet.get(fleet.catalog.by_id(model_id))
        return openai.chat(instance, client, request, body, prefer, as_tgi=True)

    @router.post(
        BASE + "/v1/completions",
        summary="Continue a prompt",
        response_model=Completion,
        responses={**_ERRORS, 200: _CHUNKS},
    )
    async def completions(model_id: str, request: Request, body: CompletionBody, prefer: Prefer = None) -> Any:
        """As the gateway's `/v1`, with the model of this address and the stop text kept."""
        instance = fleet.get(fleet.catalog.by_id(model_id))
        return openai.completion(instance, client, request, body, prefer, as_tgi=True)


def _add_reports(router: APIRouter, fleet: Fleet, reports: Reports) -> None:
    @router.get(BASE + "/v1/models", summary="The model", response_model=ServedModels, responses=_NO_GENERATION)
    async def models(model_id: str) -> Any:
        name = tgi.served_name(fleet.catalog.by_id(model_id))
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": name}]}

    @router.get(BASE + "/info", summary="Model and limits", response_model=Info, responses=_NO_GENERATION)
    async def info(model_id: str) -> Any:
        """What TGI tells of the model it serves. Does not wake the model."""
        spec = fleet.catalog.by_id(model_id)
        return tgi.info(spec, await reports.facts(spec), version=reports.version)

    async def health(model_id: str) -> Response:
        """200 without a body if the model is ready, or stopped and started by the next request. Does not wake it.

        A TGI that callers are put through to answers for itself; where it does not run, this is 503.
        """
        return Response() if fleet.status(fleet.catalog.by_id(model_id)).state in _WELL else _unhealthy()

    for path in HEALTH:
        for method in ("GET", "HEAD"):
            router.add_api_route(
                BASE + path,
                health,
                methods=[method],
                summary="Is the server well?",
                response_class=Response,
                responses=_NO_GENERATION,
                include_in_schema=method == "GET",
            )


def _add_what_only_tgi_has(router: APIRouter, fleet: Fleet) -> None:
    async def not_here(model_id: str) -> Response:
        name = fleet.catalog.by_id(model_id).id
        raise NotFound(f"Only a TGI that callers are put through to has this; {name} is served in another way.")

    for method, path in ONLY_OF_TGI:
        router.add_api_route(BASE + path, not_here, methods=[method], include_in_schema=False)


def _unhealthy() -> Response:
    return JSONResponse({"error": "unhealthy", "error_type": "healthcheck"}, 503)


# ---- putting through ------------------------------------------------------------------------------------------------


def speaks_tgi(instance: Served) -> bool:
    """Say whether callers of the model may be put through: its server is a TGI, and nothing is to be added."""
    spec = instance.spec
    return instance.engine.speaks == "tgi" and not spec.parameters and not spec.overrides


def _route_class(fleet: Fleet, client: Client) -> type[APIRoute]:
    """Return the kind of route that puts callers through where they may be, before anything of the body is read."""

    class TgiRoute(JsonRoute):
        def answering(self, handle: Handler) -> Handler:
            path = self.path.removeprefix(BASE)

            async def put_through_or_handle(request: Request) -> Response:
                instance = fleet.get(fleet.catalog.by_id(request.path_params["model_id"]))
                if not speaks_tgi(instance) or path in OWN_PAGES:
                    return await handle(request)
                if request.method == "POST":
                    return await _put_through(instance, client, request, path)
                return Worked(partial(_looked_up, instance, client, request, path))

            return put_through_or_handle

    return TgiRoute


async def _put_through(instance: Served, client: Client, request: Request, path: str) -> Response:
    """Return the server's own answer to what the caller sent. A query stays here: TGI has none, and it may hold keys.

    Raises:
        BodyTooLarge, BodyTimeout, InvalidRequest: the body did not come, or is compressed.
    """
    refuse_compressed(request)
    try:
        sent = await request.body()
    except ClientDisconnect:
        raise InvalidRequest("The connection was closed before the body had come.") from None
    kind = header(request.scope, b"content-type")
    passage = Passage(
        instance,
        Call(path or "/", sent, {"content-type": kind} if kind else {}),
        client,
        Untouched(as_openai=path.startswith("/v1/")),
        streamed=_is_streamed(path, sent),
        request_id=request_id_of(request.scope),
        max_wait_s=max_wait_s(header(request.scope, b"prefer")),
    )
    return PutThrough(passage)


def _is_streamed(path: str, sent: bytes) -> bool:
    """Say whether TGI will answer with a stream; it judges the body itself."""
    if path in NEVER_STREAMED or path == "/generate_stream":
        return path == "/generate_stream"
    try:
        body = json.loads(sent) if b'"stream"' in sent else None
    except (ValueError, RecursionError):
        return False
    return isinstance(body, dict) and body.get("stream") is True


async def _looked_up(instance: Served, client: Client, request: Request, path: str) -> Response:
    """Return the server's own answer to a question that does not wake it.

    Raises:
        ModelNotLoaded: there is no server.
        UpstreamFailed: it does not answer.
    """
    call = Call(path or "/", method="GET")
    try:
        found = await look(instance, call, client, request_id=request_id_of(request.scope))
    except (ModelNotLoaded, UpstreamFailed):
        if path in HEALTH:
            return _unhealthy()
        raise
    return _as_response(found)


def _as_response(found: Whole) -> Response:
    answer = Response(found.body, found.status)
    answer.raw_headers = [*found.head, (b"content-length", b"%d" % len(found.body))]
    return answer
