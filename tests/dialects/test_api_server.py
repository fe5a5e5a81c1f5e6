"""The API server's dialect: tables of bodies in, bytes out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.dialects.api_server import ApiServerBody, answer, to_request
from gateway.generation import Finished, TokenEvent, collect
from tests.fleet.scenes import spec


def body(**fields: Any) -> ApiServerBody:
    return ApiServerBody.model_validate({"prompt": "123+456=", **fields})


def test_the_defaults_are_the_documents() -> None:
    request = to_request(spec(), body(top_k=None))

    assert (request.max_new_tokens, request.temperature, request.top_k, request.top_p) == (100, 0.8, None, 1.0)
    assert (request.stop, request.top_tokens) == ((), 0)


@pytest.mark.parametrize(
    ("fields", "attribute", "value"),
    [
        ({"max_tokens": 2048}, "max_new_tokens", 2048),
        ({"temperature": 0}, "temperature", 0.0),
        ({"top_k": 50}, "top_k", 50),
        ({"stop_on_newline": True}, "stop", ("\n",)),
    ],
)
def test_a_field_reaches_the_request(fields: dict[str, Any], attribute: str, value: object) -> None:
    assert getattr(to_request(spec(), body(**fields)), attribute) == value


def test_the_documented_length_is_taken_by_a_model_with_less_context() -> None:
    assert to_request(spec(context_tokens=512), body(max_tokens=2048)).max_new_tokens == 512


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2049}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"stop_on_newline": "yes"}, "stop_on_newline"),
        ({"prompt": ""}, "prompt"),
    ],
)
def test_what_is_beyond_the_documents_limits_is_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as error:
        body(**fields)

    assert [each["loc"] for each in error.value.errors()] == [(field,)]


def test_a_whole_answer_begins_with_the_prompt() -> None:
    result = collect([TokenEvent(1, "57"), TokenEvent(2, "9")], Finished("eos", 3, 7))

    assert json.loads(answer(spec(id="step_002920"), body(), result)) == {
        "prompt": "123+456=",
        "generated_text": "123+456=579",
        "tokens_generated": 3,
        "model": "step_002920",
    }
