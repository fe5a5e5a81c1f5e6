"""Reading a request's headers as ASGI has them: for a few of them, faster than a mapping of all."""

from __future__ import annotations

from starlette.types import Scope


def header(scope: Scope, name: bytes) -> str:
    """Return the first header of this name, which is in lower case; empty if there is none."""
    for each, value in scope["headers"]:
        if each == name:
            return str(value, "latin-1")
    return ""


def headers(scope: Scope, name: bytes) -> list[str]:
    """Return all headers of this name, which is in lower case."""
    return [str(value, "latin-1") for each, value in scope["headers"] if each == name]
