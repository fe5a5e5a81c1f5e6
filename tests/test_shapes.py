"""How errors look in each API (contract section 5)."""

from __future__ import annotations

import pytest

from gateway.errors import (
    EmptyPrompt,
    Forbidden,
    GatewayError,
    GenerationFailed,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    RateLimited,
    StartFailed,
    Unauthorized,
    UnknownModel,
    Unsupported,
    UpstreamFailed,
)
from gateway.shapes import Api, api_of, shown


@pytest.mark.parametrize(
    ("path", "api"),
    [
        ("/v1", "openai"),
        ("/v1/chat/completions", "openai"),
        ("/v1/\n", "openai"),
        ("/v10", "documents"),
        ("/models/m/tgi", "tgi"),
        ("/models/m/tgi/v1/chat/completions", "tgi"),
        ("/models/tgi", "documents"),
        ("/models/m/tgis", "documents"),
        ("/generate", "documents"),
    ],
)
def test_an_address_belongs_to_one_api(path: str, api: Api) -> None:
    assert api_of(path) == api


@pytest.mark.parametrize(
    ("error", "statuses", "openai_type", "tgi_type"),
    [
        (EmptyPrompt("x"), (400, 400, 422), "invalid_request_error", "validation"),
        (PromptTooLong("x"), (400, 400, 422), "invalid_request_error", "validation"),
        (InvalidRequest("x"), (422, 400, 422), "invalid_request_error", "validation"),
        (Unsupported("x"), (422, 400, 422), "invalid_request_error", "validation"),
        (UnknownModel("x"), (404, 404, 404), "invalid_request_error", "model_not_found"),
        (Unauthorized("x"), (401, 401, 401), "authentication_error", "unauthorized"),
        (Forbidden("x"), (403, 403, 403), "permission_error", "forbidden"),
        (RateLimited("x"), (429, 429, 429), "rate_limit_error", "overloaded"),
        (QueueFull("x"), (503, 503, 429), "server_error", "overloaded"),
        (GenerationFailed("x"), (500, 500, 424), "server_error", "generation"),
        (UpstreamFailed("x"), (502, 502, 502), "server_error", "upstream_failed"),
        (GatewayError("x"), (500, 500, 500), "server_error", "internal_error"),
    ],
)
def test_an_error_has_one_code_and_the_status_and_kind_of_each_api(
    error: GatewayError, statuses: tuple[int, int, int], openai_type: str, tgi_type: str
) -> None:
    documents, openai, tgi = shown(error, "documents"), shown(error, "openai"), shown(error, "tgi")

    assert (documents.status, openai.status, tgi.status) == statuses
    assert documents.body == {"detail": "x", "error_code": error.code}
    assert openai.body == {"error": {"message": "x", "type": openai_type, "param": None, "code": error.code}}
    assert tgi.body == {"error": "x", "error_type": tgi_type, "error_code": error.code}


def test_what_else_an_error_tells_never_hides_its_words() -> None:
    error = StartFailed("no", cause="c", message="m", error="e", code="d")

    assert shown(error, "openai").body["error"] == {
        "cause": "c", "error": "e", "message": "no", "type": "server_error", "param": None, "code": "START_FAILED",
    }  # fmt: skip
    assert shown(error, "tgi").body["error"] == "no"


def test_a_narrower_code_and_the_field_are_told() -> None:
    openai = shown(InvalidRequest("x"), "openai", code="INVALID_TEMPERATURE", param="temperature").body["error"]

    assert (openai["code"], openai["param"]) == ("INVALID_TEMPERATURE", "temperature")
