"""What becomes of a provider's answer on its way: bytes in, bytes out."""

from __future__ import annotations

import json

import pytest

from gateway.dialects.openai_put_through import Renaming
from gateway.errors import GenerationFailed
from gateway.relay import Broken

DONE = b"data: [DONE]\n\n"


def lines(manner: Renaming, stream: bytes) -> bytes:
    return b"".join(map(manner.line, stream.splitlines(keepends=True)))


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
def test_nothing_but_the_models_name_is_changed(answer: bytes, expected: bytes) -> None:
    assert Renaming("mine").whole(answer) == expected
    if not answer.lstrip().startswith(b"{"):
        manner = Renaming("mine")
        assert lines(manner, answer) == expected
        assert manner.is_over


def test_a_name_is_written_as_json() -> None:
    name = 'a"\\1\N{EURO SIGN}'

    assert json.loads(Renaming(name).whole(b'{"model":"x"}'))["model"] == name


@pytest.mark.parametrize(
    "answer", [b"", b"\n\n", b'["no stream"]', b'data: {"model":"x"}\n\n', b'data: {"model":"x"}\n\ndata: [DO']
)
def test_a_stream_without_end_has_broken_off(answer: bytes) -> None:
    manner = Renaming("mine")
    lines(manner, answer)

    assert not manner.may_end
    with pytest.raises(Broken):
        Renaming("mine").whole(answer)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (b'{"error": {"message": "out of memory.\\nTraceback", "code": 500}}', ": out of memory."),
        (b'{"error": "out of memory"}', ": out of memory."),
        (b'{"id": "1", "error": {"code": 502}, "choices": [{"delta": {}}]}', ": no reason given."),
        (b'{"error": {', ": no reason given."),
    ],
)
@pytest.mark.parametrize("start", [b"data: ", b"data:", b""])
def test_a_stream_that_tells_of_an_error_has_failed(event: bytes, words: str, start: bytes) -> None:
    manner = Renaming("mine")

    with pytest.raises(GenerationFailed) as failed:
        manner.line(start + event + b"\n")

    assert failed.value.detail.endswith(words)
