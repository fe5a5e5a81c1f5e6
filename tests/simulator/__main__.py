"""`scripts/simulate`: many days by many seeds, or one day whose seed failed, told in full."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial

import click

from tests.simulator import traces as replayed
from tests.simulator.planted import BUGS, parts_with
from tests.simulator.promises import Day, simulate
from tests.simulator.traces import MORE, POLICIES, SHAPES, Outcome, Setting

SHARE = 25  # days that one process lives before it tells how they were


@dataclass
class Sums:
    """What all days came to that were lived."""

    days: int = 0
    days_with_gpus: int = 0
    starts: int = 0
    evictions: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)

    def add(self, day: Day) -> None:
        self.days += 1
        self.days_with_gpus += bool(day.gpus)
        self.starts += day.starts
        self.evictions += day.evictions
        self.outcomes = dict(Counter(self.outcomes) + Counter(day.outcomes))


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
    """Watch promises P1 to P11 after every step. Status 1 if one is broken.

    P3 says of the GPUs, on three days of four: never over-committed, nobody waits for them beyond his bound, no busy
    one makes room, none in vain or before it has served, and none comes or goes beside a start.
    """
    began = time.monotonic()
    seeds = [seed] if seed is not None else range(first_seed, first_seed + days)
    sums = Sums()
    broken: Day | None = None
    for day in _live(seeds, plant, quiet=as_json):
        sums.add(day)
        if day.broke:
            broken = day
            break
        if seed is not None and not as_json:
            click.echo("\n".join(day.trace))
    took_s = time.monotonic() - began
    if as_json:
        click.echo(json.dumps(_report(sums, broken, took_s)))
    else:
        _tell(sums, broken, took_s, plant, whole=seed is not None)
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


def _report(sums: Sums, broken: Day | None, took_s: float) -> dict[str, object]:
    failure = {"seed": broken.seed, "broke": broken.broke, "trace": broken.trace} if broken else None
    return {**asdict(sums), "failure": failure, "seconds": round(took_s, 1)}


def _tell(sums: Sums, broken: Day | None, took_s: float, plant: str | None, *, whole: bool) -> None:
    if broken:
        click.echo("\n".join(broken.trace if whole else broken.trace[-30:]))
        click.echo(f"\nseed {broken.seed}: {broken.broke}", err=True)
        planted = f" --plant {plant}" if plant else ""
        click.echo(f"To live that day again: scripts/simulate promises --seed {broken.seed}{planted}", err=True)
    click.echo(f"{sums.days} days, {sums.starts} starts, {sum(sums.outcomes.values())} requests in {took_s:.0f} s")
    click.echo(f"{sums.days_with_gpus} of the days with GPUs, {sums.evictions} evictions")
    for outcome, times in Counter(sums.outcomes).most_common():
        click.echo(f"  {times:9}  {outcome}")
    click.echo("broken" if broken else "every promise held")


@main.command(help=replayed.__doc__.replace("\n- ", "\n\n- ") if replayed.__doc__ else None)
@click.option("--seeds", default=20, show_default=True, type=click.IntRange(1), help="Days of each shape: their mean.")
@click.option("--first-seed", default=0, show_default=True, help="Seed of the first of them.")
@click.option("--models", default=6, show_default=True, type=click.IntRange(2), help="How many models there are.")
@click.option("--gpus", default=3, show_default=True, type=click.IntRange(1), help="How many GPUs, of 24 GiB each.")
@click.option("--gap", default=60.0, show_default=True, type=click.FloatRange(1), help="Seconds between requests.")
@click.option(
    "--load", default=(20.0, 90.0), show_default=True, type=(float, float), help="Seconds that starts take: from, to."
)
@click.option("--mixed", is_flag=True, help="Models of mixed sizes: shares of a GPU, one, or two of them.")
@click.option("--more", is_flag=True, help="Two more policies, for comparison.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: {shape: {policy: figures}}.")
def traces(
    seeds: int,
    first_seed: int,
    models: int,
    gpus: int,
    gap: float,
    load: tuple[float, float],
    mixed: bool,
    more: bool,
    as_json: bool,
) -> None:
    if not 0 < load[0] <= load[1]:
        raise click.BadParameter("a start takes some time, and FROM is not above TO", param_hint="--load")
    if mixed and gpus < 2:
        raise click.BadParameter("mixed sizes need two GPUs", param_hint="--gpus")
    setting = Setting(models=models, gpus=gpus, gap_s=gap, load_s=load, mixed=mixed)
    table = _replayed(setting, range(first_seed, first_seed + seeds), [*POLICIES, *(MORE if more else ())])
    if as_json:
        click.echo(
            json.dumps({shape: {policy: asdict(each) for policy, each in row.items()} for shape, row in table.items()})
        )
    else:
        _tell_figures(table)


def _replayed(setting: Setting, seeds: range, policies: list[str]) -> dict[str, dict[str, Outcome]]:
    jobs = [(shape, policy, seed, setting) for shape in SHAPES for policy in policies for seed in seeds]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        outcomes = dict(zip(jobs, pool.map(replayed.replay, *zip(*jobs, strict=True), chunksize=4), strict=True))
    return {
        shape: {
            policy: replayed.averaged(outcomes[shape, policy, seed, setting] for seed in seeds) for policy in policies
        }
        for shape in SHAPES
    }


def _tell_figures(table: dict[str, dict[str, Outcome]]) -> None:
    click.echo("| shape | policy | cold starts | wait p50 (s) | wait p99 (s) | switching (s) |")
    click.echo("|---|---|--:|--:|--:|--:|")
    for shape, row in table.items():
        for policy, each in row.items():
            click.echo(
                f"| {shape} | {policy} | {each.cold_starts:.0f} | {each.wait_p50_s:.0f} | {each.wait_p99_s:.0f} "
                f"| {each.switching_s:.0f} |"
            )


if __name__ == "__main__":
    main(prog_name="scripts/simulate")
