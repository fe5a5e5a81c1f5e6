"""TGI's own API through a real gateway: put through to a TGI byte for byte, and translated for every other engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.keys import add_key
from tests.end_to_end.gateway import EMBEDDED, Gateway, serving
from tests.end_to_end.test_external import tgi
from tests.runtimes.processes import wait_until
from tests.tgi_double.process import Double, free_port
from tests.tgi_double.schemas import problems

Json = dict[str, Any]
CHAT = {"model": "tgi", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0}
TEXT = {"model": "tgi", "prompt": ["say good", "The"], "max_tokens": 3, "temperature": 0}
TRANSLATED = ["translated", "embedded"]


@pytest.fixture(scope="module")
def double() -> Iterator[Double]:
    with Double("--model-id", "org/toy", "--max-top-n-tokens", "50", "--max-total-tokens", "4096") as running:
        yield running


@pytest.fixture(scope="module")
def gateway(double: Double, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway before a TGI, once as it is and once with a word of the catalog's in it, and the embedded model."""
    models = {
        "through": tgi(double.url),
        "translated": tgi(double.url, hf_name="org/toy", context_tokens=4096, overrides={"return_full_text": False}),
        "embedded": EMBEDDED,
    }
    with serving(tmp_path_factory.mktemp("tgi"), **models) as running:
        running.post("/models/through/start")
        yield running


def post(gateway: Gateway, path: str, body: Any, model: str = "embedded") -> httpx.Response:
    return gateway.post(f"/models/{model}/tgi{path}", body)


def generated(gateway: Gateway, model: str, inputs: str, **parameters: Any) -> Json:
    answer = post(gateway, "/generate", {"inputs": inputs, "parameters": {"max_new_tokens": 8, **parameters}}, model)
    assert answer.status_code == 200, answer.text
    assert problems(answer.json(), "GenerateResponse") == []
    return dict(answer.json())


def events(answer: httpx.Response) -> list[Json]:
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    return [json.loads(event.removeprefix("data: ")) for event in answer.text.removesuffix("\n\n").split("\n\n")]


# ---- put through ----------------------------------------------------------------------------------------------------

ASKED: list[tuple[str, Any]] = [
    ("/", {"inputs": "say good", "parameters": {}}),
    ("/", {"inputs": "say good", "parameters": {}, "stream": True}),
    ("/generate", {"inputs": "Once upon a", "parameters": {"details": True, "max_new_tokens": 9, "top_n_tokens": 3}}),
    ("/generate", {"inputs": "a cup of", "parameters": {"do_sample": True, "seed": 2**64 - 1, "details": True}}),
    ("/generate", {"inputs": "Once", "parameters": {"stop": ["time"], "max_new_tokens": 9}}),
    ("/generate_stream", {"inputs": "a cup of", "parameters": {"max_new_tokens": 20, "details": True}}),
    ("/generate_stream", {"inputs": "x", "parameters": {"temperature": 0}}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", {**CHAT, "stream": True, "top_p": 1}),
    ("/v1/completions", {**TEXT, "prompt": "say good"}),
    ("/v1/completions", {**TEXT, "prompt": "say good", "stream": True}),
    ("/v1/completions", {**TEXT, "suffix": "x"}),
    ("/invocations", {"inputs": "say good", "parameters": {}}),
    ("/invocations", {**CHAT, "stream": True}),
    ("/invocations", {"text": "x"}),
    ("/vertex", {"instances": [{"inputs": "The", "parameters": {"max_new_tokens": 3, "seed": 1}}]}),
    ("/vertex", {"instances": []}),
    ("/tokenize", {"inputs": "é The"}),
    ("/chat_tokenize", CHAT),
    ("/generate", {"inputs": ""}),
    ("/generate", {"inputs": "x", "parameters": None}),
    ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": "many"}}),
    ("/generate", {"inputs": "word " * 9000}),
]
MOMENT = re.compile(rb'"created":\d+')


@pytest.mark.parametrize(("path", "body"), ASKED)
def test_an_answer_is_byte_for_byte_that_of_the_server(gateway: Gateway, double: Double, path: str, body: Any) -> None:
    direct = httpx.post(double.url + path, json=body, timeout=30)
    through = post(gateway, path, body, "through")

    assert through.status_code == direct.status_code
    assert MOMENT.sub(b"", through.content) == MOMENT.sub(b"", direct.content)
    assert through.headers["content-type"] == direct.headers["content-type"]
    for name in [name for name in direct.headers if name.startswith("x-")]:
        assert name in through.headers
    for name in ("x-compute-type", "x-compute-characters", "x-prompt-tokens", "x-generated-tokens"):
        assert through.headers.get(name) == direct.headers.get(name)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"", b'"text"'])
@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
def test_what_the_server_cannot_read_is_its_own_affair(
    gateway: Gateway, double: Double, content: bytes, kind: str
) -> None:
    asked: Any = {"content": content, "headers": {"content-type": kind}, "timeout": 30}
    for path in ("/generate", "/v1/chat/completions", "/"):
        direct = httpx.post(double.url + path, **asked)
        through = httpx.post(f"{gateway.url}/models/through/tgi{path}", **asked)

        assert (through.status_code, through.content) == (direct.status_code, direct.content)


@pytest.mark.parametrize("path", ["", "/", "/health", "/ping", "/info", "/v1/models"])
def test_a_question_is_answered_as_the_server_does(gateway: Gateway, double: Double, path: str) -> None:
    direct, through = httpx.get(double.url + path), gateway.get(f"/models/through/tgi{path}")

    assert (through.status_code, through.content) == (direct.status_code, direct.content)


def test_metrics_are_the_servers_own(gateway: Gateway) -> None:
    post(gateway, "/generate", {"inputs": "say good", "parameters": {}}, "through")

    metrics = gateway.get("/models/through/tgi/metrics")
    assert "tgi_request_count" in metrics.text
    assert metrics.headers["content-type"].startswith("text/plain")


def test_an_overloaded_server_and_a_failing_one_are_told_in_its_own_words(tmp_path: Path) -> None:
    with (
        Double(overloaded=True) as busy,
        Double(oom_after_tokens=2) as failing,
        Double(cuts_after_tokens=2) as cutting,
        serving(
            tmp_path,
            busy=tgi(busy.url, hf_name="busy"),
            failing=tgi(failing.url, hf_name="failing"),
            cutting=tgi(cutting.url, hf_name="cutting"),
        ) as gateway,
    ):
        asked = {"inputs": "Once upon a", "parameters": {"max_new_tokens": 8}}
        overloaded = post(gateway, "/generate", asked, "busy")
        assert (overloaded.status_code, overloaded.json()["error_type"]) == (429, "overloaded")
        failed = post(gateway, "/generate", asked, "failing")
        assert (failed.status_code, failed.json()["error_type"]) == (424, "generation")
        cut = events(post(gateway, "/generate_stream", asked, "cutting"))
        assert [event.get("index") for event in cut] == [1, 2, None]
        assert cut[-1]["error_type"] == "generation"
        assert cut[-1]["error_code"] == "GENERATION_FAILED"


def test_a_key_of_the_servers_is_shown_by_the_gateway_and_the_callers_never(tmp_path: Path) -> None:
    keys = tmp_path / "keys.jsonl"
    alice = add_key(keys, "alice", ["generate"])
    with (
        Double("--api-key", "sk-of-the-server") as locked,
        serving(
            tmp_path, {"GATEWAY_API_KEYS_FILE": str(keys)}, m=tgi(locked.url, api_key="sk-of-the-server")
        ) as gateway,
    ):
        asked = {"inputs": "say good", "parameters": {}}
        mine = {"authorization": f"Bearer {alice}"}
        assert gateway.post("/models/m/tgi/generate", asked, **mine).status_code == 200
        assert gateway.get("/models/m/tgi/info", **mine).status_code == 200
        for path in ("/docs", "/redoc"):  # documentation needs no key (contract, section 7)
            assert gateway.get(f"/models/m/tgi{path}").status_code == 200
        for path in ("", "/health", "/info", "/metrics", "/v1/models"):
            refused = gateway.get(f"/models/m/tgi{path}")
            assert (refused.status_code, refused.json()["error_type"]) == (401, "unauthorized")
        assert gateway.post("/models/m/tgi", asked).json()["error_type"] == "unauthorized"


def test_a_model_that_is_down_is_woken_by_a_request_and_by_nothing_else(tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path, m=tgi(f"http://127.0.0.1:{port}")) as gateway:
        down = gateway.get("/models/m/tgi/health")
        assert (down.status_code, down.json()) == (503, {"error": "unhealthy", "error_type": "healthcheck"})
        info = gateway.get("/models/m/tgi/info")
        assert (info.status_code, info.json()["error_type"]) == (503, "model_not_loaded")
        assert gateway.model()["state"] == "stopped"
        failed = gateway.post("/models/m/tgi/generate", {"inputs": "x"})
        assert (failed.status_code, failed.json()["error_type"]) == (503, "start_failed")
        assert {"cause", "fix", "error", "error_code"} <= failed.json().keys()
        with Double(port=port):
            wait_until(lambda: gateway.post("/models/m/tgi/generate", {"inputs": "x"}).status_code == 200)
            assert gateway.get("/models/m/tgi/health").status_code == 200


# ---- translated -----------------------------------------------------------------------------------------------------

LIKE_TGI: list[Json] = [
    {},
    {"max_new_tokens": 4},
    {"details": True, "max_new_tokens": 4},
    {"details": True, "do_sample": False, "temperature": 1.0},
    {"details": True, "top_n_tokens": 2, "max_new_tokens": 1},
    {"details": True, "stop": ["small"], "max_new_tokens": 9},
    {"return_full_text": True},
    {"details": True, "do_sample": True, "seed": 5, "temperature": 0.7, "max_new_tokens": 6},
    {"details": True, "top_k": 3, "seed": 7, "max_new_tokens": 6},
    {"details": True, "repetition_penalty": 1.3, "max_new_tokens": 6},
]
INPUTS = ["say good", "Once upon a", "a cup of"]


@pytest.mark.parametrize("parameters", LIKE_TGI)
def test_what_is_translated_is_what_tgi_itself_answers(gateway: Gateway, double: Double, parameters: Json) -> None:
    for inputs in INPUTS:
        asked = {"inputs": inputs, "parameters": {"max_new_tokens": 20, **parameters}}
        direct, ours = httpx.post(f"{double.url}/generate", json=asked), post(gateway, "/generate", asked, "translated")

        assert ours.json() == direct.json()
        assert ours.headers["x-generated-tokens"] == direct.headers["x-generated-tokens"]
        assert problems(ours.json(), "GenerateResponse") == []
        listed = httpx.post(double.url, json=asked).json()
        assert post(gateway, "", asked, "translated").json() == listed


@pytest.mark.parametrize("parameters", LIKE_TGI)
def test_streams_that_are_translated_are_tgis_too(gateway: Gateway, double: Double, parameters: Json) -> None:
    for inputs in INPUTS:
        asked = {"inputs": inputs, "parameters": {"max_new_tokens": 20, **parameters}}
        direct = events(httpx.post(f"{double.url}/generate_stream", json=asked))
        ours = events(post(gateway, "/generate_stream", asked, "translated"))

        if "stop" in parameters:  # what may become a stop text comes later
            assert [each["token"]["id"] for each in ours] == [each["token"]["id"] for each in direct]
            assert ours[-1]["generated_text"] == direct[-1]["generated_text"]
        else:
            assert ours == direct
        assert [fault for event in ours for fault in problems(event, "StreamResponse")] == []
        assert events(post(gateway, "", {**asked, "stream": True}, "translated"))[-1]["generated_text"]


RULES = [
    {"temperature": 0}, {"top_p": 1}, {"top_k": 0}, {"max_new_tokens": 0}, {"frequency_penalty": 3},
    {"repetition_penalty": 0}, {"typical_p": 1}, {"top_n_tokens": 51},
]  # fmt: skip


@pytest.mark.parametrize("model", TRANSLATED)
@pytest.mark.parametrize("parameters", RULES)
def test_a_broken_rule_is_told_in_tgis_words(gateway: Gateway, double: Double, model: str, parameters: Json) -> None:
    asked = {"inputs": "x", "parameters": parameters}
    direct = httpx.post(f"{double.url}/generate", json=asked)
    words = direct.json()["error"].partition(". Given")[0]

    for path in ("/generate", "/generate_stream", ""):
        ours = post(gateway, path, asked, model)
        assert (ours.status_code, ours.json()["error"], ours.json()["error_type"]) == (422, words, "validation")
    empty = post(gateway, "/generate", {"inputs": "", "parameters": parameters}, model)
    assert empty.json()["error_code"] == "EMPTY_PROMPT"
    assert empty.json()["error"] == "Input validation error: `inputs` cannot be empty"


@pytest.mark.parametrize("model", TRANSLATED)
def test_a_prompt_that_is_too_long_is_refused_as_tgi_does(gateway: Gateway, model: str) -> None:
    for path in ("/generate", "/generate_stream"):
        long = post(gateway, path, {"inputs": "word " * 9000, "parameters": {"max_new_tokens": 2}}, model)
        assert (long.status_code, long.json()["error_type"]) == (422, "validation")
        assert long.json()["error_code"] == "PROMPT_TOO_LONG"


@pytest.mark.parametrize("model", TRANSLATED)
def test_the_stop_text_stays(gateway: Gateway, model: str) -> None:
    inputs = "The capital of France is"
    first, second = events(
        post(gateway, "/generate_stream", {"inputs": inputs, "parameters": {"max_new_tokens": 2}}, model)
    )
    stop = second["generated_text"].split()[-1]
    parameters = {"max_new_tokens": 20, "stop": [stop], "details": True}
    whole = generated(gateway, model, inputs, **parameters)
    streamed = events(post(gateway, "/generate_stream", {"inputs": inputs, "parameters": parameters}, model))

    assert first["generated_text"] is None
    assert whole["generated_text"].endswith(stop)
    assert whole["details"]["finish_reason"] == streamed[-1]["details"]["finish_reason"] == "stop_sequence"
    assert "".join(token["text"] for token in whole["details"]["tokens"]).startswith(whole["generated_text"])
    texts = [event["token"]["text"] for event in streamed if not event["token"]["special"]]
    assert "".join(texts) == streamed[-1]["generated_text"] == whole["generated_text"]
    assert streamed[-1]["details"]["input_length"] > 0
    for path, body in (
        ("/v1/completions", {"prompt": inputs}),
        ("/v1/completions", {"prompt": inputs, "stream": True}),
    ):
        asked = {**body, "max_tokens": 20, "temperature": 0, "stop": [stop]}
        assert stop in post(gateway, path, asked, model).text


@pytest.mark.parametrize("model", TRANSLATED)
def test_tokens_stand_where_they_are_in_the_text(gateway: Gateway, model: str) -> None:
    text = "The café ☕ is open"
    tokens = post(gateway, "/tokenize", {"inputs": text, "parameters": {"max_new_tokens": 0}}, model).json()

    assert problems(tokens, "TokenizeResponse") == []
    assert [token["start"] for token in tokens[1:]] == [token["stop"] for token in tokens[:-1]]
    assert tokens[-1]["stop"] == len(text.encode())


@pytest.mark.parametrize("model", TRANSLATED)
def test_what_is_told_of_the_model(gateway: Gateway, model: str) -> None:
    base = f"/models/{model}/tgi"
    info = gateway.get(f"{base}/info").json()
    assert problems(info, "Info") == []
    assert info["max_total_tokens"] == info["max_input_tokens"] + 1
    listed = gateway.get(f"{base}/v1/models").json()["data"]
    assert [problems(each, "ModelInfo") for each in listed] == [[]]
    assert info["model_id"] == listed[0]["id"]
    for path in ("", "/", "/health", "/ping"):
        assert (gateway.get(base + path).status_code, gateway.get(base + path).content) == (200, b"")
    for path in ("/metrics", "/nothing"):
        assert (gateway.get(base + path).status_code, gateway.get(base + path).json()["error_type"]) == (
            404,
            "not_found",
        )
    for path in ("/invocations", "/vertex", "/chat_tokenize"):
        assert post(gateway, path, {}, model).status_code == 404
    described = gateway.get(f"{base}/api-doc/openapi.json").json()
    assert {"/", "/generate", "/generate_stream", "/tokenize", "/info", "/health"} <= described["paths"].keys()
    problem = described["paths"]["/generate"]["post"]["responses"]["422"]["content"]["application/json"]
    assert problem == {"schema": {"$ref": "#/components/schemas/TgiProblem"}}
    assert "swagger" in gateway.get(f"{base}/docs").text


def test_neither_health_nor_info_wakes_a_model(tmp_path: Path) -> None:
    with serving(tmp_path, m=EMBEDDED) as gateway:
        for path in ("", "/health", "/info", "/v1/models", "/api-doc/openapi.json"):
            assert gateway.get(f"/models/m/tgi{path}").status_code == 200
        assert gateway.model()["state"] == "stopped"


@pytest.mark.parametrize("model", TRANSLATED)
def test_chats_run_on_any_engine(gateway: Gateway, model: str) -> None:
    answer = post(gateway, "/v1/chat/completions", CHAT, model)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"]
    assert answer.json()["model"] == "tgi"
    assert problems(answer.json(), "ChatCompletion") == []
    streamed = post(gateway, "/v1/chat/completions", {**CHAT, "stream": True}, model)
    assert streamed.text.endswith("data: [DONE]\n\n")
    chunks = [json.loads(event[6:]) for event in streamed.text.split("\n\n")[:-2]]
    assert [problems(chunk, "ChatCompletionChunk") for chunk in chunks] == [[]] * len(chunks)
    texts = post(gateway, "/v1/completions", TEXT, model).json()
    assert problems(texts, "CompletionFinal") == []
    assert [choice["index"] for choice in texts["choices"]] == [0, 1]
    wrong = post(gateway, "/v1/chat/completions", {**CHAT, "messages": "hello"}, model)
    assert (wrong.status_code, wrong.json()["error_type"]) == (422, "validation")
    assert wrong.json()["error"].startswith("Input validation error: `messages`")


def test_a_grammar_holds_the_answer(gateway: Gateway) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, "required": ["name"]}
    for grammar in ({"type": "json", "value": schema}, {"type": "json_schema", "value": {"schema": schema}}):
        text = generated(gateway, "embedded", "A person:", grammar=grammar, max_new_tokens=60)["generated_text"]
        assert isinstance(json.loads(text)["name"], str)
    form = {"type": "json", "value": schema}
    chat = post(gateway, "/v1/chat/completions", {**CHAT, "max_tokens": 60, "response_format": form})
    assert json.loads(chat.json()["choices"][0]["message"]["content"])["name"]


def test_sampling_is_repeatable_with_a_seed(gateway: Gateway) -> None:
    asked = {"do_sample": True, "seed": 11, "details": True}

    first, second = (generated(gateway, "embedded", "The", **asked) for _ in range(2))

    assert first == second
    assert first["details"]["seed"] == 11


def test_without_a_limit_the_context_is_filled(tmp_path: Path) -> None:
    with serving(tmp_path, m={**EMBEDDED, "context_tokens": 64}) as gateway:
        asked = {"inputs": "One, two, three, four,", "parameters": {"details": True}}
        details = gateway.post("/models/m/tgi/generate", asked).json()["details"]

        assert details["finish_reason"] in ("length", "eos_token")
        assert details["generated_tokens"] > 20
        asked["parameters"] = {"max_new_tokens": 64}
        refused = gateway.post("/models/m/tgi/generate", asked)
        assert (refused.status_code, refused.json()["error_code"]) == (422, "INVALID_MAX_TOKENS")
