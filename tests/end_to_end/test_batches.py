"""`/inference` and `/api/llm/inference`, good and bad, over a real socket with the embedded model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.end_to_end.gateway import EMBEDDED, Gateway, serving

pytestmark = pytest.mark.embedded

FRANCE = "The capital of France is"
MANY = "/api/llm/inference"
ONE = "/inference"
HELLO = {"role": "user", "content": "Hello"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "garbage.gguf").write_bytes(b"this is no model" * 1000)
    with serving(
        folder,
        m={**EMBEDDED, "aliases": ["/path/to/your/model"], "max_concurrency": 2},
        garbage={"engine": "llamacpp", "weights": "garbage.gguf"},
    ) as running:
        yield running


def refusal(answer: httpx.Response, status: int, code: str) -> Any:
    """Return the detail of an answer that must be this error."""
    assert (answer.status_code, answer.json()["error_code"]) == (status, code), answer.text
    return answer.json()["detail"]


def ask(gateway: Gateway, address: str, **fields: Any) -> httpx.Response:
    """Ask at either address, with the parameters where its document has them."""
    if address == MANY:
        return gateway.post(MANY, {"model_path": "m", "prompts": [FRANCE], **fields})
    named = {"max_new_tokens": "max_tokens"}
    parameters = {named.get(name, name): value for name, value in fields.items() if name in PARAMETERS}
    others = {name: value for name, value in fields.items() if name not in PARAMETERS}
    return gateway.post(ONE, {"model": "m", "prompt": FRANCE, "parameters": parameters, **others})


PARAMETERS = {"temperature", "max_new_tokens", "top_p"}


def test_all_addresses_give_one_text_at_temperature_0(gateway: Gateway) -> None:
    short = {"max_tokens": 8, "temperature": 0}
    texts = [
        gateway.post("/generate", {"prompt": FRANCE, "return_full_text": False, **short}).json()["generated_text"],
        gateway.post("/models/m/llm-service/generate", {"prompt": FRANCE, **short}).json()["generated_text"],
        gateway.post("/models/m/api-server/generate", {"prompt": FRANCE, **short}).json()["generated_text"][
            len(FRANCE) :
        ],
        ask(gateway, ONE, max_new_tokens=8, temperature=0).json()["generated_text"],
        *ask(gateway, MANY, max_new_tokens=8, temperature=0).json()["outputs"],
        *ask(gateway, MANY, max_new_tokens=8, do_sample=False).json()["outputs"],
    ]

    assert set(texts) == {texts[0]}
    assert texts[0].startswith(" Paris")


def test_many_prompts_are_answered_in_order(gateway: Gateway) -> None:
    prompts = [f"{country} has the capital" for country in ("France", "Italy", "Spain", "Japan")] * 3
    body = {"model_path": "/path/to/your/model", "prompts": prompts, "max_new_tokens": 3, "temperature": 0}

    answer = gateway.post(MANY, body).json()
    single = [gateway.post(MANY, {**body, "prompts": [prompt]}).json()["outputs"][0] for prompt in prompts[:4]]

    assert answer.keys() == {"outputs", "model_path", "num_prompts"}
    assert (answer["model_path"], answer["num_prompts"]) == ("/path/to/your/model", 12)
    assert answer["outputs"][:4] == single


def test_the_model_may_be_named_by_each_of_its_names(gateway: Gateway) -> None:
    for name in ("m", "/path/to/your/model", EMBEDDED["hf_name"], EMBEDDED["weights"]):
        answer = gateway.post(MANY, {"model_path": name, "prompts": ["a"], "max_new_tokens": 1})
        assert answer.json()["model_path"] == name
        assert ask(gateway, ONE, model=name, max_new_tokens=1).json()["model"] == "m"
    assert gateway.post(ONE, {"prompt": "a", "parameters": {"max_tokens": 1}}).json()["model"] == "m"


def test_stop_texts_end_an_inference_and_are_left_out(gateway: Gateway) -> None:
    parameters = {"temperature": 0, "max_tokens": 30, "stop": ["\n"]}

    answer = gateway.post(ONE, {"model": "m", "prompt": FRANCE, "parameters": parameters}).json()

    assert (answer["generated_text"], answer["finish_reason"]) == (" Paris.", "stop")


def test_an_inference_can_be_streamed(gateway: Gateway) -> None:
    body = {"prompt": FRANCE, "parameters": {"temperature": 0, "max_tokens": 5}}

    whole = gateway.post(ONE, body).json()
    stream = gateway.post(ONE, {**body, "stream": True})

    events = [json.loads(event.removeprefix("data: ")) for event in stream.text.strip().split("\n\n")]
    assert events[-1] == whole
    assert "".join(event["text"] for event in events[:-1]) == whole["generated_text"]


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"temperature": 2.1}, 422, "INVALID_TEMPERATURE"),
        ({"max_new_tokens": 0}, 422, "INVALID_MAX_TOKENS"),
        ({"max_new_tokens": 2049}, 422, "INVALID_MAX_TOKENS"),
        ({"top_p": 0}, 422, "VALIDATION_ERROR"),
        ({"prompts": [" "], "prompt": " "}, 400, "EMPTY_PROMPT"),
        ({"prompts": ["a", "word " * 3000], "prompt": "word " * 3000}, 400, "PROMPT_TOO_LONG"),
        ({"model_path": "n", "model": "n"}, 404, "MODEL_NOT_FOUND"),
        ({"prompts": None, "prompt": None}, 422, "VALIDATION_ERROR"),
    ],
)
@pytest.mark.parametrize("address", [ONE, MANY])
def test_a_wrong_request_is_told_what_is_wrong(
    gateway: Gateway, address: str, fields: dict[str, Any], status: int, code: str
) -> None:
    refusal(ask(gateway, address, **fields), status, code)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"top_k": 0}, "INVALID_TOP_K"),
        ({"prompts": []}, "VALIDATION_ERROR"),
        ({"prompts": ["a"] * 257}, "VALIDATION_ERROR"),
    ],
)
def test_many_prompts_have_limits_of_their_own(gateway: Gateway, fields: dict[str, Any], code: str) -> None:
    refusal(ask(gateway, MANY, **fields), 422, code)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"mode": "chat"}, "prompt"),
        ({"mode": "chat", "prompt": None}, "messages"),
        ({"mode": "instruct", "prompt": None}, "prompt"),
        ({"mode": "instruct", "messages": [HELLO]}, "messages"),
        ({"mode": "completion", "messages": [HELLO]}, "messages"),
        ({"messages": [HELLO]}, "prompt"),
        ({"messages": [], "prompt": None}, "messages"),
    ],
)
def test_each_mode_takes_a_prompt_or_messages_and_says_which(
    gateway: Gateway, fields: dict[str, Any], field: str
) -> None:
    [complaint] = refusal(ask(gateway, ONE, **fields), 422, "VALIDATION_ERROR")

    assert complaint["loc"] == ["body", field]


def test_an_instruction_that_is_blank_is_an_empty_prompt(gateway: Gateway) -> None:
    refusal(ask(gateway, ONE, mode="instruct", prompt=" "), 400, "EMPTY_PROMPT")


def test_a_failed_start_is_500_where_the_document_says_so(gateway: Gateway) -> None:
    for _ in range(2):  # the second one is refused because the model rests
        answer = ask(gateway, MANY, model_path="garbage", prompts=["a", "b", "c"])
        refusal(answer, 500, "START_FAILED")
        assert "GGUF" in answer.json()["cause"]
    refusal(ask(gateway, ONE, model="garbage"), 503, "START_FAILED")
