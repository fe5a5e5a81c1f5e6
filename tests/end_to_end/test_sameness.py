"""At temperature 0 every address gives the same text: completions one, chats one, on each engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.end_to_end.gateway import EMBEDDED, Gateway, serving
from tests.tgi_double.process import Double

FRANCE = "The capital of France is"
ASKED = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with (
        Double("--max-top-n-tokens", "50") as double,
        serving(
            tmp_path_factory.mktemp("models"),
            embedded=EMBEDDED,
            double={"engine": "tgi", "hf_name": "gpt2", "runtime": "external", "url": double.url},
        ) as running,
    ):
        yield running


def posted(gateway: Gateway, address: str, body: dict[str, Any]) -> Any:
    answer = gateway.post(address, body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(gateway: Gateway, address: str, body: dict[str, Any]) -> list[Any]:
    answer = httpx.post(gateway.url + address, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


# ---- completions -----------------------------------------------------------------------------------------------------


def generate(gateway: Gateway, model: str) -> str:
    body = {"model": model, "prompt": FRANCE, "return_full_text": False, **GREEDY}
    return str(posted(gateway, "/generate", body)["generated_text"])


def generate_stream(gateway: Gateway, model: str) -> str:
    frames = events(gateway, "/generate_stream", {"model": model, "prompt": FRANCE, **GREEDY})
    text = "".join(frame["token"]["text"] for frame in frames if not frame["token"]["special"])
    assert frames[-1]["generated_text"] == text
    return text


def inference(gateway: Gateway, model: str) -> str:
    body = {"model": model, "prompt": FRANCE, "parameters": GREEDY}
    return str(posted(gateway, "/inference", body)["generated_text"])


def inference_streamed(gateway: Gateway, model: str) -> str:
    *pieces, last = events(
        gateway, "/inference", {"model": model, "prompt": FRANCE, "parameters": GREEDY, "stream": True}
    )
    assert last["generated_text"] == "".join(piece["text"] for piece in pieces)
    return str(last["generated_text"])


def autotrain(gateway: Gateway, model: str) -> str:
    body = {"model_path": model, "prompts": [FRANCE], "max_new_tokens": 12, "temperature": 0}
    return str(posted(gateway, "/api/llm/inference", body)["outputs"][0])


def autotrain_greedy(gateway: Gateway, model: str) -> str:
    body = {"model_path": model, "prompts": [FRANCE], "max_new_tokens": 12, "do_sample": False}
    return str(posted(gateway, "/api/llm/inference", body)["outputs"][0])


def llm_service(gateway: Gateway, model: str) -> str:
    body = {"prompt": FRANCE, **GREEDY}
    return str(posted(gateway, f"/models/{model}/llm-service/generate", body)["generated_text"])


def api_server(gateway: Gateway, model: str) -> str:
    body = {"prompt": FRANCE, **GREEDY}
    text = str(posted(gateway, f"/models/{model}/api-server/generate", body)["generated_text"])
    assert text.startswith(FRANCE)
    return text.removeprefix(FRANCE)


def completion(gateway: Gateway, model: str) -> str:
    body = {"model": model, "prompt": FRANCE, **GREEDY}
    return str(posted(gateway, "/v1/completions", body)["choices"][0]["text"])


def completion_streamed(gateway: Gateway, model: str) -> str:
    body = {"model": model, "prompt": FRANCE, "stream": True, **GREEDY}
    return "".join(event["choices"][0]["text"] for event in events(gateway, "/v1/completions", body))


def completion_of_many(gateway: Gateway, model: str) -> str:
    body = {"model": model, "prompt": ["One two", FRANCE], "n": 2, **GREEDY}
    _, _, first, second = posted(gateway, "/v1/completions", body)["choices"]
    assert first["text"] == second["text"]
    return str(first["text"])


# ---- chats -----------------------------------------------------------------------------------------------------------


def chat(gateway: Gateway, model: str) -> str:
    body = {"model": model, "messages": ASKED, **GREEDY}
    return str(posted(gateway, "/v1/chat/completions", body)["choices"][0]["message"]["content"])


def chat_streamed(gateway: Gateway, model: str) -> str:
    body = {"model": model, "messages": ASKED, "stream": True, **GREEDY}
    told = events(gateway, "/v1/chat/completions", body)
    return "".join(event["choices"][0]["delta"].get("content", "") for event in told)


def inference_chat(gateway: Gateway, model: str) -> str:
    body = {"model": model, "messages": ASKED, "parameters": GREEDY}
    return str(posted(gateway, "/inference", body)["generated_text"])


def inference_instruct(gateway: Gateway, model: str) -> str:
    body = {"model": model, "prompt": ASKED[0]["content"], "mode": "instruct", "parameters": GREEDY}
    return str(posted(gateway, "/inference", body)["generated_text"])


def inference_chat_streamed(gateway: Gateway, model: str) -> str:
    body = {"model": model, "messages": ASKED, "parameters": GREEDY, "stream": True}
    return str(events(gateway, "/inference", body)[-1]["generated_text"])


Address = Callable[[Gateway, str], str]
COMPLETIONS: list[Address] = [
    generate,
    generate_stream,
    inference,
    inference_streamed,
    autotrain,
    autotrain_greedy,
    llm_service,
    api_server,
    completion,
    completion_streamed,
    completion_of_many,
]
CHATS: list[Address] = [chat, chat_streamed, inference_chat, inference_instruct, inference_chat_streamed]


@pytest.mark.parametrize("model", [pytest.param("embedded", marks=pytest.mark.embedded), "double"])
@pytest.mark.parametrize("addresses", [COMPLETIONS, CHATS], ids=["completions", "chats"])
def test_all_addresses_of_one_shape_give_one_text(gateway: Gateway, addresses: list[Address], model: str) -> None:
    texts = {address.__name__: address(gateway, model) for address in addresses}

    assert len(set(texts.values())) == 1, texts
    assert len(next(iter(texts.values()))) > 10
