"""The gateway itself: what it is, whether it is well, and what happens in it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header
from pydantic import BaseModel
from starlette.responses import Response

from gateway.api.problems import documented
from gateway.api.reports import GatewayInfo, GatewayStatus, Reports
from gateway.api.streams import EVENTS, EventStream, LineStream
from gateway.fleet.fleet import Fleet
from gateway.fleet.journal import Entry, Journal
from gateway.lifecycle import RUNNING, State

ENDPOINTS = {
    "POST /generate": "Generate text from prompt",
    "POST /inference": "Generate text, the continuation alone",
    "POST /api/llm/inference": "Continue many prompts",
    "POST /v1/chat/completions": "OpenAI's chats",
    "POST /v1/completions": "OpenAI's completions",
    "GET /v1/models": "OpenAI's list of models",
    "/models/{id}/tgi": "TGI's own API for one model, whatever its engine",
    "GET /models": "The models, and what they are doing",
    "GET /health": "Health check",
    "GET /status": "The gateway, its GPUs and the default model",
    "GET /info": "Model information",
    "GET /metrics": "The gateway's figures, for Prometheus",
    "GET /events": "State changes and progress, as server-sent events",
    "GET /docs": "Interactive API documentation",
}


class Overview(BaseModel):
    message: str
    service: str
    version: str
    status: str
    checkpoint: str | None
    models: list[str]
    running_containers: list[str]
    endpoints: dict[str, str]


class Health(BaseModel):
    """`model_loaded` and `checkpoint` are the default model's; null is that there is none."""

    model_config = {"protected_namespaces": ()}

    status: str
    model_loaded: bool
    checkpoint: str | None
    timestamp: str


def overview_router(fleet: Fleet, reports: Reports) -> APIRouter:
    router = APIRouter(tags=["gateway"])

    @router.get("/", summary="Get API info", response_model=Overview)
    @router.head("/", include_in_schema=False)
    async def root() -> Any:
        statuses = fleet.statuses()
        return {
            "message": "LLM Inference API",
            "service": "Inference API",
            "version": reports.version,
            "status": "running",
            "checkpoint": fleet.catalog.default_model,
            "models": [status.spec.id for status in statuses],
            "running_containers": [status.spec.id for status in statuses if status.state in RUNNING],
            "endpoints": ENDPOINTS,
        }

    @router.get("/health", summary="Is the gateway up?", response_model=Health)
    @router.head("/health", include_in_schema=False)
    @router.head("/health/live", include_in_schema=False)
    @router.get("/health/live", include_in_schema=False)
    async def health() -> Any:
        """200 once the gateway serves, whatever its models do. Wakes none of them."""
        default = fleet.catalog.default_model
        loaded = default is not None and fleet.status(fleet.catalog.models[default]).state is State.READY
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return {"status": "ok", "model_loaded": loaded, "checkpoint": default, "timestamp": now}

    @router.get("/status", summary="The gateway, its GPUs and the default model", response_model=GatewayStatus)
    async def status() -> Any:
        """Wakes no model. null is what is not known."""
        return await reports.gateway_status()

    @router.get("/info", summary="What is known of the default model", response_model=GatewayInfo)
    async def info() -> Any:
        """What the model's files and the catalog's `metadata` tell; null is not known. Wakes no model."""
        return await reports.gateway_info()

    @router.get(
        "/events",
        summary="Follow what happens",
        response_class=EventStream,
        responses={200: {"content": EVENTS}, **documented(422)},
    )
    async def events(last_event_id: Annotated[str | None, Header()] = None) -> Response:
        """Server-sent events `state`, `progress`, `catalog`; with `Last-Event-ID`, those since then first (1,000)."""
        journal = fleet.journal
        source = _as_events(journal, _after(journal, last_event_id))
        return LineStream(
            source, "text/event-stream; charset=utf-8", until=fleet.closing, heartbeat=b": still here\n\n"
        )

    return router


def _after(journal: Journal, last_event_id: str | None) -> int:
    """Return the id to go on from. An id we never gave is from before a restart: all we remember is new then."""
    if last_event_id is None:
        return journal.last_id
    known = last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 18
    after = int(last_event_id) if known else 0
    return after if after <= journal.last_id else 0


async def _as_events(journal: Journal, after_id: int) -> AsyncIterator[bytes]:
    yield b": the last event was %d\n\n" % after_id
    async for entry in journal.follow(after_id):
        yield _event(entry)


def _event(entry: Entry) -> bytes:
    data = json.dumps(entry.data, ensure_ascii=False, separators=(",", ":"))
    return f"id: {entry.id}\nevent: {entry.kind}\ndata: {data}\n\n".encode()
