"""The control plane: list, look at, start, stop and restart models, and read their logs."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.responses import JSONResponse, PlainTextResponse, Response

from gateway.api.problems import documented
from gateway.api.streams import LineStream
from gateway.errors import GatewayError, NotFound
from gateway.fleet.fleet import Fleet
from gateway.fleet.identity import server_name
from gateway.fleet.status import Failure, Status, described
from gateway.lifecycle import RUNNING
from gateway.runtimes.base import Handle

MOST_LINES = 10_000


class LastError(BaseModel):
    """How the last life that failed ended. `at` and `retry_at` are seconds since 1970."""

    error_code: str
    detail: str
    evidence: list[str]
    fix: str | None
    at: float
    retry_at: float | None


class LastStop(BaseModel):
    """Why the model last began to go down, also if it is up again: `idle`, `operator`, `makes room for x`, an error.

    `at` is in seconds since 1970.
    """

    reason: str
    at: float


class Progress(BaseModel):
    """How far a start has come. `done` and `total` count in `unit`.

    `eta_s` is in how many seconds the model is ready, as its last starts on this machine went. Where none was seen, it
    is how long this phase goes on, if that can be told from its pace; else null.
    """

    phase: str
    done: float | None
    total: float | None
    unit: str | None
    eta_s: float | None


class Replica(BaseModel):
    """One of a model's servers."""

    container_name: str
    state: str
    in_flight: int
    queued: int
    port: int | None
    gpus: list[str]


class Model(BaseModel):
    """One model of the catalog, and what is known of it now.

    `waits_for`: why it has no GPUs yet, while it waits.

    `held_for`: the model that gets its GPUs as soon as what it works on has ended; until then it takes nothing new.

    Of several replicas, `state` is that of the one that serves best, and all numbers are sums.
    """

    id: str
    name: str
    hf_name: str | None
    running: bool
    state: str
    engine: str
    runtime: str
    progress: Progress | None
    in_flight: int
    queued: int
    idle_seconds: float | None
    port: int | None
    gpus: list[str]
    waits_for: str | None
    held_for: str | None
    last_error: LastError | None
    last_stop: LastStop | None
    replicas: list[Replica]


class Models(BaseModel):
    models: list[Model]


class Started(BaseModel):
    message: str
    port: int | None
    container_name: str


class Message(BaseModel):
    message: str


def models_router(fleet: Fleet) -> APIRouter:
    router = APIRouter(tags=["models"])
    listed = _Listed()

    @router.get("/models", response_model=Models, summary="List available models")
    @router.head("/models", include_in_schema=False)
    async def models() -> Any:
        return Response(listed.page(fleet.statuses()), media_type="application/json")

    @router.get("/models/{model_id}", response_model=Model, summary="Show one model", responses=documented(404, 422))
    async def model(model_id: str) -> Any:
        return model_json(fleet.status(fleet.catalog.by_id(model_id)))

    @router.post(
        "/models/{model_id}/start",
        response_model=Started,
        summary="Start a model",
        responses={202: {"model": Started, "description": "It is starting"}, **documented(404, 422, 503, 504)},
    )
    async def start(model_id: str, wait: bool = True) -> Any:
        """Start the model's server and answer when it is ready; with `wait=false` answer 202 at once.

        Also starts a model that failed lately and cools down. A caller who leaves does not end the start.
        """
        spec = fleet.catalog.by_id(model_id)
        was_running = fleet.status(spec).state in RUNNING
        handle = await fleet.get(spec).start(wait=wait)
        if handle is None:
            return JSONResponse(_started(f"Container for {spec.id} is starting", server_name(spec), None), 202)
        words = "is already running" if was_running else "started"
        return _started(f"Container for {spec.id} {words}", handle.name, handle)

    @router.post(
        "/models/{model_id}/stop", response_model=Message, summary="Stop a model", responses=documented(404, 422, 500)
    )
    async def stop(model_id: str, force: bool = False) -> Any:
        """Let running requests finish, stop the server, and answer when it is gone; `force=true` cuts them off.

        A download of the model is called off.
        """
        spec = fleet.catalog.by_id(model_id)
        await fleet.stop(spec, force=force)
        return {"message": f"Container for {spec.id} stopped"}

    @router.post(
        "/models/{model_id}/restart",
        response_model=Started,
        summary="Restart a model",
        responses=documented(404, 422, 503, 504),
    )
    async def restart(model_id: str, force: bool = False) -> Any:
        """Stop the server as `stop` does, start it again, and answer when it is ready."""
        spec = fleet.catalog.by_id(model_id)
        handle = await fleet.running(spec).restart(force=force)
        return _started(f"Container for {spec.id} restarted", server_name(spec), handle)

    @router.post(
        "/models/{model_id}/pull",
        summary="Download a model ahead of time",
        response_class=PlainTextResponse,
        responses=documented(404, 422, 503, 504),
    )
    async def pull(model_id: str) -> Response:
        """Get the model's image and weights; answer with a line of text whenever more of them is here.

        The last line begins with `done: ` or `failed: `. Callers who ask at once share one download, which goes on
        when they leave. The model may run meanwhile.
        """
        lines = fleet.fetch(fleet.catalog.by_id(model_id)).follow()
        first = await anext(lines)  # what fails before it has begun is an error like any other
        output = _terminated(_with_words_at_the_end(first, lines))
        return LineStream(output, "text/plain; charset=utf-8", until=fleet.closing)

    @router.get(
        "/models/{model_id}/logs",
        summary="Read the log of a model's server",
        response_class=PlainTextResponse,
        responses=documented(404, 422),
    )
    async def logs(
        model_id: str,
        lines: Annotated[int, Query(ge=1, le=MOST_LINES)] = 200,
        follow: bool = False,
        replica: Annotated[int, Query(ge=0)] = 0,
    ) -> Response:
        """Return the last lines of the newest server's output as text; `follow=true` goes on until it ends.

        Of a model with several replicas, `replica` tells which, from 0 up.
        """
        spec = fleet.catalog.by_id(model_id)
        if replica >= spec.replicas:
            raise NotFound(f"{spec.id} has replicas 0 to {spec.replicas - 1}; there is no {replica}.")
        output = fleet.runtime_of(spec).logs(server_name(spec, replica), lines=lines, follow=follow)
        return LineStream(_terminated(output), "text/plain; charset=utf-8", until=fleet.closing)

    return router


class _Listed:
    """Writes the list of all models. What it says of one whose snapshot is the same as before is not written anew."""

    def __init__(self) -> None:
        self._written: dict[str, tuple[Status, bytes]] = {}

    def page(self, statuses: Sequence[Status]) -> bytes:
        self._written = {status.spec.id: (status, self._of(status)) for status in statuses}
        return b'{"models":[' + b",".join(entry for _, entry in self._written.values()) + b"]}"

    def _of(self, status: Status) -> bytes:
        before = self._written.get(status.spec.id)
        return before[1] if before and before[0] is status else to_json(model_json(status))


def model_json(status: Status) -> dict[str, Any]:
    """Return what the API says of one model."""
    return {
        "id": status.spec.id,
        "name": status.spec.name,
        "hf_name": status.spec.hf_name,
        "running": status.state in RUNNING,
        "state": status.state.value,
        "engine": status.spec.engine,
        "runtime": status.spec.runtime,
        "progress": described(status),
        "in_flight": status.in_flight,
        "queued": status.queued,
        "idle_seconds": None if status.idle_s is None else round(status.idle_s, 1),
        "port": status.handle.port if status.handle else None,
        "gpus": list(status.gpus),
        "waits_for": status.waits_for,
        "held_for": status.held_for,
        "last_error": _last_error(status.failure, status.retry_after_s),
        "last_stop": status.last_stop and {"reason": status.last_stop.reason, "at": status.last_stop.at},
        "replicas": [_replica_json(replica) for replica in status.replicas or (status,)],
    }


def _replica_json(status: Status) -> dict[str, Any]:
    return {
        "container_name": status.name,
        "state": status.state.value,
        "in_flight": status.in_flight,
        "queued": status.queued,
        "port": status.handle.port if status.handle else None,
        "gpus": list(status.gpus),
    }


def _last_error(failure: Failure | None, retry_after_s: float | None) -> dict[str, Any] | None:
    if failure is None:
        return None
    error = failure.error
    return {
        "error_code": error.code,
        "detail": error.detail,
        "evidence": error.extra.get("evidence", []),
        "fix": error.extra.get("fix"),
        "at": failure.at,
        "retry_at": None if retry_after_s is None else math.ceil(time.time() + retry_after_s),
    }


def _started(message: str, name: str, handle: Handle | None) -> dict[str, Any]:
    return {"message": message, "port": handle.port if handle else None, "container_name": name}


async def _with_words_at_the_end(first: str, lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield all lines, and as the last one why there are no more, should they end in an error."""
    yield first
    try:
        async for line in lines:
            yield line
    except GatewayError as error:
        yield f"failed: {error.detail}"


async def _terminated(lines: AsyncIterator[str]) -> AsyncIterator[bytes]:
    async for line in lines:
        yield line.encode() + b"\n"
