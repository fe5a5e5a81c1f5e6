"""What the command line writes: results on stdout, and on stderr how far it has come."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import sys
import time
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from typing import TypeVar

import click

from gateway.client import AsyncInferenceClient, ClientError, Progress

COMING_UP = ("starting", "loading")
LOOK_EVERY_S = 1.0

T = TypeVar("T")


def echo_json(value: object) -> None:
    click.echo(json.dumps(value, ensure_ascii=False))


def echo_text(text: str, *, end: str = "\n") -> None:
    """Write text that somebody else made: as it is, but harmless to a terminal."""
    if sys.stdout.isatty():
        text = harmless(text)
    click.echo(text + end, nl=False, color=True)  # color: or click would cut escape sequences out of files, too


def harmless(text: str) -> str:
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as columns, the last one ragged."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


# ---- progress -------------------------------------------------------------------------------------------------------


async def with_progress(client: AsyncInferenceClient, model_id: str, work: Awaitable[T], shown: bool) -> T:
    """Return what `work` returns; meanwhile tell on stderr how far the model's start has come."""
    watching = asyncio.create_task(_watch(client, model_id)) if shown else None
    try:
        return await work
    finally:
        if watching:
            watching.cancel()
            await asyncio.wait([watching])


async def _watch(client: AsyncInferenceClient, model_id: str) -> None:
    display = Display()
    try:
        with suppress(ClientError):  # the work itself meets it too, and reports it
            while True:
                model = await client.model(model_id)
                if model["state"] in COMING_UP:
                    phase = model["progress"]["phase"] if model["progress"] else model["state"]
                    words = how_far(model["progress"]) or phase
                    display.show(f"{model_id}: {phase}", f"{model_id}: {words}", left_of(model["progress"]))
                await asyncio.sleep(LOOK_EVERY_S)
    finally:
        display.clear()


def how_far(progress: Progress | None) -> str:
    """Return how far a start has come: `loading 3/5 files, about 40 s left`."""
    return f"{_counted(progress)}{left_of(progress)}" if progress else ""


def left_of(progress: Progress | None) -> str:
    """Return the estimate of how long it goes on, to be appended: `, about 40 s left`; empty if there is none."""
    eta_s = progress.get("eta_s") if progress else None
    if eta_s is None:
        return ""
    if eta_s < 100:
        return f", about {math.ceil(eta_s)} s left"
    return f", about {math.ceil(eta_s / 60)} min left"


def _counted(progress: Progress) -> str:
    scale, unit = (1e6, "MB") if progress["unit"] == "bytes" else (1, progress["unit"])
    amounts = [f"{amount / scale:.0f}" for amount in (progress["done"], progress["total"]) if amount is not None]
    return " ".join(filter(None, [progress["phase"], "/".join(amounts), unit if amounts else None]))


class Display:
    """A line on stderr: rewritten on a terminal, elsewhere a new one for each phase."""

    def __init__(self) -> None:
        self._rewritten = sys.stderr.isatty()
        self._began_at = time.monotonic()
        self._phase = ""

    def show(self, phase: str, words: str, left: str = "") -> None:
        """Show `words`, or elsewhere than on a terminal the phase with what is `left` of it when it begins."""
        if self._rewritten:
            self._rewrite(f"{harmless(words)} ({time.monotonic() - self._began_at:.0f} s)")
        elif phase != self._phase:
            click.echo(f"{phase}{left}", err=True)
        self._phase = phase

    def clear(self) -> None:
        if self._rewritten and self._phase:
            self._rewrite("")

    def _rewrite(self, line: str) -> None:
        room = shutil.get_terminal_size().columns - 1
        click.echo(f"\r\x1b[2K{line[:room]}", nl=False, err=True, color=True)
