"""A model's server whose every token says whose it is and which: a script for tests/scripted_server.py.

It speaks TGI's and OpenAI's streams; which one, the address that it is asked at says. Who asks names itself within the
prompt, as in "caller-17 counts", and hears " 17.1 17.2 17.3 ..." up to the length that it asked for.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.scripted_server import HEAD, Conversation

CALLER = re.compile(rb"caller-(\d+)")
ONE_TURN = 20
"""Tokens after which others have their turn, so that all answers are under way at once."""

Event = Callable[[str, int, bool, int], dict[str, Any]]
"""One event, from a token's text, its number, whether it is the last, and how many likeliest ones to report."""


def text(caller: int, tokens: int, padding: str = "") -> str:
    """Return the whole answer that this caller must hear."""
    return "".join(token(caller, number, padding) for number in range(1, tokens + 1))


def token(caller: int, number: int, padding: str = "") -> str:
    return f" {caller}.{number}{padding}"


def tgi(text: str, number: int, last: bool, top: int) -> dict[str, Any]:
    likeliest = [{"id": each, "text": text, "logprob": -1.0 - each, "special": False} for each in range(top)]
    details = {"finish_reason": "length", "generated_tokens": number, "seed": None, "input_length": 3}
    return {
        "index": number,
        "token": {"id": number, "text": text, "logprob": -0.5, "special": False},
        **({"top_tokens": likeliest} if top else {}),
        "generated_text": text if last else None,
        "details": details if last else None,
    }


def completion(text: str, number: int, last: bool, _top: int) -> dict[str, Any]:
    return _choice({"text": text}, number, last)


def chat(text: str, number: int, last: bool, _top: int) -> dict[str, Any]:
    return _choice({"delta": {"role": "assistant", "content": text}}, number, last)


def _choice(said: dict[str, Any], number: int, last: bool) -> dict[str, Any]:
    usage = {"prompt_tokens": 3, "completion_tokens": number, "total_tokens": number + 3} if last else None
    choice = {"index": 0, **said, "logprobs": None, "finish_reason": "length" if last else None}
    return {"id": "x", "object": "chunk", "created": 0, "model": "m", "choices": [choice], "usage": usage}


EVENTS: dict[str, Event] = {"/generate_stream": tgi, "/v1/completions": completion, "/v1/chat/completions": chat}


class Numbers:
    """The script. `said` counts each caller's tokens so far; `under_way` how many answers have begun and not ended.

    With `together` no answer goes beyond its first token until so many have come as far: all are under way at once.
    """

    def __init__(self, padding: str = "", together: int = 0) -> None:
        self.said: Counter[int] = Counter()
        self.at_once = 0
        self._under_way = 0
        self._padding = padding
        self._together = together
        self._all_there = asyncio.Event()

    async def __call__(self, conversation: Conversation) -> None:
        path = conversation.head.split(b" ", 2)[1].decode()
        found = CALLER.search(conversation.body)
        assert found, conversation.body
        self._under_way += 1
        self.at_once = max(self.at_once, self._under_way)
        try:
            await conversation.say(HEAD)
            await self._count(conversation, int(found[1]), EVENTS[path])
            if path.startswith("/v1"):
                await conversation.say(b"data: [DONE]\n\n")
        finally:
            self._under_way -= 1

    async def _count(self, conversation: Conversation, caller: int, event: Event) -> None:
        tokens, top = asked_for(json.loads(conversation.body))
        for number in range(1, tokens + 1):
            said = event(token(caller, number, self._padding), number, number == tokens, top)
            await conversation.say(b"data: " + json.dumps(said).encode() + b"\n\n")
            self.said[caller] += 1
            if number == 1:
                await self._others()
            if number % ONE_TURN == 0:
                await asyncio.sleep(0)

    async def _others(self) -> None:
        if self._under_way >= self._together:
            self._all_there.set()
        await self._all_there.wait()


def asked_for(body: dict[str, Any]) -> tuple[int, int]:
    """Return how many tokens, and how many of the likeliest for each."""
    parameters = body.get("parameters", {})
    lengths = (parameters.get("max_new_tokens"), body.get("max_tokens"), body.get("max_completion_tokens"))
    return next(int(length) for length in lengths if length), int(parameters.get("top_n_tokens") or 0)
