"""`POST /inference` (documents/inference-api.md)."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from gateway.api.asking import Prefer, exchange, invalid, model_of, within_context
from gateway.api.json_body import JsonRoute
from gateway.api.problems import documented
from gateway.api.streams import EVENTS
from gateway.dialects import inference as dialect
from gateway.dialects.inference import InferenceAnswer, InferenceBody, InferenceReply
from gateway.fleet.fleet import Fleet
from gateway.relay import Client, Relay
from gateway.writers import Alone


def inference_router(fleet: Fleet, client: Client) -> APIRouter:
    router = APIRouter(tags=["generation"], route_class=JsonRoute)
    errors = documented(400, 404, 408, 413, 422, 500, 502, 503, 504)
    stream = {"content": EVENTS, "description": "The text; streamed, its pieces as they come"}

    @router.post("/inference", summary="Infer", response_model=InferenceAnswer, responses={**errors, 200: stream})
    async def inference(request: Request, body: InferenceBody, prefer: Prefer = None) -> Any:
        """Continue a prompt or answer a conversation, and tell that alone. Starts the model if it is not running."""
        spec = model_of(fleet.catalog, body.model, "model")
        _has_what_its_mode_takes(body)
        if "max_tokens" in body.parameters.model_fields_set:
            within_context(spec, body.parameters.max_tokens, "parameters", "max_tokens")
        wanted = dialect.to_request(spec, body)
        reply = InferenceReply(spec, stream=body.stream)
        return Relay([exchange(fleet.get(spec), wanted, client, request, prefer)], Alone(reply))

    return router


def _has_what_its_mode_takes(body: InferenceBody) -> None:
    """Return if the body has a prompt or messages, as its mode takes them.

    Raises:
        RequestValidationError: it has not, or has what its mode has no use for.
    """
    mode = dialect.mode_of(body)
    taken, other = ("messages", "prompt") if mode == "chat" else ("prompt", "messages")
    if getattr(body, other) is not None:
        raise invalid(f"mode {mode} takes {taken} and no {other}", "value_error", other)
    if getattr(body, taken) is None:
        raise invalid(f"Field required: mode {mode} takes {taken}", "missing", taken)
