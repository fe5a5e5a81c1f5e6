from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.tgi_double.process import Double

RULES: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 0}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 0.99999999}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": list("abcde")}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"top_n_tokens": 51}, "`top_n_tokens` must be >= 0 and <= 50. Given: 51"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 4095. Given: 0"),
    ({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ({"grammar": {"type": "json", "value": 5}}, "grammar is not supported"),
]


def refused(client: httpx.Client, inputs: str, **parameters: Any) -> str:
    answer = client.post("/generate", json={"inputs": inputs, "parameters": parameters})
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    assert list(answer.json()) == ["error", "error_type"]
    return str(answer.json()["error"]).removeprefix("Input validation error: ")


@pytest.mark.parametrize(("parameters", "words"), RULES)
def test_each_rule_is_told_in_tgis_words(client: httpx.Client, parameters: dict[str, Any], words: str) -> None:
    assert refused(client, "The", **parameters) == words


def test_lengths_are_told_with_their_numbers(client: httpx.Client) -> None:
    assert refused(client, "") == "`inputs` cannot be empty"
    long = " the" * 4000
    assert refused(client, long, max_new_tokens=200) == (
        "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000 `inputs` tokens and 200 `max_new_tokens`"
    )
    with Double("--max-input-tokens", "10", "--max-total-tokens", "90") as small:
        answer = httpx.post(f"{small.url}/generate", json={"inputs": "a" + " the" * 20, "parameters": {}})
    assert answer.json()["error"] == "Input validation error: `inputs` must have less than 10 tokens. Given: 21"


def test_only_the_first_chunk_of_a_big_limit_is_checked(client: httpx.Client) -> None:
    body = {"inputs": "say good", "parameters": {"max_new_tokens": 100_000}}
    assert client.post("/generate", json=body).status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "missing field `inputs`"),
        ({"inputs": 1}, "inputs: invalid type: integer, expected a string"),
        ({"inputs": "a", "parameters": None}, "parameters: invalid type: null"),
        ({"inputs": "a", "parameters": {"stop": None}}, "parameters.stop: invalid type: null"),
        ({"inputs": "a", "parameters": {"do_sample": None}}, "parameters.do_sample: invalid type: null"),
        ({"inputs": "a", "parameters": {"temperature": "hot"}}, "parameters.temperature: invalid type: string"),
        ({"inputs": "a", "parameters": {"max_new_tokens": -1}}, "parameters.max_new_tokens"),
        ({"inputs": "a", "parameters": {"seed": 2**64}}, "parameters.seed"),
    ],
)
def test_wrong_types_are_told_in_plain_text(client: httpx.Client, body: dict[str, Any], words: str) -> None:
    answer = client.post("/generate", json=body)
    assert answer.status_code == 422
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text.startswith("Failed to deserialize the JSON body into the target type: ")
    assert words in answer.text


def test_null_is_read_as_absent_where_tgi_does_and_unknown_fields_are_ignored(client: httpx.Client) -> None:
    parameters = {"temperature": None, "top_p": None, "seed": None, "max_new_tokens": 1, "presence_penalty": "what"}
    assert client.post("/generate", json={"inputs": "The", "parameters": parameters, "n": 3}).status_code == 200


def test_bodies_that_are_no_json_or_not_said_to_be(client: httpx.Client) -> None:
    json_type = {"Content-Type": "application/json"}
    broken = client.post("/generate", content=b"{", headers=json_type)
    assert (broken.status_code, broken.text[:45]) == (400, "Failed to parse the request body as JSON: Exp")
    untyped = client.post("/generate", content=b"{}", headers={"Content-Type": "text/plain"})
    assert (untyped.status_code, untyped.text) == (415, "Expected request with `Content-Type: application/json`")


def test_a_body_beyond_the_limit_is_refused_whether_its_length_is_told_or_not() -> None:
    with Double("--payload-limit", "1000") as small:
        for content in (b"x" * 1001, iter([b"x" * 600] * 2)):
            answer = httpx.post(f"{small.url}/generate", content=content)
            assert answer.status_code == 413
            assert answer.text.startswith("Failed to buffer the request body")
