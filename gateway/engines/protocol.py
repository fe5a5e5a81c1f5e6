"""What every server's answers are read with, so that nothing in them can harm the gateway. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic_core import from_json, to_json

from gateway.bodies import MOST_TOKENS
from gateway.generation import TokenEvent

NOT_THE_PROTOCOL = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What reading an answer raises that is not what it should be."""
MOST_UNSEEN = 16
"""How many tokens without a text of their own are told apart: a character has fewer parts."""
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def json_in(text: bytes) -> Any:
    """Return what the JSON says, in texts that are Unicode: what is none of it becomes U+FFFD.

    Raises:
        ValueError, RecursionError: it is not JSON, or too deep.
    """
    try:
        # several times as fast as json, and refuses whatever is not quite right; texts are not kept for the next time
        return from_json(text, cache_strings="keys")
    except ValueError:
        return _mended_json(text.decode("utf-8-sig", errors="replace"))


def _mended_json(text: str) -> Any:
    found = json.loads(text)
    return _clean(found) if _ESCAPED_SURROGATE.search(text) else found


def object_in(text: bytes) -> dict[str, Any]:
    """Return the JSON object.

    Raises:
        ValueError, RecursionError: it is none.
    """
    found = json_in(text)
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


def each_json_in(values: Sequence[bytes]) -> Iterable[Any]:
    """Return what the JSON of each line says, as `json_in`; there may be spaces around it.

    All are read at once if all are quite right. Else each is when it is taken: nobody asks for what is behind the end
    of an answer.

    Raises:
        ValueError, RecursionError: one is not JSON, or too deep; when it is taken.
    """
    try:
        return [from_json(value, cache_strings="keys") for value in values]
    except ValueError:
        return (json_in(value.strip()) for value in values)


def written(body: Mapping[str, Any]) -> bytes:
    """Return what a server is sent, as JSON."""
    try:
        return to_json(body)  # in a third of the time of json
    except ValueError:  # a text that is no Unicode, or too deep
        return json.dumps(body).encode()


def _clean(found: Any) -> Any:
    if isinstance(found, str):
        return _LONE_SURROGATE.sub("\ufffd", found)
    if isinstance(found, list):
        return [_clean(each) for each in found]
    return {_clean(key): _clean(each) for key, each in found.items()} if isinstance(found, dict) else found


def text_in(said: Any) -> str:
    """Return a text.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(said, str):
        raise TypeError("no text")
    return said


def count_in(said: Any) -> int:
    """Return a count of tokens; 0 where none is told.

    Raises:
        TypeError, ValueError, OverflowError: it is no count: negative, beyond any model, or no whole number.
    """
    count = int(said or 0)
    if not 0 <= count <= MOST_TOKENS or count != (said or 0):
        raise ValueError("no count of tokens")
    return count


def number_in(said: Any) -> int | None:
    """Return a whole number that an error tells; None if it is none: it might be anything, and is told to callers."""
    return said if isinstance(said, int) and abs(said) <= MOST_TOKENS else None


def unseen(tokens: int) -> list[TokenEvent]:
    """Return events for tokens that were counted and not sent: parts of a character, say.

    Many at once are one event, whatever number the server tells.
    """
    return [TokenEvent(None, "")] * (tokens if tokens <= MOST_UNSEEN else 1)
