"""`scripts/bench`: what is promised in milliseconds and ratios, measured on this machine, side by side with others."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import click

from tests.bench import cold, departures, plot, relay, scale, soak, telling
from tests.bench.budgets import Budget, all_kept, of_cold_start, of_relay, of_scale, of_soak
from tests.bench.machine import CannotMeasure, about, cores
from tests.bench.rivals import ADDRESSES, EVERY, litellm_version

CANNOT = 2
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
QUICK_RUNS, QUICK_SECONDS = 1, 1.0


class Group(click.Group):
    """Says in words what cannot be measured, and why."""

    def invoke(self, ctx: click.Context) -> Any:
        signal.signal(signal.SIGTERM, _leave)
        try:
            return super().invoke(ctx)
        except CannotMeasure as error:
            click.echo(str(error), err=True)
            ctx.exit(CANNOT)


def _leave(number: int, _: object) -> None:
    """End as an exception does, so that whatever was started ends too."""
    sys.exit(128 + number)


@click.group(cls=Group)
def main() -> None:
    """Measure what is promised. The status is 1 if a promise is missed, 2 if something could not be measured at all.

    Needs nginx and wrk (apt-get install nginx-light wrk), and a package index for LiteLLM, once: it goes into a virtual
    environment of its own in the user's cache. The machine should have two cores or more, and nothing else to do.
    """


def _tell_progress(words: str) -> None:
    click.echo(f"... {words}", err=True)


def _machine() -> dict[str, Any]:
    found = about()
    found["pinning"] = str(cores())
    return found


def _end(budgets: Sequence[Budget]) -> None:
    sys.exit(0 if all_kept(budgets) else 1)


# ---- relay ----


NOTES = """
requests/s and CPU: wrk, as fast as it goes. Times of what is not paced: an open loop at {one:,} requests/s (1
connection) or {rate}, from when each was due; none where fewer are answered. `calm`: the same at {calm} requests/s,
where processors sleep between two requests and have forgotten all of it. Times of tokens: from written to read; those
that were never read are not in them (`unfinished`). LiteLLM is asked at /v1/completions for what is /generate
elsewhere. The gateway always asks engine tgi for a stream, also where its caller wants none."""


def _plan_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--runs", default=5, show_default=True, help="How often to measure; the medians count."),
        click.option("--seconds", default=2.0, show_default=True, help="How long each measurement takes."),
        click.option("--tokens", default=8, show_default=True, help="Length of the answers that are there at once."),
        click.option(
            "--rate", default=300, show_default=True, help="Requests/s of the open loop, several connections."
        ),
        click.option("--quick", is_flag=True, help="One run of one second each: a look, and no more."),
        click.option("--only", multiple=True, type=click.Choice(list(EVERY)), help="Only these contestants."),
        click.option("--address", multiple=True, type=click.Choice(ADDRESSES), help="Only these addresses."),
        click.option("--connections", multiple=True, type=int, help="Only so many connections or streams."),
        click.option("--svg", type=click.Path(path_type=Path), help="Draw the picture of the README into this file."),
        AS_JSON,
    ):
        command = option(command)
    return command


def _plan(
    runs: int,
    seconds: float,
    tokens: int,
    rate: int,
    only: Sequence[str],
    address: Sequence[str],
    connections: Sequence[int],
    *,
    quick: bool,
) -> relay.Plan:
    return relay.Plan(
        runs=QUICK_RUNS if quick else runs,
        seconds=QUICK_SECONDS if quick else seconds,
        tokens=tokens,
        contestants=tuple(only) or tuple(EVERY),
        connections=tuple(connections) or relay.CONNECTIONS,
        streams=tuple(connections) or relay.STREAMS,
        addresses=tuple(address) or ADDRESSES,
        rates_per_s=(relay.Plan.rates_per_s[0], rate),
    )


def _relay(plan: relay.Plan, svg: Path | None) -> dict[str, Any]:
    """Return what was measured and judged; draw it, if wanted."""
    machine = _machine()
    measured = relay.measure(plan, cores(), _tell_progress)
    if "litellm" in plan.contestants:
        machine["versions"]["litellm"] = litellm_version()
    results = measured.results
    if svg:
        caption = [*telling.of_machine(machine), f"medians of {plan.runs} runs"]
        svg.parent.mkdir(parents=True, exist_ok=True)
        svg.write_text(plot.svg(plot.panels(results), caption))
    return {"machine": machine, "plan": plan, "measured": measured, "budgets": of_relay(results)}


def _relay_json(found: dict[str, Any]) -> dict[str, Any]:
    results = found["measured"].results
    medians = [
        {
            "contestant": name,
            **asdict(case),
            **{figure: results.median(name, case, figure) for figure in dict.fromkeys(_figures(results))},
            "added_p50_ms": results.added(name, case, "p50_ms"),
            "added_calm_p50_ms": results.added(name, case, "calm_p50_ms"),
            "added_p99_ms": results.added(name, case, "p99_ms"),
        }
        for case in results.cases
        for name in results.contestants
    ]
    return {
        "machine": found["machine"],
        "plan": asdict(found["plan"]),
        "not_measured": found["measured"].missing,
        "medians": medians,
        "samples": [asdict(sample) for sample in results.samples],
    }


def _figures(results: Any) -> list[Any]:
    return [figure for sample in results.samples for figure in sample.figures]


def _tell_relay(found: dict[str, Any]) -> None:
    for line in (*telling.of_machine(found["machine"]), *telling.of_relay(found["measured"].results)):
        click.echo(line)
    for what, why in found["measured"].missing.items():
        click.echo(f"not measured: {what}: {why}")
    one, rate = found["plan"].rates_per_s
    click.echo(NOTES.format(one=one, rate=rate, calm=found["plan"].calm_rate_per_s))


@main.command("relay")
@_plan_options
def relay_command(as_json: bool, svg: Path | None, **said: Any) -> None:
    """Compare nobody, nginx, LiteLLM and this gateway in front of the same upstream."""
    found = _relay(_plan(**said), svg)
    _say(found, [], as_json=as_json)


def _say(found: dict[str, Any], others: Sequence[Found], *, as_json: bool) -> None:
    budgets = [*found["budgets"], *(budget for other in others for budget in other.budgets)]
    if as_json:
        more = {other.name: other.said for other in others}
        click.echo(json.dumps({**_relay_json(found), **more, "budgets": [budget.as_json() for budget in budgets]}))
    else:
        _tell_relay(found)
        for line in (line for other in others for line in other.lines):
            click.echo(line)
        _tell_budgets(budgets)
    _end(budgets)


def _tell_budgets(budgets: Sequence[Budget]) -> None:
    click.echo()
    for line in telling.of_budgets(budgets):
        click.echo(line)


# ---- cold starts, and many models ----


class Found(NamedTuple):
    """What was measured besides the relay: for machines, for people, and judged."""

    name: str
    said: dict[str, Any]
    lines: list[str]
    budgets: list[Budget]


def _cold(starts: int) -> Found:
    found = cold.measure(starts, cores(), _tell_progress)
    said = {"starts": [asdict(each) for each in found]}
    return Found("cold", said, telling.of_cold_starts(found), of_cold_start(*cold.medians(found)))


def _scale(seconds: float) -> Found:
    found = scale.measure(seconds, cores(), _tell_progress)
    budgets = of_scale(found.p99_ms, found.idle_cpu_percent, found.rss_mib)
    return Found("scale", asdict(found), telling.of_scale(found), budgets)


def _say_one(found: Found, *, as_json: bool) -> None:
    machine = _machine()
    if as_json:
        budgets = [each.as_json() for each in found.budgets]
        click.echo(json.dumps({"machine": machine, found.name: found.said, "budgets": budgets}))
    else:
        for line in (*telling.of_machine(machine), *found.lines):
            click.echo(line)
        _tell_budgets(found.budgets)
    _end(found.budgets)


@main.command("cold")
@click.option("--starts", default=30, show_default=True, help="How many models are started, one after another.")
@AS_JSON
def cold_command(starts: int, as_json: bool) -> None:
    """Measure what the gateway adds to a cold start: before the server's own loading, and after it."""
    _say_one(_cold(starts), as_json=as_json)


@main.command("scale")
@click.option("--seconds", default=40.0, show_default=True, help="How long it is idle, and then asked.")
@AS_JSON
def scale_command(seconds: float, as_json: bool) -> None:
    """Measure a catalog of a thousand models, two hundred of which are alive and watched."""
    _say_one(_scale(seconds), as_json=as_json)


@main.command("soak")
@click.option("--minutes", default=30.0, show_default=True, help="How long the load goes on; two are a first look.")
@AS_JSON
def soak_command(minutes: float, as_json: bool) -> None:
    """Measure what a long mixed load leaves behind: callers who leave and models that fail are part of it."""
    found = soak.measure(minutes, cores(), _tell_progress)
    _say_one(Found("soak", asdict(found), telling.of_soak(found), of_soak(found)), as_json=as_json)


@main.command("all")
@_plan_options
def all_command(as_json: bool, svg: Path | None, **said: Any) -> None:
    """Measure relay, cold and scale, and tell every budget in one table."""
    quick = said["quick"]
    found = _relay(_plan(**said), svg)
    others = [_cold(10 if quick else 30), _scale(10.0 if quick else 40.0)]
    _say(found, others, as_json=as_json)


# ---- departures ----


@main.command("departures")
@click.option("--runs", default=10, show_default=True, help="How often to measure each phase at each address.")
@AS_JSON
def departures_command(runs: int, as_json: bool) -> None:
    """Measure how soon the engine is free of a caller who has left. Status 1 if that took longer than promised."""
    measured = departures.measure(runs, lambda phase: None if as_json else _tell_progress(phase))
    found = departures.report(measured, runs)
    if as_json:
        click.echo(json.dumps({"departures": found}))
    else:
        _tell_departures(found)
    sys.exit(0 if found["kept"] else 1)


def _tell_departures(found: dict[str, Any]) -> None:
    click.echo(f"{'a caller leaves':24}{'min':>9}{'median':>9}{'max':>9}   in ms")
    for phase, took in found["phases"].items():
        click.echo(f"{phase:24}{took['min_ms']:9.2f}{took['median_ms']:9.2f}{took['max_ms']:9.2f}")
        for address, its in took["addresses"].items():
            click.echo(f"  {address:22}{its['min_ms']:9.2f}{its['median_ms']:9.2f}{its['max_ms']:9.2f}")
    words = "never longer than" if found["kept"] else "LONGER THAN"
    click.echo(f"{words} {found['bound_ms']:g} ms, in {found['runs']} runs at each address")


main()
