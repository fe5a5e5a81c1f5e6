"""TGI's older client, text_generation, as its users run it, on every engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.end_to_end.gateway import EMBEDDED, Gateway, serving
from tests.end_to_end.test_external import tgi
from tests.tgi_double.process import Double

WHY_NOT = "pip install text-generation: it is not among the tests' packages, as it needs a huggingface_hub below 1"
text_generation = pytest.importorskip("text_generation", reason=WHY_NOT)
PROMPT = "The capital of France is"
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
"""It is of the time of pydantic 1."""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with (
        Double() as double,
        serving(
            tmp_path_factory.mktemp("older"),
            through=tgi(double.url),
            translated=tgi(double.url, hf_name="org/other", overrides={"return_full_text": False}),
            embedded=EMBEDDED,
        ) as running,
    ):
        yield running


@pytest.fixture(params=["through", "translated", "embedded"])
def client(request: pytest.FixtureRequest, gateway: Gateway) -> Any:
    return text_generation.Client(f"{gateway.url}/models/{request.param}/tgi", timeout=60)


def test_it_generates_and_streams(client: Any) -> None:
    told = client.generate(PROMPT, max_new_tokens=6)
    frames = list(client.generate_stream(PROMPT, max_new_tokens=6))

    assert told.details.generated_tokens == len(told.details.tokens)
    assert frames[-1].generated_text == told.generated_text
    assert "".join(frame.token.text for frame in frames if not frame.token.special) == told.generated_text


def test_it_knows_what_is_wrong(client: Any) -> None:
    rule = "`max_new_tokens` must be strictly positive"

    with pytest.raises(text_generation.errors.ValidationError, match=rule):
        client.generate(PROMPT, max_new_tokens=0)
    with pytest.raises(text_generation.errors.ValidationError, match=rule):
        list(client.generate_stream(PROMPT, max_new_tokens=0))


def test_it_chats(client: Any) -> None:
    answer = client.chat([{"role": "user", "content": "Hi"}], max_tokens=4)

    assert answer.choices[0].message.content
