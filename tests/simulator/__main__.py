"""`scripts/simulate`: many days by many seeds, or one day whose seed failed, told in full."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import click

from tests.simulator.planted import BUGS, parts_with
from tests.simulator.promises import Day, simulate

SHARE = 25  # days that one process lives before it tells how they were


@click.group()
def main() -> None:
    """Simulated days of a gateway: virtual time, real code, servers of bad manners, every interleaving by seed."""


@main.command()
@click.option("--days", default=200, show_default=True, help="How many days to live, each with its own seed.")
@click.option("--seed", type=int, help="Live this one day only, and tell its story.")
@click.option("--first-seed", default=0, show_default=True, help="Seed of the first of the days.")
@click.option("--plant", type=click.Choice(BUGS), help="Plant a bug that breaks this promise.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def promises(days: int, seed: int | None, first_seed: int, plant: str | None, as_json: bool) -> None:
    """Watch promises P1, P2, P4 to P11 after every step. Status 1 if one is broken."""
    began = time.monotonic()
    seeds = [seed] if seed is not None else range(first_seed, first_seed + days)
    lived, outcomes, starts = 0, Counter[str](), 0
    broken: Day | None = None
    for day in _live(seeds, plant, quiet=as_json):
        lived, starts = lived + 1, starts + day.starts
        outcomes.update(day.outcomes)
        if day.broke:
            broken = day
            break
        if seed is not None and not as_json:
            click.echo("\n".join(day.trace))
    took_s = time.monotonic() - began
    if as_json:
        click.echo(json.dumps(_report(lived, starts, outcomes, broken, took_s)))
    else:
        _tell(lived, starts, outcomes, broken, took_s, plant, whole=seed is not None)
    sys.exit(1 if broken else 0)


def _live(seeds: Iterable[int], plant: str | None, *, quiet: bool) -> Iterator[Day]:
    seeds = list(seeds)
    if len(seeds) == 1:
        yield _day(plant, seeds[0])
        return
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for number, day in enumerate(pool.map(partial(_day, plant), seeds, chunksize=SHARE), 1):
            if not quiet and number % 500 == 0:
                click.echo(f"{number} of {len(seeds)} days", err=True)
            yield day
            if day.broke:
                pool.shutdown(wait=False, cancel_futures=True)
                return


def _day(plant: str | None, seed: int) -> Day:
    return simulate(seed, **parts_with(plant)) if plant else simulate(seed)


def _report(lived: int, starts: int, outcomes: Counter[str], broken: Day | None, took_s: float) -> dict[str, object]:
    failure = {"seed": broken.seed, "broke": broken.broke, "trace": broken.trace} if broken else None
    return {"days": lived, "starts": starts, "outcomes": outcomes, "failure": failure, "seconds": round(took_s, 1)}


def _tell(
    lived: int,
    starts: int,
    outcomes: Counter[str],
    broken: Day | None,
    took_s: float,
    plant: str | None,
    *,
    whole: bool,
) -> None:
    if broken:
        click.echo("\n".join(broken.trace if whole else broken.trace[-30:]))
        click.echo(f"\nseed {broken.seed}: {broken.broke}", err=True)
        planted = f" --plant {plant}" if plant else ""
        click.echo(f"To live that day again: scripts/simulate promises --seed {broken.seed}{planted}", err=True)
    click.echo(f"{lived} days, {starts} starts, {outcomes.total()} requests in {took_s:.0f} s")
    for outcome, times in outcomes.most_common():
        click.echo(f"  {times:9}  {outcome}")
    click.echo("broken" if broken else "every promise held")


if __name__ == "__main__":
    main(prog_name="scripts/simulate")
