"""What a server's answers may hold without harm to the gateway: every decoder and every refusal, in tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.bodies import MOST_TOKENS
from gateway.engines import llamacpp_answers, openai_answers, tgi_answers
from gateway.engines.base import Decoder
from gateway.engines.chat import ChatDecoder, not_understood
from gateway.engines.lines import MOST_LINE_BYTES, EventLines
from gateway.engines.protocol import MOST_UNSEEN, count_in, json_in, unseen
from gateway.engines.text_calls import TextCallDecoder
from gateway.errors import GatewayError, GenerationFailed, PromptTooLong
from gateway.generation import Chat, Finished, GenerationRequest, Message, TokenEvent, Tool

CHAT = Chat((Message("user", ("Hi",)),))
WITH_TOOLS = Chat((Message("user", ("Hi",)),), tools=(Tool("clock"),))
LONE = "\ud800"


def ask(chat: Chat | None = None) -> GenerationRequest:
    return GenerationRequest(prompt="" if chat else "Hi", max_new_tokens=None, temperature=0.0, chat=chat)


def chat_of_tokens() -> ChatDecoder:
    """Return what reads the chats of TGI and llama.cpp, where a chunk is a token."""
    return ChatDecoder(ask(CHAT), lambda frame, begun: not_understood(), chunk_is_token=True)  # noqa: ARG005


DECODERS: dict[str, Callable[[], Decoder]] = {
    "openai": lambda: openai_answers.CompletionDecoder(ask()),
    "openai chat": lambda: openai_answers.chat_decoder(ask(CHAT)),
    "tgi": lambda: tgi_answers.StreamDecoder(ask()),
    "tgi chat": lambda: tgi_answers.chat_decoder(ask(CHAT)),
    "tgi tools": lambda: tgi_answers.chat_decoder(ask(WITH_TOOLS)),
    "llama.cpp": lambda: llamacpp_answers.CompletionDecoder(()),
    "llama.cpp chat": chat_of_tokens,
    "llama.cpp call": lambda: TextCallDecoder(chat_of_tokens()),
}
REFUSALS = {
    "openai": openai_answers.refusal,
    "tgi": tgi_answers.refusal,
    "llama.cpp": llamacpp_answers.refusal,
}
every_decoder = pytest.mark.parametrize("decoder", [pytest.param(make, id=name) for name, make in DECODERS.items()])
every_refusal = pytest.mark.parametrize("refusal", [pytest.param(read, id=name) for name, read in REFUSALS.items()])


def line(frame: Any) -> bytes:
    return b"data: " + (frame if isinstance(frame, bytes) else json.dumps(frame).encode()) + b"\n\n"


def chunk(content: str | None, reason: str | None = None, **more: Any) -> bytes:
    return line({"choices": [{"delta": {"content": content}, "finish_reason": reason}], **more})


def completion(content: str, tokens: Any, *, stop: bool = False) -> bytes:
    end = {"stop_type": "eos"} if stop else {}
    return line(
        {"content": content, "tokens": [1], "stop": stop, "tokens_predicted": tokens, "tokens_evaluated": 3, **end}
    )


# ---- counts ----


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(chunk("a") + chunk(None, "stop", usage={"completion_tokens": 3_000_000}), id="usage"),
        pytest.param(chunk("a", "stop", timings={"predicted_n": 3_000_000}) + line(b"[DONE]"), id="timings"),
    ],
)
def test_a_number_of_a_chat_never_becomes_as_many_events(stream: bytes) -> None:
    *tokens, end = chat_of_tokens().feed(stream)

    assert len(tokens) == 2
    assert isinstance(end, Finished)
    assert end.tokens_generated == 3_000_000


@pytest.mark.parametrize("stop", [True, False])
def test_a_number_of_llama_cpps_own_never_becomes_as_many_events(stop: bool) -> None:
    stream = completion("a", 3_000_000, stop=stop) + (b"" if stop else completion("", 3_000_000, stop=True))
    *tokens, end = llamacpp_answers.CompletionDecoder(()).feed(stream)

    assert len(tokens) == (1 if stop else 2)
    assert isinstance(end, Finished)
    assert end.tokens_generated == 3_000_000


@pytest.mark.parametrize(("tokens", "events"), [(-3, 0), (0, 0), (1, 1), (MOST_UNSEEN, MOST_UNSEEN), (17, 1)])
def test_the_parts_of_a_character_are_told_apart_and_many_tokens_are_not(tokens: int, events: int) -> None:
    assert unseen(tokens) == [TokenEvent(None, "")] * events


@pytest.mark.parametrize(("said", "count"), [(None, 0), (0, 0), (7, 7), (7.0, 7), (MOST_TOKENS, MOST_TOKENS)])
def test_a_count_is_a_whole_number(said: Any, count: int) -> None:
    assert count_in(said) == count


ABSURD = [-1, 1.5, "7", [7], {"a": 1}, MOST_TOKENS + 1, 10**400, float("inf"), float("nan")]


@pytest.mark.parametrize("said", ABSURD)
def test_a_count_that_is_absurd_is_not_the_protocol(said: Any) -> None:
    for decoder, stream in (
        (chat_of_tokens(), chunk("a", "stop", usage={"completion_tokens": said})),
        (chat_of_tokens(), chunk("a", "stop", usage={"completion_tokens": 1, "prompt_tokens": said})),
        (chat_of_tokens(), chunk("a", timings={"predicted_n": said})),
        (llamacpp_answers.CompletionDecoder(()), completion("a", said)),
        (llamacpp_answers.CompletionDecoder(()), completion("a", said, stop=True)),
        (
            openai_answers.CompletionDecoder(ask()),
            line({"choices": [{"text": "a", "finish_reason": "stop"}], "usage": {"completion_tokens": said}}),
        ),
    ):
        with pytest.raises(GenerationFailed, match="that is not"):
            decoder.feed(stream)


# ---- texts ----


TOKEN = {"token": LONE, "logprob": -1.0, "top_logprobs": [{"token": LONE, "logprob": -1.0}]}
CALL = {"index": 0, "id": LONE, "function": {"name": LONE, "arguments": LONE}}


@pytest.mark.parametrize(
    ("name", "frame"),
    [
        ("openai", {"choices": [{"text": LONE}]}),
        ("openai", {"choices": [{"text": LONE, "logprobs": {"content": [TOKEN]}}]}),
        (
            "openai",
            {"choices": [{"text": LONE, "logprobs": {"tokens": [LONE], "top_logprobs": [{LONE: -1.0}]}}]},
        ),
        ("openai chat", {"choices": [{"delta": {"content": LONE}, "logprobs": {"content": [TOKEN]}}]}),
        ("openai chat", {"choices": [{"delta": {"tool_calls": [CALL]}}]}),
        ("tgi", {"token": {"id": 1, "text": LONE, "logprob": -1.0, "special": False}}),
        ("tgi chat", {"choices": [{"delta": {"content": LONE}}]}),
        ("tgi tools", {"choices": [{"delta": {"tool_calls": [CALL]}}]}),
        ("llama.cpp", {"content": LONE, "tokens": [1], "stop": False, "tokens_predicted": 1}),
        ("llama.cpp chat", {"choices": [{"delta": {"content": LONE}}]}),
        (
            "llama.cpp call",
            {"choices": [{"delta": {"content": '{"name": "\\ud800", "arguments": {"a": "' + LONE + '"}}'}}]},
        ),
    ],
)
def test_what_is_no_unicode_in_an_answer_becomes_the_replacement_character(name: str, frame: dict[str, Any]) -> None:
    shown = [str(value) for value in _leaves(DECODERS[name]().feed(line(frame)))]

    assert any("\ufffd" in value for value in shown)
    assert all(value.encode() or not value for value in shown)


def _leaves(events: list[TokenEvent | Finished]) -> list[Any]:
    tokens = [event for event in events if isinstance(event, TokenEvent)]
    assert tokens
    return [
        value
        for event in tokens
        for value in (
            event.text,
            event.token,
            *(chance.text for chance in event.top),
            *(part for call in event.tool_calls for part in (call.id, call.name, call.arguments)),
        )
    ]


@every_refusal
def test_what_is_no_unicode_in_the_words_of_a_refusal_becomes_the_replacement_character(refusal: Any) -> None:
    error = {"message": f"Template error: {LONE}", "type": LONE}
    for body in ({"error": error}, {"error": f"Template error: {LONE}", "error_type": "template_error"}):
        assert "\ufffd" in refusal(500, json.dumps(body).encode()).detail


def test_whole_characters_stay_as_they_are_however_they_are_written() -> None:
    assert json_in(b'{"a": ["\\ud83d\\ude00", "\xf0\x9f\x98\x80", "\\\\ud800"]}') == {"a": ["😀", "😀", "\\ud800"]}
    assert json_in(b'"\xed\xa0\x80 \xff"').encode().decode().endswith(" \ufffd")
    assert json_in(b'{"\\ud800": 1}') == {"\ufffd": 1}


JSON_TEXTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda parts: st.lists(parts) | st.dictionaries(st.text(), parts),
).map(lambda value: json.dumps(value).encode())
ODD_TEXTS = st.sampled_from(
    [
        b"",
        b"\xef\xbb\xbf{}",
        b'{"a": 1, "a": 2}',
        b"-0",
        b"1e400",
        b"0123",
        b"[1,]",
        b"{} {}",
        b'"a\x00"',
        b'"\xff"',
        b"1" * 5000,
        b"[" * 500 + b"]" * 500,
        b"[" * 50_000,
    ]
)


@given(JSON_TEXTS | ODD_TEXTS | st.binary())
def test_json_means_what_pythons_own_reader_takes_it_for(text: bytes) -> None:
    def read(by: Callable[[bytes], Any]) -> str:
        try:
            return repr(by(text))
        except (ValueError, RecursionError):
            return "no JSON"

    assert read(json_in) == read(lambda said: json.loads(said.decode("utf-8-sig", errors="replace")))


# ---- lines ----


@given(st.lists(st.binary(max_size=3) | st.sampled_from([b"data: a", b"\r\n", b"\n\n", b" event : b \n", b":c\n"])))
def test_lines_are_the_same_however_they_come_in_chunks(chunks: list[bytes]) -> None:
    lines = EventLines()
    found = [line for chunk in chunks for line in lines.feed(chunk)]

    assert found == EventLines().feed(b"".join(chunks))


def test_a_line_may_be_long_but_not_without_end() -> None:
    long = b"data: " + b"x" * (MOST_LINE_BYTES - 10)
    lines, endless = EventLines(), EventLines()

    assert lines.feed(long) == []
    assert lines.feed(b"\n") == [(b"data", long[6:])]
    for _ in range(MOST_LINE_BYTES // 2**16 + 1):
        assert endless.feed(b"x" * 2**16) == []
    with pytest.raises(GenerationFailed, match="without end"):
        endless.feed(b"x" * 2**16)


def test_lines_within_one_chunk_may_add_up_to_more_than_the_longest_line() -> None:
    long = b"data: %b\n" % (b"x" * 2**20)
    lines = MOST_LINE_BYTES // 2**20 + 1

    assert len(EventLines().feed(long * lines)) == lines


# ---- what is not the protocol ----


@every_decoder
@pytest.mark.parametrize(
    "frame",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"error":' + b"[" * 900 + b'"\\ud800"' + b"]" * 900 + b"}",
        b'"\xff\xfe"',
        b"\xff\xfe",
        b"9" * 5000,
        b"Infinity",
        b'{"choices": [{"delta": {"content": 5}, "text": 5}], "token": 5, "content": 5}',
        b'{"choices": [{"delta": {"tool_calls": [{"index": [1]}]}, "text": [1]}]}',
        b'{"token": {"id": Infinity, "text": "a", "logprob": 0, "special": false}, "choices": 1, "stop": 0}',
        b'{"content": "a", "tokens": [Infinity], "stop": false, "tokens_predicted": 1, "token": {}, "choices": 1}',
        b'{"choices": [{"text": "a", "delta": {"content": "a"}, "logprobs": {"content": [{"token": 1}]}}]}',
    ],
    ids=lambda frame: frame[:20].decode(errors="replace"),
)
def test_what_is_not_the_protocol_is_a_failed_generation(decoder: Callable[[], Decoder], frame: bytes) -> None:
    with pytest.raises(GenerationFailed):
        decoder().feed(line(frame))


NAMES = {
    "choices",
    "delta",
    "content",
    "text",
    "token",
    "tokens",
    "logprobs",
    "top_logprobs",
    "id",
    "logprob",
    "prob",
    "finish_reason",
    "usage",
    "completion_tokens",
    "prompt_tokens",
    "timings",
    "predicted_n",
    "stop",
    "stop_type",
    "tokens_predicted",
    "tokens_evaluated",
    "error",
    "message",
    "code",
    "type",
    "details",
    "completion_probabilities",
    "tool_calls",
    "function",
    "name",
    "arguments",
    "special",
    "error_type",
    "n_ctx",
}
PIECES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3) | st.just(LONE),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(sorted(NAMES)),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@settings(derandomize=True, deadline=None)
@given(PIECES, st.sampled_from(sorted(DECODERS)), st.sampled_from(sorted(REFUSALS)))
def test_nothing_raises_anything_but_our_own_errors(said: Any, decoder: str, refusal: str) -> None:
    found = REFUSALS[refusal](400, json.dumps(said).encode())
    found.detail.encode()
    json.dumps(found.extra, allow_nan=False)
    try:
        DECODERS[decoder]().feed(line(said) * 2)
    except GatewayError as error:
        error.detail.encode()


@every_refusal
@pytest.mark.parametrize(
    "body",
    [
        b"[" * 60_000,
        b'{"error":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"error": {"message": ' + b"[" * 900 + b"]" * 900 + b"}}",
        b'{"error": {"code": [1], "type": {}, "message": 7}}',
        b'{"error": "`inputs` must have less than ' + b"9" * 5000 + b' tokens. Given: 1", "error_type": "validation"}',
        b"\xff\xfe\x00",
        b"9" * 5000,
        b"",
    ],
    ids=lambda body: body[:30].decode(errors="replace"),
)
def test_a_refusal_of_any_body_is_an_error_of_ours(refusal: Any, body: bytes) -> None:
    assert isinstance(refusal(400, body), GatewayError)
    assert isinstance(refusal(500, body), GatewayError)


@pytest.mark.parametrize("refusal", [openai_answers.refusal, llamacpp_answers.refusal])
def test_nothing_but_numbers_is_told_for_numbers(refusal: Any) -> None:
    error = {"type": "exceed_context_size_error", "message": "too long", "n_prompt_tokens": "sk-secret", "n_ctx": [1]}
    found = refusal(400, json.dumps({"error": error}).encode())

    assert isinstance(found, PromptTooLong)
    assert found.extra == {"prompt_tokens": None, "context_tokens": None}
    assert "sk-secret" not in found.detail
    assert "None" not in found.detail


def test_the_bytes_of_a_prompts_token_are_never_made_of_a_number() -> None:
    with pytest.raises(GatewayError, match="not its own protocol"):
        llamacpp_answers.prompt_tokens("a", b'{"tokens": [{"id": 1, "piece": 100000000000}]}')
