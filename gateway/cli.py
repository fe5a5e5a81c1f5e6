"""The command `gateway`: serves, checks the catalog, and talks to a gateway that runs.

Words for people go to stderr, results to stdout. The exit status is 0, 1 (it failed) or 2 (bad usage, environment or
file); 130 after Ctrl-C. The modules that serve are imported by the commands that need them: `gateway models` shall
answer at once.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gateway.commands import Commands, Failed, json_option
from gateway.errors import CatalogError, StartFailed
from gateway.remote import COMMANDS
from gateway.terminal import echo_json, echo_text, table

if TYPE_CHECKING:
    from gateway.catalog import Catalog, ModelSpec


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="tgi-gateway", prog_name="gateway")
def main() -> None:
    """One address for many language models: each one's server runs only while it is wanted.

    \b
    To begin with:
      gateway check                                     what models.yaml says, and what is wrong with it
      gateway serve                                     serve its models at http://127.0.0.1:8000
      gateway generate smollm2-135m "The sky is" --stream
                                                        in another terminal: one answer, starting the model
      gateway chat smollm2-135m                         a conversation with it
      gateway models                                    what runs, and what has failed

    All commands but `serve`, `check`, `doctor` and `keys` talk to a gateway that runs: at --url, at GATEWAY_URL, or on
    this machine's port 8000. The exit status is 0, 1 if the command failed, 2 if the usage, environment or a file is
    wrong, and 130 after Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # no answer is lost for a character that the terminal lacks


# ---- serve ----------------------------------------------------------------------------------------------------------


@main.command()
@click.option("--host", help="Where to listen; anything but loopback must be allowed explicitly. [127.0.0.1]")
@click.option("--port", help="Its port; 0 takes a free one, and the address printed is the real one. [8000]")
@click.option("--catalog", metavar="FILE", help="The file of models. [models.yaml]")
@click.option("--checkpoint", metavar="ID", help="The model for requests that name none: the catalog's default_model.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where llama.cpp computes. [auto]")
@click.option(
    "--reload",
    is_flag=True,
    help="Serve afresh whenever the gateway's own code changes (for developers; a changed catalog needs no flag).",
)
def serve(checkpoint: str | None, reload: bool, **flags: str | None) -> None:
    """Serve the models of the catalog until SIGTERM or Ctrl-C.

    Each option overrides its environment variable (GATEWAY_HOST, GATEWAY_PORT, GATEWAY_CATALOG, GATEWAY_DEVICE); there
    are more of those, and GATEWAY_LOG_FORMAT=json makes each log line on stderr a JSON object. One line on stdout
    says where the gateway is, as soon as it serves. It follows the catalog's file: a changed entry touches its own
    model alone, and a file that is wrong none (GET /status says what is). Asked to end, it lets requests finish within
    their models' drain_timeout, stops the models that are its own processes, and exits with 0.

    \b
    Examples:
      gateway serve
      gateway serve --port 8080 --checkpoint smollm2-135m --device cpu
      GATEWAY_API_KEYS_FILE=keys.jsonl gateway serve --host 0.0.0.0    # for those who have a key: `gateway keys`
      GATEWAY_ALLOW_INSECURE=true gateway serve --host 0.0.0.0         # no keys: only where something else protects it
    """
    from gateway import serving

    said = {f"GATEWAY_{flag.upper()}": value for flag, value in flags.items() if value is not None}
    with _naming_flags(said):
        what = serving.prepared({**os.environ, **said}, checkpoint)
    try:
        listener = serving.listen(what.settings.host, what.settings.port)
    except serving.CannotListen as error:
        raise Failed([str(error)], {"error_code": "CANNOT_LISTEN", "detail": str(error)}, as_json=False) from None
    with listener:
        if reload:
            os.environ.update(said, **{serving.CHECKPOINT: checkpoint or ""})
        status = (serving.serve_reloading if reload else serving.serve)(what, listener)
    raise click.exceptions.Exit(status)


@contextmanager
def _naming_flags(said: Mapping[str, str]) -> Iterator[None]:
    """Let complaints about a variable that a flag has set name the flag."""
    try:
        yield
    except CatalogError as error:
        raise CatalogError([_naming_flag(complaint, said) for complaint in error.complaints]) from None


def _naming_flag(complaint: str, said: Mapping[str, str]) -> str:
    name, colon, rule = complaint.partition(":")
    return f"--{name.removeprefix('GATEWAY_').lower()}{colon}{rule}" if name in said else complaint


# ---- check ----------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--schema", is_flag=True, help="Print the JSON Schema of such files instead, for editors.")
@json_option
def check(file: Path | None, schema: bool, as_json: bool) -> None:
    """Say what is wrong with a catalog, or what it would run where.

    FILE is the one that GATEWAY_CATALOG names, or else models.yaml. Nothing is started. A catalog that cannot be used
    is exit status 2, with a line on stderr for each of its faults; so is a GATEWAY_GPUS that says no GPUs. What keeps
    one model from running here, as GPUs that it can never have, is among its notes.

    \b
    Examples:
      gateway check
      gateway check /etc/gateway/models.yaml --json
      gateway check --schema > models.schema.json
    """
    from gateway.catalog_file import load_catalog
    from gateway.catalog_schema import catalog_schema

    if schema:
        click.echo(json.dumps(catalog_schema(), indent=2))
        return
    catalog = load_catalog(file or Path(os.environ.get("GATEWAY_CATALOG") or "models.yaml"), os.environ)
    lacking = _lacking_gpus(catalog)
    models = [_plan(spec, lacking.get(spec.id, ())) for spec in catalog.models.values()]
    if as_json:
        echo_json({"catalog": str(catalog.path), "default_model": catalog.default_model, "models": models})
        return
    lack = f" {len(lacking)} of its {len(models)} models may lack GPUs here (see NOTES)." if lacking else ""
    default = f"Requests that name no model get {catalog.default_model or 'an error'}."
    click.echo(f"{catalog.path} can be read.{lack} {default}\n")
    rows = [
        [*(model[key] for key in ("id", "engine", "runtime", "runs")), "; ".join(model["notes"])] for model in models
    ]
    click.echo(table([["MODEL", "ENGINE", "RUNTIME", "RUNS", "NOTES"], *rows]))


def _lacking_gpus(catalog: Catalog) -> dict[str, list[str]]:
    """Return, by model, why it cannot have what it asks for of the GPUs that GATEWAY_GPUS or the driver tells."""
    from gateway.app import inventory_of
    from gateway.fleet.fitting import crowded_out, misfits
    from gateway.settings import load_settings

    said = {name: value for name, value in os.environ.items() if name == "GATEWAY_GPUS"}
    devices = inventory_of(load_settings(said)).devices()
    specs = list(catalog.models.values())
    lacking: dict[str, list[str]] = {}
    for model, words in [*misfits(specs, devices), *crowded_out(specs, devices)] if devices else ():
        lacking.setdefault(model, []).append(words)
    return lacking


def _plan(spec: ModelSpec, lacking: Sequence[str]) -> dict[str, Any]:
    from gateway.catalog import deferred

    runs, wrong = _what_runs(spec)
    notes = [*deferred(spec), *wrong, *_missing_weights(spec), *lacking]
    return {"id": spec.id, "engine": spec.engine, "runtime": spec.runtime, "runs": runs, "notes": notes}


def _what_runs(spec: ModelSpec) -> tuple[str, list[str]]:
    """Return what would be run, and why it cannot be, if so."""
    from gateway.app import planned

    if spec.weights_source:
        return str(spec.weights or spec.weights_source), []
    try:
        launch = planned(spec)
    except StartFailed as error:
        return str(spec.url or spec.hf_name), [error.detail]
    if launch and launch.url:
        return launch.url, []
    if not launch or not launch.container:
        return str(spec.hf_name), []
    gpus = spec.gpus if isinstance(spec.gpus, int) else ", ".join(spec.gpus)
    return f"{spec.hf_name} in {launch.container.image}, GPUs: {gpus}", []


def _missing_weights(spec: ModelSpec) -> Iterator[str]:
    if spec.weights_source and spec.weights is None:
        yield "the package of its weights is not installed"
    elif spec.weights and not spec.weights.is_file():
        yield "there is no such weights file"


# ---- keys -----------------------------------------------------------------------------------------------------------


@main.group()
def keys() -> None:
    """Make, list and remove the keys that callers show.

    They are in a file of their own, which has no key but only what tells whether one is right. A gateway that is given
    this file (GATEWAY_API_KEYS_FILE) answers nobody without a key. It reads the file when it starts: restart it
    after each change.

    \b
    Examples:
      gateway keys add alice --rights generate --file keys.jsonl
      GATEWAY_API_KEYS_FILE=keys.jsonl gateway serve --host 0.0.0.0
      GATEWAY_API_KEY=gw_... gateway models
    """


file_option = click.option(
    "--file",
    "file",
    envvar="GATEWAY_API_KEYS_FILE",
    show_envvar=True,
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The file of keys.",
)


def _rights(_: click.Context, __: click.Parameter, written: str) -> list[str]:
    from gateway.keys import RIGHTS

    rights = [right.strip() for right in written.split(",")]
    if unknown := [right for right in rights if right not in RIGHTS]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(RIGHTS)}.")
    return rights


@contextmanager
def _changing(as_json: bool) -> Iterator[None]:
    from gateway.keys import NoChange

    try:
        yield
    except NoChange as error:
        raise Failed([str(error)], {"error_code": "NO_CHANGE", "detail": str(error)}, as_json) from None


@keys.command("add")
@click.argument("name")
@click.option(
    "--rights",
    required=True,
    callback=_rights,
    metavar="RIGHT,...",
    help="generate: everything but what `manage` is for: start, stop, restart, pull and logs.",
)
@click.option("--requests-per-minute", type=click.IntRange(1, 1_000_000), help="[no limit]")
@click.option("--max-concurrency", type=click.IntRange(1, 1_000_000), help="Requests under way at once. [no limit]")
@file_option
@json_option
def keys_add(name: str, rights: Sequence[str], file: Path, as_json: bool, **limits: int | None) -> None:
    """Make a key and print it, this once: nobody can find it out again.

    The file is made if need be, for its owner only.
    """
    from gateway.keys import add_key

    with _changing(as_json):
        token = add_key(file, name, rights, **limits)
    if as_json:
        echo_json({"name": name, "key": token, "rights": rights, **limits})
        return
    click.echo(token)
    click.echo(f"This key is shown only now. A gateway that uses {file} knows it from its next start.", err=True)


@keys.command("list")
@file_option
@json_option
def keys_list(file: Path, as_json: bool) -> None:
    """List the keys of the file by name, with what each may do."""
    from gateway.keys import RIGHTS, load_keys

    found: list[dict[str, Any]] = [
        {
            "name": key.name,
            "rights": [right for right in RIGHTS if right in key.rights],
            "requests_per_minute": key.requests_per_minute,
            "max_concurrency": key.max_concurrency,
        }
        for key in load_keys(file)
    ]
    if as_json:
        echo_json({"keys": found})
        return
    rows = [
        [key["name"], ",".join(key["rights"]), *(str(key[limit] or "-") for limit in list(key)[2:])] for key in found
    ]
    click.echo(table([["NAME", "RIGHTS", "REQUESTS/MINUTE", "AT ONCE"], *rows]))


@keys.command("remove")
@click.argument("name")
@file_option
@json_option
def keys_remove(name: str, file: Path, as_json: bool) -> None:
    """Take a key out of the file. A gateway that runs knows it until its next start."""
    from gateway.keys import remove_key

    with _changing(as_json):
        remove_key(file, name)
    if as_json:
        echo_json({"removed": name})
    else:
        click.echo(f"Removed {name}. A gateway that uses {file} still knows it until its next start.", err=True)


# ---- doctor ---------------------------------------------------------------------------------------------------------


@main.command()
@click.option("--catalog", metavar="FILE", help="The file of models. [GATEWAY_CATALOG, or models.yaml]")
@json_option
def doctor(catalog: str | None, as_json: bool) -> None:
    """Say what would keep models from running here, and what to do about it.

    Looks at the environment, keys, catalog, weights, Docker Engine, GPUs and their toolkit, disk, images and ports, as
    `gateway serve` would find them in this shell. Changes nothing, and starts nothing. The exit status is 1 if there
    is a problem; warnings are none.

    \b
    Examples:
      gateway doctor
      gateway doctor --json | jq -r '.findings[] | select(.level == "problem") | .words'
      docker compose exec gateway gateway doctor
    """
    from gateway.doctor import diagnose

    findings = diagnose({**os.environ, **({"GATEWAY_CATALOG": catalog} if catalog else {})})
    if as_json:
        echo_json({"findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            echo_text(f"{finding.level:<9}{finding.about:<13}{finding.words}")
            if finding.fix:
                echo_text(f"{'':<22}-> {finding.fix}")
    if any(finding.level == "problem" for finding in findings):
        raise click.exceptions.Exit(1)


for command in COMMANDS:
    main.add_command(command)
