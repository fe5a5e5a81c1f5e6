"""`POST /api/llm/inference` (documents/autotrain-inference.md): many prompts, answered in their order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Request

from gateway.api.asking import Prefer, exchange, within_context
from gateway.api.json_body import JsonRoute
from gateway.api.problems import documented
from gateway.dialects import autotrain
from gateway.dialects.autotrain import AutotrainAnswer, AutotrainBody
from gateway.errors import LoadingFailed, StartFailed
from gateway.fleet.fleet import Fleet
from gateway.relay import Client, Worked, as_one, together


def autotrain_router(fleet: Fleet, client: Client) -> APIRouter:
    router = APIRouter(tags=["generation"], route_class=JsonRoute)

    @router.post(
        "/api/llm/inference",
        summary="Continue many prompts",
        response_model=AutotrainAnswer,
        responses=documented(400, 404, 408, 413, 422, 500, 502, 503, 504),
    )
    async def inference(request: Request, body: AutotrainBody, prefer: Prefer = None) -> Any:
        """Continue each prompt, and answer the continuations in the prompts' order; if one fails, that failure.

        As many at once as the model takes. Starts the model if it is not running, which may take minutes.
        """
        spec = fleet.catalog.resolve(body.model_path)
        if "max_new_tokens" in body.model_fields_set:
            within_context(spec, body.max_new_tokens, "max_new_tokens")
        with _as_loading_failed():
            instance = fleet.get(spec)
        wanted = autotrain.to_requests(spec, body)
        exchanges = as_one([exchange(instance, each, client, request, prefer) for each in wanted])

        async def work() -> bytes:
            with _as_loading_failed():
                return autotrain.answer(
                    body, await together([each.whole for each in exchanges], at_once=spec.max_concurrency)
                )

        return Worked(work)

    return router


@contextmanager
def _as_loading_failed() -> Iterator[None]:
    """Report a failed start with the status that this document has for it."""
    try:
        yield
    except StartFailed as error:
        raise LoadingFailed(error.detail, retry_after_s=error.retry_after_s, **error.extra) from None
