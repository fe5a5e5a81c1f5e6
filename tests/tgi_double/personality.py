"""How this double behaves: what the variables `DOUBLE_*` say (the table is at the top of launcher.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

PREFIX = "DOUBLE_"
NO = {"", "0", "false", "no"}


class UnknownPersonality(ValueError):
    """A variable `DOUBLE_*` that means nothing, or a value that it cannot have."""


@dataclass(frozen=True)
class Personality:
    """One field for each variable: `DOUBLE_TOKEN_S` is `token_s`. The default is a healthy server, ready at once."""

    download_s: float = 0.0
    files: int = 2
    cached: bool = False
    shard_s: float = 0.0
    warmup_s: float = 0.0
    endless: bool = False
    silent: bool = False
    fails: str = ""

    token_s: float = 0.0
    keep_alive_s: float = 15.0
    overloaded: bool = False
    garbage: bool = False
    no_template: bool = False
    oom_after_tokens: int | None = None
    dies_after_tokens: int | None = None
    cuts_after_tokens: int | None = None
    hangs_after_tokens: int | None = None
    tells_aborts: bool = False

    health_hangs_after_s: float | None = None
    health_fails_after_s: float | None = None
    health_recovers_after_s: float | None = None

    ignores_sigterm: bool = False
    stop_s: float = 0.0


def from_environment(env: Mapping[str, str]) -> Personality:
    """Return the personality that these variables describe.

    Raises:
        UnknownPersonality: so that a misspelt variable is not a healthy server.
    """
    kinds = {PREFIX + each.name.upper(): (each.name, str(each.type)) for each in fields(Personality)}
    said = {name: text for name, text in env.items() if name.startswith(PREFIX)}
    if unknown := sorted(said.keys() - kinds.keys()):
        raise UnknownPersonality(f"the double knows no {', '.join(unknown)}; it knows {', '.join(sorted(kinds))}")
    values: dict[str, Any] = {kinds[name][0]: _value(name, text, kinds[name][1]) for name, text in said.items()}
    return Personality(**values)


def _value(name: str, text: str, kind: str) -> bool | int | float | str:
    if kind == "bool":
        return text.lower() not in NO
    if kind == "str":
        return text
    try:
        return int(text) if kind.startswith("int") else float(text)
    except ValueError:
        raise UnknownPersonality(f"{name} is {text!r}, which is no number") from None
