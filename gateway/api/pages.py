"""Documentation of its own for each model's service: pages, and an OpenAPI document with the model's own address."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from starlette.responses import HTMLResponse

from gateway.api.problems import with_problem
from gateway.fleet.fleet import Fleet


def add_pages(
    router: APIRouter, fleet: Fleet, *, base: str, title: str, version: str, openapi_at: str = "/openapi.json"
) -> None:
    """Add `docs`, `redoc` and an OpenAPI document of what `router` has so far below `base`, which has a model's name.

    An address with `{model_id}` in it becomes that model's own.
    """
    described = list(router.routes)

    @cache
    def of_all() -> dict[str, Any]:
        made = with_problem(get_openapi(title=title, version=version, routes=described))
        made["paths"] = {path.removeprefix(base) or "/": _unbound(item) for path, item in made["paths"].items()}
        return made

    def address(request: Request, model_id: str) -> tuple[str, str]:
        spec = fleet.catalog.by_id(model_id)
        root = request.scope.get("root_path", "")
        return spec.id, root + base.replace("{model_id}", spec.id)

    @router.get(base + openapi_at, include_in_schema=False)
    async def openapi(request: Request, model_id: str) -> dict[str, Any]:
        name, url = address(request, model_id)
        return {**of_all(), "info": {"title": f"{title}: {name}", "version": version}, "servers": [{"url": url}]}

    @router.get(base + "/docs", include_in_schema=False)
    async def docs(request: Request, model_id: str) -> HTMLResponse:
        name, url = address(request, model_id)
        return get_swagger_ui_html(openapi_url=url + openapi_at, title=f"{title}: {name}")

    @router.get(base + "/redoc", include_in_schema=False)
    async def redoc(request: Request, model_id: str) -> HTMLResponse:
        name, url = address(request, model_id)
        return get_redoc_html(openapi_url=url + openapi_at, title=f"{title}: {name}")


def _unbound(item: dict[str, Any]) -> dict[str, Any]:
    """Return a path's operations without the parameter that the address of the service has already."""
    return {method: _without_model_id(operation) for method, operation in item.items()}


def _without_model_id(operation: dict[str, Any]) -> dict[str, Any]:
    others = [each for each in operation.get("parameters", ()) if each["name"] != "model_id"]
    rest = {key: value for key, value in operation.items() if key != "parameters"}
    return {**rest, "parameters": others} if others else rest
