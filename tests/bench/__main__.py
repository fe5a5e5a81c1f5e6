"""`scripts/bench`: what is promised in milliseconds, measured on this machine, against doubles."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from tests.bench import departures


@click.command()
@click.option("--runs", default=10, show_default=True, help="How often to measure each phase at each address.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(runs: int, as_json: bool) -> None:
    """Measure how soon the engine is free of a caller who has left. Status 1 if that took longer than promised."""
    measured = departures.measure(runs, lambda phase: None if as_json else click.echo(f"... {phase}", err=True))
    found = departures.report(measured, runs)
    if as_json:
        click.echo(json.dumps({"departures": found}))
    else:
        _tell(found)
    sys.exit(0 if found["kept"] else 1)


def _tell(found: dict[str, Any]) -> None:
    click.echo(f"{'a caller leaves':24}{'min':>9}{'median':>9}{'max':>9}   in ms")
    for phase, took in found["phases"].items():
        click.echo(f"{phase:24}{took['min_ms']:9.2f}{took['median_ms']:9.2f}{took['max_ms']:9.2f}")
        for address, its in took["addresses"].items():
            click.echo(f"  {address:22}{its['min_ms']:9.2f}{its['median_ms']:9.2f}{its['max_ms']:9.2f}")
    words = "never longer than" if found["kept"] else "LONGER THAN"
    click.echo(f"{words} {found['bound_ms']:g} ms, in {found['runs']} runs at each address")


main()
