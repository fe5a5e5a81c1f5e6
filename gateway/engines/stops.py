"""Finds the texts that end a generation, however the answer is cut into pieces, and cuts them off. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Passes an answer's text on, except what may yet become a stop text."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(filter(None, texts))
        self._held = ""
        self.found = False
        self.matched = ""
        """The stop text that was found; of several that begin at one place, the first one asked for."""

    def feed(self, piece: str) -> str:
        """Return what can be passed on now. Once a stop text is complete, `found` is set and nothing more comes."""
        text, self._held = self._held + piece, ""
        if not self._texts:
            return text
        if self.found:
            return ""
        found = [(start, stop) for stop in self._texts if (start := text.find(stop)) >= 0]
        if found:
            start, self.matched = min(found, key=lambda each: each[0])
            self.found = True
            return text[:start]
        sent = text[: len(text) - self._may_become_stop(text)]
        self._held = text[len(sent) :]
        return sent

    def rest(self) -> str:
        """Return what was held back, at the end of an answer: it did not become a stop text."""
        rest, self._held = self._held, ""
        return rest

    def _may_become_stop(self, text: str) -> int:
        """Return how many characters at the end of `text` begin a stop text."""
        return max([_begun(stop, text) for stop in self._texts])


def _begun(stop: str, text: str) -> int:
    """Return how many characters at the end of `text`, which does not hold `stop`, begin it."""
    start = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return len(text) - start if start >= 0 else 0
