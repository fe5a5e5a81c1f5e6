"""The lines that TGI prints (tgi.md 7.2): coloured text, or two kinds of JSON in one stream.

The launcher speaks for itself and for its shards; the router, another program, prints in its own way.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

LEVEL_COLORS = {"INFO": "32", "WARN": "33", "ERROR": "31"}
Painter = Callable[[str, str], str]
"""Puts a text in a colour, which is a number for the terminal."""
LAUNCHER = "text_generation_launcher"


class Log:
    """Writes log lines to standard output; `silent` writes none. Every line is flushed, as it is in Rust."""

    def __init__(self, *, as_json: bool, silent: bool = False) -> None:
        self._as_json = as_json
        self._silent = silent
        self._launcher_colors = not os.environ.get("NO_COLOR")
        self._router_colors = os.environ.get("LOG_COLORIZE") != "1"  # TGI has it the wrong way round

    def launcher(self, message: str, level: str = "INFO", span: str = "", **fields: Any) -> None:
        """Print a line of the launcher, or of a shard, which the launcher repeats without a span."""
        if self._as_json:
            head: dict[str, Any] = {"timestamp": _now(), "level": level, "fields": {"message": message}}
            self._print(_json({**head, "target": LAUNCHER, **_spans(span, fields)}))
        else:
            paint = _painter(self._launcher_colors)
            place = f"{paint('1', span)}: " if span else ""
            tail = "".join(f" {paint('3', name)}{paint('2', '=')}{value}" for name, value in fields.items())
            target = paint("2", LAUNCHER) + paint("2", ":")
            self._print(f"{_stamp(paint, level)} {place}{target} {message}{tail}")

    def router(
        self, message: str, where: tuple[str, str, int], level: str = "INFO", span: str = "", **fields: Any
    ) -> None:
        """Print a line of the router; `where` is the Rust module, its file, and the line in it."""
        target, filename, line_number = where
        if self._as_json:
            head = {"timestamp": _now(), "level": level, "message": message, "target": target}
            place = {"filename": filename, "line_number": line_number}
            self._print(_json({**head, **place, **_spans(span, fields)}))
        else:
            paint = _painter(self._router_colors)
            inner = " ".join(f"{paint('3', name)}{paint('2', '=')}{_quoted(value)}" for name, value in fields.items())
            place_text = f"{paint('1', span)}{paint('1', '{')}{inner}{paint('1', '}')}: " if span else ""
            source = f"{paint('2', target)}{paint('2', ':')} {paint('2', filename)}{paint('2', ':')}{line_number}:"
            self._print(f"{_stamp(paint, level)} {place_text}{source} {message}")

    def bare(self, text: str) -> None:
        """Print what is no log line in any format: a panic of the router, say."""
        self._print(text)

    def error(self, variant: str) -> None:
        """Print the launcher's last words, on standard error."""
        if not self._silent:
            print(f"Error: {variant}", file=sys.stderr, flush=True)  # noqa: T201

    def _print(self, line: str) -> None:
        if not self._silent:
            print(line, flush=True)  # noqa: T201


def _painter(colors: bool) -> Painter:
    return (lambda code, text: f"\x1b[{code}m{text}\x1b[0m") if colors else (lambda *code_and_text: code_and_text[1])


def _stamp(paint: Painter, level: str) -> str:
    return f"{paint('2', _now())} {paint(LEVEL_COLORS[level], level.rjust(5))}"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _spans(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    if not name:
        return {}
    span = {**fields, "name": name}
    return {"span": span, "spans": [span]}


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) and " { " not in value else str(value)


def _json(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, separators=(",", ":"))
