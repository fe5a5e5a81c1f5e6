"""How a request ended, in one word: noted where that is known, read where requests are counted."""

from __future__ import annotations

from starlette.types import Scope

OK = "ok"
LEFT = "left"
"""The caller went before the answer was whole."""


def note(scope: Scope, outcome: str) -> None:
    """Remember how a request ended: with the code of an error, or because its caller left."""
    scope.setdefault("state", {})["outcome"] = outcome


def outcome_of(scope: Scope, status: int | None) -> str:
    """Return how it ended; `status` is that of its answer, None if it never got one."""
    noted = scope.get("state", {}).get("outcome")
    if noted or status is None:
        return str(noted or LEFT)
    return OK if status < 400 else f"HTTP_{status}"
