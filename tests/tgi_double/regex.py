"""The smallest text that a regular expression matches, of those that are simple enough to read at a glance."""

from __future__ import annotations

import re
from collections.abc import Iterator

ESCAPED = {"d": "0", "w": "a", "s": " ", "D": "a", "W": " ", "S": "a", "n": "\n", "t": "\t", "r": "\r"}
CANDIDATES = "a0A _-.!\n" + "".join(map(chr, range(0x20, 0x17F)))
"""What is tried for a class of characters: readable ones first."""
TIMES = re.compile(r"\{(\d+)(?:,\d*)?\}")
CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


class UnknownPattern(ValueError):
    """Not a regular expression, or one of those that the double cannot write for."""


def smallest_match(pattern: str) -> str:
    """Return the smallest text that `pattern` matches as a whole.

    Raises:
        UnknownPattern: look-arounds, back-references and the like; and what is no regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UnknownPattern(str(error)) from None
    parser = _Parser(pattern)
    text = parser.alternatives()
    if parser.rest or not compiled.fullmatch(text):
        raise UnknownPattern(f"cannot write for {pattern}")
    return text


class _Parser:
    """Reads from the front of `rest`, and returns the smallest text of what it has read."""

    def __init__(self, pattern: str) -> None:
        self.rest = pattern

    def alternatives(self) -> str:
        found = [self._sequence()]
        while self.rest.startswith("|"):
            self._take(1)
            found.append(self._sequence())
        return min(found, key=len)

    def _sequence(self) -> str:
        return "".join(self._pieces())

    def _pieces(self) -> Iterator[str]:
        while self.rest and self.rest[0] not in "|)":
            atom = self._atom()
            yield atom * self._times()

    def _atom(self) -> str:
        if self.rest.startswith("("):
            return self._group()
        if self.rest.startswith("["):
            return self._class()
        letter = self._take(1)
        if letter == "\\":
            escaped = self._take(1)
            return ESCAPED.get(escaped, escaped)
        if letter in "^$":
            return ""
        return "a" if letter == "." else letter

    def _group(self) -> str:
        self._take(3 if self.rest.startswith("(?:") else 1)
        if self.rest.startswith("?"):
            raise UnknownPattern(f"cannot write for (?{self.rest[1:3]}")
        inner = self.alternatives()
        self._take(1)
        return inner

    def _class(self) -> str:
        found = CLASS.match(self.rest)
        whole = self._take(found.end() if found else 1)
        matching = (each for each in CANDIDATES if re.fullmatch(whole, each))
        if (first := next(matching, None)) is None:
            raise UnknownPattern(f"cannot write for {whole}")
        return first

    def _times(self) -> int:
        times = 1
        if self.rest[:1] in ("*", "?", "+"):
            times = 1 if self._take(1) == "+" else 0
        elif found := TIMES.match(self.rest):
            self._take(found.end())
            times = int(found[1])
        else:
            return times
        if self.rest[:1] in ("?", "+"):  # lazy, possessive: as small
            self._take(1)
        return times

    def _take(self, count: int) -> str:
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken
