"""Engine `openai`: what is asked of servers with OpenAI's API, and what is heard. Tables."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.catalog import OPENAI_SERVERS, ModelSpec
from gateway.engines.base import Call
from gateway.engines.openai import OpenAi, model_name
from gateway.engines.openai_calls import SERVERS
from gateway.errors import (
    BodyTooLarge,
    GatewayError,
    GenerationFailed,
    InvalidRequest,
    PromptTooLong,
    QueueFull,
    StartFailed,
    Unsupported,
    UpstreamFailed,
)
from gateway.generation import (
    Chat,
    Finished,
    GenerationRequest,
    Image,
    JsonObject,
    JsonSchema,
    Message,
    Regex,
    TokenChance,
    TokenEvent,
    Tool,
    ToolCall,
    ToolCallPiece,
    collect,
)

ENGINE = OpenAi()
KEY = "sk-0123456789abcdef"
Events = list[TokenEvent | Finished]


def spec(**more: Any) -> ModelSpec:
    return ModelSpec(**{"id": "m", "engine": "openai", "url": "http://server:8000", **more})


def ask(**more: Any) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "Hello", "max_new_tokens": 5, "temperature": 0.7, **more})


def body_of(model: ModelSpec | None = None, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ENGINE.call(model or spec(), ask(**more), "").body)
    return found


# ---- where it is ----


@pytest.mark.parametrize(
    ("url", "reached"),
    [
        ("http://server:8000", "http://server:8000/v1"),
        ("http://server:8000/", "http://server:8000/v1"),
        ("https://api.openai.com/v1", "https://api.openai.com/v1"),
        ("https://api.openai.com/v1/", "https://api.openai.com/v1"),
        ("https://provider.example/api/v3", "https://provider.example/api/v3"),
    ],
)
def test_an_address_without_a_path_gets_v1_and_one_with_a_path_is_taken_as_it_is(url: str, reached: str) -> None:
    launch = ENGINE.launch(spec(url=url), "tgi-m", "s3cret")

    assert (launch.name, launch.model, launch.url) == ("tgi-m", "m", reached)
    assert (launch.command, launch.container, dict(launch.env)) == ((), None, {})
    assert ENGINE.download(spec(), "tgi-m") is None


def test_every_kind_of_server_that_the_catalog_takes_is_known() -> None:
    assert tuple(SERVERS) == OPENAI_SERVERS


@pytest.mark.parametrize(
    ("status", "well"),
    [(200, True), (404, True), (405, True), (429, True), (500, False), (502, False), (503, False)],
)
def test_what_a_health_check_says(status: int, well: bool) -> None:
    assert ENGINE.is_ready(status, b"") is well
    assert ENGINE.is_alive(status, b"") is well


@pytest.mark.parametrize(("status", "words"), [(401, "api_key"), (403, "api_key"), (301, "url"), (308, "url")])
def test_a_server_that_will_never_be_ready_is_not_waited_for(status: int, words: str) -> None:
    with pytest.raises(StartFailed, match=f"`{words}`") as caught:
        ENGINE.is_ready(status, b"Incorrect API key provided: " + KEY.encode())

    assert f"`{words}`" in caught.value.extra["fix"]
    assert f"status {status}" in caught.value.extra["cause"]
    assert KEY not in caught.value.detail
    assert ENGINE.is_alive(status, b"")  # a key that is refused later ends no model: requests say so


# ---- what is asked ----


def test_a_plain_call() -> None:
    call = ENGINE.call(spec(hf_name="acme/model-7b", api_key=KEY), ask(), "s3cret")

    assert call.path == "/completions"
    assert call.headers == {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    assert json.loads(call.body) == {
        "model": "acme/model-7b",
        "prompt": "Hello",
        "max_tokens": 5,
        "temperature": 0.7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert KEY not in repr(call)


def test_without_a_key_none_is_shown() -> None:
    assert "Authorization" not in ENGINE.call(spec(), ask(), "s3cret").headers


@pytest.mark.parametrize(
    ("keys", "name"),
    [({}, "m"), ({"hf_name": "a/b"}, "a/b"), ({"hf_name": "a/b", "args": {"model": "babbage-002"}}, "babbage-002")],
)
def test_the_model_is_named_as_its_server_does(keys: dict[str, Any], name: str) -> None:
    assert body_of(spec(**keys))["model"] == name


@pytest.mark.parametrize(
    ("server", "asked", "sent"),
    [
        ("openai", {"top_p": 0.9, "seed": 3}, {"top_p": 0.9, "seed": 3}),
        ("openai", {"temperature": 0.0, "top_p": 0.9, "top_k": 3, "seed": 3}, {}),
        ("openai", {"frequency_penalty": 0.5, "presence_penalty": -1.0}, None),
        ("openai", {"stop": ("a", "", "b")}, {"stop": ["a", "b"]}),
        ("openai", {"stop": tuple("abcdef")}, {"stop": list("abcd")}),
        ("vllm", {"stop": tuple("abcdef")}, {"stop": list("abcdef")}),
        ("llama.cpp", {"stop": ("a",)}, {}),
        ("openai", {"logprobs": True}, {"logprobs": 1}),
        ("openai", {"top_tokens": 5, "temperature": 1.0}, {"logprobs": 5}),
        ("vllm", {"top_k": 3, "repetition_penalty": 1.1}, None),
        ("sglang", {"top_k": 3, "repetition_penalty": 1.1}, None),
        ("llama.cpp", {"top_k": 3, "repetition_penalty": 1.1}, {"top_k": 3, "repeat_penalty": 1.1}),
    ],
)
def test_what_is_sent_for_what_is_asked(server: str, asked: dict[str, Any], sent: dict[str, Any] | None) -> None:
    plain = body_of(spec(args={"server": server}), temperature=asked.get("temperature", 0.7))
    body = body_of(spec(args={"server": server}), **asked)

    assert {name: value for name, value in body.items() if plain.get(name) != value} == (
        asked if sent is None else sent
    )


@pytest.mark.parametrize(
    ("said", "extra"),
    [
        ("temperature", {"param": "temperature"}),
        ("messages[0].content.1.image_url", {"param": "messages[0].content.1.image_url"}),
        (None, {}),
        ("", {}),
        (5, {}),
        ({"a": 1}, {}),
        ("you wrote: Hello", {}),
        (KEY, {}),
        ("a" * 41, {}),
        ("a" + "[0]" * 10, {}),
    ],
)
def test_the_field_that_a_provider_finds_wrong_is_kept_if_it_is_one(said: object, extra: dict[str, str]) -> None:
    error = ENGINE.refusal(400, json.dumps({"error": {"message": "no", "param": said}}).encode())

    assert isinstance(error, InvalidRequest)
    assert error.extra == extra


def test_a_parameter_that_nobody_asked_for_is_left_out_where_the_server_has_none_of_it() -> None:
    unasked: dict[str, Any] = {"top_k": 50, "defaults": frozenset({"top_k"})}

    ENGINE.check(spec(), ask(**unasked))
    assert body_of(**unasked) == body_of()
    assert body_of(spec(args={"server": "vllm"}), **unasked)["top_k"] == 50


def test_a_stop_text_that_must_be_told_is_looked_for_here_alone() -> None:
    kept: dict[str, Any] = {"stop": ("x",), "keep_stop": True}

    assert "stop" not in body_of(**kept)
    assert "stop" not in chat_body(**kept)
    assert heard(chunk(" a x b"), **kept)[-1] == Finished("stop", 1, 0, stop="x")
    assert heard(chunk(" a"), chunk("", "stop"), "[DONE]", **kept)[-1] == Finished("eos", 1, 0)


@pytest.mark.parametrize(
    ("server", "neutral"),
    [
        ("vllm", {"top_k": -1, "repetition_penalty": 1.0}),
        ("sglang", {"top_k": -1, "repetition_penalty": 1.0}),
        ("llama.cpp", {"top_k": 0, "repeat_penalty": 1.0}),
    ],
)
def test_a_server_with_defaults_of_its_own_is_told_that_everything_is_off(server: str, neutral: dict[str, Any]) -> None:
    off = {"top_p": 1.0, "min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, **neutral}

    assert body_of(spec(args={"server": server})) == {**body_of(), **off}


@pytest.mark.parametrize(
    ("server", "asked", "words"),
    [
        ("openai", {"top_k": 3}, "has no top_k.*args: {server: vllm}"),
        ("openai", {"top_k": 3, "repetition_penalty": 1.1}, "no top_k and no repetition_penalty"),
        ("openai", {"top_tokens": 6, "temperature": 1.0}, "at most 5 top_tokens"),
        ("vllm", {"top_tokens": 2}, "top_tokens at temperature 0.7"),
    ],
)
def test_what_the_server_cannot_do_is_refused_by_name(server: str, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        ENGINE.check(spec(args={"server": server}), ask(**asked))


@pytest.mark.parametrize(
    ("server", "asked"),
    [
        ("openai", {}),
        ("openai", {"temperature": 0.0, "top_k": 1, "top_tokens": 5, "top_p": 0.5}),
        ("openai", {"top_p": 0.5, "seed": 1, "frequency_penalty": 1.0, "presence_penalty": 1.0, "logprobs": True}),
        ("vllm", {"top_k": 3, "repetition_penalty": 1.1}),
        ("llama.cpp", {"temperature": 1.0, "top_tokens": 50}),
    ],
)
def test_what_the_server_can_do_is_let_pass(server: str, asked: dict[str, Any]) -> None:
    ENGINE.check(spec(args={"server": server}), ask(**asked))


# ---- how long a prompt may be continued ----


@pytest.mark.parametrize(
    ("keys", "sent"),
    [
        ({"context_tokens": 100}, {"max_tokens": 87}),  # "Hello" has 5 bytes; 8 are for what a server may add
        ({"context_tokens": 100, "args": {"server": "vllm"}}, {"max_tokens": 87}),
        ({"args": {"server": "llama.cpp"}}, {}),
    ],
)
def test_as_many_tokens_as_fit_are_what_surely_fits_or_left_to_the_server(
    keys: dict[str, Any], sent: dict[str, int]
) -> None:
    ENGINE.check(spec(**keys), ask(max_new_tokens=None))

    body = body_of(spec(**keys), max_new_tokens=None)
    assert {name: body[name] for name in ("max_tokens", "max_completion_tokens") if name in body} == sent


@pytest.mark.parametrize("keys", [{}, {"context_tokens": 13}, {"args": {"server": "sglang"}}])
def test_where_nobody_knows_how_many_tokens_fit_the_caller_must_say(keys: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match=r"must be told how many.*max_new_tokens.*context_tokens"):
        ENGINE.check(spec(**keys), ask(max_new_tokens=None))


# ---- chats ----

HELLO = Message("user", ("Hello",))
WEATHER = Tool("weather", "Tells it.", {"type": "object"})
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def chat(*messages: Message, **more: Any) -> Chat:
    return Chat(messages or (HELLO,), **more)


def chat_body(model: ModelSpec | None = None, **more: Any) -> dict[str, Any]:
    return body_of(model, **{"prompt": "", "chat": chat(), **more})


def test_a_plain_chat() -> None:
    call = ENGINE.call(spec(hf_name="acme/model-7b", api_key=KEY), ask(prompt="", chat=chat()), "s3cret")

    assert call.path == "/chat/completions"
    assert call.headers == {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    assert json.loads(call.body) == {
        "model": "acme/model-7b",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 5,
        "temperature": 0.7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({}, "max_tokens"),
        ({"args": {"server": "vllm"}}, "max_tokens"),
        ({"url": "https://provider.example/openai.com/v1"}, "max_tokens"),
        ({"url": "https://notopenai.com/v1"}, "max_tokens"),
        ({"url": "https://api.openai.com/v1"}, "max_completion_tokens"),
        ({"url": "https://mine.openai.azure.com/openai/v1"}, "max_completion_tokens"),
    ],
)
def test_openais_own_addresses_take_another_name_for_the_length_of_a_chat(keys: dict[str, Any], name: str) -> None:
    lengths = {"max_tokens", "max_completion_tokens"}

    assert chat_body(spec(**keys)).keys() & lengths == {name}
    assert chat_body(spec(**keys), max_new_tokens=None).keys() & lengths == set()
    assert body_of(spec(**keys))["max_tokens"] == 5
    ENGINE.check(spec(**keys), ask(prompt="", chat=chat(), max_new_tokens=None))


@pytest.mark.parametrize(
    ("server", "asked", "sent"),
    [
        ("openai", {"logprobs": True}, {"logprobs": True}),
        ("openai", {"top_tokens": 20, "temperature": 1.0}, {"logprobs": True, "top_logprobs": 20}),
        ("openai", {"stop": tuple("abcdef")}, {"stop": list("abcd")}),
        ("llama.cpp", {"stop": ("a",)}, {}),
        ("vllm", {"top_k": 3, "repetition_penalty": 1.1}, {"top_k": 3, "repetition_penalty": 1.1}),
        ("openai", {"grammar": JsonObject()}, {"response_format": {"type": "json_object"}}),
        (
            "openai",
            {"grammar": JsonSchema(SCHEMA)},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
                }
            },
        ),
        ("sglang", {"grammar": Regex("[0-9]+")}, {"regex": "[0-9]+"}),
        (
            "openai",
            {"chat": chat(Message("user", ("Look", Image("https://a/b.png"))))},
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "Look"},
                            {"type": "image_url", "image_url": {"url": "https://a/b.png"}},
                        ],
                    }
                ]
            },
        ),
    ],
)
def test_what_is_sent_for_what_is_asked_of_a_chat(server: str, asked: dict[str, Any], sent: dict[str, Any]) -> None:
    model = spec(args={"server": server})
    plain = chat_body(model, temperature=asked.get("temperature", 0.7))
    body = chat_body(model, **asked)

    ENGINE.check(model, ask(**{"prompt": "", "chat": chat(), **asked}))
    assert {name: value for name, value in body.items() if plain.get(name) != value} == sent


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({}, {"tool_choice": "auto"}),
        ({"tool_choice": "none"}, {"tool_choice": "none"}),
        ({"tool_choice": "required"}, {"tool_choice": "required"}),
        (
            {"tool_choice": "required", "tool_name": "weather"},
            {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
        ),
        ({"parallel_tool_calls": False}, {"tool_choice": "auto", "parallel_tool_calls": False}),
    ],
)
def test_tools_are_sent_with_their_choice(asked: dict[str, Any], sent: dict[str, Any]) -> None:
    body = chat_body(chat=chat(tools=(WEATHER,), **asked))

    assert body.pop("tools")[0]["function"]["name"] == "weather"
    assert {name: value for name, value in body.items() if name not in chat_body()} == sent


def test_llama_cpp_which_knows_no_choice_by_name_is_told_of_no_other_tool() -> None:
    asked = chat(tools=(WEATHER, Tool("clock")), tool_choice="required", tool_name="clock")
    body = chat_body(spec(args={"server": "llama.cpp"}), chat=asked)

    assert [tool["function"]["name"] for tool in body["tools"]] == ["clock"]
    assert body["tool_choice"] == "required"


def test_without_tools_there_is_no_choice_among_them() -> None:
    assert chat_body(chat=chat(tool_choice="none", parallel_tool_calls=False)) == chat_body()


@pytest.mark.parametrize(
    ("server", "sent"),
    [
        ("openai", set()),
        ("vllm", {"continue_final_message", "add_generation_prompt"}),
        ("sglang", {"continue_final_message"}),
        ("llama.cpp", set()),
    ],
)
def test_a_server_that_would_begin_a_new_turn_is_told_to_go_on_with_an_assistants_last(
    server: str, sent: set[str]
) -> None:
    model = spec(args={"server": server})
    begun = chat(HELLO, Message("assistant", ("Well,",)))
    called = chat(HELLO, Message("assistant", tool_calls=(ToolCall("c1", "weather", "{}"),)))

    assert chat_body(model, chat=begun).keys() - chat_body(model).keys() == sent
    assert chat_body(model, chat=called).keys() == chat_body(model).keys()


@pytest.mark.parametrize(
    ("server", "asked", "words"),
    [
        ("openai", {"top_k": 3}, "has no top_k"),
        ("openai", {"top_tokens": 21, "temperature": 1.0}, "at most 20 top_tokens"),
        ("openai", {"top_tokens": 2}, "top_tokens at temperature 0.7"),
        ("openai", {"grammar": Regex("a")}, "no regular expression.*server: sglang"),
        ("vllm", {"grammar": Regex("a")}, "no regular expression"),
        ("llama.cpp", {"grammar": Regex("a")}, "no regular expression"),
    ],
)
def test_what_the_server_cannot_do_in_a_chat_is_refused_by_name(server: str, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        ENGINE.check(spec(args={"server": server}), ask(prompt="", chat=chat(), **asked))


@pytest.mark.parametrize(
    ("server", "grammar", "sent"),
    [
        ("vllm", JsonObject(), {"response_format": {"type": "json_object"}}),
        (
            "vllm",
            JsonSchema(SCHEMA, "a"),
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": SCHEMA, "strict": True},
                }
            },
        ),
        ("sglang", JsonObject(), {"json_schema": '{"type": "object"}'}),
        ("sglang", JsonSchema(SCHEMA), {"json_schema": json.dumps(SCHEMA)}),
        ("sglang", Regex("a|b"), {"regex": "a|b"}),
        ("llama.cpp", JsonObject(), {"json_schema": {"type": "object"}}),
        ("llama.cpp", JsonSchema(SCHEMA), {"json_schema": SCHEMA}),
        ("openai", JsonObject(), None),
        ("openai", Regex("a"), None),
        ("vllm", Regex("a"), None),
    ],
)
def test_a_prompt_is_completed_in_a_given_form_where_the_server_can(
    server: str, grammar: Any, sent: dict[str, Any] | None
) -> None:
    model = spec(args={"server": server})
    if sent is None:
        with pytest.raises(Unsupported, match=r"in no given form|no regular expression"):
            ENGINE.check(model, ask(grammar=grammar))
        return
    ENGINE.check(model, ask(grammar=grammar))
    assert body_of(model, grammar=grammar) == {**body_of(model), **sent}


def test_the_tokens_of_a_text_are_not_to_be_had() -> None:
    with pytest.raises(Unsupported, match="cannot tell the tokens"):
        ENGINE.tokenize(spec(), ask(), "")
    with pytest.raises(Unsupported, match="cannot tell the tokens"):
        ENGINE.tokens(ask(), b"[]")


# ---- what is put through ----


def forwarded(body: bytes, **keys: Any) -> Call:
    return ENGINE.forward(spec(**{"api_key": KEY, **keys}), Call("/v1/chat/completions", body), "s3cret")


def test_a_callers_own_request_is_put_through_with_the_servers_name_for_the_model() -> None:
    said = {"model": "our-name", "messages": [{"content": "é\ud800"}], "seed": 10**40, "x": {"model": "our-name"}}

    call = forwarded(json.dumps(said).encode(), args={"model": "their-name"})

    assert (call.path, call.method) == ("/chat/completions", "POST")
    assert call.headers == {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    assert json.loads(call.body) == {**said, "model": "their-name"}
    assert list(json.loads(call.body)) == list(said)


def test_a_request_that_names_the_model_as_its_server_does_stays_as_it_is() -> None:
    body = b'{ "model":"a/b", "stream": true, "temperature": 1.00 }'

    assert forwarded(body, hf_name="a/b").body == body


def test_a_request_that_names_no_model_gets_the_servers_name() -> None:
    assert json.loads(forwarded(b'{"prompt": "a"}').body) == {"prompt": "a", "model": model_name(spec())}


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "ours", "a": {"Model": "kept"}, "model": "a/b"}',
        b'{"model": "a/b", "a": {"Model": "kept"}, "model": "a/b"}',
        b'{"model": "ours", "a": {"Model": "kept"}, "mod\\u0065l": "a/b"}',
        b'{"Model": "ours", "a": {"Model": "kept"}, "model": "a/b"}',
        b'{"model": "a/b", "a": {"Model": "kept"}, "MODEL": "ours"}',
        b'{"mOdel": "ours", "a": {"Model": "kept"}}',
    ],
)
def test_no_server_reads_another_name_of_the_model_than_the_catalogs(body: bytes) -> None:
    sent = json.loads(forwarded(body, hf_name="a/b").body, object_pairs_hook=list)

    assert sorted(sent) == [("a", [("Model", "kept")]), ("model", "a/b")]


def test_a_body_that_is_no_object_is_the_servers_to_refuse() -> None:
    body = b'[{"model": "ours"}]'

    assert forwarded(body, hf_name="a/b").body == body


@pytest.mark.parametrize("body", [b"", b"{", b'{"a": NaN}', b'{"a": 1e999}', b"\xff", b'{"a":' * 100_000])
def test_a_body_that_is_not_json_is_not_put_through(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        forwarded(body)


def test_a_list_of_models_is_asked_for_without_a_body() -> None:
    call = ENGINE.forward(spec(api_key=KEY), Call("/v1/models", method="GET"), "")

    assert (call.path, call.method, call.body) == ("/models", "GET", b"")
    assert call.headers == {"Authorization": f"Bearer {KEY}"}
    assert ENGINE.speaks == "openai"


# ---- what is heard ----


def chunk(text: str | None = None, reason: str | None = None, usage: Any = None, **more: Any) -> dict[str, Any]:
    choices = [] if text is None else [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason, **more}]
    return {"id": "cmpl-1", "object": "text_completion", "choices": choices, "usage": usage}


USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


def frames(*chunks: Any) -> bytes:
    texts = (each if isinstance(each, str) else json.dumps(each) for each in chunks)
    return b"".join(b"data: " + text.encode() + b"\n\n" for text in texts)


def heard(*chunks: Any, **asked: Any) -> Events:
    return ENGINE.decoder(ask(**asked)).feed(frames(*chunks))


def result(*chunks: Any, **asked: Any) -> tuple[str, str, int, int]:
    *events, finished = heard(*chunks, **asked)
    assert isinstance(finished, Finished)
    whole = collect([event for event in events if isinstance(event, TokenEvent)], finished)
    return whole.text, whole.reason, whole.tokens_generated, whole.prompt_tokens


@pytest.mark.parametrize(
    ("chunks", "asked", "found"),
    [
        # OpenAI, vLLM: the reason, then the usage without a choice, then the end
        ([chunk(" a"), chunk(" b"), chunk("", "length"), chunk(usage=USAGE), "[DONE]"], {}, (" a b", "length", 3, 7)),
        ([chunk(" a b c"), chunk("", "stop"), chunk(usage=USAGE), "[DONE]"], {}, (" a b c", "eos", 3, 7)),
        # TGI: no reason is empty, its own words for reasons, the usage in the last chunk
        ([chunk(" a", ""), chunk(" b", "length", USAGE), "[DONE]"], {}, (" a b", "length", 3, 7)),
        ([chunk(" a", ""), chunk("", "eos_token", USAGE), "[DONE]"], {}, (" a", "eos", 3, 7)),
        # a server that counts nothing
        ([chunk(" a"), chunk(" b"), chunk("", "stop"), "[DONE]"], {}, (" a b", "eos", 2, 0)),
        # the server cut the stop text off
        ([chunk(" a"), chunk("", "stop"), chunk(usage=USAGE)], {"stop": ("x",)}, (" a", "stop", 3, 7)),
        ([chunk("a", "stop", stop_reason=None), chunk(usage=USAGE)], {"stop": ("x",)}, ("a", "eos", 3, 7)),
        ([chunk("a", "stop", stop_reason="x"), chunk(usage=USAGE)], {"stop": ("x",)}, ("a", "stop", 3, 7)),
        ([chunk("a", "stop", matched_stop=2), chunk(usage=USAGE)], {"stop": ("x",)}, ("a", "eos", 3, 7)),
        # the server left it in
        ([chunk(" a"), chunk(" x b"), chunk(" c")], {"stop": ("x",)}, (" a ", "stop", 2, 0)),
        # what began like a stop text and was none
        ([chunk("a"), chunk("x"), chunk("", "length"), chunk(usage=USAGE)], {"stop": ("xy",)}, ("ax", "length", 3, 7)),
        ([chunk(" a", "content_filter"), chunk(usage=USAGE)], {}, (" a", "eos", 3, 7)),
    ],
)  # fmt: skip
def test_answers_as_servers_give_them(chunks: list[Any], asked: dict[str, Any], found: tuple[Any, ...]) -> None:
    assert result(*chunks, **asked) == found


@given(st.lists(st.integers(0, 400), max_size=8))
def test_an_answer_may_be_cut_anywhere(cuts: list[int]) -> None:
    whole = b": ping\r\n\r\n" + frames(chunk(" é"), chunk(" 😀"), chunk("", "length"), chunk(usage=USAGE), "[DONE]")
    edges = [0, *sorted(cuts), len(whole)]
    decoder = ENGINE.decoder(ask())
    events = [event for a, b in pairwise(edges) for event in decoder.feed(whole[a:b])]

    assert events == [TokenEvent(None, " é"), TokenEvent(None, " 😀"), Finished("length", 3, 7)]


@pytest.mark.parametrize(
    ("chunks", "stop"),
    [
        ([chunk(" a"), chunk(" x b")], "x"),
        ([chunk("a", "stop", stop_reason="y"), chunk(usage=USAGE)], "y"),
        ([chunk("a", "stop", matched_stop="y"), chunk(usage=USAGE)], "y"),
        ([chunk("a", "stop", matched_stop=2), chunk(usage=USAGE)], ""),
        ([chunk("a", "stop"), chunk(usage=USAGE)], ""),
        ([chunk("a", "length"), chunk(usage=USAGE)], ""),
    ],
)
def test_which_stop_text_it_was_is_told_where_it_is_known(chunks: list[Any], stop: str) -> None:
    finished = heard(*chunks, stop=("x", "y"))[-1]

    assert isinstance(finished, Finished)
    assert finished.stop == stop


def test_a_prompt_that_must_be_counted_is_waited_for_in_silence() -> None:
    asked = {"stop": ("x",), "count_prompt": True}
    decoder = ENGINE.decoder(ask(**asked))

    assert decoder.feed(frames(chunk(" a x"), chunk(" more"), chunk("", "length"))) == [TokenEvent(None, " a ")]
    assert decoder.feed(frames(chunk(usage=USAGE))) == [Finished("stop", 1, 7, stop="x")]
    assert heard(chunk(" a x"), "[DONE]", **asked)[-1] == Finished("stop", 1, 0, stop="x")


# ---- what is heard of a chat ----


def delta(content: str | None = None, reason: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": content, **more}, "finish_reason": reason}
    return {"object": "chat.completion.chunk", "choices": [choice]}


def chatted(*chunks: Any, **asked: Any) -> Events:
    return heard(*chunks, **{"prompt": "", "chat": chat(tools=(WEATHER,)), **asked})


@pytest.mark.parametrize(
    ("chunks", "asked", "events"),
    [
        (
            [delta("", role="assistant"), delta("Hi"), delta("!"), delta(None, "stop"), chunk(usage=USAGE), "[DONE]"],
            {},
            [TokenEvent(None, "Hi"), TokenEvent(None, "!"), Finished("eos", 3, 7)],
        ),
        (
            [delta("Hi"), delta(None, "stop"), chunk(usage=USAGE)],
            {"stop": ("x",)},
            [TokenEvent(None, "Hi"), Finished("stop", 3, 7)],
        ),
        ([delta("Hi x")], {"stop": ("x",)}, [TokenEvent(None, "Hi "), Finished("stop", 1, 0, stop="x")]),
        ([delta("Hi"), delta(None, "length"), "[DONE]"], {}, [TokenEvent(None, "Hi"), Finished("length", 1, 0)]),
    ],
)
def test_chats_as_servers_answer_them(chunks: list[Any], asked: dict[str, Any], events: Events) -> None:
    assert chatted(*chunks, **asked) == events


def test_a_call_of_a_tool_is_heard() -> None:
    called = {"index": 0, "id": "theirs", "type": "function", "function": {"name": "weather", "arguments": ""}}
    more = {"index": 0, "function": {"arguments": "{}"}}
    first, second, finished = chatted(
        delta(tool_calls=[called]), delta(tool_calls=[more]), delta(None, "tool_calls"), chunk(usage=USAGE)
    )

    assert isinstance(first, TokenEvent)
    assert first.tool_calls[0].name == "weather"
    assert second == TokenEvent(None, "", tool_calls=(ToolCallPiece(0, arguments="{}"),))
    assert finished == Finished("tool_calls", 3, 7)


def test_what_fails_in_a_chat_is_told_as_for_prompts() -> None:
    broken = {"error": {"message": "maximum context length is 2048 tokens", "code": "context_length_exceeded"}}
    with pytest.raises(PromptTooLong, match="too long"):
        chatted(broken)
    with pytest.raises(GenerationFailed, match="in mid-answer"):
        chatted(delta("Hi"), broken)
    with pytest.raises(UpstreamFailed, match="status 500"):
        chatted({"error": {"message": "boom", "code": 500}})
    with pytest.raises(GenerationFailed, match="no reason given"):
        chatted({"unheard": "of"})


def test_nothing_comes_after_the_end() -> None:
    decoder = ENGINE.decoder(ask())
    decoder.feed(frames(chunk("a", "stop"), chunk(usage=USAGE)))

    assert decoder.feed(frames(chunk("b"), "[DONE]", "garbage")) == []


def test_log_probabilities_as_documented() -> None:
    said = {
        "tokens": [" Paris", "."],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{" Lyon": -2.0, " Paris": -0.5, " x": -9.0}, {".": -1.0, ",": -1.5}],
        "text_offset": [0, 6],
    }
    first, second, finished = heard(
        chunk(" Paris.", logprobs=said), chunk("", "length", USAGE), top_tokens=2, temperature=1.0
    )

    assert first == TokenEvent(
        None,
        " Paris",
        -0.5,
        (TokenChance(-1, " Paris", math.exp(-0.5), -0.5), TokenChance(-1, " Lyon", math.exp(-2.0), -2.0)),
        token=" Paris",
    )
    assert isinstance(second, TokenEvent)
    assert (second.text, [chance.text for chance in second.top]) == (".", [".", ","])
    assert finished == Finished("length", 3, 7)


def test_log_probabilities_as_llama_cpp_gives_them() -> None:
    top = [{"id": 5, "token": " Paris", "logprob": -0.5}, {"id": 6, "token": " Lyon", "logprob": -2.0}]
    said = {"content": [{"id": 5, "token": " Paris", "logprob": -0.5, "top_logprobs": top}]}
    event = heard(chunk(" Paris", logprobs=said), top_tokens=1, temperature=0.0)[0]

    assert event == TokenEvent(5, " Paris", -0.5, (TokenChance(5, " Paris", math.exp(-0.5), -0.5),), " Paris")


def test_a_character_of_several_tokens_is_text_once() -> None:
    said = {"tokens": ["bytes:\\xf0\\x9f", "bytes:\\x98\\x80"], "token_logprobs": [-1.0, None], "top_logprobs": None}

    assert heard(chunk("😀", logprobs=said), logprobs=True) == [
        TokenEvent(None, "", -1.0, token="bytes:\\xf0\\x9f"),
        TokenEvent(None, "😀", None, token="bytes:\\x98\\x80"),
    ]


def test_top_tokens_are_never_dropped_in_silence() -> None:
    with pytest.raises(Unsupported, match="reports no top_tokens"):
        heard(chunk(" Paris"), top_tokens=2, temperature=0.0)
    assert heard(chunk(" Paris"), logprobs=True) == [TokenEvent(None, " Paris")]


def test_a_server_that_refuses_log_probabilities_is_not_asked_for_any() -> None:
    model = spec(args={"logprobs": False})

    assert body_of(model, logprobs=True) == body_of(model)
    with pytest.raises(Unsupported, match="logprobs: false"):
        ENGINE.check(model, ask(top_tokens=2, temperature=0.0))


@pytest.mark.parametrize(
    "said",
    [
        *("garbage", "[1]", "{}x", "[" * 100_000, "[DONE]"),
        *('{"choices": 1}', '{"choices": [1]}', '{"choices": [], "usage": 3}', '{"choices": [{"text": 5}]}'),
        '{"choices": [{"text": "a", "logprobs": {"tokens": [1]}}]}',
    ],
)
def test_what_is_not_the_protocol_is_a_failure(said: str) -> None:
    with pytest.raises(GenerationFailed, match="not OpenAI's protocol"):
        heard(said, chunk("", "stop"), "[DONE]")


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        ({"error": {"message": "the shard died", "code": 500}}, UpstreamFailed, "the shard died"),
        ({"error": {"message": "bad seed", "type": "BadRequestError", "code": 400}}, InvalidRequest, "bad seed"),
        ({"error": {"message": "out of memory"}}, GenerationFailed, "out of memory"),
        ({"error": "out of memory", "error_type": "generation"}, GenerationFailed, "out of memory"),
        ({"object": "error", "message": "out of memory", "code": "x"}, GenerationFailed, "out of memory"),
        (
            {
                "error": {
                    "message": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 2048. "
                    "Given: 3000 `inputs` tokens and 5 `max_new_tokens`",
                    "http_status_code": 422,
                }
            },
            PromptTooLong,
            "has 3000 tokens, and this model takes 2048",
        ),
    ],
)
def test_an_error_in_place_of_an_answer(said: Any, kind: type[GatewayError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        heard(said)

    assert type(caught.value) is kind
    with pytest.raises(GenerationFailed, match="in mid-answer"):
        heard(chunk(" a"), said)


def test_an_answer_that_the_server_gave_up_is_a_failure() -> None:
    with pytest.raises(GenerationFailed, match="abort"):
        heard(chunk(" a"), chunk("", "abort"))


# ---- refusals ----


@pytest.mark.parametrize(
    ("status", "said", "kind", "words"),
    [
        (400, {"error": {"message": "bad `seed`", "type": "invalid_request_error"}}, InvalidRequest, "bad `seed`"),
        (422, {"detail": [{"loc": ["body", "n"], "msg": "no", "input": "my prompt"}]}, InvalidRequest, "refuses"),
        (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, UpstreamFailed, "status 401.*`api_key`"),
        (403, {"error": {"message": f"{KEY}"}}, UpstreamFailed, "status 403.*`api_key`"),
        (402, {"error": {"message": "Insufficient Balance"}}, UpstreamFailed, "no credit or quota"),
        (404, {"error": {"message": "The model `x` does not exist"}}, UpstreamFailed, "`x` does not exist.*args"),
        (404, {"detail": "Not Found"}, UpstreamFailed, "Not Found.*Correct `url`"),
        (308, None, UpstreamFailed, "Correct `url`"),
        (413, None, BodyTooLarge, "shorten"),
        (429, {"error": {"message": "Rate limit reached", "code": "rate_limit_exceeded"}}, QueueFull, "rate limit"),
        (429, {"error": {"message": "Exceeded", "code": "insufficient_quota"}}, UpstreamFailed, "no credit or quota"),
        (500, {"error": {"message": "boom"}}, UpstreamFailed, "status 500: boom"),
        (500, {"error": {"message": "image input is not supported - hint: mmproj"}}, Unsupported, "takes no images"),
        (502, None, UpstreamFailed, "status 502: no reason given"),
        (503, [{"error": {"message": "overloaded", "code": 503}}], UpstreamFailed, "overloaded"),
    ],
)  # fmt: skip
def test_a_refusal_is_an_error_of_ours(status: int, said: Any, kind: type[GatewayError], words: str) -> None:
    error = ENGINE.refusal(status, b"<html>" if said is None else json.dumps(said).encode())

    assert type(error) is kind
    with pytest.raises(kind, match=words):
        raise error
    assert KEY not in error.detail
    assert "my prompt" not in error.detail
    assert (error.retry_after_s is not None) is (status == 503 or kind is QueueFull)


@pytest.mark.parametrize(
    "said",
    [
        {
            "code": "context_length_exceeded",
            "message": "This model's maximum context length is 2048 tokens, however you requested 3016 tokens "
            "(3000 in your prompt; 16 for the completion). Please reduce your prompt; or completion length.",
        },
        {
            "code": 400,
            "message": "This model's maximum context length is 2048 tokens. However, you requested 3016 tokens "
            "(3000 in the messages, 16 in the completion). Please reduce the length of the messages or completion.",
        },
        {
            "code": 400,
            "message": "'max_tokens' or 'max_completion_tokens' is too large: 16. This model's maximum context length "
            "is 2048 tokens and your request has 3000 input tokens (16 > 2048 - 3000). None",
        },
        {
            "message": "Requested token count exceeds the model's maximum context length of 2048 tokens. You requested "
            "a total of 3016 tokens: 3000 tokens from the input messages and 16 tokens for the completion."
        },
        {"message": "Input length (3000 tokens) exceeds the maximum allowed length (2048 tokens)."},
        {
            "code": 400,
            "message": "the request exceeds the available context size. try increasing it",
            "type": "exceed_context_size_error",
            "n_prompt_tokens": 3000,
            "n_ctx": 2048,
        },
        {"message": "request (3000 tokens) exceeds the available context size (2048 tokens), try increasing it"},
    ],
)
def test_a_prompt_that_is_too_long_is_told_with_both_numbers(said: dict[str, Any]) -> None:
    error = ENGINE.refusal(400, json.dumps({"error": said}).encode())

    assert isinstance(error, PromptTooLong)
    assert "has 3000 tokens, and this model takes 2048" in error.detail
    assert error.extra == {"prompt_tokens": 3000, "context_tokens": 2048}


def test_a_prompt_that_is_too_long_by_unknown_words_keeps_them() -> None:
    said = {"error": {"message": "prompt too big", "code": "context_length_exceeded"}}
    error = ENGINE.refusal(400, json.dumps(said).encode())

    assert isinstance(error, PromptTooLong)
    assert "prompt too big" in error.detail


@pytest.mark.parametrize(("server", "fresh"), [("openai", False), ("vllm", False), ("llama.cpp", True)])
def test_only_a_server_that_keeps_connections_is_sent_calls_over_kept_ones(server: str, fresh: bool) -> None:
    model = spec(args={"server": server})
    said = Call("/v1/chat/completions", b'{"model":"m"}')
    asked = Call("/v1/models", method="GET")

    calls = [ENGINE.call(model, ask(), ""), ENGINE.forward(model, said, ""), ENGINE.forward(model, asked, "")]
    assert [call.fresh for call in calls] == [fresh] * 3
