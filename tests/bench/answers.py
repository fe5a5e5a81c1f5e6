"""What the upstream says, in TGI's and OpenAI's words: whole, as a stream, and as a stream whose tokens tell the time.

Such a token is ` @NANOSECONDS@`: the machine's monotonic clock when it was written. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

PROMPT = "Tell me of the sea. " * 10
TGI_STREAM = "/generate_stream"
COMPLETION = "/v1/completions"
CHAT = "/v1/chat/completions"
DONE = b"data: [DONE]\n\n"
STAMP = re.compile(rb'"(?:text|content)":\s*" @(\d+)@"')
"""The token of one event; a TGI's last event has the whole text too, under another name."""
LONGEST_STAMP = 64


def token(number: int) -> str:
    return f" word{number}"


def whole(path: str, tokens: int) -> bytes:
    """Return the body of an answer that is not streamed, at `/generate` or one of OpenAI's two addresses."""
    text = "".join(token(number) for number in range(tokens))
    usage = {"prompt_tokens": 50, "completion_tokens": tokens, "total_tokens": 50 + tokens}
    match path:
        case "/v1/completions":
            said = {"text": text, "index": 0, "logprobs": None, "finish_reason": "length"}
            return _dumps({**_head("text_completion"), "choices": [said], "usage": usage})
        case "/v1/chat/completions":
            said = {"message": {"role": "assistant", "content": text}, "index": 0, "finish_reason": "length"}
            return _dumps({**_head("chat.completion"), "choices": [said], "usage": usage})
    return _dumps({"generated_text": text})


def streamed(path: str, tokens: int) -> bytes:
    """Return the same as server-sent events, one for each token."""
    texts = [token(number) for number in range(tokens)]
    return b"".join(event(path, text, number, "".join(texts)) for number, text in enumerate(texts, 1 - tokens)) + (
        b"" if path == TGI_STREAM else DONE
    )


def event(path: str, text: str, number: int, full: str = "") -> bytes:
    """Return one event; the one whose number is 0 is the last."""
    last = number == 0
    match path:
        case "/generate_stream":
            return _event(_tgi(text, full, last=last))
        case "/v1/completions":
            said: dict[str, Any] = {"text": text}
            kind = "text_completion"
        case _:
            said, kind = {"delta": {"role": "assistant", "content": text}}, "chat.completion.chunk"
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": "length" if last else None}
    return _event({**_head(kind), "choices": [choice]})


def _tgi(text: str, full: str, *, last: bool) -> dict[str, Any]:
    details = {"finish_reason": "length", "generated_tokens": 1, "seed": None, "input_length": 50}
    return {
        "index": 1,
        "token": {"id": 42, "text": text, "logprob": -0.5, "special": False},
        "generated_text": full if last else None,
        "details": details if last else None,
    }


def paced_parts(path: str) -> tuple[bytes, bytes]:
    """Return what stands before and behind the nanoseconds in an event that is not the last one."""
    before, _, behind = event(path, " @0@", -1).partition(b"@0@")
    return before + b"@", b"@" + behind


def stamps(data: bytes) -> tuple[list[int], bytes]:
    """Return the times that the tokens in `data` tell, and its end, in which another one may have begun."""
    found, end = [], 0
    for match in STAMP.finditer(data):
        found.append(int(match[1]))
        end = match.end()
    return found, data[end:][-LONGEST_STAMP:]


def nginx_text(body: bytes) -> Iterator[str]:
    """Yield the body as nginx's configuration takes it, in pieces: one word there has at most 4,096 characters."""
    text = body.decode()
    for start in range(0, len(text), 1500):
        yield text[start : start + 1500].replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _head(kind: str) -> dict[str, Any]:
    return {"id": "answer-1", "object": kind, "created": 1700000000, "model": "m"}


def _event(value: Any) -> bytes:
    return b"data: " + _dumps(value) + b"\n\n"


def _dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
