"""The key of a server that already runs: shown to that server, and to nobody else. Pure."""

from __future__ import annotations

from itertools import takewhile

from gateway.catalog import ModelSpec
from gateway.errors import GatewayError, UpstreamFailed

LEAST_TELLING = 8
"""How many characters of a key's beginning are no secret, such as `sk-proj`."""


def authorization(spec: ModelSpec) -> dict[str, str]:
    """Return the header that shows the catalog's `api_key`, if it has one."""
    return {"Authorization": f"Bearer {spec.api_key.get_secret_value()}"} if spec.api_key else {}


def key_refused(status: int) -> UpstreamFailed:
    """Return what a server's 401 or 403 means to a caller, whose own key it is not. Its words may quote the key."""
    return UpstreamFailed(
        f"The model's server does not accept the gateway's key (status {status}). "
        "Correct `api_key` of this model in models.yaml."
    )


def hidden(words: bytes, spec: ModelSpec) -> bytes:
    """Return the words of a server without the key."""
    key = spec.api_key.get_secret_value().encode() if spec.api_key else b""
    return words.replace(key, b"[key]") if key else words


def begun_key(words: bytes, spec: ModelSpec) -> int:
    """Return how many bytes at the end of a server's words may be the beginning of the key."""
    key = spec.api_key.get_secret_value().encode() if spec.api_key else b""
    return next((size for size in range(len(key) - 1, 0, -1) if words.endswith(key[:size])), 0)


def without_key(error: GatewayError, spec: ModelSpec) -> GatewayError:
    """Return the same error, in words that do not hold the key: a server may repeat what it was sent.

    Its words may have been cut in the midst of the key: what begins like the key is taken out as well.
    """
    key = spec.api_key.get_secret_value() if spec.api_key else ""
    if not key or key[:LEAST_TELLING] not in error.detail:
        return error
    detail = error.detail.replace(key, "[key]")
    detail = _without_beginnings(detail, key) if len(key) > LEAST_TELLING else detail
    return type(error)(detail, retry_after_s=error.retry_after_s, **error.extra)


def _without_beginnings(words: str, key: str) -> str:
    found = ""
    while (at := words.find(key[:LEAST_TELLING])) >= 0:
        found += f"{words[:at]}[key]"
        like_key = takewhile(lambda pair: pair[0] == pair[1], zip(words[at:], key, strict=False))
        words = words[at + len(list(like_key)) :]
    return found + words
