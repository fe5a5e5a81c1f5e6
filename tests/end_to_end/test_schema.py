"""Every operation of the OpenAPI documents, asked by schemathesis: with what they allow, and with what they do not.

CI asks 100 examples of each operation, the same ones in every run. By hand, with examples that nobody saw before:

    SCHEMA_EXAMPLES=2000 python -m pytest tests/end_to_end/test_schema.py

Besides, each is asked with the edges of all that it takes, and by methods that it has not. A new operation joins by
being in a document. Every model is a double that answers at once; the endless stream of events is left out.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import requests
import schemathesis
from fastapi import FastAPI
from hypothesis import strategies as st
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import negative_data_rejection

from gateway.app import compose
from gateway.catalog import Catalog, ModelSpec
from gateway.settings import Settings
from tests.end_to_end.gateway import Gateway, serving
from tests.instant_provider import instant_provider
from tests.tgi_double.process import Double

BY_HAND = "SCHEMA_EXAMPLES" in os.environ
EXAMPLES = int(os.environ.get("SCHEMA_EXAMPLES", "100"))
BOUND_S = 60 + EXAMPLES
"""How long one operation may take on a slow machine."""
DOCUMENTS = ("/openapi.json", "/models/tgi/llm-service/openapi.json", "/models/tgi/api-server/openapi.json")
ENDLESS = "/events"
NOWHERE = "http://127.0.0.1:1"
NAMED_BY = ("model_id", "model", "model_path", "name")
NAMES = ["tgi", "openai", "vllm", "gpt2"]
KNOWN = {**dict.fromkeys(NAMED_BY, NAMES), "messages": [[{"role": "user", "content": "Hello"}]]}
"""Values that lead on, where one that is made up would end at its check."""
BOTH = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
"""What the document allows, and what it does not."""


def models(tgi: str = NOWHERE, provider: str = NOWHERE) -> dict[str, dict[str, Any]]:
    """Return a catalog of each engine that reaches what already runs, `openai` with as little and as much as it can."""
    known: dict[str, Any] = {"runtime": "external", "context_tokens": 64}
    return {
        "tgi": {**known, "engine": "tgi", "url": tgi, "hf_name": "gpt2"},
        "openai": {**known, "engine": "openai", "url": provider},
        "vllm": {**known, "engine": "openai", "url": provider, "args": {"server": "vllm"}},
    }


SAYS_200_FIRST = re.compile(r"/models/[^/]+/tgi(/generate_stream|/v1/.*)?")
"""A TGI that callers are put through to begins a stream before it has judged what was asked."""

# ---- what is asked ---------------------------------------------------------------------------------------------------


def application() -> FastAPI:
    """Return a gateway that never runs: its documents are those of the one that does."""
    specs = {name: ModelSpec(id=name, **keys) for name, keys in models().items()}
    return compose(Settings(), Catalog(path=Path("models.yaml"), models=specs, default_model="tgi"))


def document(app: FastAPI, path: str) -> Any:
    async def ask() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return (await client.get(path)).raise_for_status().json()

    return asyncio.run(ask())


def with_known(part: Any) -> Any:
    """Return (part of) a document with known values as examples: the edges of all else are tried with them."""
    if isinstance(part, list):
        return [with_known(each) for each in part]
    if not isinstance(part, dict):
        return part
    part = {key: with_known(value) for key, value in part.items()}
    fields = part.get("properties", {})
    for name in [name for name in KNOWN if name in fields]:
        fields[name]["examples"] = KNOWN[name]
    if part.get("in") == "path" and part["name"] in KNOWN:
        part["schema"]["examples"] = KNOWN[part["name"]]
    return part


def config() -> schemathesis.Config:
    """Return that half of all names are those of models; and what holds for every answer."""
    places = [f"{where}.{name}" for where in ("path", "body") for name in NAMED_BY]
    return schemathesis.Config.from_dict(
        {
            "dictionaries": {"names": {"values": NAMES}},
            "parameters": {place: {"dictionary": "names", "probability": 0.5} for place in places},
            "checks": {
                # what the gateway and its models' servers are not to do while all of them are well
                "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "503", "504"]},
                # engines differ in what they can do, so a document allows more than any of them takes
                "positive_data_acceptance": {"enabled": False},
            },
            "output": {"sanitization": {"enabled": False}},  # else `max_tokens` is taken for a secret
            "cache": {"enabled": False},
        }
    )


def operations() -> Iterator[pytest.ParameterSet]:
    """Yield every operation, and the path that stands before its own."""
    app = application()
    for path in DOCUMENTS:
        said = document(app, path)
        base = said["servers"][0]["url"] if "servers" in said else ""
        schema = schemathesis.openapi.from_dict(with_known(said), config=config()).exclude(path=ENDLESS)
        for found in schema.get_all_operations():
            assert isinstance(found, Ok), found.err()
            operation = found.ok()
            yield pytest.param(operation, base, id=f"{operation.method.upper()} {base}{operation.path}")


# ---- asking ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    with (
        Double("--max-top-n-tokens", "50") as double,
        instant_provider() as provider,
        serving(folder, **models(double.url, provider)) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as connections:
        yield connections


@pytest.mark.timeout(BOUND_S)
@pytest.mark.parametrize(("operation", "base"), list(operations()))
def test_answers_are_as_documented(
    operation: APIOperation[Any, Any, Any, Any], base: str, gateway: Gateway, session: requests.Session
) -> None:
    schema = operation.schema
    edges = schema.iter_coverage_cases(
        operation, generation_modes=list(BOTH), generation_config=schema.config.generation
    )

    unchecked: list[Any] = [negative_data_rejection] if SAYS_200_FIRST.fullmatch(base + operation.path) else []

    @hypothesis.settings(max_examples=EXAMPLES, derandomize=not BY_HAND, database=None)
    @hypothesis.given(st.one_of([operation.as_strategy(mode) for mode in BOTH]))
    def ask(case: Case[Any]) -> None:
        case.call_and_validate(gateway.url + base, session, excluded_checks=unchecked)

    for case in edges:
        case.call_and_validate(gateway.url + base, session, excluded_checks=unchecked)
    ask()


def test_the_documents_are_those_of_the_gateway_that_runs(gateway: Gateway) -> None:
    app = application()
    assert [gateway.get(path).json() for path in DOCUMENTS] == [document(app, path) for path in DOCUMENTS]
