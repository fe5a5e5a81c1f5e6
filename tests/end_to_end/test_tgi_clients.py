"""The client that TGI's makers recommend, huggingface_hub, as its users run it, on every engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError

from tests.end_to_end.gateway import EMBEDDED, Gateway, serving
from tests.end_to_end.test_external import tgi
from tests.tgi_double.process import Double

MODELS = ["through", "translated", "embedded"]
PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "Say hello"}]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with (
        Double("--max-top-n-tokens", "50") as double,
        serving(
            tmp_path_factory.mktemp("clients"),
            through=tgi(double.url),
            translated=tgi(double.url, hf_name="org/other", overrides={"return_full_text": False}),
            embedded=EMBEDDED,
        ) as running,
    ):
        yield running


@pytest.fixture(params=MODELS)
def url(request: pytest.FixtureRequest, gateway: Gateway) -> str:
    return f"{gateway.url}/models/{request.param}/tgi"


@pytest.fixture
def hub(url: str) -> Iterator[InferenceClient]:
    with InferenceClient(base_url=url, timeout=60) as client:
        yield client


def test_the_hubs_client_generates_text(hub: InferenceClient) -> None:
    full = hub.text_generation(PROMPT, max_new_tokens=6)
    text = hub.text_generation(PROMPT, max_new_tokens=6, return_full_text=False)

    assert text.strip()
    assert full == PROMPT + text  # it asks at `POST /`, whose default this is


def test_the_hubs_client_is_told_details(hub: InferenceClient) -> None:
    told = hub.text_generation(PROMPT, max_new_tokens=5, details=True, top_n_tokens=2, seed=1, do_sample=True)

    assert told.details is not None
    assert told.details.finish_reason == "length"
    assert told.details.generated_tokens == len(told.details.tokens) == 5
    assert told.details.top_tokens
    assert len(told.details.top_tokens[0]) >= 2


def test_the_hubs_client_streams_and_stops(hub: InferenceClient) -> None:
    frames = list(hub.text_generation(PROMPT, max_new_tokens=12, details=True, stream=True, return_full_text=False))
    words = list(hub.text_generation(PROMPT, max_new_tokens=12, stream=True, return_full_text=False))
    whole = frames[-1].generated_text
    assert whole
    assert frames[-1].details is not None
    assert [frame.index for frame in frames] == list(range(1, len(frames) + 1))
    assert "".join(frame.token.text for frame in frames if not frame.token.special) == whole
    assert "".join(words).startswith(whole)

    stop = whole.split()[0]
    stopped = hub.text_generation(PROMPT, max_new_tokens=12, details=True, stop=[stop], return_full_text=False)
    assert stopped.details is not None
    assert stopped.details.finish_reason == "stop_sequence"
    assert stopped.generated_text.endswith(stop)


@pytest.mark.parametrize("stream", [False, True])
def test_the_hubs_client_knows_what_is_wrong(hub: InferenceClient, stream: bool) -> None:
    with pytest.raises(ValidationError, match="`temperature` must be strictly positive"):
        list(hub.text_generation(PROMPT, temperature=0.0, stream=stream))


def test_the_hubs_client_chats(hub: InferenceClient) -> None:
    answer = hub.chat_completion(MESSAGES, max_tokens=6, temperature=0)
    chunks = list(hub.chat_completion(MESSAGES, max_tokens=6, temperature=0, stream=True))

    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens > 0
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
