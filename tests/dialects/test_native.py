"""The gateway's own dialect: tables of bodies in, bytes out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.dialects.native import GenerateBody, NativeReply, to_request, with_catalog
from gateway.errors import GenerationFailed, InvalidRequest
from gateway.generation import Finished, FinishReason, TokenChance, TokenEvent, collect
from tests.fleet.scenes import spec

PARIS = TokenEvent(
    7042, " Paris", -0.25, (TokenChance(7042, " Paris", 0.77, -0.25), TokenChance(260, " the", 0.1, -2.3))
)
DOT = TokenEvent(30, ".", -0.4)


def body(**fields: Any) -> GenerateBody:
    return GenerateBody.model_validate({"prompt": "The capital of France is", **fields})


def reply(**fields: Any) -> NativeReply:
    asked = body(**fields)
    return NativeReply(spec(), asked, to_request(spec(), asked))


def frames(*data: bytes) -> list[dict[str, Any]]:
    sent = b"".join(data)
    assert sent.endswith(b"\n\n")
    events = sent.removesuffix(b"\n\n").split(b"\n\n")
    assert all(event.startswith(b"data: ") for event in events)
    return [json.loads(event[6:]) for event in events]


def test_the_defaults_are_the_documents() -> None:
    request = to_request(spec(), body())

    assert (request.max_new_tokens, request.temperature, request.top_p, request.top_k) == (200, 0.7, 0.95, None)
    assert request.stop == ()
    assert request.seed is None


@pytest.mark.parametrize(
    ("fields", "attribute", "value"),
    [
        ({"max_tokens": 7}, "max_new_tokens", 7),
        ({"stop": "end"}, "stop", ("end",)),
        ({"stop": ["a", "b"], "stop_on_newline": True}, "stop", ("a", "b", "\n")),
        ({"top_tokens": 3}, "top_p", 1.0),
        ({"top_tokens": 3, "top_p": 0.95}, "top_p", 0.95),
        ({"temperature": 0}, "temperature", 0.0),
    ],
)
def test_a_field_reaches_the_request(fields: dict[str, Any], attribute: str, value: object) -> None:
    assert getattr(to_request(spec(), body(**fields)), attribute) == value


def test_a_small_context_bounds_the_default_length() -> None:
    assert to_request(spec(context_tokens=64), body()).max_new_tokens == 64


@pytest.mark.parametrize(
    "fields",
    [{"max_tokens": 1, "max_new_tokens": 1}, {"model": "a", "model_id": "b"}, {"stop": ["x"] * 65}, {"stop": [None]}],
)
def test_a_body_that_contradicts_itself_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        body(**fields)


@pytest.mark.parametrize(
    ("keys", "said", "max_new_tokens", "temperature"),
    [
        ({"parameters": {"max_new_tokens": 5}}, {}, 5, 0.7),
        ({"parameters": {"max_new_tokens": 5}}, {"max_tokens": 9}, 9, 0.7),
        ({"parameters": {"max_tokens": 5}}, {"max_new_tokens": 9}, 9, 0.7),
        ({"overrides": {"max_tokens": 5}}, {"max_new_tokens": 9}, 5, 0.7),
        ({"parameters": {"temperature": 0.1}, "overrides": {"temperature": 0.2}}, {"temperature": 2}, 200, 0.2),
    ],
)
def test_the_callers_word_beats_parameters_and_overrides_beat_it(
    keys: dict[str, Any], said: dict[str, Any], max_new_tokens: int, temperature: float
) -> None:
    model = spec(**keys)

    request = to_request(model, with_catalog(model, body(**said)))

    assert (request.max_new_tokens, request.temperature) == (max_new_tokens, temperature)


def test_a_catalog_that_spoils_a_good_request_is_named() -> None:
    model = spec(overrides={"stop": ["x"] * 65})

    with pytest.raises(InvalidRequest, match=r"models\.yaml"):
        with_catalog(model, body())


@pytest.mark.parametrize(("reason", "word"), [("length", "length"), ("stop", "stop_sequence"), ("eos", "eos_token")])
def test_a_whole_answer(reason: FinishReason, word: str) -> None:
    result = collect([PARIS, DOT], Finished(reason, 2, 5, "!"))

    full = json.loads(reply().whole(result))
    short = json.loads(reply(return_full_text=False, top_tokens=2).whole(result))

    assert full == {
        "generated_text": "The capital of France is Paris.!",
        "model_id": "m",
        "model": "m",
        "prompt": "The capital of France is",
        "tokens_generated": 2,
        "finish_reason": word,
    }
    assert short["generated_text"] == " Paris.!"
    assert short["tokens"][0][1] == {
        "token": " the",
        "probability": 0.1,
        "percentage": 10.0,
        "logprob": -2.3,
        "rank": 2,
    }


def test_a_stream_that_ends_at_its_limit_has_the_last_token_in_the_final_frame() -> None:
    answer = reply(stream=True, max_new_tokens=2, top_tokens=2)

    first, last = frames(answer.event(PARIS), answer.event(DOT), answer.end(Finished("length", 2, 5)))

    assert first["index"] == 1
    assert first["token"] == {"id": 7042, "text": " Paris", "logprob": -0.25, "special": False}
    assert [token["text"] for token in first["top_tokens"]] == [" Paris", " the"]
    assert first["generated_text"] is first["details"] is None
    assert last["token"]["text"] == "."
    assert last["generated_text"] == " Paris."
    assert last["details"] == {"finish_reason": "length", "generated_tokens": 2, "seed": None, "input_length": 5}


@pytest.mark.parametrize(
    ("end", "token_id"),
    [
        ([TokenEvent(2, "", -0.1)], 2),
        ([TokenEvent(2, "", -0.1, token="</s>", special=True)], 2),
        ([], -1),
    ],
)
def test_a_stream_that_the_model_ends_ends_with_its_special_token(end: list[TokenEvent], token_id: int) -> None:
    answer = reply(stream=True, max_new_tokens=9)

    told = [answer.event(event) for event in [PARIS, *end]]
    first, last = frames(*told, answer.end(Finished("eos", 2, 5)))

    assert first["token"]["text"] == " Paris"
    assert (last["index"], last["token"]["text"], last["token"]["special"]) == (2, "", True)
    assert last["token"]["id"] == token_id
    assert last["generated_text"] == " Paris"
    assert last["details"]["finish_reason"] == "eos_token"


def test_a_token_without_text_waits_for_the_next_and_is_not_lost() -> None:
    answer = reply(stream=True, max_new_tokens=9)
    part = TokenEvent(None, "")

    told = [answer.event(event) for event in (part, part, PARIS)]
    sent = frames(*told, answer.end(Finished("eos", 4, 5)))

    assert told[0] == b""
    assert [frame["index"] for frame in sent] == [1, 2, 3, 4]
    assert [frame["token"]["id"] for frame in sent] == [-1, -1, 7042, -1]
    assert [frame["token"]["special"] for frame in sent] == [False, False, False, True]


def test_a_token_that_is_known_to_be_the_last_is_in_the_final_frame() -> None:
    answer = reply(stream=True, max_new_tokens=9, stop=["."])

    [last] = frames(answer.event(PARIS, last=True), answer.end(Finished("stop", 1, 5)))

    assert last["token"]["text"] == " Paris"
    assert last["generated_text"] == " Paris"
    assert (last["token"]["special"], last["details"]["finish_reason"]) == (False, "stop_sequence")


def test_likeliest_tokens_are_in_a_stream_only_if_asked_for() -> None:
    [frame] = frames(reply(stream=True).event(PARIS))

    assert "top_tokens" not in frame
    assert frame["token"]["logprob"] == -0.25


def test_what_was_held_back_comes_with_the_end_and_clients_can_add_it_up() -> None:
    answer = reply(stream=True, max_new_tokens=9, stop=["!!"])

    sent = frames(answer.event(PARIS), answer.end(Finished("eos", 2, 5, "!")))

    assert "".join(frame["token"]["text"] for frame in sent) == " Paris!"
    assert sent[-1]["generated_text"] == " Paris!"


def test_a_failure_is_one_event_with_its_code() -> None:
    [frame] = frames(reply(stream=True).failure(GenerationFailed("it broke off")))

    assert frame == {"error": "it broke off", "error_type": "GENERATION_FAILED", "error_code": "GENERATION_FAILED"}
