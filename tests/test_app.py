"""The composition root: what it refuses before anything runs, and what its OpenAPI document tells."""

import asyncio
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from gateway.api.rights import right_for
from gateway.app import check_one_worker, create_app
from gateway.errors import CatalogError
from gateway.shapes import api_of


@pytest.mark.parametrize(
    ("environ", "arguments"),
    [
        ({"WEB_CONCURRENCY": "2"}, []),
        ({"UVICORN_WORKERS": "4"}, []),
        ({}, ["uvicorn", "gateway.app:create_app", "--factory", "--workers", "2"]),
        ({}, ["uvicorn", "gateway.app:create_app", "--factory", "--workers=8"]),
    ],
)
def test_several_workers_are_refused(environ: dict[str, str], arguments: list[str]) -> None:
    with pytest.raises(CatalogError, match="one process, because each model has one owner"):
        check_one_worker(environ, arguments)


@pytest.mark.parametrize("arguments", [[], ["--workers"], ["--workers", "1"], ["serve", "workers", "3"]])
def test_one_worker_is_fine(arguments: list[str]) -> None:
    check_one_worker({"WEB_CONCURRENCY": "1", "UVICORN_WORKERS": ""}, arguments)


def test_the_application_is_made_of_the_environment_alone() -> None:
    with pytest.raises(CatalogError, match=r"no-such\.yaml"):
        create_app(environ={"GATEWAY_CATALOG": "no-such.yaml"})
    with pytest.raises(CatalogError, match="GATEWAY_HOST"):
        create_app(environ={"GATEWAY_HOST": "0.0.0.0"})


def application(folder: Path) -> FastAPI:
    catalog = folder / "models.yaml"
    catalog.write_text("models: {m: {engine: llamacpp, weights: m.gguf}}")
    return create_app(environ={"GATEWAY_CATALOG": str(catalog)})


def plain_words(path: str) -> set[str]:
    """Return what errors may also be where callers are put through to a TGI."""
    return {"text/plain"} if api_of(path) == "tgi" else set()


def test_the_openapi_document_tells_of_every_error_in_its_shape(tmp_path: Path) -> None:
    document = application(tmp_path).openapi()
    paths, names = document["paths"], {"documents": "Problem", "openai": "OpenAiProblem", "tgi": "TgiProblem"}

    for path, operations in paths.items():
        problem = {"$ref": f"#/components/schemas/{names[api_of(path)]}"}
        for operation in operations.values():
            assert operation["security"] == ([{"key": []}, {}] if right_for(path) else [])
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    assert answer["content"]["application/json"] == {"schema": problem}, (path, status)
                    assert set(answer["content"]) <= {"application/json"} | plain_words(path), (path, status)
    assert set(paths["/generate"]["post"]["responses"]) >= {
        "200",
        "400",
        "404",
        "413",
        "422",
        "500",
        "502",
        "503",
        "504",
    }
    chat = paths["/v1/chat/completions"]["post"]
    assert "422" not in chat["responses"]  # OpenAI's is 400
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    body = chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert {"messages", "max_completion_tokens", "tools"} <= document["components"]["schemas"][body][
        "properties"
    ].keys()
    assert set(paths["/models/{model_id}/start"]["post"]["responses"]) >= {"200", "202", "404", "503", "504"}
    assert list(paths["/generate_stream"]["post"]["responses"]["200"]["content"]) == ["text/event-stream"]
    assert list(paths["/models/{model_id}/logs"]["get"]["responses"]["200"]["content"]) == ["text/plain"]
    assert {"detail", "error_code"} == set(document["components"]["schemas"]["Problem"]["properties"])


def test_the_openapi_document_has_events_one_by_one(tmp_path: Path) -> None:
    paths = application(tmp_path).openapi()["paths"]
    for path, method in (
        ("/generate", "post"),
        ("/generate_stream", "post"),
        ("/inference", "post"),
        ("/events", "get"),
    ):
        content = paths[path][method]["responses"]["200"]["content"]["text/event-stream"]
        assert list(content) == ["itemSchema"], path
        assert content["itemSchema"]["required"] == ["data"]


def test_the_openapi_document_has_the_shape_of_every_answer_in_json(tmp_path: Path) -> None:
    for path, operations in application(tmp_path).openapi()["paths"].items():
        for method, operation in operations.items():
            for status, answer in operation["responses"].items():
                if "application/json" in answer.get("content", {}):  # health has no body
                    assert "$ref" in answer["content"]["application/json"]["schema"], (path, method, status)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/models", "GET, HEAD"),
        ("OPTIONS", "/health", "GET, HEAD"),
        ("DELETE", "/", "GET, HEAD"),
        ("PUT", "/models/m/llm-service/health/", "GET, HEAD"),
        ("HEAD", "/models/m", "GET"),
        ("GET", "/generate", "POST"),
        ("GET", "/models/m/start", "POST"),
    ],
)
def test_whoever_asks_by_a_wrong_method_is_told_of_all_that_the_address_has(
    method: str, path: str, allowed: str, tmp_path: Path
) -> None:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(application(tmp_path))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path)

    answer = asyncio.run(ask())

    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed
