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
    """Passes an answer on line by line. A stream that tells of an error, or that ends without [DONE], has failed."""

    keeps_refusals = False

    def __init__(self, name: str) -> None:
        self._name = json.dumps(name).encode()
        self._unread = b""
        self._is_body: bool | None = None
        self._is_renamed = False
        self._is_done = False

    def feed(self, chunk: bytes) -> bytes:
        """Return what goes on.

        Raises:
            GenerationFailed: a stream tells of an error.
        """
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        return b"".join(self._line(line + b"\n") for line in lines)

    def rest(self) -> bytes:
        """Return what was held back.

        Raises:
            Broken: the answer has no end.
        """
        rest = self._line(self._unread) if self._unread else b""
        if not self._is_body and not self._is_done:
            raise Broken("the answer has no end")
        return rest

    def failure(self, error: GatewayError) -> bytes:
        return b"data: " + as_json(shown(error, "openai").body) + b"\n\n"

    def _line(self, line: bytes) -> bytes:
        if self._is_body is None and line.strip():
            self._is_body = line.lstrip().startswith(b"{")
        return self._of_body(line) if self._is_body else self._of_stream(line)

    def _of_body(self, line: bytes) -> bytes:
        """Return a line of a body: it names the model once, however many lines it has."""
        if self._is_renamed:
            return line
        line, times = self._renamed(line)
        self._is_renamed = times > 0
        return line

    def _of_stream(self, line: bytes) -> bytes:
        if line.startswith(b"data:") and _ERROR.search(line):
            raise GenerationFailed(f"The model's server failed in mid-answer: {_words(line)}.")
        self._is_done = self._is_done or bool(_DONE.fullmatch(line))
        return self._renamed(line)[0]

    def _renamed(self, line: bytes) -> tuple[bytes, int]:
        return _MODEL.subn(lambda found: found[1] + self._name, line, count=1)


def _words(line: bytes) -> str:
    """Return what an event says of an error."""
    try:
        error = json.loads(line.partition(b":")[2])["error"]
        words = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        words = ""
    return words.partition("\n")[0][:300].rstrip(". ") or "no reason given"
