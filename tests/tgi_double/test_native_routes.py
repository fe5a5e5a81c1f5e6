from __future__ import annotations

import json
import math
from typing import Any

import httpx
import pytest

from tests.tgi_double.model import SIZE
from tests.tgi_double.process import Double
from tests.tgi_double.schemas import problems

Json = dict[str, Any]


def frames(client: httpx.Client, path: str, body: Json) -> list[Json]:
    """Return the events of a stream, each of which must look exactly as TGI's do."""
    with client.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        text = b"".join(answer.iter_raw()).decode()
    assert text.endswith("\n\n")
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def generated(client: httpx.Client, inputs: str, **parameters: Any) -> Json:
    answer = client.post("/generate", json={"inputs": inputs, "parameters": {"max_new_tokens": 8, **parameters}})
    assert answer.status_code == 200, answer.text
    body: Json = answer.json()
    assert problems(body, "GenerateResponse") == []
    return body


def test_generate_answers_the_text_alone_unless_details_are_asked_for(client: httpx.Client) -> None:
    assert generated(client, "Once upon a") == {"generated_text": " time there was a small model that lived"}


def test_details_have_tokens_and_no_prefill_and_a_seed_only_if_sampled(client: httpx.Client) -> None:
    details = generated(client, "say good", details=True)["details"]
    assert details["finish_reason"] == "eos_token"
    assert details["generated_tokens"] == 3
    assert details["seed"] is None
    assert details["prefill"] == []
    assert "top_tokens" not in details
    assert "best_of_sequences" not in details
    assert details["tokens"][-1] | {"logprob": 0} == {"id": 2, "text": "</s>", "logprob": 0, "special": True}
    sampled = generated(client, "say good", details=True, do_sample=True, seed=2**64 - 1)["details"]
    assert sampled["seed"] == 2**64 - 1


def test_without_parameters_it_samples_and_with_empty_ones_it_does_not(client: httpx.Client) -> None:
    def body(**parameters: Any) -> str:
        return str(client.post("/generate", json={"inputs": "say good", **parameters}).json()["generated_text"])

    assert len({body(parameters={}) for _ in range(3)}) == 1
    assert len({client.post("/generate", json={"inputs": "The"}).text for _ in range(3)}) > 1


def test_top_tokens_are_sorted_probabilities_of_the_whole_vocabulary(client: httpx.Client) -> None:
    position = generated(client, "Paris is the", max_new_tokens=1, details=True, top_n_tokens=50)["details"]
    chances = position["top_tokens"][0]
    logprobs = [chance["logprob"] for chance in chances]
    assert 50 <= len(chances) <= SIZE
    assert logprobs == sorted(logprobs, reverse=True)
    assert 0.9 < math.fsum(map(math.exp, logprobs)) <= 1.000001
    assert chances[0] == position["tokens"][0]


def test_a_filter_leaves_fewer_than_asked_for(client: httpx.Client) -> None:
    details = generated(client, "The", max_new_tokens=1, details=True, top_n_tokens=50, top_k=2, seed=1)["details"]
    assert 2 <= len(details["top_tokens"][0]) < 50


def test_the_prompts_tokens_are_told_only_by_a_server_that_was_told_to(client: httpx.Client) -> None:
    assert generated(client, "The cat", decoder_input_details=True)["details"]["prefill"] == []
    with Double("--enable-prefill-logprobs") as telling, httpx.Client(base_url=telling.url) as asking:
        prefill = generated(asking, "The cat", decoder_input_details=True)["details"]["prefill"]
    assert [token["text"] for token in prefill] == ["The", " cat"]
    assert prefill[0]["logprob"] is None
    assert prefill[1]["logprob"] < 0


def test_the_best_of_several_is_the_answer_and_the_others_are_told(client: httpx.Client) -> None:
    details = generated(client, "The", best_of=2, do_sample=True, details=True)["details"]
    assert len(details["best_of_sequences"]) == 1


def test_root_answers_a_list_of_one_with_the_prompt_before_the_text(client: httpx.Client) -> None:
    body = {"inputs": "say good", "parameters": {}}
    assert client.post("/", json=body).json() == [{"generated_text": "say good bye."}]
    body["parameters"] = {"return_full_text": False}
    assert client.post("/", json=body).json() == [{"generated_text": " bye."}]
    assert frames(client, "/", {**body, "stream": True})[-1]["generated_text"] == " bye."


def test_a_stream_has_one_token_an_event_and_the_text_in_the_last(client: httpx.Client) -> None:
    body = {"inputs": "say good", "parameters": {"details": True, "top_n_tokens": 2, "max_new_tokens": 9}}
    events = frames(client, "/generate_stream", body)
    assert [event["index"] for event in events] == [1, 2, 3]
    assert all(problems(event, "StreamResponse") == [] for event in events)
    assert [list(event) for event in events] == [["index", "token", "top_tokens", "generated_text", "details"]] * 3
    assert [event["generated_text"] for event in events] == [None, None, " bye."]
    assert events[0]["details"] is None
    assert events[-1]["details"] == {
        "finish_reason": "eos_token",
        "generated_tokens": 3,
        "seed": None,
        "input_length": len(client.post("/tokenize", json={"inputs": "say good"}).json()),
    }


def test_the_last_event_has_details_only_if_asked_for_and_no_empty_top_tokens(client: httpx.Client) -> None:
    last = frames(client, "/generate_stream", {"inputs": "say good", "parameters": {}})[-1]
    assert last["details"] is None
    assert "top_tokens" not in last


def test_streamed_and_whole_text_are_the_same_also_with_characters_of_several_bytes(client: httpx.Client) -> None:
    parameters = {"max_new_tokens": 20}
    events = frames(client, "/generate_stream", {"inputs": "a cup of", "parameters": parameters})
    texts = [event["token"]["text"] for event in events if not event["token"]["special"]]
    assert (
        "".join(texts) == events[-1]["generated_text"] == generated(client, "a cup of", **parameters)["generated_text"]
    )
    assert "☕" in texts


def test_a_stream_reports_errors_with_status_200(client: httpx.Client) -> None:
    for parameters, words in (
        ({"temperature": 0.0}, "`temperature` must be strictly positive"),
        ({"best_of": 2}, "`best_of` != 1 is not supported when streaming tokens"),
        ({"decoder_input_details": True}, "`decoder_input_details` == true is not supported when streaming tokens"),
    ):
        events = frames(client, "/generate_stream", {"inputs": "The", "parameters": parameters})
        assert events == [{"error": f"Input validation error: {words}", "error_type": "validation"}]


def test_more_than_a_chunk_is_rounded_up(client: httpx.Client) -> None:
    assert generated(client, "go round and", max_new_tokens=1100, details=True)["details"]["generated_tokens"] == 2048


def test_truncate_keeps_the_end_of_the_prompt(client: httpx.Client) -> None:
    body = {"inputs": "Once upon a time, say good", "parameters": {"truncate": 2, "max_new_tokens": 5}}
    answer = client.post("/generate", json=body)
    assert answer.headers["x-prompt-tokens"] == "2"
    assert answer.json()["generated_text"] == " bye."


def test_headers_tell_the_time_in_milliseconds_and_count_tokens(client: httpx.Client) -> None:
    headers = client.post("/generate", json={"inputs": "say good", "parameters": {}}).headers
    for name in ("total", "validation", "queue", "inference"):
        assert headers[f"x-{name}-time"].isdigit()
    assert headers["x-time-per-token"].isdigit()
    assert float(headers["x-compute-time"]) < 20
    assert headers["x-compute-characters"] == "8"
    assert headers["x-generated-tokens"] == "3"
    assert headers["x-compute-type"] == "gpu+optimized"
    assert not any(name.startswith("x-") for name in client.post("/generate", json={"inputs": ""}).headers)


def test_tokenize_answers_places_in_bytes(client: httpx.Client) -> None:
    pieces = client.post("/tokenize", json={"inputs": "é The"}).json()
    assert problems(pieces, "TokenizeResponse") == []
    assert [(piece["start"], piece["stop"]) for piece in pieces[:2]] == [(0, 1), (1, 2)]
    assert pieces[-1]["stop"] == len("é The".encode())


def test_info_and_models_describe_the_server(client: httpx.Client, double: Double) -> None:
    info = client.get("/info").json()
    assert problems(info, "Info") == []
    assert info["model_id"] == "org/toy"
    assert info["max_total_tokens"] == 4096
    assert info["max_input_tokens"] == 4095
    listed = client.get("/v1/models").json()
    assert listed == {
        "object": "list",
        "data": [{"id": "org/toy", "object": "model", "created": 0, "owned_by": "org/toy"}],
    }
    assert problems(listed["data"][0], "ModelInfo") == []


@pytest.mark.parametrize("path", ["/", "/health", "/ping"])
def test_health_is_200_without_a_body(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.content) == (200, b"")


def test_metrics_appear_with_their_first_use_and_count_openai_calls_twice() -> None:
    with Double() as fresh, httpx.Client(base_url=fresh.url) as client:
        assert client.get("/metrics").text == ""
        client.post("/generate", json={"inputs": "say good", "parameters": {}})
        client.post("/v1/completions", json={"prompt": "say good", "temperature": 0})
        client.post("/generate", json={"inputs": ""})
        page = client.get("/metrics").text.splitlines()
    assert "tgi_request_count 4" in page
    assert "tgi_request_success 2" in page
    assert 'tgi_request_failure{err="validation"} 1' in page
    assert "tgi_batch_current_size 0" in page
    assert "tgi_request_generated_tokens_sum 6" in page


def test_sagemaker_takes_all_three_bodies_and_says_if_it_is_none(client: httpx.Client) -> None:
    assert client.post("/invocations", json={"inputs": "say good", "parameters": {}}).json()[0]["generated_text"]
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    assert client.post("/invocations", json=chat).json()["object"] == "chat.completion"
    assert client.post("/invocations", json={"prompt": "hello", "max_tokens": 3}).json()["object"] == "text_completion"
    answer = client.post("/invocations", json={"text": "hello"})
    assert answer.status_code == 422
    assert "did not match any variant" in answer.text


def test_vertex_answers_predictions_and_every_failure_is_a_500(client: httpx.Client) -> None:
    instance = {"inputs": "The", "parameters": {"max_new_tokens": 3, "seed": 1}}
    assert len(client.post("/vertex", json={"instances": [instance, instance]}).json()["predictions"]) == 2
    failed = client.post("/vertex", json={"instances": [{"inputs": ""}]})
    assert (failed.status_code, failed.json()["error_type"]) == (500, "Incomplete generation")


def test_unknown_paths_and_wrong_methods_have_empty_answers(client: httpx.Client) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/generate", 405), ("POST", "/info", 405)):
        answer = client.request(method, path)
        assert (answer.status_code, answer.content) == (status, b"")


def test_a_key_is_asked_for_where_tgi_does_and_compared_without_regard_to_case() -> None:
    with Double("--api-key", "Secret") as locked, httpx.Client(base_url=locked.url) as client:
        body = {"inputs": "say good", "parameters": {"max_new_tokens": 1}}
        refused = client.post("/generate", json=body)
        assert (refused.status_code, refused.content) == (401, b"")
        assert client.post("/", json=body).status_code == 401
        assert client.post("/generate", json=body, headers={"Authorization": "bearer sECRET"}).status_code == 200
        for path in ("/", "/health", "/info", "/metrics", "/v1/models"):
            assert client.get(path).status_code == 200
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        assert client.post("/chat_tokenize", json=chat).status_code == 200
