"""The composition root: what it refuses before anything runs."""

from pathlib import Path

import pytest

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


def test_the_openapi_document_tells_of_every_error_in_its_shape(tmp_path: Path) -> None:
    catalog = tmp_path / "models.yaml"
    catalog.write_text("models: {m: {engine: llamacpp, weights: m.gguf}}")
    document = create_app(environ={"GATEWAY_CATALOG": str(catalog)}).openapi()
    paths, names = document["paths"], {"documents": "Problem", "openai": "OpenAiProblem", "tgi": "TgiProblem"}

    for path, operations in paths.items():
        problem = {"$ref": f"#/components/schemas/{names[api_of(path)]}"}
        for operation in operations.values():
            assert operation["security"] == ([{"key": []}, {}] if right_for(path) else [])
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    assert answer["content"] == {"application/json": {"schema": problem}}, (path, status)
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
