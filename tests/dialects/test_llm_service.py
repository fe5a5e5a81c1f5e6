"""The LLM service's dialect: tables of bodies in, bytes out; and how probabilities at one temperature tell others."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.dialects.llm_service import (
    LlmServiceBody,
    answer,
    completed,
    first_of,
    lacks_alternatives,
    to_request,
    unsharpened,
)
from gateway.engines.tgi_answers import StreamDecoder
from gateway.errors import GenerationFailed
from gateway.generation import Finished, GenerationResult, TokenChance, TokenEvent, collect
from tests.fleet.scenes import spec

LOGITS = {" Paris": 9.0, " the": 6.5, " Lyon": 2.0, "\n": -3.0}


def chances(temperature: float, count: int = 4) -> list[TokenChance]:
    """Return softmax(logits / T), the likeliest first."""
    weights = {token: math.exp(logit / temperature - 9 / temperature) for token, logit in LOGITS.items()}
    shares = [(token, weight / sum(weights.values())) for token, weight in weights.items()]
    return [TokenChance(number, token, p, math.log(p)) for number, (token, p) in enumerate(shares[:count])]


def body(**fields: Any) -> LlmServiceBody:
    return LlmServiceBody.model_validate({"prompt": "The capital of France is", **fields})


def result(*tokens: TokenEvent, prompt_tokens: int = 5) -> GenerationResult:
    return collect(tokens, Finished("length", len(tokens), prompt_tokens, generation_s=0.1564))


def test_the_defaults_are_the_documents_and_nothing_is_filtered() -> None:
    request = to_request(spec(), body())

    assert (request.temperature, request.max_new_tokens, request.top_tokens) == (1.0, 1, 5)
    assert (request.top_p, request.top_k, request.stop) == (1.0, None, ())


def test_null_means_not_given_and_unknown_fields_are_ignored() -> None:
    assert body(temperature=None, max_tokens=None, top_k=None, model="x") == body()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"temperature": 2.01}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 51}, "top_k"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": " \n"}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
    ],
)
def test_what_is_beyond_the_documents_limits_is_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as error:
        body(**fields)

    assert [each["loc"] for each in error.value.errors()] == [(field,)]


def test_the_catalogs_parameters_do_not_reshape_the_probabilities_and_its_overrides_do() -> None:
    parameters = {"top_p": 0.5, "top_k": 3, "repetition_penalty": 1.2, "temperature": 0.5, "max_new_tokens": 300}

    request = to_request(spec(parameters=parameters), body())
    forced = to_request(spec(overrides={"top_p": 0.5}), body())

    assert (request.top_p, request.top_k, request.repetition_penalty) == (1.0, None, 1.0)
    assert (request.temperature, request.max_new_tokens) == (0.5, 100)
    assert forced.top_p == 0.5


def test_a_whole_answer() -> None:
    request = to_request(spec(hf_name="org/m"), body(top_k=2))
    paris = TokenEvent(0, " Paris", -0.1, tuple(chances(1.0)))
    whole = result(paris, TokenEvent(1, ".", -0.1, tuple(chances(2.0))))

    told = json.loads(answer(spec(hf_name="org/m"), request, whole, first_of(whole), device="cpu"))

    best = chances(1.0)[0]
    assert told["generated_text"] == " Paris."
    assert [token["token"] for token in told["tokens"]] == [" Paris", " the"]
    assert told["tokens"][0] == {
        "token": " Paris",
        "probability": best.probability,
        "percentage": round(100 * best.probability, 2),
        "logprob": best.logprob,
        "rank": 1,
    }
    assert told["metadata"] == {
        "model_name": "org/m",
        "prompt_length": 24,
        "prompt_tokens": 5,
        "tokens_generated": 2,
        "finish_reason": "length",
        "generation_time_ms": 156,
        "temperature_used": 1.0,
        "device": "cpu",
    }


def test_an_engine_that_does_not_tell_the_prompts_length_leaves_it_unknown() -> None:
    request = to_request(spec(), body(prompt="héé 🙂"))
    whole = result(prompt_tokens=0)

    metadata = json.loads(answer(spec(), request, whole, (), device=None))["metadata"]

    assert (metadata["prompt_tokens"], metadata["prompt_length"], metadata["device"]) == (None, 5, None)


def test_it_is_seen_when_alternatives_are_lacking() -> None:
    request = to_request(spec(), body(top_k=4))

    assert not lacks_alternatives(result(TokenEvent(0, " Paris", -0.1, tuple(chances(1.0)))), request)
    assert lacks_alternatives(result(TokenEvent(0, " Paris", -0.1, tuple(chances(1.0, 3)))), request)
    assert lacks_alternatives(result(TokenEvent(None, "")), request)
    assert lacks_alternatives(result(), request)
    assert unsharpened(request) == replace(request, temperature=0.0)


@pytest.mark.parametrize("temperature", [0.3, 0.9, 2.0])
@pytest.mark.parametrize("known", [1, 2, 4])
def test_one_probability_at_a_temperature_tells_all_others(temperature: float, known: int) -> None:
    found = completed(chances(temperature, known), chances(1.0), temperature)

    assert [chance.text for chance in found] == list(LOGITS)
    for mine, true in zip(found, chances(temperature), strict=True):
        assert mine.probability == pytest.approx(true.probability, abs=1e-12)
        assert mine.logprob == pytest.approx(true.logprob)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_probabilities_at_temperature_0_and_1_are_the_models_own(temperature: float) -> None:
    assert list(completed((), chances(1.0), temperature)) == chances(1.0)


@pytest.mark.parametrize("temperature", [1e-3, 1e-300])
def test_what_is_almost_impossible_can_still_be_expressed(temperature: float) -> None:
    certain = TokenChance(0, " Paris", 1.0, 0.0)

    found = completed([certain], chances(1.0), temperature)

    assert [chance.probability for chance in found] == [1.0, 0.0, 0.0, 0.0]
    assert json.dumps([chance.logprob for chance in found], allow_nan=False)


@pytest.mark.parametrize(("known", "plain"), [([], chances(1.0)), (chances(0.5, 1), []), ([], [])])
def test_where_nothing_tells_the_alternatives_the_answer_fails(
    known: list[TokenChance], plain: list[TokenChance]
) -> None:
    with pytest.raises(GenerationFailed, match="part of a character"):
        completed(known, plain, 0.5)


def test_what_tgi_tells_becomes_the_same_answer() -> None:
    request = to_request(spec(), body(top_k=2))
    top = [{"id": 7042, "text": " Paris", "logprob": -0.25}, {"id": 260, "text": " the", "logprob": -2.3}]
    event = {
        "index": 1,
        "token": {"id": 7042, "text": " Paris", "logprob": -0.25, "special": False},
        "top_tokens": [{**each, "special": False} for each in top],
        "generated_text": " Paris",
        "details": {"finish_reason": "length", "generated_tokens": 1, "seed": None, "input_length": 5},
    }
    paris, end = StreamDecoder(request).feed(b"data:" + json.dumps(event).encode() + b"\n\n")
    assert isinstance(paris, TokenEvent)
    assert isinstance(end, Finished)
    whole = collect([paris], end)

    told = json.loads(answer(spec(), request, whole, first_of(whole), device="cuda:0"))

    assert not lacks_alternatives(whole, request)
    assert [(each["token"], each["rank"]) for each in told["tokens"]] == [(" Paris", 1), (" the", 2)]
    assert told["tokens"][0]["probability"] == pytest.approx(math.exp(-0.25))
    assert (told["metadata"]["prompt_tokens"], told["metadata"]["device"]) == (5, "cuda:0")
