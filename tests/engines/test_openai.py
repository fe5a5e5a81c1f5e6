"""Engine `openai`: what is asked of servers with OpenAI's API, and what is heard. Tables."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.catalog import ModelSpec
from gateway.engines.openai import OpenAi
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
from gateway.generation import Finished, GenerationRequest, TokenChance, TokenEvent, collect

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


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"args": {"server": "ollama"}}, "names the server ollama.*openai, vllm, sglang, llama.cpp"),
        ({"args": {"temperature": 1}}, "rgs of m has temperature.*takes model, server, logprobs in args"),
        ({"runtime": "docker", "url": None}, "runtime of m is docker.*runtime: external"),
    ],
)
def test_what_cannot_be_used_says_what_to_write(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(StartFailed, match=words) as caught:
        ENGINE.launch(spec(**keys), "tgi-m", "")

    assert caught.value.extra["cause"]
    assert caught.value.extra["fix"]


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
    )
    assert isinstance(second, TokenEvent)
    assert (second.text, [chance.text for chance in second.top]) == (".", [".", ","])
    assert finished == Finished("length", 3, 7)


def test_log_probabilities_as_llama_cpp_gives_them() -> None:
    top = [{"id": 5, "token": " Paris", "logprob": -0.5}, {"id": 6, "token": " Lyon", "logprob": -2.0}]
    said = {"content": [{"id": 5, "token": " Paris", "logprob": -0.5, "top_logprobs": top}]}
    event = heard(chunk(" Paris", logprobs=said), top_tokens=1, temperature=0.0)[0]

    assert event == TokenEvent(5, " Paris", -0.5, (TokenChance(5, " Paris", math.exp(-0.5), -0.5),))


def test_a_character_of_several_tokens_is_text_once() -> None:
    said = {"tokens": ["bytes:\\xf0\\x9f", "bytes:\\x98\\x80"], "token_logprobs": [-1.0, None], "top_logprobs": None}

    assert heard(chunk("😀", logprobs=said), logprobs=True) == [
        TokenEvent(None, "", -1.0),
        TokenEvent(None, "😀", None),
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
