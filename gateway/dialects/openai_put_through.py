"""Answers of servers that speak OpenAI's API themselves, on their way to callers under `/v1` (contract section 4).

They stay as they are, but for the model's name: it becomes the one that was asked for. Pure.
"""

from __future__ import annotations

import json
import re

from gateway.bodies import as_json
from gateway.errors import GatewayError, GenerationFailed
from gateway.relay import Broken
from gateway.shapes import shown

_MODEL = re.compile(rb'("model"\s*:\s*)"(?:[^"\\]|\\.)*"')
"""The key itself: within a text its quotes would be escaped."""
_ERROR = re.compile(rb'"error"\s*:\s*["{]')
_DONE = re.compile(rb"data:\s*\[DONE\]\s*")


class Renaming:
    """Passes an answer on with another model's name. A stream that tells of an error has failed."""

    keeps_refusals = False

    def __init__(self, name: str) -> None:
        self._name = json.dumps(name).encode()
        self.is_over = False

    @property
    def may_end(self) -> bool:
        return self.is_over

    def whole(self, body: bytes) -> bytes:
        """Return the body of an answer, which names the model once.

        Raises:
            Broken: it is a stream without end.
            GenerationFailed: it is a stream that tells of an error.
        """
        if body.lstrip().startswith(b"{"):
            return self._renamed(body)
        lines = b"".join(map(self.line, body.splitlines(keepends=True)))
        if not self.is_over:
            raise Broken("the answer has no end")
        return lines

    def line(self, line: bytes) -> bytes:
        """Return what goes on of a stream's line.

        Raises:
            GenerationFailed: it tells of an error.
        """
        if line.startswith((b"data:", b"{")) and _ERROR.search(line):
            raise GenerationFailed(f"The model's server failed in mid-answer: {_words(line)}.")
        self.is_over = self.is_over or bool(_DONE.fullmatch(line))
        return self._renamed(line)

    def failure(self, error: GatewayError) -> bytes:
        return b"data: " + as_json(shown(error, "openai").body) + b"\n\n"

    def _renamed(self, words: bytes) -> bytes:
        found = _MODEL.search(words)
        return words[: found.end(1)] + self._name + words[found.end() :] if found else words


def _words(line: bytes) -> str:
    """Return what an event says of an error."""
    try:
        error = json.loads(line.removeprefix(b"data:"))["error"]
        words = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        words = ""
    return words.partition("\n")[0][:300].rstrip(". ") or "no reason given"
