"""What becomes of a provider's answer on its way: bytes in, bytes out."""

from __future__ import annotations

import json

import pytest

from gateway.dialects.openai_put_through import Renaming
from gateway.errors import GenerationFailed
from gateway.relay import Broken

DONE = b"data: [DONE]\n\n"


def passed(answer: bytes, name: str = "mine", size: int = 1000) -> bytes:
    manner = Renaming(name)
    pieces = [answer[start : start + size] for start in range(0, len(answer), size)]
    return b"".join([*(manner.feed(piece) for piece in pieces), manner.rest()])


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b'{"model":"x","a":1}', b'{"model":"mine","a":1}'),
        (b'{"a":1, "model" :\t"x/y-7B"}\n', b'{"a":1, "model" :\t"mine"}\n'),
        (b'\n{\n  "model": "x",\n  "b": {"model": "y"}\n}\n', b'\n{\n  "model": "mine",\n  "b": {"model": "y"}\n}\n'),
        (b'{"text":"\\"model\\": \\"x\\"","model":"a\\"b"}', b'{"text":"\\"model\\": \\"x\\"","model":"mine"}'),
        (b'{"role":"model","model":"x"}', b'{"role":"model","model":"mine"}'),
        (b'{"model":null}', b'{"model":null}'),
        (b'{"error":{"message":"of a body"}}', b'{"error":{"message":"of a body"}}'),
        (b'data: {"model":"x","b":{"model":"y"}}\n\n' + DONE, b'data: {"model":"mine","b":{"model":"y"}}\n\n' + DONE),
        (b'data: {"model":"x"}\n\ndata: {"model":"x"}\n\n' + DONE, b'data: {"model":"mine"}\n\n' * 2 + DONE),
        (b'data:{"model":"x"}\r\n\r\ndata:[DONE]\r\n\r\n', b'data:{"model":"mine"}\r\n\r\ndata:[DONE]\r\n\r\n'),
        (b': hi\n\nevent: x\ndata: {"error":null,"model":"x"}\n\n' + DONE,
         b': hi\n\nevent: x\ndata: {"error":null,"model":"mine"}\n\n' + DONE),
        (b'data: {"delta":"\\"error\\": \\"x\\""}\n\n' + DONE, b'data: {"delta":"\\"error\\": \\"x\\""}\n\n' + DONE),
        (b'data: {"model":"\xe2\x82\xac"}\n\n' + DONE.rstrip(), b'data: {"model":"mine"}\n\n' + DONE.rstrip()),
    ],
)  # fmt: skip
def test_nothing_but_the_models_name_is_changed(answer: bytes, expected: bytes, size: int) -> None:
    assert passed(answer, size=size) == expected


def test_a_name_is_written_as_json() -> None:
    name = 'a"\\1\N{EURO SIGN}'

    assert json.loads(passed(b'{"model":"x"}', name))["model"] == name


@pytest.mark.parametrize("answer", [b"", b"\n\n", b'data: {"model":"x"}\n\n', b'data: {"model":"x"}\n\ndata: [DO'])
def test_a_stream_without_end_has_broken_off(answer: bytes) -> None:
    with pytest.raises(Broken):
        passed(answer)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (b'{"error": {"message": "out of memory.\\nTraceback", "code": 500}}', ": out of memory."),
        (b'{"error": "out of memory"}', ": out of memory."),
        (b'{"id": "1", "error": {"code": 502}, "choices": [{"delta": {}}]}', ": no reason given."),
        (b'{"error": {', ": no reason given."),
    ],
)
def test_a_stream_that_tells_of_an_error_has_failed(event: bytes, words: str) -> None:
    manner = Renaming("mine")
    assert manner.feed(b'data: {"model":"x"}\n\n') == b'data: {"model":"mine"}\n\n'

    with pytest.raises(GenerationFailed) as failed:
        manner.feed(b"data: " + event + b"\n\n" + DONE)

    assert failed.value.detail.endswith(words)


def test_each_line_goes_on_as_soon_as_it_is_whole() -> None:
    manner = Renaming("mine")

    assert manner.feed(b'data: {"mod') == b""
    assert manner.feed(b'el":"x"}\n\nda') == b'data: {"model":"mine"}\n\n'
    assert manner.feed(b"ta: [DONE]\n\n") == DONE
    assert manner.rest() == b""
