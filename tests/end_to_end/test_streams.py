"""Streams as contract section 5 wants them, at every address: whole characters, and words when they fail midway.

When the status goes out, and the comments while nothing comes, are shown in virtual time (tests/test_writers.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.end_to_end.addresses import ADDRESSES, DONE, STREAMS, Address, Caller, Json, events_of, models_at
from tests.end_to_end.gateway import Gateway, serving
from tests.numbered_server import EVENTS
from tests.scripted_server import HEAD, Conversation, scripted
from tests.tgi_double.process import Double

at_every_address = pytest.mark.parametrize("address", ADDRESSES, ids=lambda address: address.name)
in_every_stream = pytest.mark.parametrize("address", STREAMS, ids=lambda address: address.name)

DOUBLES: dict[str, Json] = {
    "well": {},
    "cuts-at-once": {"cuts_after_tokens": 0},
    "cuts": {"cuts_after_tokens": 3},
    "hangs": {"hangs_after_tokens": 3, "keep_alive_s": 0.05},
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with ExitStack() as stack:
        models: dict[str, Json] = {}
        for name, mood in DOUBLES.items():
            double = stack.enter_context(Double("--max-top-n-tokens", "50", **mood))
            models[name] = {"engine": "tgi", "hf_name": name, "runtime": "external", "url": double.url}
        models["hangs"]["generation_timeout"] = "500ms"
        yield stack.enter_context(serving(tmp_path_factory.mktemp("streams"), **models))


class Answer:
    """A whole answer as it came over the wire, of which no chunk may end within a character."""

    def __init__(self, port: int, request: bytes) -> None:
        caller = Caller(port, request)
        caller.hear_all()
        caller.close()
        head, _, body = caller.heard.partition(b"\r\n\r\n")
        self.status = int(head.split(b" ")[1])
        chunks = chunks_of(body) if b"transfer-encoding: chunked" in head.lower() else [body]
        self.body = "".join(chunk.decode() for chunk in chunks)


def chunks_of(body: bytes) -> Iterator[bytes]:
    """Yield the chunks of a body that must end as HTTP wants it."""
    while body:
        size, _, rest = body.partition(b"\r\n")
        yield rest[: int(size, 16)]
        assert rest[int(size, 16) :].startswith(b"\r\n")
        body = rest[int(size, 16) + 2 :]
        if int(size, 16) == 0:
            assert body == b""
            return
    raise AssertionError("the body has no end")


def ask(gateway: Gateway, address: Address, model: str, prompt: str = "go round and", tokens: int = 40) -> Answer:
    return Answer(gateway.port, address.request(model, prompt, tokens, Connection="close"))


# ---- characters ------------------------------------------------------------------------------------------------------


@at_every_address
def test_a_character_that_is_several_tokens_comes_whole(gateway: Gateway, address: Address) -> None:
    answer = ask(gateway, address, "well", prompt="a cup of")

    assert address.text_of(answer.body) == " ☕ at the café with 🙂 and paid."


EMOJI = ("🙂", " 👩‍👩‍👧", "é", "𝄞", "\U0001f1eb\U0001f1f7", " done")


@pytest.mark.parametrize("model", ["by-tgi", "by-openai"])
def test_however_the_engines_bytes_are_cut_no_character_is(tmp_path: Path, model: str) -> None:
    async def byte_by_byte(conversation: Conversation) -> None:
        event = EVENTS[conversation.head.split(b" ", 2)[1].decode()]
        told = [event(text, number, number == len(EMOJI), 0) for number, text in enumerate(EMOJI, 1)]
        said = b"".join(b"data: " + json.dumps(each, ensure_ascii=False).encode() + b"\n\n" for each in told)
        await conversation.say(HEAD)
        for byte in said:
            await conversation.say(bytes([byte]))
            await asyncio.sleep(0)

    def heard(url: str) -> list[Answer]:
        with serving(tmp_path, **models_at(url)) as gateway:
            return [ask(gateway, address, model, tokens=len(EMOJI)) for address in STREAMS]

    async def scene() -> list[Answer]:
        async with scripted(byte_by_byte) as (_, port):
            return await asyncio.to_thread(heard, f"http://127.0.0.1:{port}")

    for address, answer in zip(STREAMS, asyncio.run(scene()), strict=True):
        pieces = [address.text(event) for event in events_of(answer.body)]
        assert [piece for piece in pieces if piece] == list(EMOJI)


# ---- failures --------------------------------------------------------------------------------------------------------


@in_every_stream
@pytest.mark.parametrize(("model", "code"), [("cuts", "GENERATION_FAILED"), ("hangs", "GENERATION_TIMEOUT")])
def test_what_fails_midway_ends_with_one_event_that_says_so(
    gateway: Gateway, address: Address, model: str, code: str
) -> None:
    answer = ask(gateway, address, model)
    *good, bad = events_of(answer.body)

    assert answer.status == 200
    assert "".join(map(address.text, good)) == " round and round"
    assert address.code(bad) == code
    assert not any(address.final(event) for event in [*good, bad])
    assert DONE not in answer.body
    assert not [line for line in answer.body.split("\n") if line.startswith(":")]  # the engine's own comments


@at_every_address
def test_what_fails_before_the_first_token_has_a_status_of_its_own(gateway: Gateway, address: Address) -> None:
    answer = ask(gateway, address, "cuts-at-once")

    assert answer.status == 502
    assert address.code(json.loads(answer.body)) == "UPSTREAM_FAILED"


@pytest.mark.parametrize(
    "address", [address for address in ADDRESSES if not address.streams], ids=lambda address: address.name
)
@pytest.mark.parametrize(("model", "code"), [("cuts", "GENERATION_FAILED"), ("hangs", "GENERATION_TIMEOUT")])
def test_half_an_answer_is_none_where_it_is_not_streamed(
    gateway: Gateway, address: Address, model: str, code: str
) -> None:
    answer = ask(gateway, address, model)

    assert answer.status >= 500
    assert address.code(json.loads(answer.body)) == code
