"""The busy addresses answer byte for byte as FastAPI's own routes do: one application, with and without them."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, Request

from gateway.api.hot_routes import HotRoutes
from gateway.api.json_body import JsonRoute
from gateway.app import compose
from gateway.catalog import Catalog, ModelSpec
from gateway.settings import Settings
from tests.instant_provider import instant_provider
from tests.tgi_double.process import Double

MOST_BYTES = 200_000
TOLD = "http://a.page"
TALK = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "seed": 7}
TEXT = {"inputs": "Once", "parameters": {"max_new_tokens": 2, "seed": 7}}
GOOD: dict[str, Any] = {
    "/generate": {"model_id": "openai", "prompt": "Once", "max_new_tokens": 2},
    "/generate_stream": {"model_id": "openai", "prompt": "Once", "max_new_tokens": 2},
    "/inference": {"model": "openai", "prompt": "Once", "parameters": {"max_tokens": 2}},
    "/api/llm/inference": {"model_path": "openai", "prompts": ["Once", "Twice"], "max_new_tokens": 2},
    "/v1/chat/completions": {"model": "openai", **TALK},
    "/v1/completions": {"model": "tgi", "prompt": "Once", "max_tokens": 2, "seed": 7},
    "/models/openai/llm-service/generate": {"prompt": "Once"},
    "/models/openai/api-server/generate": {"prompt": "Once", "max_new_tokens": 2},
    "/models/openai/tgi": TEXT,
    "/models/openai/tgi/generate": TEXT,
    "/models/openai/tgi/generate_stream": TEXT,
    "/models/openai/tgi/v1/chat/completions": TALK,
    "/models/openai/tgi/v1/completions": {"model": "x", "prompt": "Once", "max_tokens": 2},
    "/models/openai/tgi/tokenize": {"inputs": "Once"},
    "/models/tgi/tgi": TEXT,
    "/models/tgi/tgi/generate": TEXT,
    "/models/tgi/tgi/generate_stream": TEXT,
    "/models/tgi/tgi/v1/chat/completions": {"model": "tgi", **TALK},
    "/models/tgi/tgi/tokenize": {"inputs": "Once"},
}
"""A request that is answered, for every busy address: translated, and put through."""


@dataclass(frozen=True)
class Asked:
    path: str
    body: Sequence[bytes] = (b"",)
    """In the pieces in which it comes."""
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)
    leaves: bool = False
    """Whether the caller leaves before the body has come."""


def sent(path: str, body: Any, **headers: str) -> Asked:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Asked(path, [data], headers={"content-type": "application/json", **named})


# ---- what is asked ---------------------------------------------------------------------------------------------------


def of_every_kind(path: str, good: dict[str, Any]) -> Iterator[Asked]:
    yield sent(path, good)
    yield sent(path, {**good, "stream": True})
    yield sent(path, {**good, "stream": None, "unknown": 1.0})
    yield sent(path, good, prefer="wait=5")
    yield from (sent(path, wrong) for wrong in bad_bodies(good))
    data = json.dumps(good).encode()
    yield Asked(path, [data[:7], data[7:]], headers={"content-type": "application/json"})
    yield Asked(path, [data[:7]], headers={"content-type": "application/json"}, leaves=True)
    yield Asked(path, [], leaves=True)
    yield Asked(path, [data])
    for kind in ("", "text/plain", "application/json; charset=utf-8", "APPLICATION/JSON ", "application/a+json"):
        yield Asked(path, [data], headers={"content-type": kind})
    for kind in ("application", "application/jsonx", "a/b/json", 'application/json; a="', "multipart/form-data"):
        yield Asked(path, [data], headers={"content-type": kind})
    yield sent(path, good, content_encoding="gzip")
    yield sent(path, b"", content_encoding="gzip")
    yield Asked(path, [data], headers={"content-encoding": "br"})
    yield sent(path, good, content_length=str(MOST_BYTES + 1))
    yield Asked(path, [b" " * (MOST_BYTES + 1), data], headers={"content-type": "application/json"})
    yield sent(path, good, origin=TOLD)
    yield sent(path, good, origin="http://other.page")
    for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "post"):
        yield Asked(path, [data], method, {"content-type": "application/json"})
    preflight = {"origin": TOLD, "access-control-request-method": "POST"}
    yield Asked(path, method="OPTIONS", headers=preflight)
    for other in (path + "/", path + "//", path + "\n", "/" + path, path.upper(), path + "/more", path + "%20"):
        yield sent(other, good)


def bad_bodies(good: dict[str, Any]) -> Iterator[Any]:
    yield from (b"", b"{", b"\xff{}", b"\xef\xbb\xbf{}", b"null", b"[]", b"1", b'"text"', b"{}", b"NaN", b"{} {}")
    yield from (b"[" * 100_000, b'{"prompt": ' + b"1" * 5000 + b"}", '{"prompt": "ü"}'.encode("latin-1"))
    for name in sorted(good.keys() - {"seed", "parameters"}):  # without a seed each answer is another
        yield {other: value for other, value in good.items() if other != name}
        yield from ({**good, name: value} for value in (None, 5, " ", "\ud800", [None]))
    yield {**good, "temperature": 99}
    yield {**good, "parameters": {"temperature": -1, "top_k": "many"}}
    yield {**good, "max_new_tokens": 10**6, "max_tokens": 10**6}


def of_models(path: str, good: dict[str, Any]) -> Iterator[Asked]:
    """Yield the same for models that cannot answer."""
    named = next((name for name in ("model_id", "model_path", "model") if name in good), None)
    for name in ("nobody", "silent", "", "a/b", "{model_id}", "openai\n", "Ü"):
        yield sent(path.replace("/models/openai/", f"/models/{name}/"), {**good, named: name} if named else good)


def everything() -> list[Asked]:
    kinds = [each for path, good in GOOD.items() for each in of_every_kind(path, good)]
    return [*kinds, *(each for path, good in GOOD.items() for each in of_models(path, good))]


# ---- what is answered ------------------------------------------------------------------------------------------------

CHANCE = re.compile(rb'((?:chatcmpl|cmpl|call)-)\w+|("created":)\d+|("[a-z_]*(?:time|seconds|_ms|_s)[a-z_]*":)[\d.e-]+')
"""What is another one in each answer."""
TIMES = re.compile(rb"x-(?:total|validation|queue|inference|compute)-time|x-time-per-token")


async def answer(app: FastAPI, asked: Asked, root_path: str) -> Any:
    """Return status, headers, body and what was noted of it; or what broke off."""
    pieces = [*asked.body]
    messages: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not pieces:
            if not asked.leaves:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces) or asked.leaves}

    async def send(message: Any) -> None:
        messages.append(message)

    headers = {"host": "gateway", "x-request-id": "the-same", **asked.headers}
    path = root_path + asked.path
    scope: dict[str, Any] = {
        "type": "http",
        "method": asked.method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": root_path,
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
        "scheme": "http",
        "http_version": "1.1",
        "state": {},
    }
    await asyncio.wait_for(app(scope, receive, send), 20)
    head = messages[0] if messages else {"status": None, "headers": []}
    body = b"".join(message.get("body", b"") for message in messages[1:])
    return head["status"], _sure(head["headers"]), CHANCE.sub(rb"\1\2\3", body), scope["state"]


def _sure(headers: Any) -> list[tuple[bytes, bytes]]:
    """Return the headers, but for times, and for the length of a body that tells of some."""
    told = {name: b"" if TIMES.fullmatch(name) or name == b"content-length" else value for name, value in headers}
    assert len(told) == len(headers)
    return sorted(told.items())


async def answers(app: FastAPI, requests: Sequence[Asked], root_path: str) -> list[Any]:
    async with app.router.lifespan_context(app):
        return [await answer(app, asked, root_path) for asked in requests]


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, ModelSpec]]:
    known: dict[str, Any] = {"runtime": "external", "context_tokens": 64}
    with ExitStack() as stack:
        provider = stack.enter_context(instant_provider())
        tgi = stack.enter_context(Double())
        yield {
            "openai": ModelSpec(id="openai", engine="openai", url=provider, **known),
            "tgi": ModelSpec(id="tgi", engine="tgi", hf_name="gpt2", url=tgi.url, **known),
        }


def application(models: dict[str, ModelSpec]) -> FastAPI:
    catalog = Catalog(path=Path("models.yaml"), models=models, default_model="openai")
    return compose(Settings(max_body_bytes=MOST_BYTES, cors_origins=(TOLD,)), catalog)


def without_hot_routes(app: FastAPI) -> FastAPI:
    hot: Any = HotRoutes
    others = [each for each in app.user_middleware if each.cls != hot]
    assert len(others) == len(app.user_middleware) - 1
    app.user_middleware = others
    return app


@pytest.mark.parametrize(("root_path", "every"), [("", 1), ("/below", 7)])
def test_hot_routes_answer_as_fastapi_does(root_path: str, every: int, models: dict[str, ModelSpec]) -> None:
    requests = everything()[::every]
    hot, other = application(models), without_hot_routes(application(models))

    answered = asyncio.run(answers(hot, requests, root_path))

    for asked, one, same in zip(requests, answered, asyncio.run(answers(other, requests, root_path)), strict=True):
        assert one == same, asked
    assert {status for status, *_ in answered} >= {200, 400, 404, 405, 413, 422}


@pytest.mark.parametrize("path", GOOD)
def test_every_good_request_is_answered_by_a_hot_route(path: str, models: dict[str, ModelSpec]) -> None:
    async def scene() -> None:
        app = application(models)
        app.router.routes.clear()  # so that nobody else can
        async with app.router.lifespan_context(app):
            status, _, body, _ = await answer(app, sent(path, GOOD[path]), "")
        assert status == 200 or (status == 422 and b"UNSUPPORTED" in body), body

    asyncio.run(scene())


def test_every_operation_that_takes_json_is_a_hot_route(models: dict[str, ModelSpec]) -> None:
    paths = application(models).openapi()["paths"].items()
    taken = {path for path, item in paths if "requestBody" in item.get("post", {})}

    assert taken == {re.sub("^/models/[^/]+", "/models/{model_id}", path) for path in GOOD}


def test_an_endpoint_with_parameters_that_nobody_gives_is_refused_at_once() -> None:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/odd")
    async def odd(request: Request, body: dict[str, int], number: int = 0, prefer: str | None = None) -> None: ...

    @router.post("/v1/models/{name}")
    async def other(name: str, request: Request, body: dict[str, int], prefer: str | None = None) -> None: ...

    for route in router.routes:
        with pytest.raises(TypeError, match="nobody gives"):
            HotRoutes(FastAPI(), [route])
