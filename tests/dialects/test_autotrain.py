"""The dialect of /api/llm/inference: tables of bodies in, bytes out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.dialects.autotrain import AutotrainBody, answer, to_requests
from gateway.generation import Finished, TokenEvent, collect
from tests.fleet.scenes import spec


def body(**fields: Any) -> AutotrainBody:
    return AutotrainBody.model_validate({"model_path": "/path/to/your/model", "prompts": ["a", "b"], **fields})


def test_the_defaults_are_the_documents_for_each_prompt() -> None:
    first, second = to_requests(spec(), body(device=None))

    assert (first.prompt, second.prompt) == ("a", "b")
    assert (first.max_new_tokens, first.temperature, first.top_p, first.top_k) == (100, 0.7, 0.95, 50)


@pytest.mark.parametrize(
    ("fields", "attribute", "value"),
    [
        ({"max_new_tokens": 150}, "max_new_tokens", 150),
        ({"temperature": 0.8}, "temperature", 0.8),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"top_k": 3}, "top_k", 3),
        ({"do_sample": False, "temperature": 1.5}, "temperature", 0.0),
        ({"do_sample": False, "top_k": 3}, "top_k", None),
        ({"device": "cuda", "temperature": 0}, "temperature", 0.0),
    ],
)
def test_a_field_reaches_the_requests(fields: dict[str, Any], attribute: str, value: object) -> None:
    assert [getattr(request, attribute) for request in to_requests(spec(), body(**fields))] == [value, value]


@pytest.mark.parametrize(
    ("keys", "fields", "unasked"),
    [
        ({}, {}, {"top_k"}),
        ({}, {"top_k": None}, {"top_k"}),
        ({}, {"top_k": 50}, set()),
        ({}, {"do_sample": False}, set()),
        ({"parameters": {"top_k": 50}}, {}, set()),
        ({"overrides": {"top_k": 50}}, {}, set()),
    ],
)
def test_a_top_k_that_nobody_asked_for_is_known_as_such(
    keys: dict[str, Any], fields: dict[str, Any], unasked: set[str]
) -> None:
    assert [request.defaults for request in to_requests(spec(**keys), body(**fields))] == [unasked, unasked]


@pytest.mark.parametrize(
    ("fields", "loc"),
    [
        ({"prompts": []}, ("prompts",)),
        ({"prompts": ["x"] * 257}, ("prompts",)),
        ({"prompts": "one"}, ("prompts",)),
        ({"prompts": ["a", " "]}, ("prompts", 1)),
        ({"prompts": ["a", None]}, ("prompts", 1)),
        ({"model_path": None}, ("model_path",)),
        ({"max_new_tokens": 0}, ("max_new_tokens",)),
        ({"max_new_tokens": 10**30}, ("max_new_tokens",)),
        ({"temperature": 3}, ("temperature",)),
        ({"top_p": 1.1}, ("top_p",)),
        ({"top_k": 0}, ("top_k",)),
        ({"do_sample": "no"}, ("do_sample",)),
        ({"device": 0}, ("device",)),
    ],
)
def test_what_is_wrong_is_refused_by_its_name(fields: dict[str, Any], loc: tuple[object, ...]) -> None:
    with pytest.raises(ValidationError) as error:
        body(**fields)

    assert [each["loc"] for each in error.value.errors()] == [loc]


def test_the_answer_has_the_continuations_in_order_and_echoes_the_model() -> None:
    results = [collect([TokenEvent(1, text)], Finished("length", 1, 1)) for text in (" one", " two")]

    assert json.loads(answer(body(), results)) == {
        "outputs": [" one", " two"],
        "model_path": "/path/to/your/model",
        "num_prompts": 2,
    }
