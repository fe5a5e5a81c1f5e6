"""Grammars: what fits is written, token by token, and ends by itself."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.tgi_double.grammar import BadGrammar, smallest
from tests.tgi_double.process import Double
from tests.tgi_double.test_openai_routes import HELLO, events

PERSON = {
    "$defs": {
        "Pet": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
        "Node": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}},
            "required": ["next"],
        },
    },
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2},
        "age": {"type": "integer", "exclusiveMinimum": 17},
        "height": {"type": "number", "maximum": -1.5, "multipleOf": 0.5},
        "kind": {"enum": ["person", "pet"]},
        "is_well": {"type": "boolean"},
        "pets": {"type": "array", "items": {"$ref": "#/$defs/Pet"}, "minItems": 1},
        "nick": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "best": {"allOf": [{"$ref": "#/$defs/Pet"}]},
        "node": {"$ref": "#/$defs/Node"},
        "place": {"type": "array", "prefixItems": [{"const": 1}, {"type": "null"}], "minItems": 2},
        "extra": {"type": "string"},
        "born": {"type": "string", "format": "date"},
        "code": {"type": ["string", "null"], "pattern": "^[A-Z]{2}\\d$"},
    },
    "required": ["name", "age", "height", "kind", "is_well", "pets", "nick", "best", "node", "place", "born", "code"],
}
SMALLEST_PERSON = {
    "name": "aa",
    "age": 18,
    "height": -1.5,
    "kind": "pet",
    "is_well": True,
    "pets": [{"name": ""}],
    "nick": "",
    "best": {"name": ""},
    "node": {"next": None},
    "place": [1, None],
    "born": "2000-01-01",
    "code": None,
}
SMALL = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def generated(client: httpx.Client, grammar: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    body = {"inputs": "The", "parameters": {"grammar": grammar, "details": True, **parameters}}
    answer = client.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_a_schema_of_many_kinds_gets_the_smallest_that_fits(client: httpx.Client) -> None:
    answer = generated(client, {"type": "json", "value": PERSON})
    assert json.loads(answer["generated_text"]) == SMALLEST_PERSON
    assert list(json.loads(answer["generated_text"])) == list(SMALLEST_PERSON)
    assert answer["details"]["finish_reason"] == "eos_token"


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "json", "value": SMALL},
        {"type": "json_object", "value": SMALL},
        {"type": "json", "value": json.dumps(SMALL)},
        {"type": "json_schema", "value": {"name": "small", "schema": SMALL}},
        {"type": "json_schema", "value": {"schema": SMALL}},
        {"type": "regex", "value": r'\{"a":\d\}'},
    ],
)
def test_every_form_of_a_grammar_rules_on_both_routes(client: httpx.Client, grammar: dict[str, Any]) -> None:
    assert generated(client, grammar)["generated_text"] == '{"a":0}'
    body = {"messages": HELLO, "response_format": grammar}
    chat = client.post("/v1/chat/completions", json=body).json()
    assert chat["choices"][0]["message"]["content"] == '{"a":0}'
    chunks = events(client, "/v1/chat/completions", body)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == '{"a":0}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("(a|bc)+", "a"),
        ("yes|no", "no"),
        (r"\d{3}-[a-f]{2,}x*\.?", "000-aa"),
        (r"^(?:[^a0A]|\w\w)$", " "),
        (r"[\]\-]+?", "-"),
        ("", ""),
        ("caf\u00e9", "caf\u00e9"),
    ],
)
def test_a_regex_gets_a_small_match(pattern: str, text: str) -> None:
    assert smallest({"type": "regex", "value": pattern}) == text


def test_what_is_sampled_and_penalised_fits_all_the_same(client: httpx.Client) -> None:
    warped = {"do_sample": True, "temperature": 1.7, "top_p": 0.3, "top_k": 2, "repetition_penalty": 1.3}
    answer = generated(client, {"type": "json", "value": SMALL}, **warped, typical_p=0.2, top_n_tokens=3)
    assert answer["generated_text"] == '{"a":0}'
    assert [token["logprob"] for token in answer["details"]["tokens"]] == [0.0] * 8
    assert all(len(top) == 1 for top in answer["details"]["top_tokens"])


def test_a_length_cuts_it_off_in_the_midst(client: httpx.Client) -> None:
    answer = generated(client, {"type": "json", "value": SMALL}, max_new_tokens=3)
    assert answer["generated_text"] == '{"a'
    assert answer["details"]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ({"type": "json", "value": {"type": "object"}}, "grammar is not valid: Grammar must have a 'properties' field"),
        ({"type": "json_schema", "value": {"schema": {}}}, "grammar is not valid: Grammar must have"),
        ({"type": "json", "value": "{"}, "grammar is not valid: "),
        ({"type": "json", "value": 5}, "grammar is not supported"),
        ({"type": "regex", "value": "(a"}, "grammar is not valid: "),
        ({"type": "regex", "value": "(?=a)a"}, "grammar is not valid: cannot write for "),
        ({"type": "regex", "value": r"(a)\1"}, "grammar is not valid: cannot write for "),
        (
            {"type": "json", "value": {"properties": {"a": {"$ref": "#/$defs/A"}}, "required": ["a"]}},
            "cannot compile regex from schema: Unsupported JSON Schema structure",
        ),
        (
            {"type": "json", "value": {"properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
            "cannot compile regex from schema: Unsupported JSON Schema structure",
        ),
        (
            {"type": "json", "value": {"properties": {"a": {"type": "sheep"}}, "required": ["a"]}},
            "cannot compile regex from schema: Unsupported JSON Schema structure",
        ),
    ],
)
def test_a_grammar_that_is_none_breaks_a_rule(client: httpx.Client, grammar: dict[str, Any], words: str) -> None:
    answer = client.post("/generate", json={"inputs": "The", "parameters": {"grammar": grammar}})
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    assert answer.json()["error"].startswith(f"Input validation error: {words}")


def test_a_schema_that_never_ends_is_refused() -> None:
    endless = {"properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]}
    with pytest.raises(BadGrammar, match="within itself"):
        smallest({"type": "json", "value": endless})


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_schema", "json_schema": {"name": "small", "schema": SMALL}},
        {"type": "json_object"},
        {"type": "text"},
        {"type": "regex", "value": 5},
        {"type": "json_schema", "value": {"name": "small"}},
    ],
)
def test_openai_s_shape_is_unreadable(client: httpx.Client, response_format: dict[str, Any]) -> None:
    body = {"messages": HELLO, "response_format": response_format}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 422
    assert answer.headers["content-type"].startswith("text/plain")


def test_grammars_can_be_disabled() -> None:
    tool = {"type": "function", "function": {"name": "f", "arguments": {}}}
    grammar = {"type": "json", "value": SMALL}
    with Double("--disable-grammar-support") as double, httpx.Client(base_url=double.url, timeout=20) as client:
        for path, body in (
            ("/generate", {"inputs": "The", "parameters": {"grammar": grammar}}),
            ("/v1/chat/completions", {"messages": HELLO, "response_format": grammar}),
            ("/v1/chat/completions", {"messages": HELLO, "tools": [tool]}),
        ):
            error = client.post(path, json=body).json()["error"]
            assert error == "Input validation error: grammar is not supported"
        body = {"messages": HELLO, "tools": [tool], "tool_choice": "none", "max_tokens": 1}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
