"""What is counted of one model's work: the seam to whoever counts. Nothing in here waits or raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Figures(Protocol):
    """Hears what is done for one model. Called on the event loop, in the midst of requests: it takes microseconds."""

    def waited(self, seconds: float) -> None:
        """Hear how long a call waited until it had the model's server, a cold start included."""

    def first_token(self, seconds: float) -> None:
        """Hear when a stream's first token came, counted from the call's arrival."""

    def generated(self, tokens: int, prompt_tokens: int) -> None:
        """Hear how long an answer and its prompt were; 0 where nobody tells."""

    def ended(self, outcome: str) -> None:
        """Hear how a call ended: `ok`, `cancelled`, `refused` by the server in its own words, or an error's code."""


class Silent:
    """Counts nothing."""

    def waited(self, seconds: float) -> None:
        pass

    def first_token(self, seconds: float) -> None:
        pass

    def generated(self, tokens: int, prompt_tokens: int) -> None:
        pass

    def ended(self, outcome: str) -> None:
        pass


FiguresOf = Callable[[str], Figures]
"""Returns who counts for the model of this id."""


def silent(_: str) -> Figures:
    return Silent()
