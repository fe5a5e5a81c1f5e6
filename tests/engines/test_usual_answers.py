"""What nearly every answer consists of is read in a hurry: with the same result as everything else is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.engines import openai_answers, tgi_answers
from gateway.engines.base import Decoder
from gateway.engines.lines import EventLines
from gateway.engines.protocol import each_json_in, json_in, written
from gateway.engines.stops import StopTexts
from gateway.errors import GatewayError
from gateway.generation import Finished, GenerationRequest, TokenEvent

NEVER = "\x00"
"""Is in no answer here: to look for it as a stop text is what sends every token the long way."""
Events = list[TokenEvent | Finished]


# ---- lines and their JSON ----


def lines_of(stream: bytes) -> list[tuple[bytes, bytes]]:
    """Return the lines in the plainest way."""
    cut = [line.partition(b":") for line in stream.split(b"\n")[:-1]]
    return [(field.strip(), value.strip()) for field, _, value in cut if field.strip()]


PARTS = st.sampled_from(
    [
        *(b'data: {"a": 1}\n\n', b'data:{"a":1}\n\n', b"data: [DONE]\n\n", b"data:\n\n", b"data:\n", b"data: 1", b"\n"),
        *(
            b"event: x\n",
            b": comment\n\n",
            b"data\n",
            b" data : 2 \n\n",
            b"data: 3\r\n\r\n",
            b"\n\ndata:",
            b"data:4\x0b\n\n",
        ),
        *(b"", b"d", b"ata:", b"id:5\n", b"data: a\rb\n\n", b"data:data:\n\n"),
    ]
)


@given(st.lists(st.lists(PARTS, max_size=4).map(b"".join) | st.binary(max_size=4), max_size=6))
@example([b"data: 1\n\ndata: 2\n\n"])
@example([b"data: 1\nid: 7\n\ndata: 2\n\n"])
def test_lines_are_those_of_the_plainest_way(chunks: list[bytes]) -> None:
    found, values = EventLines(), EventLines()
    wanted = lines_of(b"".join(chunks))

    assert [line for chunk in chunks for line in found.feed(chunk)] == wanted
    assert [value.strip() for chunk in chunks for value in values.data(chunk)] == [
        value for field, value in wanted if field == b"data"
    ]


JSON_LINES = st.sampled_from(
    [
        *(b'{"a": 1}', b' {"a":[1]}\r', b'{"a":1}\x0b', b'"\\ud800"', b"\xff", b"", b"1,2", b"[1", b"2]", b"[DONE]"),
        *(b'{"a":1},{"b":2}', b'{"c":[{}', b"{}]}", b'{"c":"}', b'{"}', b"null"),
    ]
)


@given(st.lists(JSON_LINES, max_size=5))
@example([b'{"a":1},{"b":1}', b'{"c":[{}', b"{}]}"])
def test_each_line_is_json_by_itself_and_whatever_is_behind_a_bad_one_is_not_looked_at(values: list[bytes]) -> None:
    def read() -> Any:
        for value in values:
            yield json_in(value.strip())

    assert taken_of(lambda: each_json_in(values)) == taken_of(read)


def taken_of(read: Callable[[], Any]) -> tuple[list[Any], bool]:
    """Return what was read, and whether all was."""
    taken: list[Any] = []
    try:
        for each in read():
            taken.append(each)  # noqa: PERF402 - up to the one that fails
    except (ValueError, RecursionError):
        return taken, False
    return taken, True


# ---- tokens ----


def line(frame: Any) -> bytes:
    return b"data:" + (frame if isinstance(frame, bytes) else json.dumps(frame).encode()) + b"\n\n"


def heard(decoder: Decoder, chunks: list[bytes]) -> tuple[Events, str]:
    """Return the events, and how it failed if it did."""
    events: Events = []
    try:
        for chunk in chunks:
            events += decoder.feed(chunk)
    except GatewayError as error:
        return events, repr(error.detail)
    return events, ""


def ask(**more: Any) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "Hi", "max_new_tokens": 3, "temperature": 0.0, **more})


TEXTS = st.text(st.characters(exclude_characters=NEVER), max_size=3)
NUMBERS = st.floats() | st.sampled_from([0, -1, 10**30, float("inf"), float("nan")])
ODD = st.none() | st.booleans() | NUMBERS | st.sampled_from(["", "a", "error", [], [1], {}, {"a": 1}])
USUAL: dict[str, Any] = {"id": 5, "text": " word", "logprob": -0.5, "special": False}
DETAILS = st.fixed_dictionaries({"finish_reason": st.sampled_from(["length", "eos_token", "odd"]), "input_length": ODD})
USUAL_FRAMES = st.builds(lambda text: {"token": {**USUAL, "text": text}, "generated_text": None}, TEXTS)
TGI_FRAMES = (
    st.builds(lambda name, odd: {"token": {**USUAL, name: odd}}, st.sampled_from([*USUAL, "more"]), ODD)
    | st.builds(
        lambda name: {"token": {key: said for key, said in USUAL.items() if key != name}}, st.sampled_from([*USUAL])
    )
    | st.builds(
        lambda name, odd: {"token": USUAL, name: odd},
        st.sampled_from(["token", "top_tokens", "generated_text", "details", "error"]),
        ODD,
    )
    | st.builds(lambda details: {"token": USUAL, "generated_text": "a", "details": details}, DETAILS)
    | st.just({"token": USUAL, "top_tokens": [{"id": 1, "text": "a", "logprob": -0.5}]})
)
ODD_FRAMES = st.sampled_from(
    [
        b"[]",
        b"1",
        b"null",
        b'"error"',
        b'["error"]',
        b"{}",
        b"{",
        b"1,2",
        b"[DONE]",
        b'{"error": "a", "error_type": "x"}',
    ]
)


@settings(derandomize=True)
@given(
    st.lists(USUAL_FRAMES | TGI_FRAMES | ODD_FRAMES, min_size=1, max_size=6),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([0, 1]),
)
@example([{"token": {**USUAL, "text": None}}], None, 0)
def test_tgis_tokens_are_the_same_in_a_hurry_and_not(frames: list[Any], most: int | None, top: int) -> None:
    asked = {"max_new_tokens": most, "top_tokens": top}
    chunks = [line(frame) for frame in frames]
    in_a_hurry = tgi_answers.StreamDecoder(ask(**asked))
    not_so = tgi_answers.StreamDecoder(ask(**asked, stop=(NEVER,)))

    assert repr(heard(in_a_hurry, chunks)) == repr(heard(not_so, chunks))


CHOICE: dict[str, Any] = {"text": " word", "logprobs": None, "finish_reason": None}
TEXT_ALONE = st.builds(lambda text: {"choices": [{**CHOICE, "text": text}]}, TEXTS)
REPORTED = {"tokens": ["a", "b"], "token_logprobs": [-0.5, -1.5]}
COMPLETIONS = (
    st.builds(lambda name, odd: {"choices": [{**CHOICE, name: odd}]}, st.sampled_from([*CHOICE, "more"]), ODD)
    | st.builds(lambda name, odd: {"choices": [CHOICE], name: odd}, st.sampled_from(["choices", "usage", "error"]), ODD)
    | st.builds(lambda reason: {"choices": [{**CHOICE, "finish_reason": reason}]}, st.sampled_from(["stop", "abort"]))
    | st.sampled_from(
        [
            {"choices": [CHOICE, CHOICE]},
            {"choices": [{**CHOICE, "logprobs": REPORTED}]},
            {"choices": [CHOICE], "usage": {"completion_tokens": 9, "prompt_tokens": 7}},
            {"choices": [CHOICE], "object": "error"},
            b"[DONE]",
        ]
    )
)


@settings(derandomize=True)
@given(st.lists(TEXT_ALONE | COMPLETIONS | ODD_FRAMES, min_size=1, max_size=6), st.booleans())
@example(
    [{"choices": [{**CHOICE, "finish_reason": "stop"}]}, {"choices": [CHOICE], "usage": {"prompt_tokens": 7}}], False
)
def test_an_openai_servers_texts_are_the_same_in_a_hurry_and_not(frames: list[Any], counts: bool) -> None:
    # `keep_stop`: the server is told of no stop text in either case, so that its word `stop` means the same
    asked = {"count_prompt": counts, "keep_stop": True}
    chunks = [line(frame) for frame in frames]
    in_a_hurry = openai_answers.CompletionDecoder(ask(**asked))
    not_so = openai_answers.CompletionDecoder(ask(**asked, stop=(NEVER,)))

    assert repr(heard(in_a_hurry, chunks)) == repr(heard(not_so, chunks))


DECODERS: dict[str, tuple[Callable[[], Decoder], Any]] = {
    "tgi": (lambda: tgi_answers.StreamDecoder(ask()), USUAL_FRAMES | TGI_FRAMES),
    "openai": (lambda: openai_answers.CompletionDecoder(ask()), TEXT_ALONE | COMPLETIONS),
}


@pytest.mark.parametrize("name", DECODERS)
@settings(derandomize=True)
@given(st.data())
def test_events_in_one_chunk_are_read_as_those_that_come_one_by_one(name: str, data: st.DataObject) -> None:
    make, frames = DECODERS[name]
    chunks = [line(frame) for frame in data.draw(st.lists(frames | ODD_FRAMES, min_size=1, max_size=6))]
    events, failed = heard(make(), chunks)

    assert repr(heard(make(), [b"".join(chunks)])) == repr(([] if failed else events, failed))


JUNK = b"data: {no JSON\n\ndata: [\n\n"


def test_what_follows_the_end_of_an_answer_may_be_anything() -> None:
    *tokens, end = tgi_answers.StreamDecoder(ask()).feed(line({"token": USUAL}) * 3 + JUNK)

    assert tokens == [TokenEvent(5, " word", -0.5, token=" word")] * 3
    assert end == Finished("length", 3, 0)

    stream = (
        line({"choices": [CHOICE]}) + line({"choices": [{"text": "", "finish_reason": "length"}]}) + line(b"[DONE]")
    )
    assert openai_answers.CompletionDecoder(ask()).feed(stream + JUNK) == [
        TokenEvent(None, " word"),
        Finished("length", 1, 0),
    ]


def test_an_error_is_one_whatever_else_is_in_its_event() -> None:
    assert heard(openai_answers.CompletionDecoder(ask()), [line({"choices": [CHOICE], "object": "error"})])[1]


# ---- stop texts ----


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.text("ab", max_size=6))
def test_what_is_held_back_is_the_longest_end_that_begins_a_stop_text(stops: list[str], text: str) -> None:
    texts = StopTexts(stops)
    passed = texts.feed(text)

    if not texts.found:
        ends = (text[at:] for at in range(len(text) + 1))
        held = next(end for end in ends if any(stop.startswith(end) for stop in stops))
        assert (passed, texts.rest()) == (text.removesuffix(held), held)


# ---- what servers are asked ----

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None, exclude_categories=())),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=3), parts, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(st.characters(codec=None, exclude_categories=()), max_size=3), VALUES, max_size=3))
@example({"inputs": "a\ud800", "seed": 2**70})
@example({"inputs": float("nan")})
def test_a_request_is_the_json_that_json_writes(body: dict[str, Any]) -> None:
    assert json.dumps(json.loads(written(body))) == json.dumps(body)


def test_a_request_may_be_as_deep_as_json_can_be() -> None:
    deep: Any = "a"
    for _ in range(400):
        deep = [deep]

    assert json.loads(written({"schema": deep})) == {"schema": deep}


# ---- the end ----


def test_an_end_is_told_with_how_long_it_took_and_is_else_the_same() -> None:
    end = Finished("stop", 3, 9, "text", "stop", 0.0)

    assert end.timed(1.5) == replace(end, generation_s=1.5)
    assert end.generation_s == 0.0
