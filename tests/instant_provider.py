"""A provider with OpenAI's API, conformant, that answers every completion and chat at once with the same two tokens."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gateway.dialects.openai_chat import ChatCompletionBody
from gateway.dialects.openai_completions import CompletionBody
from tests.scripted_server import HEAD, Conversation, refused, scripted

TOKENS = (" a", " b")
LOGPROB = -0.5
ALTERNATIVES = 50
USAGE = {"prompt_tokens": 3, "completion_tokens": len(TOKENS), "total_tokens": 3 + len(TOKENS)}
START_S = 10.0


async def answer(conversation: Conversation) -> None:
    """Answer one POST to `/v1/completions` or `/v1/chat/completions`, streamed or not."""
    asked = json.loads(conversation.body)
    is_chat = b"/chat/completions " in conversation.head.partition(b"\r\n")[0]
    try:  # what is put through to it, nobody has read before
        (ChatCompletionBody if is_chat else CompletionBody).model_validate(asked)
    except ValueError:
        await conversation.say(refused(400, "this is no request of OpenAI's API"))
        return
    kind = _Chat(asked) if is_chat else _Completion(asked)
    await conversation.say(HEAD + _streamed(kind, asked) if asked.get("stream") else _whole(kind))


class _Completion:
    object = "text_completion"
    chunk = "text_completion"

    def __init__(self, asked: dict[str, Any]) -> None:
        self._asked = asked
        self.head = {"id": "cmpl-1", "created": 1, "model": str(asked.get("model"))}

    def choice(self, tokens: tuple[str, ...], reason: str | None) -> dict[str, Any]:
        told = self._logprobs(tokens) if self._asked.get("logprobs") is not None else None
        return {"index": 0, "text": "".join(tokens), "logprobs": told, "finish_reason": reason}

    part = choice

    def _logprobs(self, tokens: tuple[str, ...]) -> dict[str, Any]:
        count = max(int(self._asked["logprobs"]), 1)
        return {
            "tokens": list(tokens),
            "token_logprobs": [LOGPROB] * len(tokens),
            "top_logprobs": [dict(_ranked(token, count)) for token in tokens],
            "text_offset": [0] * len(tokens),
        }


class _Chat:
    object = "chat.completion"
    chunk = "chat.completion.chunk"

    def __init__(self, asked: dict[str, Any]) -> None:
        self._asked = asked
        self.head = {"id": "chatcmpl-1", "created": 1, "model": str(asked.get("model"))}

    def choice(self, tokens: tuple[str, ...], reason: str | None) -> dict[str, Any]:
        return self._choice("message", tokens, reason)

    def part(self, tokens: tuple[str, ...], reason: str | None) -> dict[str, Any]:
        return self._choice("delta", tokens, reason)

    def _choice(self, name: str, tokens: tuple[str, ...], reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(tokens), "refusal": None}
        told = (
            {"content": [self._token(token) for token in tokens], "refusal": None}
            if self._asked.get("logprobs")
            else None
        )
        return {"index": 0, name: message, "logprobs": told, "finish_reason": reason}

    def _token(self, token: str) -> dict[str, Any]:
        first, *others = (
            {"token": text, "logprob": logprob, "bytes": list(text.encode())}
            for text, logprob in _ranked(token, max(int(self._asked.get("top_logprobs") or 0), 1))
        )
        return {**first, "top_logprobs": [first, *others] if self._asked.get("top_logprobs") else []}


def _ranked(token: str, count: int) -> list[tuple[str, float]]:
    """Return a token and what it was chosen from, the likeliest first."""
    return [(token, LOGPROB), *((f" {number}", LOGPROB - 1 - number) for number in range(1, min(count, ALTERNATIVES)))]


def _streamed(kind: _Completion | _Chat, asked: dict[str, Any]) -> bytes:
    last = len(TOKENS) - 1
    parts = [kind.part((token,), "length" if index == last else None) for index, token in enumerate(TOKENS)]
    frames: list[dict[str, Any]] = [{**kind.head, "object": kind.chunk, "choices": [part]} for part in parts]
    if (asked.get("stream_options") or {}).get("include_usage"):
        frames.append({**kind.head, "object": kind.chunk, "choices": [], "usage": USAGE})
    return b"".join(b"data: " + json.dumps(frame).encode() + b"\n\n" for frame in frames) + b"data: [DONE]\n\n"


def _whole(kind: _Completion | _Chat) -> bytes:
    said = {**kind.head, "object": kind.object, "choices": [kind.choice(TOKENS, "length")], "usage": USAGE}
    body = json.dumps(said).encode()
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


@contextmanager
def instant_provider() -> Iterator[str]:
    """Run one in a thread of its own, for tests without a loop; yield its address."""
    loop, over = asyncio.new_event_loop(), asyncio.Event()
    ports: list[int] = []
    listens = threading.Event()

    async def serve() -> None:
        async with scripted(answer) as (_, port):
            ports.append(port)
            listens.set()
            await over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert listens.wait(START_S), "the provider did not start"
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()
