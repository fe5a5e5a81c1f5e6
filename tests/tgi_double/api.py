"""TGI's routes (tgi.md section 1): who may call, what is read of a body, and which answer an error is."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import native, openai
from .answers import answer, plain, refusal
from .service import Service
from .validation import (
    CHAT,
    COMPATIBLE,
    COMPLETION,
    GENERATE,
    Field,
    Reader,
    Refused,
    Unreadable,
    body_of,
    list_of,
)
from .web import Request, Response, Stream

MODEL_SHA = "0123456789abcdef0123456789abcdef01234567"
NOT_JSON = "Expected request with `Content-Type: application/json`"
GARBAGE = Response(200, b"<html><body>It works!</body></html>\n", {"content-type": "text/html"})
HEALTH_PATHS = ("/", "/health", "/ping")

Handler = Callable[[Service, Mapping[str, Any]], Awaitable[Response | Stream]]


@dataclass(frozen=True)
class Route:
    read: Reader
    handler: Handler
    needs_key: bool = True


POSTS: Mapping[str, Route] = {
    "/": Route(body_of(COMPATIBLE), native.compatible),
    "/generate": Route(body_of(GENERATE), native.generate),
    "/generate_stream": Route(body_of(GENERATE), native.generate_stream),
    "/tokenize": Route(body_of(GENERATE), native.tokens),
    "/v1/chat/completions": Route(body_of(CHAT), openai.chat),
    "/v1/completions": Route(body_of(COMPLETION), openai.completions),
    "/chat_tokenize": Route(body_of(CHAT), openai.chat_tokens, needs_key=False),
    "/vertex": Route(body_of({"instances": Field(list_of(body_of(GENERATE)))}), native.vertex),
}
SAGEMAKER = ("/", "/v1/chat/completions", "/v1/completions")
"""What a body for `/invocations` is tried as, in this order."""


class Api:
    """Answers requests, whatever they are; never raises but to break a connection."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._gets: Mapping[str, Callable[[], Response]] = {
            "/info": lambda: answer(self._info()),
            "/metrics": lambda: plain(200, service.metrics.page()),
            "/v1/models": lambda: answer({"object": "list", "data": [self._model()]}),
        }

    async def __call__(self, request: Request) -> Response | Stream:
        if request.method == "GET" and request.path in HEALTH_PATHS:
            return await self._health()
        if self._service.personality.garbage:
            return GARBAGE
        if request.method == "GET" and request.path in self._gets:
            return self._gets[request.path]()
        if request.method == "OPTIONS":
            return Response(
                headers={"access-control-allow-methods": "GET,POST", "access-control-allow-headers": "content-type"}
            )
        if (
            request.path not in POSTS
            and request.path not in self._gets
            and request.path not in (*HEALTH_PATHS, "/invocations")
        ):
            return Response(404)
        if request.method != "POST" or request.path not in (*POSTS, "/invocations"):
            return Response(405, headers={"allow": "POST" if request.path in POSTS else "GET,HEAD"})
        return await self._post(request)

    async def _post(self, request: Request) -> Response | Stream:
        route = POSTS.get(request.path)
        if (route is None or route.needs_key) and not self._may_call(request):
            return Response(401)
        if not request.headers.get("content-type", "").partition(";")[0].strip().endswith("json"):
            return plain(415, NOT_JSON)
        try:
            body = json.loads(request.body)
        except ValueError as error:
            return plain(400, f"Failed to parse the request body as JSON: {error}")
        try:
            if route is None:
                route, read = _variant(body)
            else:
                read = route.read(body, "")
            return await route.handler(self._service, read)
        except Unreadable as error:
            column = f" at line 1 column {len(request.body)}"
            return plain(422, f"Failed to deserialize the JSON body into the target type: {error}{column}")
        except Refused as refused:
            return refusal(refused)

    def _may_call(self, request: Request) -> bool:
        key = self._service.args.api_key
        given = request.headers.get("authorization", "")
        return key is None or given.lower() == f"Bearer {key}".lower()  # both lowered: TGI's own weakness

    async def _health(self) -> Response:
        """Answer, hang or fail as the personality says for this moment."""
        mood, age_s = self._service.personality, time.monotonic() - self._service.ready_at
        recovered = mood.health_recovers_after_s is not None and age_s >= mood.health_recovers_after_s
        if mood.health_hangs_after_s is not None and age_s >= mood.health_hangs_after_s and not recovered:
            left_s = None if mood.health_recovers_after_s is None else mood.health_recovers_after_s - age_s
            await _sleep(left_s)
        if mood.health_fails_after_s is not None and age_s >= mood.health_fails_after_s and not recovered:
            return answer({"error": "unhealthy", "error_type": "healthcheck"}, status=503)
        return Response()

    def _info(self) -> dict[str, Any]:
        args, limits = self._service.args, self._service.limits
        is_path = args.model_id.startswith("/")
        return {
            "model_id": args.model_id,
            "model_sha": None if is_path else args.revision or MODEL_SHA,
            "model_pipeline_tag": None if is_path else "text-generation",
            "max_concurrent_requests": args.max_concurrent_requests,
            "max_best_of": args.max_best_of,
            "max_stop_sequences": args.max_stop_sequences,
            "max_input_tokens": limits.max_input_tokens,
            "max_total_tokens": limits.max_total_tokens,
            "validation_workers": args.validation_workers,
            "max_client_batch_size": args.max_client_batch_size,
            "router": "text-generation-router",
            "version": openai.VERSION,
            "sha": None,
            "docker_label": None,
        }

    def _model(self) -> dict[str, Any]:
        model_id = self._service.args.model_id
        return {"id": model_id, "object": "model", "created": 0, "owned_by": model_id}


def _variant(body: Any) -> tuple[Route, Any]:
    """Return the route that a body for SageMaker fits, and what was read of it."""
    for path in SAGEMAKER:
        try:
            return POSTS[path], POSTS[path].read(body, "")
        except Unreadable:
            continue
    raise Unreadable("data did not match any variant of untagged enum SagemakerRequest")


async def _sleep(seconds: float | None) -> None:
    """Sleep; for ever without a number."""
    await (asyncio.Event().wait() if seconds is None else asyncio.sleep(seconds))
