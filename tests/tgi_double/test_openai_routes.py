from __future__ import annotations

import json
from typing import Any

import httpx

from tests.tgi_double.process import Double
from tests.tgi_double.schemas import problems

Json = dict[str, Any]
HELLO = [{"role": "user", "content": "hello"}]
ENDS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "say good"}]
"""A conversation whose last message is continued, and the continuation ends by itself."""


def events(client: httpx.Client, path: str, body: Json) -> list[Json]:
    """Return what a stream said before its `[DONE]`."""
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        lines = b"".join(answer.iter_raw()).decode().removesuffix("\n\n").split("\n\n")
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def chat(client: httpx.Client, **body: Any) -> Json:
    answer = client.post("/v1/chat/completions", json={"messages": ENDS, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    found: Json = answer.json()
    assert problems(found, "ChatCompletion") == []
    return found


def test_chat_continues_the_assistant_and_counts_its_tokens(client: httpx.Client) -> None:
    answer = chat(client)
    assert answer["id"] == ""
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": " bye."}, "logprobs": None, "finish_reason": "stop"}
    ]
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 3


def test_the_model_is_echoed_unless_it_is_tgi(client: httpx.Client) -> None:
    assert chat(client)["model"] == "org/toy"
    assert chat(client, model="tgi")["model"] == "org/toy"
    assert chat(client, model="alias")["model"] == "alias"


def test_reasons_are_tgis(client: httpx.Client) -> None:
    def reason(**body: Any) -> str:
        return str(chat(client, **body)["choices"][0]["finish_reason"])

    assert reason() == "stop"
    assert reason(max_tokens=1) == "length"
    assert reason(stop=[" bye"]) == "stop_sequence"
    assert chat(client, stop=[" bye"])["choices"][0]["message"]["content"] == " bye"


def test_logprobs_come_with_their_alternatives(client: httpx.Client) -> None:
    content = chat(client, logprobs=True, top_logprobs=5, max_tokens=1)["choices"][0]["logprobs"]["content"]
    assert len(content) == 1
    assert content[0]["token"] == content[0]["top_logprobs"][0]["token"]
    assert len(content[0]["top_logprobs"]) >= 5


def test_a_chat_stream_has_a_role_in_every_delta_and_a_reason_in_the_last(client: httpx.Client) -> None:
    chunks = events(client, "/v1/chat/completions", {"messages": ENDS, "temperature": 0})
    assert all(problems(chunk, "ChatCompletionChunk") == [] for chunk in chunks)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": text} for text in (" bye", ".", "")
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert all(chunk["usage"] is None for chunk in chunks)


def test_usage_comes_in_a_chunk_of_its_own_if_asked_for(client: httpx.Client) -> None:
    body = {"messages": ENDS, "temperature": 0, "stream_options": {"include_usage": True}}
    *earlier, last = events(client, "/v1/chat/completions", body)
    assert all(chunk["usage"] is None for chunk in earlier)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3


def test_errors_in_streams_lose_their_type_and_are_always_422(client: httpx.Client) -> None:
    expected = {
        "error": {"message": "Input validation error: `top_p` must be > 0.0 and < 1.0", "http_status_code": 422}
    }
    assert events(client, "/v1/chat/completions", {"messages": HELLO, "top_p": 1.0}) == [expected]
    assert events(client, "/v1/completions", {"prompt": "hello", "top_p": 1.0}) == [expected]
    with Double(overloaded=True) as busy, httpx.Client(base_url=busy.url) as asking:
        overloaded = {"error": {"message": "Model is overloaded", "http_status_code": 422}}
        assert events(asking, "/v1/chat/completions", {"messages": HELLO}) == [overloaded]


def test_a_presence_penalty_becomes_a_strong_repetition_penalty(client: httpx.Client) -> None:
    body = {"messages": HELLO, "presence_penalty": -2.0}
    assert "repetition_penalty" in client.post("/v1/chat/completions", json=body).json()["error"]
    again = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "go round and"}]
    plain, penalized = (chat(client, messages=again, max_tokens=12, **more) for more in ({}, {"presence_penalty": 0.0}))
    assert plain["choices"] != penalized["choices"]


def test_what_tgi_refuses_before_a_stream(client: httpx.Client) -> None:
    grammar = {"type": "json", "value": {"properties": {}}}
    for path, body, kind in (
        ("/v1/chat/completions", {"messages": HELLO, "response_format": grammar, "tools": []}, "tool_error"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix not supported"),
        ("/v1/completions", {"prompt": ["a"] * 5}, "batch size exceeded"),
    ):
        answer = client.post(path, json={**body, "stream": True})
        assert (answer.status_code, answer.json()["error_type"]) == (422, kind)


def test_a_model_without_a_chat_template_says_so() -> None:
    with Double(no_template=True) as base, httpx.Client(base_url=base.url) as client:
        answer = client.post("/v1/chat/completions", json={"messages": HELLO, "stream": True})
        assert (answer.status_code, answer.json()["error_type"]) == (422, "template_error")
        assert client.post("/generate", json={"inputs": "say good", "parameters": {}}).status_code == 200


def test_content_is_a_text_or_parts_and_a_stop_text_alone_is_unreadable(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
    body: Json = {"messages": [{"role": "user", "content": parts}]}
    assert "a ![](http://x/y.png)" in client.post("/chat_tokenize", json=body).json()["templated_text"]
    for broken in ({"messages": HELLO, "stop": "x"}, {"messages": [{"role": "user"}]}, {}):
        answer = client.post("/v1/chat/completions", json=broken)
        assert answer.status_code == 422
        assert answer.headers["content-type"].startswith("text/plain")


def test_chat_tokenize_shows_the_template(client: httpx.Client) -> None:
    body = client.post("/chat_tokenize", json={"messages": HELLO}).json()
    assert problems(body, "ChatTokenizeResponse") == []
    assert body["templated_text"] == "user: hello\nassistant:"


def test_completions_answer_every_prompt_under_its_index(client: httpx.Client) -> None:
    body = {"prompt": ["Once upon a", "say good"], "temperature": 0, "max_tokens": 4}
    answer = client.post("/v1/completions", json=body)
    found = answer.json()
    assert problems(found, "CompletionFinal") == []
    assert {choice["index"]: (choice["text"], choice["finish_reason"]) for choice in found["choices"]} == {
        0: (" time there was a", "length"),
        1: (" bye.", "stop"),
    }
    assert found["usage"]["completion_tokens"] == 7
    assert answer.headers["x-generated-tokens"] == "7"
    assert "x-compute-time" not in answer.headers


def test_a_completion_stream_has_empty_reasons_raw_last_ones_and_leaks_the_end_token(client: httpx.Client) -> None:
    chunks = events(client, "/v1/completions", {"prompt": ["say good", "say good"], "temperature": 0})
    for index in (0, 1):
        mine = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [chunk["choices"][0]["text"] for chunk in mine] == [" bye", ".", "</s>"]
        assert [chunk["choices"][0]["finish_reason"] for chunk in mine] == ["", "", "eos_token"]
        assert all(problems(chunk, "Chunk") == [] for chunk in mine[:-1])
        assert problems(mine[-1], "CompletionFinal") == []
        assert mine[-1]["usage"]["completion_tokens"] == 3
