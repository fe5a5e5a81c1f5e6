"""The composition root: what it refuses before anything runs."""

import pytest

from gateway.app import check_one_worker, create_app
from gateway.errors import CatalogError


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
