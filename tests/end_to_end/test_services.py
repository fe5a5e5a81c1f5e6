"""Each model's own services, good and bad, over a real socket (documents/llm-service.md, api-server.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.gateway import EMBEDDED, Gateway, serving

pytestmark = pytest.mark.embedded

FRANCE = "The capital of France is"
LLM = "/models/m/llm-service"
API = "/models/m/api-server"
METADATA = {
    "step": 2920,
    "val_loss": 0.2627,
    "trained_on": "text",
    "model_dim": 577,
    "vocab_size": "many",
    "checkpoint": 1,
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "garbage.gguf").write_bytes(b"this is no model" * 1000)
    with serving(
        folder,
        m={**EMBEDDED, "aliases": ["small"], "metadata": METADATA},
        cold={**EMBEDDED, "hf_name": "cold", "aliases": [EMBEDDED["weights"]]},
        garbage={"engine": "llamacpp", "weights": "garbage.gguf"},
        container={"hf_name": "no-such/model"},
    ) as running:
        assert running.post(f"{API}/generate", {"prompt": "warm up", "max_tokens": 1}).status_code == 200
        yield running


def refusal(answer: httpx.Response, status: int, code: str) -> Any:
    """Return the detail of an answer that must be this error."""
    assert (answer.status_code, answer.json()["error_code"]) == (status, code), answer.text
    return answer.json()["detail"]


def ask_llama(gateway: Gateway, body: dict[str, Any]) -> Any:
    """Ask the model server of `m` itself."""
    port = str(gateway.model()["port"])
    pid = next(pid for pid in gateway.children() if port in Path(f"/proc/{pid}/cmdline").read_text().split("\0"))
    environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    key = next(entry.partition(b"=")[2] for entry in environ if entry.startswith(b"EMBEDDED_API_KEY=")).decode()
    url = f"http://127.0.0.1:{port}/completion"
    return httpx.post(url, json=body, headers={"authorization": f"Bearer {key}"}, timeout=60).json()


# ---- llm-service ----------------------------------------------------------------------------------------------------


def test_paris_is_the_likeliest_capital(gateway: Gateway) -> None:
    answer = gateway.post(f"{LLM}/generate", {"prompt": FRANCE, "temperature": 0}).json()

    assert answer["generated_text"] == " Paris"
    assert [token["rank"] for token in answer["tokens"]] == [1, 2, 3, 4, 5]
    assert answer["tokens"][0]["token"] == " Paris"
    metadata = answer["metadata"]
    assert (metadata["prompt_length"], metadata["prompt_tokens"], metadata["tokens_generated"]) == (24, 5, 1)
    assert metadata["model_name"] == EMBEDDED["hf_name"]
    assert metadata["temperature_used"] == 0.0
    assert 0 <= metadata["generation_time_ms"] < 60_000


def test_probabilities_are_those_of_the_whole_vocabulary(gateway: Gateway) -> None:
    whole = {"prompt": FRANCE, "n_predict": 1, "n_probs": 49152, "temperature": 0.0, "cache_prompt": False}
    [first] = ask_llama(gateway, whole)["completion_probabilities"]
    logprobs = {each["id"]: each["logprob"] for each in first["top_logprobs"]}
    assert len(logprobs) == 49152

    for temperature in (0, 0.5, 1, 2):
        asked = {"prompt": FRANCE, "temperature": temperature, "top_k": 50}
        told = gateway.post(f"{LLM}/generate", asked).json()["tokens"]
        weights = sorted((math.exp(logprob / (temperature or 1)) for logprob in logprobs.values()), reverse=True)

        assert len(told) == 50
        for token, weight in zip(told, weights, strict=False):
            assert token["probability"] == pytest.approx(weight / sum(weights), abs=1e-3)
            assert token["logprob"] == pytest.approx(math.log(weight / sum(weights)), abs=0.05)
            assert token["percentage"] == round(100 * token["probability"], 2)


@pytest.mark.parametrize("temperature", [1e-6, 0.02, 0.1])
def test_alternatives_are_exactly_as_many_as_asked_for_even_if_almost_impossible(
    gateway: Gateway, temperature: float
) -> None:
    asked = {"prompt": FRANCE, "temperature": temperature, "top_k": 50}
    told = gateway.post(f"{LLM}/generate", asked).json()["tokens"]

    assert len({token["token"] for token in told}) > 40
    assert len(told) == 50
    assert told[0]["probability"] > 0.9
    assert all(one["logprob"] >= other["logprob"] for one, other in pairwise(told))


def test_alternatives_are_told_where_the_model_ends_at_once(gateway: Gateway) -> None:
    ended = "<|im_start|>assistant\nHello! How can I help you today?"

    answer = gateway.post(f"{LLM}/generate", {"prompt": ended, "temperature": 0, "max_tokens": 5}).json()

    assert (answer["generated_text"], answer["metadata"]["finish_reason"]) == ("", "eos")
    assert len(answer["tokens"]) == 5


def test_where_a_character_is_cut_the_failure_is_typed(gateway: Gateway) -> None:
    answer = gateway.post(f"{LLM}/generate", {"prompt": "I love it 🙂🙂🙂🙂🙂🙂", "temperature": 0})

    assert "part of a character" in refusal(answer, 500, "GENERATION_FAILED")


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"prompt": ""}, 400, "EMPTY_PROMPT"),
        ({"prompt": "  \n", "temperature": 9}, 400, "EMPTY_PROMPT"),
        ({"prompt": "word " * 3000}, 400, "PROMPT_TOO_LONG"),
        ({"temperature": 2.1}, 422, "INVALID_TEMPERATURE"),
        ({"max_tokens": 0}, 422, "INVALID_MAX_TOKENS"),
        ({"max_tokens": 101}, 422, "INVALID_MAX_TOKENS"),
        ({"top_k": 51}, 422, "INVALID_TOP_K"),
        ({"top_k": 0, "temperature": -1}, 422, "VALIDATION_ERROR"),
        ({"prompt": 7}, 422, "VALIDATION_ERROR"),
        ({"prompt": None}, 422, "VALIDATION_ERROR"),
    ],
)
@pytest.mark.parametrize("address", [LLM, API])
def test_a_wrong_request_is_told_which_field_is_wrong(
    gateway: Gateway, address: str, fields: dict[str, Any], status: int, code: str
) -> None:
    if address == API:  # its limits are others
        fields = {**fields, **({"max_tokens": 2049} if fields.get("max_tokens") else {})}
        fields = {**fields, **({"top_k": 49153} if fields.get("top_k") else {})}

    answer = gateway.post(f"{address}/generate", {"prompt": FRANCE, **fields})

    detail = refusal(answer, status, code)
    if status == 422:
        assert all(complaint.keys() == {"loc", "msg", "type"} for complaint in detail)
        assert all(complaint["loc"][0] == "body" for complaint in detail)


@pytest.mark.parametrize("address", [LLM, API])
def test_what_is_no_json_and_no_model_is_told_so(gateway: Gateway, address: str) -> None:
    url = f"{gateway.url}{address}/generate"

    refusal(httpx.post(url, content=b'{"prompt": "x'), 422, "VALIDATION_ERROR")
    refusal(httpx.post(url, content=b'{"prompt": "\xff"}'), 422, "VALIDATION_ERROR")
    refusal(httpx.post(url, content=b"[]"), 422, "VALIDATION_ERROR")
    refusal(httpx.get(url), 405, "METHOD_NOT_ALLOWED")
    refusal(httpx.get(f"{gateway.url}{address}/nothing"), 404, "NOT_FOUND")
    refusal(gateway.post(address.replace("/m/", "/n/") + "/generate", {"prompt": "x"}), 404, "MODEL_NOT_FOUND")


@pytest.mark.parametrize("service", ["llm-service", "api-server"])
def test_a_model_that_cannot_be_started_is_told_why(gateway: Gateway, service: str) -> None:
    answer = gateway.post(f"/models/garbage/{service}/generate", {"prompt": FRANCE})

    refusal(answer, 503, "START_FAILED")
    assert "GGUF" in answer.json()["cause"]
    health = gateway.get("/models/garbage/llm-service/health")
    assert refusal(health, 503, "START_FAILED")
    assert health.json()["status"] == "failed"


def test_health_status_and_info_wake_no_model_and_its_start_is_seen_there(gateway: Gateway) -> None:
    cold = "/models/cold"
    asleep = gateway.get(f"{cold}/llm-service/health")
    assert (asleep.status_code, asleep.json().keys()) == (200, {"status", "timestamp"})
    assert asleep.json()["status"] == "healthy"
    assert asleep.json()["timestamp"].endswith("Z")
    status = gateway.get(f"{cold}/llm-service/status").json()
    assert (status["service"]["status"], status["model"]["loaded"]) == ("running", False)
    assert gateway.get(f"{cold}/api-server/info").json()["step"] is None
    assert gateway.get(f"{cold}/api-server/health").json() == {
        "status": "ok",
        "model_loaded": False,
        "checkpoint": "cold",
    }
    assert gateway.model("cold")["state"] == "stopped"

    refused = gateway.post(f"{cold}/llm-service/generate", {"prompt": FRANCE}, prefer="wait=0")
    assert refused.headers["retry-after"]
    refusal(refused, 503, "MODEL_NOT_LOADED")
    starting, told = gateway.get(f"{cold}/llm-service/health"), gateway.get(f"{cold}/llm-service/status")
    if gateway.model("cold")["state"] in ("starting", "loading"):  # it takes half a second
        refusal(starting, 503, "MODEL_NOT_LOADED")
        assert starting.json()["status"] == "starting"
        assert refusal(told, 503, "MODEL_NOT_LOADED").startswith("Model is not loaded.")
        assert told.json()["model"]["loaded"] is False

    assert gateway.post(f"{cold}/llm-service/generate", {"prompt": FRANCE}).status_code == 200
    assert gateway.get(f"{cold}/api-server/health").json()["model_loaded"] is True


def test_the_status_has_the_documented_fields(gateway: Gateway) -> None:
    status = gateway.get(f"{LLM}/status").json()

    assert status["service"].keys() == {"status", "version", "uptime_seconds", "memory_usage_mb"}
    assert status["service"]["memory_usage_mb"] > 10
    model = status["model"]
    assert (model["name"], model["loaded"], model["precision"]) == (EMBEDDED["hf_name"], True, "Q4_1")
    assert (model["max_length"], model["vocab_size"]) == (2048, 49152)
    system = status["system"]
    assert {"gpu_available", "gpu_name", "gpu_memory_total_mb", "gpu_memory_used_mb"} <= system.keys()
    assert system["cpu_cores"] >= 1
    assert system["system_memory_gb"] > 0


def test_the_gateways_status_and_info_are_the_default_models_and_its_own(gateway: Gateway) -> None:
    status, info = gateway.get("/status").json(), gateway.get("/info").json()

    assert {"service", "model", "system", "gpus", "catalog_error"} == status.keys()
    assert status["model"]["name"] == EMBEDDED["hf_name"]
    assert info["models"] == ["m", "cold", "garbage", "container"]
    assert info["gpus"] == status["gpus"]
    assert gateway.get(f"{API}/info").json().items() <= info.items()


# ---- api-server -----------------------------------------------------------------------------------------------------


def test_the_api_server_answers_with_the_prompt_and_what_follows(gateway: Gateway) -> None:
    answer = gateway.post(f"{API}/generate", {"prompt": FRANCE, "max_tokens": 5, "temperature": 0})

    assert answer.json() == {
        "prompt": FRANCE,
        "generated_text": FRANCE + " Paris.\n\nThe",
        "tokens_generated": 5,
        "model": "m",
    }


def test_the_api_server_stops_at_a_new_line_after_the_prompt(gateway: Gateway) -> None:
    asked = {"prompt": f"One\n{FRANCE}", "temperature": 0, "stop_on_newline": True}

    answer = gateway.post(f"{API}/generate", asked).json()

    assert answer["generated_text"] == f"One\n{FRANCE} Paris."


def test_top_k_goes_up_to_the_vocabulary(gateway: Gateway) -> None:
    asked = {"prompt": FRANCE, "max_tokens": 2, "temperature": 0.8}

    assert gateway.post(f"{API}/generate", {**asked, "top_k": 49152}).status_code == 200
    [complaint] = refusal(gateway.post(f"{API}/generate", {**asked, "top_k": 49153}), 422, "INVALID_TOP_K")
    assert "49152" in complaint["msg"]


def test_info_has_what_the_file_and_the_catalog_say(gateway: Gateway) -> None:
    assert gateway.get(f"{API}/info").json() == {
        "checkpoint": "m",
        "step": 2920,
        "val_loss": 0.2627,
        "model_layers": 30,
        "model_dim": 577,
        "vocab_size": 49152,
        "trained_on": "text",
    }
    unknown = gateway.get("/models/container/api-server/info").json()
    assert set(unknown.values()) == {"container", None}


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_overview_of_an_api_server(gateway: Gateway, slash: str) -> None:
    overview = gateway.get(f"/models/small/api-server{slash}").json()

    assert overview.keys() == {"service", "version", "checkpoint", "status", "endpoints"}
    assert (overview["service"], overview["checkpoint"], overview["status"]) == ("Inference API", "m", "running")
    assert "POST /generate" in overview["endpoints"]


# ---- documentation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "paths"),
    [(LLM, {"/generate", "/health", "/status"}), (API, {"/", "/generate", "/health", "/info"})],
)
def test_each_service_has_documentation_of_its_own(gateway: Gateway, address: str, paths: set[str]) -> None:
    document = gateway.get(f"{address}/openapi.json").json()
    pages = [gateway.get(f"{address}/{page}") for page in ("docs", "redoc", "docs/")]

    assert set(document["paths"]) == paths
    assert document["servers"] == [{"url": address}]
    assert '"name": "model_id"' not in json.dumps(document["paths"])
    references = {word for word in json.dumps(document["paths"]).split('"') if word.startswith("#/components/")}
    assert {each.rpartition("/")[2] for each in references} <= document["components"]["schemas"].keys()
    for page in pages:
        assert page.headers["content-type"].startswith("text/html")
        assert f"{address}/openapi.json" in page.text
    refusal(gateway.get(address.replace("/m/", "/n/") + "/docs"), 404, "MODEL_NOT_FOUND")
