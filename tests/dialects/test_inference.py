"""The inference API's dialect: tables of bodies in, bytes out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.dialects.inference import InferenceBody, InferenceReply, mode_of, to_request
from gateway.errors import GenerationFailed
from gateway.generation import Chat, Finished, Message, TokenEvent, collect
from tests.fleet.scenes import spec

HELLO = {"role": "user", "content": "Hello"}
TOKENS = [TokenEvent(1, " Paris"), TokenEvent(None, ""), TokenEvent(2, " é")]


def body(**fields: Any) -> InferenceBody:
    return InferenceBody.model_validate({"model": "m", "prompt": "Explain", **fields})


def test_the_defaults_are_the_contracts() -> None:
    request = to_request(spec(), body())

    assert (request.max_new_tokens, request.temperature, request.top_p) == (200, 0.7, 0.95)
    assert (request.frequency_penalty, request.presence_penalty, request.stop) == (0.0, 0.0, ())
    assert body(parameters=None) == body()


@pytest.mark.parametrize(
    ("fields", "attribute", "value"),
    [
        ({"max_tokens": 7}, "max_new_tokens", 7),
        ({"temperature": 0}, "temperature", 0.0),
        ({"top_p": 1}, "top_p", 1.0),
        ({"frequency_penalty": -2}, "frequency_penalty", -2.0),
        ({"presence_penalty": 2}, "presence_penalty", 2.0),
        ({"stop": ["\n", "end"]}, "stop", ("\n", "end")),
        ({"stop": "end"}, "stop", ("end",)),
        ({"stop": None}, "stop", ()),
    ],
)
def test_a_parameter_reaches_the_request(fields: dict[str, Any], attribute: str, value: object) -> None:
    assert getattr(to_request(spec(), body(parameters=fields)), attribute) == value


@pytest.mark.parametrize(
    ("fields", "loc"),
    [
        ({"parameters": {"temperature": 2.5}}, ("parameters", "temperature")),
        ({"parameters": {"max_tokens": 0}}, ("parameters", "max_tokens")),
        ({"parameters": {"top_p": 0}}, ("parameters", "top_p")),
        ({"parameters": {"presence_penalty": 3}}, ("parameters", "presence_penalty")),
        ({"parameters": {"stop": [""]}}, ("parameters", "stop", 0)),
        ({"parameters": {"stop": 7}}, ("parameters", "stop")),
        ({"parameters": [1]}, ("parameters",)),
        ({"mode": "poem"}, ("mode",)),
        ({"prompt": " "}, ("prompt",)),
        ({"messages": "hello"}, ("messages",)),
        ({"messages": []}, ("messages",)),
        ({"messages": [HELLO, "hello"]}, ("messages", 1)),
        ({"messages": [{"role": "poet", "content": "x"}]}, ("messages", 0, "role")),
        ({"messages": [{"role": "user"}]}, ("messages", 0, "content")),
    ],
)
def test_what_is_wrong_is_refused_by_its_name(fields: dict[str, Any], loc: tuple[object, ...]) -> None:
    with pytest.raises(ValidationError) as error:
        body(**fields)

    assert [each["loc"] for each in error.value.errors()] == [loc]


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({}, "completion"),
        ({"messages": [HELLO]}, "chat"),
        ({"messages": [HELLO], "mode": "instruct"}, "instruct"),
        ({"messages": [HELLO], "mode": "completion"}, "completion"),
        ({"mode": "instruct"}, "instruct"),
    ],
)
def test_the_mode_follows_from_what_is_given(fields: dict[str, Any], mode: str) -> None:
    assert mode_of(body(**fields)) == mode


def test_a_conversation_reaches_the_request_with_the_same_defaults() -> None:
    turns = [{"role": "developer", "content": "Be brief."}, HELLO]
    request = to_request(spec(), body(prompt=None, messages=turns))

    assert request.chat == Chat((Message("system", ("Be brief.",)), Message("user", ("Hello",))))
    assert (request.prompt, request.max_new_tokens, request.temperature, request.top_p) == ("", 200, 0.7, 0.95)


def test_an_instruction_is_all_that_the_user_said() -> None:
    request = to_request(spec(overrides={"temperature": 0}), body(mode="instruct", parameters={"max_tokens": 7}))

    assert request.chat == Chat((Message("user", ("Explain",)),))
    assert (request.prompt, request.max_new_tokens, request.temperature) == ("", 7, 0.0)


def test_a_completion_is_no_chat() -> None:
    assert (to_request(spec(), body()).prompt, to_request(spec(), body()).chat) == ("Explain", None)


def test_a_whole_answer_is_the_continuation_alone() -> None:
    told = InferenceReply(spec(), stream=False).whole(collect(TOKENS, Finished("stop", 3, 5, "!")))

    assert json.loads(told) == {
        "generated_text": " Paris é!",
        "model": "m",
        "tokens_generated": 3,
        "finish_reason": "stop",
    }


def test_a_stream_has_pieces_and_at_last_the_whole() -> None:
    reply = InferenceReply(spec(), stream=True)

    sent = b"".join(reply.event(token) for token in TOKENS) + reply.end(Finished("eos", 3, 5, "!"))

    events = [json.loads(event.removeprefix("data: ")) for event in sent.decode().strip().split("\n\n")]
    assert events[:-1] == [{"text": " Paris"}, {"text": " é"}, {"text": "!"}]
    assert events[-1] == {"generated_text": " Paris é!", "model": "m", "tokens_generated": 3, "finish_reason": "eos"}


def test_a_failure_in_a_stream_has_the_shape_of_every_error() -> None:
    told = InferenceReply(spec(), stream=True).failure(GenerationFailed("It broke."))

    assert told == b'data: {"detail":"It broke.","error_code":"GENERATION_FAILED"}\n\n'
