"""`POST /generate` and `/generate_stream`: the data plane of the gateway's own API."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.exceptions import RequestValidationError

from gateway.api.json_body import JsonRoute
from gateway.api.middleware import request_id_of
from gateway.api.problems import documented
from gateway.api.streams import EventStream
from gateway.catalog import Catalog, ModelSpec
from gateway.dialects.native import GenerateAnswer, GenerateBody, NativeReply, to_request, with_catalog
from gateway.fleet.fleet import Fleet
from gateway.relay import Client, Relay

_WAIT = re.compile(r"(?:^|,)\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(?=$|[,;])", re.ASCII | re.IGNORECASE)


def generate_router(fleet: Fleet, client: Client) -> APIRouter:
    router = APIRouter(tags=["generation"], route_class=JsonRoute)
    errors = documented(400, 404, 408, 413, 422, 500, 502, 503, 504)
    stream = {
        "content": {"text/event-stream": {}},
        "description": "The text; streamed, its tokens as they come",
    }

    @router.post("/generate", summary="Generate text", response_model=GenerateAnswer, responses={**errors, 200: stream})
    async def generate(request: Request, body: GenerateBody, prefer: Annotated[str | None, Header()] = None) -> Any:
        """Generate text from a prompt. Starts the model if it is not running, which may take minutes."""
        spec = _model(fleet.catalog, body)
        _within_context(spec, body)
        body = with_catalog(spec, body)
        wanted = to_request(spec, body)
        reply = NativeReply(spec, body, wanted)
        return Relay(
            fleet.get(spec),
            wanted,
            reply,
            client,
            request_id=request_id_of(request.scope),
            max_wait_s=_max_wait_s(prefer),
        )

    @router.post(
        "/generate_stream",
        summary="Generate text, streamed",
        response_class=EventStream,
        responses={**errors, 200: stream},
    )
    async def generate_stream(
        request: Request, body: GenerateBody, prefer: Annotated[str | None, Header()] = None
    ) -> Any:
        """As `/generate` with `stream: true`."""
        return await generate(request, body.model_copy(update={"stream": True}), prefer)

    return router


def _model(catalog: Catalog, body: GenerateBody) -> ModelSpec:
    name = body.model_name or catalog.default_model
    if name is None:
        raise _invalid("model_id", "the catalog has no default_model, so the request must name its model", "missing")
    return catalog.resolve(name)


def _within_context(spec: ModelSpec, body: GenerateBody) -> None:
    for field in ("max_new_tokens", "max_tokens"):
        asked, most = getattr(body, field), spec.context_tokens
        if asked is not None and most is not None and asked > most:
            raise _invalid(field, f"must be at most {most}, the context of {spec.id} in tokens", "less_than_equal")


def _invalid(field: str, words: str, kind: str) -> RequestValidationError:
    return RequestValidationError([{"loc": ("body", field), "msg": words, "type": kind}])


def _max_wait_s(prefer: str | None) -> float | None:
    """Return the bound that `Prefer: wait=N` (RFC 7240) sets on the wait for a cold model, in seconds."""
    found = _WAIT.search(prefer or "")
    return float(found[1]) if found else None
