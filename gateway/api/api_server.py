"""`/models/{id}/api-server`: one model, as if it had a server to itself (documents/api-server.md)."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from gateway.api.asking import Prefer, exchange, invalid
from gateway.api.json_body import JsonRoute
from gateway.api.pages import add_pages
from gateway.api.problems import documented
from gateway.api.reports import ModelInfo, Reports
from gateway.dialects import api_server
from gateway.dialects.api_server import ApiServerAnswer, ApiServerBody
from gateway.fleet.fleet import Fleet
from gateway.lifecycle import State
from gateway.relay import Client, Worked

BASE = "/models/{model_id}/api-server"
ENDPOINTS = {
    "POST /generate": "Generate text from prompt",
    "GET /health": "Health check",
    "GET /info": "Model information",
    "GET /docs": "Interactive API documentation",
}


class Overview(BaseModel):
    service: str
    version: str
    checkpoint: str
    status: str
    endpoints: dict[str, str]


class Health(BaseModel):
    model_config = {"protected_namespaces": ()}

    status: str
    model_loaded: bool
    checkpoint: str


def api_server_router(fleet: Fleet, client: Client, reports: Reports) -> APIRouter:
    router = APIRouter(tags=["api-server"], route_class=JsonRoute)

    @router.get(BASE, summary="Overview", response_model=Overview, responses=documented(404, 422))
    async def overview(model_id: str) -> Any:
        spec = fleet.catalog.by_id(model_id)
        return {
            "service": "Inference API",
            "version": reports.version,
            "checkpoint": spec.id,
            "status": "running",
            "endpoints": ENDPOINTS,
        }

    @router.post(
        BASE + "/generate",
        summary="Generate text",
        response_model=ApiServerAnswer,
        responses=documented(400, 404, 408, 413, 422, 500, 502, 503, 504),
    )
    async def generate(model_id: str, request: Request, body: ApiServerBody, prefer: Prefer = None) -> Any:
        """Generate text from a prompt. Starts the model if it is not running, which may take minutes."""
        spec = fleet.catalog.by_id(model_id)
        vocab_size = (await reports.facts(spec)).vocab_size if body.top_k else None
        if body.top_k and vocab_size and body.top_k > vocab_size:
            words = f"must be at most {vocab_size}, the vocabulary of {spec.id}"
            raise invalid(words, "less_than_equal", "top_k")
        asked = exchange(fleet.get(spec), api_server.to_request(spec, body), client, request, prefer)

        async def work() -> bytes:
            return api_server.answer(spec, body, await asked.whole())

        return Worked(work)

    @router.head(BASE + "/health", include_in_schema=False)
    @router.get(BASE + "/health", summary="Health check", response_model=Health, responses=documented(404, 422))
    async def health(model_id: str) -> Any:
        """Always 200; `model_loaded` says whether the model is ready. Does not wake it."""
        spec = fleet.catalog.by_id(model_id)
        loaded = fleet.status(spec).state is State.READY
        return {"status": "ok", "model_loaded": loaded, "checkpoint": spec.id}

    @router.get(BASE + "/info", summary="Model information", response_model=ModelInfo, responses=documented(404, 422))
    async def info(model_id: str) -> Any:
        """What the model's files and the catalog's `metadata` tell; null is not known. Does not wake the model."""
        return await reports.info(fleet.catalog.by_id(model_id))

    add_pages(router, fleet, base=BASE, title="Inference API", version=reports.version)
    return router
