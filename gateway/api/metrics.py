"""`GET /metrics`: the gateway's figures for Prometheus, and the count of requests."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastapi import APIRouter
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import PlainTextResponse, Response
from starlette.types import Scope

from gateway.api.headers import route_path
from gateway.api.middleware import Ended
from gateway.figures import Figures, Gpu
from gateway.fleet.fleet import Fleet
from gateway.fleet.gpus import Gpus
from gateway.outcome import outcome_of

_APIS = {
    **dict.fromkeys(("generate", "generate_stream"), "generate"),
    "inference": "inference",
    "v1": "openai",
    **dict.fromkeys(("", "health", "status", "info", "events", "metrics", "docs", "redoc", "openapi.json"), "gateway"),
}
"""By the first step of a path."""
_OF_A_MODEL = {"llm-service": "llm-service", "api-server": "api-server", "tgi": "tgi"}
"""By what follows a model's id."""
_AUTOTRAIN = re.compile(r"/api/llm/inference(?:/.*)?", re.DOTALL)


def metrics_router(fleet: Fleet, figures: Figures) -> APIRouter:
    router = APIRouter(tags=["gateway"])

    @router.get("/metrics", summary="The gateway's figures, for Prometheus", response_class=PlainTextResponse)
    @router.head("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        """States, starts, stops, waits, tokens, GPUs and requests, in Prometheus' text format. Wakes no model."""
        page = await figures.page(fleet.statuses(), gpus_of(fleet.gpus))
        return Response(page, headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})

    return router


def gpus_of(gpus: Gpus) -> Sequence[Gpu]:
    """Return the GPUs that are known or held, with what models hold of them, in bytes; None is all of it."""
    return [
        Gpu(device.id, device.memory_bytes, {name: held.memory_bytes for name, held in gpus.holders(device.id).items()})
        for device in gpus.in_sight()
    ]


def _by_its_steps(path: str) -> str:
    if path[:1] != "/":
        return "other"
    steps = path.split("/", 4)
    if steps[1] == "models":
        return _OF_A_MODEL.get(steps[3], "models") if len(steps) > 3 and steps[2] else "models"
    return _APIS.get(steps[1]) or ("autotrain" if _AUTOTRAIN.fullmatch(path) else "other")


_ASKED_OFTEN = {
    path: _by_its_steps(path)
    for path in (
        "/generate",
        "/generate_stream",
        "/inference",
        "/api/llm/inference",
        "/v1/chat/completions",
        "/v1/completions",
    )
}
"""What is met without taking a path apart."""


def api_of(path: str) -> str:
    """Return which API an address belongs to: one of a table, whatever the path holds."""
    return _ASKED_OFTEN[path] if path in _ASKED_OFTEN else _by_its_steps(path)


def counted(figures: Figures) -> Ended:
    """Return what counts every request, however it ends: those too that are refused for want of a key."""

    def count(scope: Scope, status: int | None, took_s: float) -> None:
        figures.answered(api_of(route_path(scope)), outcome_of(scope, status), took_s)

    return count
