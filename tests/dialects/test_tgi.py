"""TGI's own API as a dialect: tables of bodies in, bytes out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.dialects.tgi import (
    CompatibleBody,
    GenerateBody,
    TgiReply,
    TokenizeBody,
    Untouched,
    as_openai,
    exceeds_context,
    headers,
    info,
    served_name,
    to_request,
    to_tokenize,
    tokenized,
)
from gateway.errors import GenerationFailed, GenerationTimeout, PromptTooLong, QueueFull, Unsupported
from gateway.facts import Facts
from gateway.generation import (
    Finished,
    FinishReason,
    GenerationRequest,
    JsonSchema,
    PromptToken,
    Regex,
    TokenChance,
    TokenEvent,
    collect,
)
from tests.dialects.test_native import frames
from tests.fleet.scenes import spec
from tests.tgi_double.schemas import problems

PARIS = TokenEvent(7, " Paris", -0.25, (TokenChance(7, " Paris", 0.77, -0.25), TokenChance(26, " the", 0.1, -2.3)))
PART = TokenEvent(None, "")
DOT = TokenEvent(30, ".", -0.4)
END = TokenEvent(2, "", -0.1, token="</s>", special=True)
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}}


def body(**parameters: Any) -> GenerateBody:
    return GenerateBody.model_validate({"inputs": "The capital is", "parameters": parameters})


def asked(**parameters: Any) -> GenerationRequest:
    return to_request(spec(), body(**parameters))


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "json", "value": {"properties": {"a": {"type": "string"}}}},
        {"type": "json", "value": '{"properties": {"a": {"type": "string"}}}'},
        {"type": "json_schema", "value": {"schema": {"properties": {"a": {"type": "string"}}}}},
    ],
)
def test_a_schema_of_properties_alone_is_that_of_an_object(grammar: dict[str, Any]) -> None:
    wanted = {"type": "object", "properties": {"a": {"type": "string"}}}

    assert asked(grammar=grammar).grammar == JsonSchema(wanted)
    form = as_openai({"response_format": grammar})["response_format"]
    assert form == {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted}}


def test_the_stop_text_that_ends_an_answer_must_be_told() -> None:
    assert asked(stop=["x"]).keep_stop


def reply(*, stream: bool = True, **parameters: Any) -> TgiReply:
    said = body(**parameters)
    return TgiReply(said, to_request(spec(), said, stream=stream), stream=stream)


def whole(events: list[TokenEvent], finished: Finished, **parameters: Any) -> dict[str, Any]:
    answer = json.loads(reply(stream=False, **parameters).whole(collect(events, finished)))
    assert problems(answer, "GenerateResponse") == []
    return dict(answer)


def streamed(events: list[TokenEvent], finished: Finished, **parameters: Any) -> list[dict[str, Any]]:
    writer = reply(**parameters)
    told = [writer.event(event, last=number == len(events)) for number, event in enumerate(events, 1)]
    found = frames(*told, writer.end(finished))
    assert [fault for frame in found for fault in problems(frame, "StreamResponse")] == []
    return found


# ---- requests -------------------------------------------------------------------------------------------------------


def test_without_parameters_it_samples_and_with_none_in_them_it_does_not() -> None:
    absent = to_request(spec(), GenerateBody.model_validate({"inputs": "x"}))
    empty = asked()

    assert (absent.temperature, empty.temperature) == (1.0, 0.0)
    for request in (absent, empty):
        assert (request.top_p, request.top_k, request.seed, request.stop) == (1.0, None, None, ())
        assert (request.repetition_penalty, request.frequency_penalty, request.grammar) == (1.0, 0.0, None)
        assert request.max_new_tokens is None
        assert request.top_tokens == 0


@pytest.mark.parametrize(
    ("parameters", "temperature", "top_p", "top_k"),
    [
        ({"do_sample": True}, 1.0, 1.0, None),
        ({"do_sample": False}, 0.0, 1.0, None),
        ({"temperature": 0.5}, 0.5, 1.0, None),
        ({"temperature": 3.5}, 3.5, 1.0, None),  # TGI has no upper bound
        ({"temperature": 1}, 0.0, 1.0, None),  # counts as none at all
        ({"temperature": 1.0, "do_sample": True}, 1.0, 1.0, None),
        ({"temperature": 0.5, "do_sample": False}, 0.5, 1.0, None),
        ({"top_p": 0.9}, 1.0, 0.9, None),
        ({"top_k": 4, "do_sample": False}, 1.0, 1.0, 4),
        ({"top_k": 4, "top_p": 0.5, "temperature": 0.7}, 0.7, 0.5, 4),
        ({"seed": 3}, 0.0, 1.0, None),
        ({"temperature": None, "top_p": None, "top_k": None}, 0.0, 1.0, None),
    ],
)
def test_it_samples_as_tgi_decides_it(
    parameters: dict[str, Any], temperature: float, top_p: float, top_k: int | None
) -> None:
    request = asked(**parameters)

    assert (request.temperature, request.top_p, request.top_k) == (temperature, top_p, top_k)


@pytest.mark.parametrize(
    ("parameters", "attribute", "value"),
    [
        ({"max_new_tokens": 7}, "max_new_tokens", 7),
        ({"stop": ["a", "b"]}, "stop", ("a", "b")),
        ({"seed": 2**64 - 1}, "seed", 2**64 - 1),
        ({"repetition_penalty": 1.2}, "repetition_penalty", 1.2),
        ({"frequency_penalty": -2}, "frequency_penalty", -2),
        ({"top_n_tokens": 5}, "top_tokens", 5),
        ({"details": True}, "logprobs", True),
        ({"grammar": {"type": "json", "value": SCHEMA}}, "grammar", JsonSchema(SCHEMA)),
        ({"grammar": {"type": "json_object", "value": SCHEMA}}, "grammar", JsonSchema(SCHEMA)),
        ({"grammar": {"type": "json", "value": json.dumps(SCHEMA)}}, "grammar", JsonSchema(SCHEMA)),
        ({"grammar": {"type": "regex", "value": "[0-9]+"}}, "grammar", Regex("[0-9]+")),
        (
            {"grammar": {"type": "json_schema", "value": {"name": "n", "schema": SCHEMA}}},
            "grammar",
            JsonSchema(SCHEMA, "n"),
        ),
        ({"best_of": 1, "watermark": False, "adapter_id": None, "truncate": None}, "temperature", 0.0),
        ({"return_full_text": None, "typical_p": None, "unknown": {"of": "TGI"}}, "temperature", 0.0),
    ],
)
def test_a_parameter_reaches_the_request(parameters: dict[str, Any], attribute: str, value: object) -> None:
    assert getattr(asked(**parameters), attribute) == value


@pytest.mark.parametrize(
    ("keys", "parameters", "temperature", "top_p", "max_new_tokens"),
    [
        ({"parameters": {"temperature": 0.3, "max_tokens": 5}}, {}, 0.3, 1.0, 5),
        ({"parameters": {"temperature": 0.3}}, {"do_sample": False}, 0.0, 1.0, None),
        ({"parameters": {"max_tokens": 5}}, {"max_new_tokens": 9}, 0.0, 1.0, 9),
        ({"parameters": {"temperature": 0.3, "top_p": 0.5}}, {"temperature": 0.8}, 0.8, 0.5, None),
        ({"overrides": {"temperature": 0}}, {"temperature": 0.8, "top_p": 0.5}, 0.0, 0.5, None),
        ({"context_tokens": 64}, {"max_new_tokens": 4096}, 0.0, 1.0, 64),
        ({"context_tokens": 64}, {}, 0.0, 1.0, None),
    ],
)  # fmt: skip
def test_the_catalog_has_its_word(
    keys: dict[str, Any], parameters: dict[str, Any], temperature: float, top_p: float, max_new_tokens: int | None
) -> None:
    request = to_request(spec(**keys), body(**parameters))

    assert (request.temperature, request.top_p, request.max_new_tokens) == (temperature, top_p, max_new_tokens)


def test_the_first_block_must_leave_room_for_a_prompt() -> None:
    assert [exceeds_context(spec(context_tokens=64), body(max_new_tokens=most)) for most in (63, 64, 9999)] == [
        False,
        True,
        True,
    ]
    assert not exceeds_context(spec(context_tokens=2048), body(max_new_tokens=100_000))
    assert not exceeds_context(spec(), body(max_new_tokens=100_000))
    assert not exceeds_context(spec(context_tokens=64), body())


RULES = [
    ({"temperature": 0}, "must be strictly positive"),
    ({"temperature": -0.5}, "must be strictly positive"),
    ({"temperature": 1e-60}, "must be strictly positive"),  # 0 in 32 bits
    ({"repetition_penalty": 0}, "must be strictly positive"),
    ({"frequency_penalty": 2.1}, "must be >= -2.0 and <= 2.0"),
    ({"top_p": 0}, "must be > 0.0 and < 1.0"),
    ({"top_p": 1}, "must be > 0.0 and < 1.0"),
    ({"top_p": 0.99999999}, "must be > 0.0 and < 1.0"),  # 1 in 32 bits
    ({"typical_p": 1.0}, "must be > 0.0 and < 1.0"),
    ({"top_k": 0}, "must be strictly positive"),
    ({"top_k": -1}, "must be strictly positive"),
    ({"max_new_tokens": 0}, "must be strictly positive"),
    ({"truncate": 0}, "must be strictly positive"),
    ({"best_of": 0}, "must be > 0 and <= 1"),
    ({"top_n_tokens": 51}, "must be >= 0 and <= 50"),
    ({"stop": ["x"] * 65}, "supports up to 64 stop sequences. Given: 65"),
    ({"grammar": {"type": "json", "value": {"type": "object"}}}, "Grammar must have a 'properties' field"),
    ({"grammar": {"type": "json", "value": "{"}}, "that is not JSON"),
    ({"grammar": {"type": "json", "value": "[" * 9999}}, "that is not JSON"),
    ({"grammar": {"type": "json", "value": "1"}}, "Grammar must have a 'properties' field"),
    ({"grammar": {"type": "json_schema", "value": {"schema": {}}}}, "Grammar must have a 'properties' field"),
]


@pytest.mark.parametrize(("parameters", "words"), RULES)
def test_a_rule_of_tgis_is_told_in_its_words(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        body(**parameters)

    (error,) = refused.value.errors()
    assert error["loc"][:2] == ("parameters", next(iter(parameters)))
    assert words in error["msg"]
    assert error["type"] in ("rule", "grammar")


@pytest.mark.parametrize(
    "parameters",
    [
        {"typical_p": 0.5},
        {"truncate": 5},
        {"watermark": True},
        {"adapter_id": "lora"},
        {"decoder_input_details": True},
        {"best_of": 2},
    ],
)
def test_what_only_tgi_can_do_is_unsupported(parameters: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        body(**parameters)

    assert [error["type"] for error in refused.value.errors()] == ["unsupported"]


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"inputs": None},
        {"inputs": ["x"]},
        {"inputs": ""},
        {"inputs": "\ud800"},
        {"inputs": "x", "parameters": None},
        {"inputs": "x", "parameters": []},
        *[
            {"inputs": "x", "parameters": {name: None}}
            for name in ("stop", "do_sample", "details", "watermark", "decoder_input_details")
        ],
        *[
            {"inputs": "x", "parameters": parameters}
            for parameters in (
                {"temperature": "0.5"},
                {"temperature": True},
                {"temperature": float("inf")},
                {"max_new_tokens": 2**32},
                {"max_new_tokens": -1},
                {"max_new_tokens": 5.0},
                {"seed": -1},
                {"seed": 2**64},
                {"top_k": 2**31},
                {"stop": "x"},
                {"stop": [""]},
                {"stop": [None]},
                {"stop": ["\ud800"]},
                {"do_sample": 1},
                {"details": "true"},
                {"grammar": {"type": "yaml", "value": "x"}},
                {"grammar": {"type": "regex"}},
                {"grammar": {"type": "regex", "value": {}}},
                {"grammar": "x"},
            )
        ],
    ],
)
def test_what_tgi_cannot_read_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GenerateBody.model_validate(said)


def test_white_space_is_a_prompt_as_it_is_for_tgi() -> None:
    assert GenerateBody.model_validate({"inputs": " \n"}).inputs == " \n"


def test_a_text_to_be_cut_into_tokens_may_be_empty_and_has_no_rules() -> None:
    said = TokenizeBody.model_validate({"inputs": "", "parameters": {"temperature": 0}})

    assert to_tokenize(said).prompt == ""


# ---- answers --------------------------------------------------------------------------------------------------------


def test_an_answer_is_the_text_alone_unless_details_are_asked_for() -> None:
    assert whole([PARIS, DOT], Finished("length", 2, 5)) == {"generated_text": " Paris."}
    assert whole([PARIS], Finished("length", 1, 5), return_full_text=True) == {"generated_text": "The capital is Paris"}


@pytest.mark.parametrize(("reason", "word"), [("length", "length"), ("stop", "stop_sequence"), ("eos", "eos_token")])
def test_details(reason: FinishReason, word: str) -> None:
    details = whole([PARIS, PART, DOT], Finished(reason, 3, 5), details=True, do_sample=True, seed=2**64 - 1)["details"]

    assert details == {
        "finish_reason": word,
        "generated_tokens": 3,
        "seed": 2**64 - 1,
        "prefill": [],
        "tokens": [
            {"id": 7, "text": " Paris", "logprob": -0.25, "special": False},
            {"id": 0, "text": "", "logprob": None, "special": False},
            {"id": 30, "text": ".", "logprob": -0.4, "special": False},
        ],
    }


def test_a_greedy_answer_tells_no_seed_as_nothing_was_drawn() -> None:
    assert whole([PARIS], Finished("length", 1, 5), details=True, seed=4)["details"]["seed"] is None


def test_the_stop_text_is_part_of_the_text_and_of_the_last_token() -> None:
    finished = Finished("stop", 2, 5, text=" of", stop=" France")

    answer = whole([PARIS, PART], finished, details=True)

    assert answer["generated_text"] == " Paris of France"
    assert [token["text"] for token in answer["details"]["tokens"]] == [" Paris", " of France"]
    assert not answer["details"]["tokens"][-1]["special"]
    first, last = streamed([PARIS, PART], finished)
    assert (first["token"]["text"], first["generated_text"]) == (" Paris", None)
    assert (last["token"]["text"], last["generated_text"]) == (" of France", " Paris of France")


def test_each_token_has_its_own_text_where_the_engine_tells_it() -> None:
    held = [TokenEvent(5, "", -0.1, token=" Pa"), TokenEvent(6, " ", -0.2, token="ris.")]

    answer = whole(held, Finished("stop", 2, 5, text="Pa", stop="ris"), details=True)

    assert answer["generated_text"] == " Paris"
    assert [token["text"] for token in answer["details"]["tokens"]] == [" Pa", "ris."]


def test_the_models_own_end_is_special_and_no_text() -> None:
    answer = whole([PARIS, END], Finished("eos", 2, 5), details=True)
    _, last = streamed([PARIS, END], Finished("eos", 2, 5))

    for shown in (answer["details"]["tokens"][-1], last["token"]):
        assert shown == {"id": 2, "text": "</s>", "logprob": -0.1, "special": True}
    assert answer["generated_text"] == last["generated_text"] == " Paris"


def test_an_end_of_which_the_engine_tells_nothing_is_special_too() -> None:
    answer = whole([PARIS, PART], Finished("eos", 2, 5), details=True)

    assert answer["details"]["tokens"][-1] == {"id": 0, "text": "", "logprob": None, "special": True}
    assert streamed([PARIS], Finished("eos", 2, 5))[-1]["index"] == 1
    assert whole([], Finished("eos", 0, 5), details=True)["details"]["tokens"] == []


def test_the_likeliest_tokens_are_told_at_each_position() -> None:
    details = whole([PARIS, DOT], Finished("length", 2, 5), details=True, top_n_tokens=2)["details"]
    first, last = streamed([PARIS, DOT], Finished("length", 2, 5), top_n_tokens=2)

    paris = [
        {"id": 7, "text": " Paris", "logprob": -0.25, "special": False},
        {"id": 26, "text": " the", "logprob": -2.3, "special": False},
    ]
    assert details["top_tokens"] == [paris, []]
    assert first["top_tokens"] == paris
    assert "top_tokens" not in last


def test_a_stream_has_one_token_an_event_and_details_in_the_last_if_asked_for() -> None:
    plain = streamed([PARIS, DOT], Finished("length", 2, 5))
    told = streamed([PARIS, DOT], Finished("length", 2, 5), details=True, return_full_text=True)

    assert [frame["index"] for frame in plain] == [1, 2]
    assert [frame["generated_text"] for frame in plain] == [None, " Paris."]
    assert [frame["details"] for frame in plain] == [None, None]
    assert told[-1]["generated_text"] == "The capital is Paris."
    assert told[-1]["details"] == {
        "finish_reason": "length",
        "generated_tokens": 2,
        "seed": None,
        "input_length": 5,
    }
    assert list(plain[0]) == ["index", "token", "generated_text", "details"]


@pytest.mark.parametrize(("said", "text"), [({}, "x Paris"), ({"parameters": {"return_full_text": False}}, " Paris")])
def test_root_answers_a_list_of_one_that_begins_with_the_prompt(said: dict[str, Any], text: str) -> None:
    asked = CompatibleBody.model_validate({"inputs": "x", **said}).with_defaults()
    request = to_request(spec(), asked)

    answer = TgiReply(asked, request, stream=False).whole(collect([PARIS], Finished("length", 1, 5)))

    assert json.loads(answer) == [{"generated_text": text}]
    assert request.temperature == (0.0 if said else 1.0)  # the trap of absent parameters is there, too


def test_a_failure_in_a_stream_is_one_event_in_tgis_shape() -> None:
    (event,) = frames(reply().failure(GenerationFailed("it broke")))

    assert event == {"error": "it broke", "error_type": "generation", "error_code": "GENERATION_FAILED"}
    assert problems(event, "ErrorResponse") == []


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (GenerationFailed("no"), "generation", 424),
        (QueueFull("no"), "overloaded", 429),
        (PromptTooLong("no"), "validation", 422),
        (Unsupported("no"), "validation", 422),
        (GenerationTimeout("no"), "generation_timeout", 504),
    ],
)
def test_a_failure_of_what_is_put_through_has_the_shape_of_its_address(error: Any, kind: str, status: int) -> None:
    (native,) = frames(Untouched(as_openai=False).failure(error))
    (openai,) = frames(Untouched(as_openai=True).failure(error))

    assert (native["error"], native["error_type"], native["error_code"]) == ("no", kind, error.code)
    assert openai["error"] == {"message": "no", "http_status_code": status}
    assert (openai["error_type"], openai["error_code"]) == (kind, error.code)


def test_headers_tell_times_in_milliseconds_and_what_was_no_inference_was_a_wait() -> None:
    result = collect([PARIS, DOT], Finished("length", 2, 5, generation_s=0.25))

    assert headers("é ☕", result, total_s=1.0, device="cpu") == {
        "x-compute-type": "cpu",
        "x-compute-time": "1.000000",
        "x-compute-characters": "3",
        "x-total-time": "1000",
        "x-validation-time": "0",
        "x-queue-time": "750",
        "x-inference-time": "250",
        "x-time-per-token": "125",
        "x-prompt-tokens": "5",
        "x-generated-tokens": "2",
    }
    nothing = headers("x", collect([], Finished("stop", 0, 0)), total_s=0.0, device=None)
    assert "x-prompt-tokens" not in nothing
    assert "x-compute-type" not in nothing


def test_tokens() -> None:
    answer = json.loads(tokenized((PromptToken(504, "The", 0, 3), PromptToken(9, " ☕", 3, 7))))

    assert answer == [
        {"id": 504, "text": "The", "start": 0, "stop": 3},
        {"id": 9, "text": " ☕", "start": 3, "stop": 7},
    ]
    assert problems(answer, "TokenizeResponse") == []


@pytest.mark.parametrize(
    ("context_tokens", "of_the_model", "total"), [(2048, 8192, 2048), (None, 8192, 8192), (4096, 512, 512)]
)
def test_info_tells_the_limits(context_tokens: int | None, of_the_model: int, total: int) -> None:
    model = spec(context_tokens=context_tokens, hf_name="org/name", max_concurrency=3)

    told = info(model, Facts(context_tokens=of_the_model), version="1.2.3").model_dump()

    assert problems(told, "Info") == []
    assert (told["max_total_tokens"], told["max_input_tokens"]) == (total, total - 1)
    assert (told["model_id"], told["version"], told["max_concurrent_requests"]) == ("org/name", "1.2.3", 3)


def test_limits_that_nobody_knows_are_null() -> None:
    told = info(spec(), Facts(), version="1")

    assert (told.max_total_tokens, told.max_input_tokens) == (None, None)
    assert served_name(spec()) == "m"


# ---- TGI's chats ----------------------------------------------------------------------------------------------------


AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
NAMED_SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
TGIS_CHATS: list[tuple[Any, Any]] = [
    ({"response_format": {"type": "json", "value": SCHEMA}}, {"response_format": AS_SCHEMA}),
    ({"response_format": {"type": "json_object", "value": json.dumps(SCHEMA)}}, {"response_format": AS_SCHEMA}),
    (
        {"response_format": {"type": "json_schema", "value": {"name": "n", "schema": SCHEMA}}},
        {"response_format": NAMED_SCHEMA},
    ),
    ({"tool_choice": "weather"}, {"tool_choice": {"type": "function", "function": {"name": "weather"}}}),
]
OPENAIS_CHATS: list[Any] = [
    {"tool_choice": "required"},
    {"response_format": NAMED_SCHEMA},
    {"response_format": {"type": "json_object"}},
    {"response_format": None, "messages": [], "tool_choice": None},
    {"response_format": {"type": "regex", "value": "[0-9]"}},
    [1],
    None,
]


@pytest.mark.parametrize(("said", "meant"), [*TGIS_CHATS, *((same, same) for same in OPENAIS_CHATS)])
def test_what_tgi_writes_otherwise_is_written_as_openai_does(said: Any, meant: Any) -> None:
    assert as_openai(said) == meant
