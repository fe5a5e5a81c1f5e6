"""`POST /generate` and `/generate_stream`: the data plane of the gateway's own API."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from gateway.api.asking import Prefer, exchange, model_of, within_context
from gateway.api.json_body import JsonRoute
from gateway.api.problems import documented
from gateway.api.streams import EVENTS, EventStream
from gateway.dialects.native import GenerateAnswer, GenerateBody, NativeReply, to_request, with_catalog
from gateway.fleet.fleet import Fleet
from gateway.relay import Client, Relay
from gateway.writers import Alone


def generate_router(fleet: Fleet, client: Client) -> APIRouter:
    router = APIRouter(tags=["generation"], route_class=JsonRoute)
    errors = documented(400, 404, 408, 413, 422, 500, 502, 503, 504)
    stream = {"content": EVENTS, "description": "The text; streamed, its tokens as they come"}

    @router.post("/generate", summary="Generate text", response_model=GenerateAnswer, responses={**errors, 200: stream})
    async def generate(request: Request, body: GenerateBody, prefer: Prefer = None) -> Any:
        """Generate text from a prompt. Starts the model if it is not running, which may take minutes."""
        spec = model_of(fleet.catalog, body.model_name, "model_id")
        for field in ("max_new_tokens", "max_tokens"):
            within_context(spec, getattr(body, field), field)
        body = with_catalog(spec, body)
        wanted = to_request(spec, body)
        reply = NativeReply(spec, body, wanted)
        return Relay([exchange(fleet.get(spec), wanted, client, request, prefer)], Alone(reply))

    @router.post(
        "/generate_stream",
        summary="Generate text, streamed",
        response_class=EventStream,
        responses={**errors, 200: stream},
    )
    async def generate_stream(request: Request, body: GenerateBody, prefer: Prefer = None) -> Any:
        """As `/generate` with `stream: true`."""
        return await generate(request, body.model_copy(update={"stream": True}), prefer)

    return router
