"""`/models/{id}/llm-service`: token probabilities of one model (documents/llm-service.md)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse

from gateway.api.asking import Prefer, exchange
from gateway.api.json_body import JsonRoute
from gateway.api.pages import add_pages
from gateway.api.problems import documented
from gateway.api.reports import Reports, ServiceStatus
from gateway.dialects import llm_service
from gateway.dialects.llm_service import LlmServiceAnswer, LlmServiceBody
from gateway.fleet.fleet import Fleet
from gateway.fleet.status import Status, described
from gateway.lifecycle import State
from gateway.relay import Client, Worked

BASE = "/models/{model_id}/llm-service"
LOADING_RETRY_S = 2
_HEALTHY = {State.READY, State.STOPPED}
_FAILED = {State.FAILED, State.UNHEALTHY}


class Healthy(BaseModel):
    status: str
    timestamp: str


def llm_service_router(fleet: Fleet, client: Client, reports: Reports) -> APIRouter:
    router = APIRouter(tags=["llm-service"], route_class=JsonRoute)

    @router.post(
        BASE + "/generate",
        summary="Token probabilities for what comes next",
        response_model=LlmServiceAnswer,
        responses=documented(400, 404, 408, 413, 422, 500, 502, 503, 504),
    )
    async def generate(model_id: str, request: Request, body: LlmServiceBody, prefer: Prefer = None) -> Any:
        """Generate text, and tell the likeliest tokens at its first position. Starts the model if it is not running.

        Probabilities are softmax(logits / temperature) over the whole vocabulary; temperature 0 reads as 1.
        """
        spec = fleet.catalog.by_id(model_id)
        instance = fleet.get(spec)
        wanted = llm_service.to_request(spec, body)
        asked = exchange(instance, wanted, client, request, prefer)

        async def work() -> bytes:
            result = await asked.whole()
            tokens = llm_service.first_of(result)
            if llm_service.lacks_alternatives(result, wanted):
                again = exchange(instance, llm_service.unsharpened(wanted), client, request, prefer)
                again.admission = asked.admission
                plain = llm_service.first_of(await again.whole())
                tokens = llm_service.completed(tokens, plain, wanted.temperature)
            return llm_service.answer(spec, wanted, result, tokens, device=reports.device(spec))

        return Worked(work)

    @router.head(BASE + "/health", include_in_schema=False)
    @router.get(
        BASE + "/health", summary="Is the service well?", response_model=Healthy, responses=documented(404, 422, 503)
    )
    async def health(model_id: str) -> Any:
        """200 if the model is ready, or stopped and started by the next request. Does not wake it."""
        status = fleet.status(fleet.catalog.by_id(model_id))
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return _answer(status, {"status": _word(status, "healthy"), "timestamp": now})

    @router.get(
        BASE + "/status", summary="Service and model", response_model=ServiceStatus, responses=documented(404, 422, 503)
    )
    async def status(model_id: str) -> Any:
        """Tell of the service, the model and the machine. Does not wake the model; 503 while it starts."""
        spec = fleet.catalog.by_id(model_id)
        told = await reports.status(spec, _word(fleet.status(spec), "running"))
        return _answer(fleet.status(spec), told.model_dump(), unless_failed=True)

    add_pages(router, fleet, base=BASE, title="LLM Service", version=reports.version)
    return router


def _word(status: Status, well: str) -> str:
    if status.state in _HEALTHY:
        return well
    return "failed" if status.state in _FAILED else "starting"


def _answer(status: Status, body: dict[str, Any], *, unless_failed: bool = False) -> JSONResponse:
    """Return the report, with status 503 and the reason where the service is not well."""
    if status.state in _HEALTHY or (unless_failed and status.state in _FAILED):
        return JSONResponse(body)
    if status.state in _FAILED:
        return JSONResponse({**body, **_failure(status)}, 503)
    words = "Model is not loaded. Please wait for model loading to complete."
    reason = {"detail": words, "error_code": "MODEL_NOT_LOADED", "progress": described(status)}
    return JSONResponse({**body, **reason}, 503, {"retry-after": str(LOADING_RETRY_S)})


def _failure(status: Status) -> dict[str, Any]:
    if status.state is State.UNHEALTHY or status.failure is None:
        return {"detail": "The model's server misses its health checks.", "error_code": "MODEL_UNHEALTHY"}
    return {"detail": status.failure.error.detail, "error_code": status.failure.error.code}
