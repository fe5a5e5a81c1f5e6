"""What dialects have in common: how the catalog, a document's defaults and a caller's words make one request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from gateway.bodies import Body, Prompt, StopTexts, as_json, json_text, request_of
from tests.fleet.scenes import spec

DEFAULTS = {"temperature": 0.7, "max_new_tokens": 200, "top_p": 0.95}


@pytest.mark.parametrize(
    ("keys", "said", "max_new_tokens", "temperature"),
    [
        ({}, {}, 200, 0.7),
        ({"context_tokens": 64}, {}, 64, 0.7),
        ({"context_tokens": 64}, {"max_tokens": 100}, 64, 0.7),
        ({"parameters": {"max_tokens": 5}}, {}, 5, 0.7),
        ({"parameters": {"max_tokens": 5}}, {"max_new_tokens": 9}, 9, 0.7),
        ({"overrides": {"max_tokens": 5, "temperature": 0}}, {"max_new_tokens": 9, "temperature": 1.5}, 5, 0.0),
        ({"parameters": {"temperature": 0.1}}, {"temperature": 2.0}, 200, 2.0),
    ],
)
def test_the_catalogs_defaults_the_callers_word_and_the_catalogs_overrides(
    keys: dict[str, Any], said: dict[str, Any], max_new_tokens: int, temperature: float
) -> None:
    request = request_of(spec(**keys), "Once", defaults=DEFAULTS, said=said)

    assert (request.max_new_tokens, request.temperature, request.top_p) == (max_new_tokens, temperature, 0.95)


def test_every_parameter_of_the_catalog_reaches_the_request_but_those_of_other_answers() -> None:
    said = {"stop": ["a"], "stop_on_newline": True, "seed": 7, "repetition_penalty": 1.1, "frequency_penalty": 0.2}
    more = {"presence_penalty": 0.3, "top_k": 4, "top_p": 0.5, "top_tokens": 9, "return_full_text": False}

    request = request_of(spec(parameters={**said, **more}), "Once", defaults=DEFAULTS, said={}, apart_from=["top_k"])

    assert request.stop == ("a", "\n")
    assert (request.seed, request.repetition_penalty, request.frequency_penalty) == (7, 1.1, 0.2)
    assert (request.presence_penalty, request.top_k, request.top_p, request.top_tokens) == (0.3, None, 0.5, 0)


def test_a_document_bounds_what_the_catalog_says() -> None:
    model = spec(parameters={"max_tokens": 500})

    assert request_of(model, "Once", defaults=DEFAULTS, said={}, most_new_tokens=100).max_new_tokens == 100


class Asked(Body):
    prompt: Prompt
    max_tokens: int = Field(5, ge=1, description="Most tokens")
    name: str | None = None
    stop: StopTexts = Field(default=[])


@pytest.mark.parametrize(("said", "read"), [(5, 5), (5.0, 5), (1e3, 1000)])
def test_an_integer_may_be_written_as_json_schema_lets_it(said: float, read: int) -> None:
    asked = Asked.model_validate({"prompt": "Once", "max_tokens": said})

    assert type(asked.max_tokens) is int
    assert asked.max_tokens == read


@pytest.mark.parametrize("said", [5.5, 0.0, -1e300, float("inf"), float("nan"), True, "5"])
def test_what_is_no_integer_is_refused(said: object) -> None:
    with pytest.raises(ValidationError):
        Asked.model_validate({"prompt": "Once", "max_tokens": said})


def test_the_schema_of_a_body_tells_that_null_means_not_given_and_that_a_prompt_is_not_blank() -> None:
    asked = Asked.model_validate({"prompt": "Once", "max_tokens": None, "name": None, "stop": None})
    assert (asked.max_tokens, asked.name, asked.stop) == (5, None, [])

    schema = Asked.model_json_schema()
    null = {"type": "null"}
    assert schema["required"] == ["prompt"]
    assert schema["properties"]["prompt"] == {"pattern": r"\S", "title": "Prompt", "type": "string"}
    assert schema["properties"]["max_tokens"] == {
        "anyOf": [{"minimum": 1, "type": "integer"}, null],
        "default": 5,
        "description": "Most tokens",
        "title": "Max Tokens",
    }
    assert schema["properties"]["name"]["anyOf"] == [{"type": "string"}, null]
    assert [kind["type"] for kind in schema["properties"]["stop"]["anyOf"]] == ["string", "array", "null"]


def test_an_answer_is_valid_utf_8_whatever_is_in_it() -> None:
    assert as_json({"\ud800": ["a\udfff", "é😀"]}) == '{"?":["a?","é😀"]}'.encode()


BLANKS = "".join(character for character in map(chr, range(0x11000)) if character.isspace())


@given(st.text(st.sampled_from(BLANKS) | st.just("a"), max_size=3))
def test_a_prompt_holds_more_than_white_space(prompt: str) -> None:
    if prompt.strip():
        assert Asked.model_validate({"prompt": prompt}).prompt == prompt
    else:
        with pytest.raises(ValidationError, match="write what the model shall continue"):
            Asked.model_validate({"prompt": prompt})


@pytest.mark.parametrize("prompt", ["a\ud800", "\udfff", " \ud800"])
def test_a_prompt_is_unicode(prompt: str) -> None:
    with pytest.raises(ValidationError, match="this is not valid Unicode"):
        Asked.model_validate({"prompt": prompt})


ANY_TEXTS = st.text(st.characters(codec=None, exclude_categories=()), max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXTS,
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(ANY_TEXTS, parts, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(ANY_TEXTS, VALUES, max_size=3))
def test_an_answer_is_what_json_writes_but_for_lone_surrogates(answer: dict[str, Any]) -> None:
    wanted = json.dumps(answer, ensure_ascii=False).encode(errors="replace")

    assert json.dumps(json.loads(as_json(answer))) == json.dumps(json.loads(wanted))
    assert json.dumps(json.loads(json_text(answer))) == json.dumps(answer)
