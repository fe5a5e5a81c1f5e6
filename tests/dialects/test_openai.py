"""OpenAI's dialect: tables of bodies in, bytes out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway.dialects.openai import Heading, SampledBody
from gateway.dialects.openai_chat import ChatChoices, ChatCompletion, ChatCompletionBody
from gateway.dialects.openai_chat import to_requests as chat_requests
from gateway.dialects.openai_completions import Completion, CompletionBody, CompletionChoices
from gateway.dialects.openai_completions import to_requests as completion_requests
from gateway.errors import GenerationFailed
from gateway.generation import (
    Finished,
    FinishReason,
    GenerationRequest,
    GenerationResult,
    JsonSchema,
    Regex,
    TokenChance,
    TokenEvent,
    ToolCallPiece,
    collect,
)
from tests.fleet.scenes import spec

HEADING = Heading("id-1", 1700000000, "the/name-asked-for")
SAID = {"messages": [{"role": "user", "content": "Hello"}]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
HI = TokenEvent(7, "Hi", -0.25, (TokenChance(7, "Hi", 0.7, -0.25), TokenChance(8, "Yo", 0.1, -2.3)), "Hi")
BANG = TokenEvent(9, "!", -0.5, (TokenChance(9, "!", 0.6, -0.5), TokenChance(10, "?", 0.2, -1.6)), "!")
END = Finished("eos", 3, 5)


def chat(**fields: Any) -> ChatCompletionBody:
    return ChatCompletionBody.model_validate({**SAID, **fields})


def text(**fields: Any) -> CompletionBody:
    return CompletionBody.model_validate({"prompt": "Once", **fields})


def wanted(body: SampledBody, **keys: Any) -> list[GenerationRequest]:
    model = spec(**keys)
    if isinstance(body, ChatCompletionBody):
        return chat_requests(model, body)
    assert isinstance(body, CompletionBody)
    return completion_requests(model, body)


def events(*data: bytes) -> list[Any]:
    """Return the events of a stream; `[DONE]` as it stands."""
    sent = b"".join(data)
    assert sent.endswith(b"\n\n")
    told = [event.removeprefix(b"data: ") for event in sent.removesuffix(b"\n\n").split(b"\n\n")]
    return [each.decode() if each == b"[DONE]" else json.loads(each) for each in told]


def whole_chat(result: GenerationResult, keep_stop: bool = False, **fields: Any) -> dict[str, Any]:
    answer = json.loads(ChatChoices(HEADING, chat(**fields), keep_stop=keep_stop).whole([result]))
    ChatCompletion.model_validate(answer)
    return dict(answer["choices"][0])


def whole_text(result: GenerationResult, keep_stop: bool = False, **fields: Any) -> dict[str, Any]:
    answer = json.loads(CompletionChoices(HEADING, text(**fields), keep_stop=keep_stop).whole([result]))
    Completion.model_validate(answer)
    return dict(answer["choices"][0])


def streamed_chat(*told: TokenEvent, end: Finished = END, keep_stop: bool = False, **fields: Any) -> list[Any]:
    choices = ChatChoices(HEADING, chat(stream=True, **fields), keep_stop=keep_stop)
    return events(*(choices.event(0, each) for each in told), choices.end(0, end), choices.done([end]))


def streamed_text(*told: TokenEvent, end: Finished = END, keep_stop: bool = False, **fields: Any) -> list[Any]:
    choices = CompletionChoices(HEADING, text(stream=True, **fields), keep_stop=keep_stop)
    return events(*(choices.event(0, each) for each in told), choices.end(0, end), choices.done([end]))


def deltas(told: list[Any]) -> list[dict[str, Any]]:
    return [choice["delta"] for event in told if event != "[DONE]" for choice in event["choices"]]


# ---- asking ----------------------------------------------------------------------------------------------------------


def test_the_defaults_are_openais() -> None:
    [of_chat], [of_text] = wanted(chat()), wanted(text())

    for request in (of_chat, of_text):
        assert (request.temperature, request.top_p, request.top_k, request.seed) == (1.0, 1.0, None, None)
        assert (request.stop, request.repetition_penalty, request.logprobs) == ((), 1.0, False)
        assert (request.frequency_penalty, request.presence_penalty, request.top_tokens) == (0.0, 0.0, 0)
    assert (of_chat.max_new_tokens, of_text.max_new_tokens) == (None, 16)
    assert (of_chat.prompt, of_text.prompt, of_text.chat) == ("", "Once", None)
    assert of_chat.chat is not None
    assert of_chat.chat.messages[0].text == "Hello"


@pytest.mark.parametrize("make", [chat, text])
@pytest.mark.parametrize(
    ("fields", "attribute", "value"),
    [
        ({"max_tokens": 7}, "max_new_tokens", 7),
        ({"max_completion_tokens": 7}, "max_new_tokens", 7),
        ({"max_tokens": 7, "max_completion_tokens": 7}, "max_new_tokens", 7),
        ({"max_tokens": None, "max_completion_tokens": 7}, "max_new_tokens", 7),
        ({"temperature": 0}, "temperature", 0.0),
        ({"temperature": 2}, "temperature", 2.0),
        ({"temperature": None}, "temperature", 1.0),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"top_p": 0}, "top_p", 1e-6),
        ({"top_k": 5}, "top_k", 5),
        ({"top_k": 0}, "top_k", None),
        ({"top_k": -1}, "top_k", None),
        ({"repetition_penalty": 1.2}, "repetition_penalty", 1.2),
        ({"frequency_penalty": -2}, "frequency_penalty", -2.0),
        ({"presence_penalty": 2}, "presence_penalty", 2.0),
        ({"stop": "end"}, "stop", ("end",)),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", ("a", "b", "c", "d", "e")),
        ({"stop": None}, "stop", ()),
        ({"seed": 0}, "seed", 0),
        ({"seed": 2**63 - 1}, "seed", 2**63 - 1),
        ({"seed": -1}, "seed", 2**63 - 1),
        ({"seed": -(2**63)}, "seed", 0),
        ({}, "count_prompt", True),
        ({"stream": True}, "count_prompt", False),
        ({"stream": True, "stream_options": {"include_usage": True}}, "count_prompt", True),
        ({"stream": True, "stream_options": {"include_obfuscation": False}}, "count_prompt", False),
        ({"logit_bias": {}}, "temperature", 1.0),
        ({"logit_bias": {"50256": 0}}, "temperature", 1.0),
        ({"user": 1, "metadata": {}, "store": True, "service_tier": "flex", "unheard_of": 1}, "temperature", 1.0),
    ],
)
def test_a_field_reaches_the_request(make: Any, fields: dict[str, Any], attribute: str, value: object) -> None:
    [request] = wanted(make(**fields))

    assert getattr(request, attribute) == value


@pytest.mark.parametrize(
    ("fields", "logprobs", "top_tokens"),
    [
        ({}, False, 0),
        ({"logprobs": False}, False, 0),
        ({"logprobs": True}, True, 0),
        ({"logprobs": True, "top_logprobs": 0}, True, 0),
        ({"logprobs": True, "top_logprobs": 20}, True, 20),
    ],
)
def test_logprobs_of_chats(fields: dict[str, Any], logprobs: bool, top_tokens: int) -> None:
    [request] = wanted(chat(**fields))

    assert (request.logprobs, request.top_tokens) == (logprobs, top_tokens)


@pytest.mark.parametrize(("said", "logprobs", "top_tokens"), [(None, False, 0), (0, True, 0), (5, True, 5)])
def test_logprobs_of_completions(said: int | None, logprobs: bool, top_tokens: int) -> None:
    [request] = wanted(text(logprobs=said))

    assert (request.logprobs, request.top_tokens) == (logprobs, top_tokens)


@pytest.mark.parametrize(
    "fields",
    [
        {"modalities": ["text"]},
        {"modalities": None, "audio": None, "prediction": None, "web_search_options": None},
        {"functions": [], "function_call": "none"},
        {"function_call": "auto"},
        {"reasoning_effort": "none"},
        {"reasoning_effort": "medium", "verbosity": "medium"},
    ],
)
def test_what_changes_nothing_is_fine_in_a_chat(fields: dict[str, Any]) -> None:
    assert wanted(chat(**fields)) == wanted(chat())


@pytest.mark.parametrize("fields", [{"echo": False}, {"suffix": ""}, {"suffix": None}, {"best_of": 1}])
def test_what_changes_nothing_is_fine_in_a_completion(fields: dict[str, Any]) -> None:
    assert wanted(text(**fields)) == wanted(text())


NEUTRAL: dict[str, list[Any]] = {
    "min_p": [None, 0, 0.0],
    "typical_p": [None, 1, 1.0],
    "min_tokens": [None, 0],
    "ignore_eos": [None, False],
    "guided_json": [None, {}, ""],
    "guided_regex": [None, ""],
    "guided_choice": [None, []],
    "guided_grammar": [None, ""],
    "structured_outputs": [None, {}],
    "chat_template": [None, ""],
    "chat_template_kwargs": [None, {}],
}


@pytest.mark.parametrize("make", [chat, text])
@pytest.mark.parametrize(("name", "values"), NEUTRAL.items())
def test_what_only_other_servers_have_is_fine_where_it_changes_nothing(
    make: Any, name: str, values: list[object]
) -> None:
    assert [wanted(make(**{name: value})) for value in values] == [wanted(make())] * len(values)


@pytest.mark.parametrize("make", [chat, text])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_p", 0.1),
        ("typical_p", 0.9),
        ("min_tokens", 3),
        ("ignore_eos", True),
        ("guided_json", {"type": "object"}),
        ("guided_regex", "a+"),
        ("guided_choice", ["a", "b"]),
        ("guided_grammar", "root ::= x"),
        ("structured_outputs", {"regex": "a+"}),
        ("chat_template", "{{ messages }}"),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ],
)
def test_what_only_other_servers_have_is_not_dropped_in_silence(make: Any, name: str, value: object) -> None:
    with pytest.raises(ValidationError) as refused:
        make(**{name: value})

    assert [(error["loc"], error["type"]) for error in refused.value.errors()] == [((name,), "unsupported")]


@pytest.mark.parametrize("make", [chat, text])
def test_a_regular_expression_is_a_form_as_tgi_writes_it(make: Any) -> None:
    [request] = wanted(make(response_format={"type": "regex", "value": "a+"}))

    assert request.grammar == Regex("a+")
    with pytest.raises(ValidationError) as refused:
        make(response_format={"type": "regex"})
    assert [error["loc"] for error in refused.value.errors()] == [("response_format", "value")]


def test_no_logprobs_and_none_of_the_likeliest_are_neutral() -> None:
    assert wanted(chat(logprobs=False, top_logprobs=0)) == wanted(chat())


def test_tools_and_formats_reach_the_request() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    json_schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}

    [calling] = wanted(chat(tools=[WEATHER], tool_choice="required"))
    [formed] = wanted(chat(response_format=json_schema))
    [continued] = wanted(text(response_format=json_schema))

    assert calling.chat is not None
    assert calling.calls_tools
    assert (calling.chat.tool_choice, calling.chat.tools[0].name) == ("required", "weather")
    assert formed.grammar == continued.grammar == JsonSchema(schema, "answer")


def test_each_choice_has_a_seed_of_its_own_and_one_of_them_counts_the_prompt() -> None:
    assert [each.seed for each in wanted(chat(n=3, seed=5))] == [5, 6, 7]
    assert [each.seed for each in wanted(chat(n=2, seed=-1))] == [2**63 - 1, 0]
    assert [each.seed for each in wanted(chat(n=2))] == [None, None]
    assert [each.count_prompt for each in wanted(text(n=2, prompt=["a", "b"]))] == [True, False, True, False]


def test_choices_are_in_the_order_of_the_prompts() -> None:
    requests = wanted(text(prompt=["a", "b"], n=2, seed=1))

    assert [(each.prompt, each.seed) for each in requests] == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


@pytest.mark.parametrize(
    ("keys", "said", "max_new_tokens", "temperature"),
    [
        ({"parameters": {"max_new_tokens": 5, "temperature": 0}}, {}, 5, 0.0),
        ({"parameters": {"max_tokens": 5}}, {"max_completion_tokens": 9}, 9, 1.0),
        ({"overrides": {"max_tokens": 5}}, {"max_tokens": 9}, 5, 1.0),
        ({"parameters": {"temperature": 0.1}, "overrides": {"temperature": 0.2}}, {"temperature": 2}, None, 0.2),
        ({"context_tokens": 64}, {}, None, 1.0),
    ],
)
def test_the_callers_word_beats_parameters_and_overrides_beat_it(
    keys: dict[str, Any], said: dict[str, Any], max_new_tokens: int | None, temperature: float
) -> None:
    [request] = wanted(chat(**said), **keys)

    assert (request.max_new_tokens, request.temperature) == (max_new_tokens, temperature)


def test_the_default_length_of_completions_is_within_the_context() -> None:
    assert wanted(text(), context_tokens=8)[0].max_new_tokens == 8


def test_a_top_k_that_is_off_beats_the_catalogs() -> None:
    assert wanted(chat(top_k=-1), parameters={"top_k": 3})[0].top_k is None
    assert wanted(chat(), parameters={"top_k": 3})[0].top_k == 3


@pytest.mark.parametrize("make", [chat, text])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 5),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", "9"),
        ("max_completion_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", True),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_k", -2),
        ("repetition_penalty", 0),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("stop", ["x"] * 65),
        ("stop", [""]),
        ("stop", 5),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("seed", 1.5),
        ("n", 0),
        ("n", 129),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("stream_options", "usage"),
        ("logit_bias", [0]),
        ("logit_bias", {"1": "x"}),
        ("logprobs", "all"),
    ],
)
def test_a_field_out_of_its_range_is_refused_by_its_name(make: Any, field: str, value: object) -> None:
    with pytest.raises(ValidationError) as refused:
        make(**{field: value})

    assert {error["loc"][0] for error in refused.value.errors()} == {field}


@pytest.mark.parametrize(
    ("make", "fields", "field"),
    [
        (chat, {"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        (text, {"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        (chat, {"stream": False, "stream_options": {}}, "stream_options"),
        (chat, {"top_logprobs": 2}, "top_logprobs"),
        (chat, {"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
        (chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (chat, {"logprobs": 3}, "logprobs"),
        (chat, {"messages": []}, "messages"),
        (text, {"logprobs": 51}, "logprobs"),
        (text, {"logprobs": -1}, "logprobs"),
        (text, {"prompt": []}, "prompt"),
        (text, {"prompt": None}, "prompt"),
        (text, {"prompt": {"text": "a"}}, "prompt"),
        (text, {"prompt": ["a"] * 257}, "prompt"),
        (text, {"prompt": ["a"] * 129, "n": 2}, "prompt"),
        (text, {"prompt": ["a", "\ud800"]}, "prompt"),
        (text, {"best_of": 0}, "best_of"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(make: Any, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as refused:
        make(**fields)

    assert [error["loc"][0] for error in refused.value.errors()] == [field]
    assert refused.value.errors()[0]["type"] != "unsupported"


@pytest.mark.parametrize("prompt", ["", "  \n", ["a", ""]])
def test_a_blank_prompt_is_told_apart(prompt: object) -> None:
    with pytest.raises(ValidationError) as refused:
        text(prompt=prompt)

    assert [error["type"] for error in refused.value.errors()] == ["empty_prompt"]


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (chat, "logit_bias", {"50256": -100}),
        (text, "logit_bias", {"50256": 0.5}),
        (chat, "audio", {"voice": "alloy", "format": "wav"}),
        (chat, "modalities", ["text", "audio"]),
        (chat, "modalities", []),
        (chat, "prediction", {"type": "content", "content": "x"}),
        (chat, "web_search_options", {}),
        (chat, "functions", [{"name": "f"}]),
        (chat, "function_call", {"name": "f"}),
        (chat, "reasoning_effort", "high"),
        (chat, "verbosity", "low"),
        (text, "best_of", 2),
        (text, "echo", True),
        (text, "suffix", "."),
        (text, "prompt", [1, 2, 3]),
        (text, "prompt", [[1, 2], [3]]),
    ],
)
def test_what_no_engine_can_do_is_refused_as_unsupported(make: Any, field: str, value: object) -> None:
    with pytest.raises(ValidationError) as refused:
        make(**{field: value})

    assert [(error["loc"][0], error["type"]) for error in refused.value.errors()] == [(field, "unsupported")]


# ---- whole answers ---------------------------------------------------------------------------------------------------


ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=())) | st.sampled_from(['"', "\\", "\u2028", "\ud800"])


@given(ANY_TEXT.filter(bool), ANY_TEXT, st.booleans(), st.none() | ANY_TEXT.filter(bool), st.integers(0, 127))
def test_every_chunk_is_written_as_json_is_written(
    said: str, model: str, usage: bool, fingerprint: str | None, index: int
) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    choices = ChatChoices(Heading("id-1", 17, model, fingerprint), chat(stream=True, **options))
    delta = {"role": "assistant", "content": said}
    wanted: dict[str, Any] = {"id": "id-1", "object": "chat.completion.chunk", "created": 17, "model": model}
    wanted |= {"system_fingerprint": fingerprint} if fingerprint else {}
    wanted |= {"choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]}
    wanted |= {"usage": None} if usage else {}
    written = json.dumps(wanted, ensure_ascii=False, separators=(",", ":"))

    assert choices.event(index, TokenEvent(None, said)) == f"data: {written}\n\n".encode(errors="replace")


def test_a_whole_chat() -> None:
    answer = json.loads(ChatChoices(HEADING, chat()).whole([collect([HI, BANG], END)]))

    assert answer == {
        "id": "id-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "the/name-asked-for",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi!", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
    }


def test_a_whole_completion() -> None:
    answer = json.loads(CompletionChoices(HEADING, text()).whole([collect([HI, BANG], Finished("length", 2, 5, "?"))]))

    assert answer == {
        "id": "id-1",
        "object": "text_completion",
        "created": 1700000000,
        "model": "the/name-asked-for",
        "choices": [{"index": 0, "text": "Hi!?", "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
    }


@pytest.mark.parametrize(
    ("reason", "word"), [("length", "length"), ("stop", "stop"), ("eos", "stop"), ("tool_calls", "tool_calls")]
)
def test_an_end_has_openais_word(reason: FinishReason, word: str) -> None:
    end = Finished(reason, 1, 5)

    assert whole_chat(collect([HI], end))["finish_reason"] == word
    assert streamed_chat(HI, end=end)[-2]["choices"][0]["finish_reason"] == word
    assert streamed_text(HI, end=end)[-2]["choices"][0]["finish_reason"] == word


def test_a_prompt_counts_once_for_all_its_choices() -> None:
    ends = [Finished("eos", 2, 5), Finished("eos", 3, 0), Finished("eos", 4, 7), Finished("eos", 5, 7)]
    results = [collect([], end) for end in ends]

    choices = CompletionChoices(HEADING, text(prompt=["a", "b"], n=2))
    answer = json.loads(choices.whole(results))

    assert answer["usage"] == {"prompt_tokens": 12, "completion_tokens": 14, "total_tokens": 26}
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]


CALLS = [
    TokenEvent(None, "", tool_calls=(ToolCallPiece(0, "call_1", "weather", ""),)),
    TokenEvent(None, "", tool_calls=(ToolCallPiece(0, arguments='{"a"'),)),
    TokenEvent(None, "", tool_calls=(ToolCallPiece(0),)),
    TokenEvent(None, "", tool_calls=(ToolCallPiece(0, arguments=":1}"), ToolCallPiece(1, "call_2", "time", "{}"))),
]


def test_a_whole_chat_that_calls_tools() -> None:
    choice = whole_chat(collect(CALLS, Finished("tool_calls", 3, 5)))

    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"a":1}'}},
            {"id": "call_2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
        ],
    }


def test_text_before_calls_is_not_lost_and_an_empty_answer_is_text() -> None:
    assert whole_chat(collect([HI, *CALLS], Finished("tool_calls", 3, 5)))["message"]["content"] == "Hi"
    empty = whole_chat(collect([], END))["message"]
    assert (empty["content"], "tool_calls" in empty) == ("", False)


HELD = [HI, TokenEvent(11, "", -0.7, (), "EN"), TokenEvent(12, "", -0.9, (), "D")]
STOPPED = Finished("stop", 3, 5, stop="END")


def test_the_stop_text_stays_only_where_it_is_to_be_kept() -> None:
    result = collect(HELD, STOPPED)

    assert whole_chat(result)["message"]["content"] == "Hi"
    assert whole_chat(result, keep_stop=True)["message"]["content"] == "HiEND"
    assert whole_text(result)["text"] == "Hi"
    assert whole_text(result, keep_stop=True)["text"] == "HiEND"
    assert "".join(delta.get("content", "") for delta in deltas(streamed_chat(*HELD, end=STOPPED))) == "Hi"
    kept = streamed_chat(*HELD, end=STOPPED, keep_stop=True)
    assert "".join(delta.get("content", "") for delta in deltas(kept)) == "HiEND"
    for keep_stop, whole in ((False, "Hi"), (True, "HiEND")):
        told = streamed_text(*HELD, end=STOPPED, keep_stop=keep_stop)
        assert "".join(event["choices"][0]["text"] for event in told[:-1]) == whole


# ---- log-probabilities -----------------------------------------------------------------------------------------------


def test_logprobs_of_a_whole_chat() -> None:
    special = TokenEvent(2, "", -0.1, (), "</s>", special=True)
    choice = whole_chat(collect([HI, special], END), logprobs=True, top_logprobs=1)
    plain = whole_chat(collect([HI], END), logprobs=True)

    hi = {"token": "Hi", "logprob": -0.25, "bytes": [72, 105]}
    assert choice["logprobs"] == {"content": [{**hi, "top_logprobs": [hi]}], "refusal": None}
    assert plain["logprobs"]["content"] == [{**hi, "top_logprobs": []}]


def test_logprobs_of_a_whole_completion() -> None:
    taken = TokenEvent(3, " you", -4.0, HI.top, " you")
    result = collect([HI, taken, BANG], END)

    assert whole_text(result, logprobs=2)["logprobs"] == {
        "tokens": ["Hi", " you", "!"],
        "token_logprobs": [-0.25, -4.0, -0.5],
        "top_logprobs": [{"Hi": -0.25, "Yo": -2.3}, {"Hi": -0.25, "Yo": -2.3, " you": -4.0}, {"!": -0.5, "?": -1.6}],
        "text_offset": [0, 2, 6],
    }
    assert whole_text(result, logprobs=0)["logprobs"]["top_logprobs"] is None


def test_candidates_that_read_alike_are_told_by_the_likeliest() -> None:
    part = "\N{REPLACEMENT CHARACTER}"
    top = (TokenChance(1, part, 0.5, -0.7), TokenChance(2, part, 0.3, -1.2))

    answered = collect([TokenEvent(1, "", -0.7, top, part)], END)

    assert whole_text(answered, logprobs=2)["logprobs"]["top_logprobs"] == [{part: -0.7}]
    [told] = whole_chat(answered, logprobs=True, top_logprobs=2)["logprobs"]["content"]
    assert told["bytes"] is None


@pytest.mark.parametrize("keep_stop", [False, True])
def test_tokens_of_a_stop_text_are_no_part_of_the_answer_nor_of_its_logprobs(keep_stop: bool) -> None:
    wanted_tokens = ["Hi", "EN", "D"] if keep_stop else ["Hi"]

    chats = whole_chat(collect(HELD, STOPPED), keep_stop, logprobs=True)["logprobs"]["content"]
    texts = whole_text(collect(HELD, STOPPED), keep_stop, logprobs=0)["logprobs"]
    stream = streamed_chat(*HELD, end=STOPPED, keep_stop=keep_stop, logprobs=True)

    assert [each["token"] for each in chats] == texts["tokens"] == wanted_tokens
    assert [each["token"] for each in reported(stream)] == wanted_tokens


def reported(stream: list[Any]) -> list[dict[str, Any]]:
    choices = [choice for event in stream if event != "[DONE]" for choice in event["choices"]]
    return [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]


@pytest.mark.parametrize("end", [Finished("eos", 3, 5, "END"), Finished("length", 3, 5, "EN")])
def test_tokens_that_were_held_back_in_vain_are_told_with_their_text(end: Finished) -> None:
    stream = streamed_chat(*HELD, end=end, logprobs=True)
    whole = whole_chat(collect(HELD, end), logprobs=True)["logprobs"]["content"]

    assert [each["token"] for each in reported(stream)] == ["Hi", "EN", "D"]
    assert [each["token"] for each in whole] == ["Hi", "EN", "D"]
    assert "".join(delta.get("content", "") for delta in deltas(stream)) == "Hi" + end.text


def test_offsets_go_on_through_a_stream() -> None:
    stream = streamed_text(HI, BANG, BANG, logprobs=0)

    offsets = [event["choices"][0]["logprobs"]["text_offset"] for event in stream[:-1]]
    assert offsets == [[0], [2], [3], []]


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_a_streamed_chat_names_its_role_once_and_ends_with_an_empty_delta() -> None:
    first, second, last, done = streamed_chat(HI, TokenEvent(None, ""), BANG)

    assert first == {
        "id": "id-1",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "the/name-asked-for",
        "choices": [
            {"index": 0, "delta": {"role": "assistant", "content": "Hi"}, "logprobs": None, "finish_reason": None}
        ],
    }
    assert second["choices"][0]["delta"] == {"content": "!"}
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert done == "[DONE]"


def test_a_streamed_chat_that_says_nothing_has_a_role_all_the_same() -> None:
    assert deltas(streamed_chat(TokenEvent(None, ""))) == [{"role": "assistant", "content": ""}, {}]


def test_a_streamed_completion() -> None:
    first, second, last, done = streamed_text(HI, BANG)

    assert first["object"] == "text_completion"
    assert first["choices"] == [{"index": 0, "text": "Hi", "logprobs": None, "finish_reason": None}]
    assert second["choices"][0]["text"] == "!"
    assert last["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}]
    assert "usage" not in first
    assert done == "[DONE]"


@pytest.mark.parametrize("make", [streamed_chat, streamed_text])
def test_usage_is_told_in_an_event_of_its_own_if_it_is_asked_for(make: Any) -> None:
    *told, last, done = make(HI, BANG, stream_options={"include_usage": True})

    assert [event["usage"] for event in told] == [None] * 3
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    assert done == "[DONE]"


def test_calls_of_tools_are_named_in_their_first_piece_alone() -> None:
    told = deltas(streamed_chat(*CALLS, end=Finished("tool_calls", 3, 5)))

    named = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    second = {"index": 1, "id": "call_2", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    assert told == [
        {"role": "assistant", "content": None, "tool_calls": [named]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}, second]},
        {},
    ]


def test_choices_of_one_stream_are_told_apart() -> None:
    choices = ChatChoices(HEADING, chat(stream=True, n=2))

    told = events(choices.event(1, HI), choices.event(0, HI), choices.end(1, END), choices.event(0, BANG))

    assert [(each["choices"][0]["index"], each["choices"][0]["delta"]) for each in told] == [
        (1, {"role": "assistant", "content": "Hi"}),
        (0, {"role": "assistant", "content": "Hi"}),
        (1, {}),
        (0, {"content": "!"}),
    ]
    assert choices.done([END, END]) == b"data: [DONE]\n\n"


def test_a_failure_is_one_event_in_openais_shape() -> None:
    [event] = events(ChatChoices(HEADING, chat(stream=True)).failure(GenerationFailed("it broke off")))

    about = {"message": "it broke off", "type": "server_error", "param": None, "code": "GENERATION_FAILED"}
    assert event == {"error": about}
