"""The command `gateway`: serves, checks the catalog, and talks to a gateway that runs.

Words for people go to stderr, results to stdout. The exit status is 0, 1 (it failed) or 2 (bad usage, environment or
file); 130 after Ctrl-C. The modules that serve are imported by the commands that need them: `gateway models` shall
answer at once.
"""

from __future__ import annotations

import asyncio
import importlib
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gateway.client import (
    DEFAULT_URL,
    AsyncInferenceClient,
    ChatMessage,
    ChatParameters,
    ClientError,
    GatewayRefused,
    InferenceClient,
    Model,
    Parameters,
    Started,
)
from gateway.errors import CatalogError, StartFailed
from gateway.terminal import Display, echo_json, echo_text, harmless, how_far, table, with_progress

if TYPE_CHECKING:
    from gateway.catalog import ModelSpec

PULLED = "done: "
DOWN = ("stopped", "failed")
CUT_SHORT = 128 + signal.SIGINT

T = TypeVar("T")

# ---- errors, and what all commands share ----------------------------------------------------------------------------


class Failed(click.ClickException):
    """The command failed: a line on stderr for each complaint, or with --json one object on stdout."""

    def __init__(self, lines: Sequence[str], about: Mapping[str, Any], as_json: bool) -> None:
        super().__init__("\n".join(lines))
        self._lines = lines
        self._about = about
        self._as_json = as_json

    def show(self, file: Any = None) -> None:
        if self._as_json:
            echo_json({"error": self._about})
            return
        for line in self._lines:
            click.echo(harmless(line), file=file, err=True)


class Unusable(Failed):
    """The usage, the environment or a file is wrong."""

    exit_code = 2


class Commands(click.Group):
    """Ends every command in words, however it fails."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CatalogError as error:
            about = {"error_code": error.code, "detail": error.detail, "complaints": error.complaints}
            raise Unusable(error.complaints, about, _wants_json(ctx)) from None
        except ClientError as error:
            raise Failed(list(_lines_about(error)), _about(error), _wants_json(ctx)) from None
        except UnicodeEncodeError:  # of an argument: stdout takes anything
            raise click.UsageError("The arguments must be UTF-8 text.") from None
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                click.echo(err=True)  # the terminal's ^C stands on the line
            raise click.exceptions.Exit(CUT_SHORT) from None


def _lines_about(error: ClientError) -> Iterator[str]:
    yield str(error)
    extra = error.extra if isinstance(error, GatewayRefused) else {}
    evidence = extra.get("evidence")
    for line in evidence if isinstance(evidence, list) else ():
        yield f"  | {line}"


def _about(error: ClientError) -> dict[str, Any]:
    if not isinstance(error, GatewayRefused):
        return {"error_code": "UNREACHABLE", "detail": str(error)}
    known = {"error_code": error.error_code, "status": error.status, "detail": error.detail}
    return {**known, "retry_after_s": error.retry_after_s, **error.extra}


def _wants_json(ctx: click.Context) -> bool:
    return bool(ctx.meta.get("as_json"))


def _remember_json(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    ctx.meta["as_json"] = value
    return value


json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    is_eager=True,
    callback=_remember_json,
    help='Print one JSON object; an error is {"error": {...}} on stdout too.',
)


def _checked(_: click.Context, __: click.Parameter, url: str) -> str:
    try:
        InferenceClient(url, api_key=_api_key()).close()
    except ValueError as error:
        raise click.UsageError(f"{error}.") from None
    return url


def _api_key() -> str | None:
    return os.environ.get("GATEWAY_API_KEY") or None


url_option = click.option(
    "--url",
    envvar="GATEWAY_URL",
    show_envvar=True,
    default=DEFAULT_URL,
    show_default=True,
    metavar="URL",
    callback=_checked,
    help="The gateway to talk to; its key, if it asks for one, is taken from GATEWAY_API_KEY.",
)


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
@click.option("--reload", is_flag=True, help="Serve afresh whenever the gateway's own code changes (for developers).")
def serve(checkpoint: str | None, reload: bool, **flags: str | None) -> None:
    """Serve the models of the catalog until SIGTERM or Ctrl-C.

    Each option overrides its environment variable (GATEWAY_HOST, GATEWAY_PORT, GATEWAY_CATALOG, GATEWAY_DEVICE); there
    are more of those, and GATEWAY_LOG_FORMAT=json makes each log line on stderr a JSON object. One line on stdout
    says where the gateway is, as soon as it serves. Asked to end, it lets requests finish within their models'
    drain_timeout, stops the models that are its own processes, and exits with 0.

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
        settings, catalog = serving.prepared({**os.environ, **said}, checkpoint)
    try:
        listener = serving.listen(settings.host, settings.port)
    except serving.CannotListen as error:
        raise Failed([str(error)], {"error_code": "CANNOT_LISTEN", "detail": str(error)}, as_json=False) from None
    with listener:
        if reload:
            os.environ.update(said, **{serving.CHECKPOINT: checkpoint or ""})
        status = (serving.serve_reloading if reload else serving.serve)(settings, catalog, listener)
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
    is exit status 2, with a line on stderr for each of its faults.

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
    models = [_plan(spec) for spec in catalog.models.values()]
    if as_json:
        echo_json({"catalog": str(catalog.path), "default_model": catalog.default_model, "models": models})
        return
    click.echo(f"{catalog.path} is fine. Requests that name no model get {catalog.default_model or 'an error'}.\n")
    rows = [
        [*(model[key] for key in ("id", "engine", "runtime", "runs")), "; ".join(model["notes"])] for model in models
    ]
    click.echo(table([["MODEL", "ENGINE", "RUNTIME", "RUNS", "NOTES"], *rows]))


def _plan(spec: ModelSpec) -> dict[str, Any]:
    from gateway.catalog import deferred

    runs, wrong = _what_runs(spec)
    notes = [*deferred(spec), *wrong, *_missing_weights(spec)]
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


# ---- talking to a gateway -------------------------------------------------------------------------------------------


@main.command()
@url_option
@json_option
def models(url: str, as_json: bool) -> None:
    """List all models: what runs, what starts, and what has failed.

    \b
    Examples:
      gateway models
      gateway models --json | jq -r '.models[] | select(.running) | .id'
    """
    with InferenceClient(url, api_key=_api_key()) as client:
        found = client.models()
    if as_json:
        echo_json({"models": found})
        return
    echo_text(table([["MODEL", "STATE", "ENGINE", "RUNTIME", "BUSY", "QUEUED", "ABOUT"], *map(_row, found)]))


def _row(model: Model) -> list[str]:
    counts = [str(model["in_flight"]), str(model["queued"])]
    return [model["id"], model["state"], model["engine"], model["runtime"], *counts, _about_model(model)]


def _about_model(model: Model) -> str:
    if model["progress"]:
        return how_far(model["progress"])
    if model["last_error"] and model["state"] == "failed":
        return " ".join(model["last_error"]["detail"].split())
    return ""


@main.command()
@click.argument("model_id", metavar="ID")
@click.option("--no-wait", is_flag=True, help="Return at once; the start goes on.")
@url_option
@json_option
def start(model_id: str, no_wait: bool, url: str, as_json: bool) -> None:
    """Start a model and return when it is ready.

    Tells on stderr how far it has come. Ctrl-C ends the waiting, not the start: `gateway stop` calls it off. A model
    that has failed is tried again at once.

    \b
    Examples:
      gateway start smollm2-135m
      gateway start mistral-7b --no-wait
    """
    answer = _talk(
        url, lambda client: with_progress(client, model_id, client.start(model_id, wait=not no_wait), not as_json)
    )
    _tell(answer, as_json)


@main.command()
@click.argument("model_id", metavar="ID")
@url_option
@json_option
def restart(model_id: str, url: str, as_json: bool) -> None:
    """Restart a model and return when it is ready.

    Its running requests finish first, within drain_timeout; those that wait are answered by the new server.
    """
    _tell(_talk(url, lambda client: with_progress(client, model_id, client.restart(model_id), not as_json)), as_json)


def _tell(started: Started, as_json: bool) -> None:
    if as_json:
        echo_json(started)
    else:
        port = f", port {started['port']}" if started["port"] else ""
        click.echo(f"{started['message']} ({started['container_name']}{port}).")


@main.command()
@click.argument("model_id", metavar="[ID]", required=False)
@click.option("--all", "everything", is_flag=True, help="Every model that runs or starts, instead of one.")
@click.option("--force", is_flag=True, help="Cut off the requests that run, instead of letting them finish.")
@url_option
@json_option
def stop(model_id: str | None, everything: bool, force: bool, url: str, as_json: bool) -> None:
    """Stop a model, or all of them, and return when they are gone.

    Running requests finish first, within drain_timeout. The next request for the model starts it again.

    \b
    Examples:
      gateway stop smollm2-135m
      gateway stop --all --force
    """
    if everything == bool(model_id):
        raise click.UsageError("Name one model, or say --all.")
    if model_id:
        message = _talk(url, lambda client: client.stop(model_id, force=force))
        echo_json(message) if as_json else click.echo(f"{message['message']}.")
    else:
        _report_stops(_talk(url, lambda client: _stop_all(client, force)), as_json)


async def _stop_all(client: AsyncInferenceClient, force: bool) -> dict[str, ClientError | None]:
    """Stop all that runs or may run, at once; return each id that did with what went wrong."""
    up = [model for model in await client.models() if _may_run(model)]
    ends = await asyncio.gather(*(_stop_one(client, model, force) for model in up))
    return {model["id"]: end for model, end in zip(up, ends, strict=True) if end is not NOTHING_RAN}


def _may_run(model: Model) -> bool:
    unknown = model["last_error"] is not None and model["state"] in DOWN
    return model["runtime"] != "external" and (model["state"] not in DOWN or bool(model["progress"]) or unknown)


NOTHING_RAN = ClientError("nothing ran")
"""How a stop ended that was sent to be sure."""


async def _stop_one(client: AsyncInferenceClient, model: Model, force: bool) -> ClientError | None:
    try:
        await client.stop(model["id"], force=force)
    except ClientError as error:
        if not isinstance(error, GatewayRefused) or error.error_code != "MODEL_NOT_RUNNING":
            return error
        return NOTHING_RAN if model["state"] in DOWN else None
    return None


def _report_stops(ends: Mapping[str, ClientError | None], as_json: bool) -> None:
    stopped = [model_id for model_id, error in ends.items() if error is None]
    failed = {model_id: error for model_id, error in ends.items() if error is not None}
    if as_json:
        echo_json({"stopped": stopped, "failed": {model_id: _about(error) for model_id, error in failed.items()}})
    else:
        click.echo(f"Stopped: {', '.join(stopped) or 'nothing was running'}.")
        for model_id, error in failed.items():
            click.echo(harmless(f"{model_id}: {error}"), err=True)
    if failed:
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("model_id", metavar="ID")
@click.option("--follow", "-f", is_flag=True, help="Go on with new lines until the server ends.")
@click.option("--lines", "-n", type=click.IntRange(1, 10_000), default=200, show_default=True, help="How many lines.")
@url_option
def logs(model_id: str, follow: bool, lines: int, url: str) -> None:
    """Print what a model's server has written.

    That is its newest server, also when it has ended already.

    \b
    Examples:
      gateway logs smollm2-135m --lines 20
      gateway logs smollm2-135m --follow
    """
    with InferenceClient(url, api_key=_api_key()) as client:
        for line in client.logs(model_id, lines=lines, follow=follow):
            echo_text(line)


@main.command()
@click.argument("model_id", metavar="ID")
@url_option
@json_option
def pull(model_id: str, url: str, as_json: bool) -> None:
    """Fetch a model's image and weights before there is any traffic, and return when they are there.

    Nothing is started. Tells on stderr how far it has come; Ctrl-C ends the telling, not the download.

    \b
    Examples:
      gateway pull mistral-7b
      gateway pull mistral-7b --json
    """
    with InferenceClient(url, api_key=_api_key()) as client:
        message = _tell_of_pull(model_id, client.pull(model_id), shown=not as_json)
    echo_json({"message": message}) if as_json else echo_text(f"{model_id}: {message}")


def _tell_of_pull(model_id: str, lines: Iterator[str], shown: bool) -> str:
    """Show each line as it comes, and return what has come of it."""
    display = Display()
    line = ""
    try:
        for line in lines:
            if shown and not line.startswith(PULLED):
                phase = line.replace(",", " ").partition(" ")[0]
                display.show(f"{model_id}: {phase}", f"{model_id}: {line}")
    finally:
        display.clear()
    return line.removeprefix(PULLED)


def _finite(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter("must be a number from 0 to 2")
    return value


@main.command()
@click.argument("model_id", metavar="ID")
@click.argument("prompt")
@click.option("--stream", is_flag=True, help="Print each token as it comes.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest answer in tokens.")
@click.option(
    "--temperature", type=click.FloatRange(0, 2), callback=_finite, help="0 always takes the likeliest token."
)
@url_option
@json_option
def generate(
    model_id: str,
    prompt: str,
    stream: bool,
    max_new_tokens: int | None,
    temperature: float | None,
    url: str,
    as_json: bool,
) -> None:
    """Print how a model continues a prompt.

    A model that is not running is started first; on stderr is told how far that has come.

    \b
    Examples:
      gateway generate smollm2-135m "The capital of France is" --temperature 0 --max-new-tokens 8
      gateway generate smollm2-135m "Once upon a time" --stream
      gateway generate smollm2-135m "2 + 2 =" --json | jq -r .generated_text
    """
    if stream and as_json:
        raise click.UsageError("--json prints one object when the answer is whole: leave out --stream.")
    asked: Parameters = {"model": model_id, "max_new_tokens": max_new_tokens, "temperature": temperature}
    if stream:
        _talk(url, lambda client: _print_stream(client, prompt, asked))
        return
    asked["return_full_text"] = False
    answer = _talk(url, lambda client: with_progress(client, model_id, client.generate(prompt, **asked), not as_json))
    echo_json(answer) if as_json else echo_text(answer["generated_text"])


async def _print_stream(client: AsyncInferenceClient, prompt: str, asked: Parameters) -> None:
    async with aclosing(client.stream(prompt, **asked)) as texts:
        echo_text(await with_progress(client, asked["model"] or "", anext(texts, ""), True), end="")
        try:
            async for text in texts:
                echo_text(text, end="")
        finally:
            click.echo()


def _talk(url: str, work: Callable[[AsyncInferenceClient], Coroutine[Any, Any, T]]) -> T:
    """Run what does two things at once: asyncio ends both on Ctrl-C."""

    async def talk() -> T:
        async with AsyncInferenceClient(url, api_key=_api_key()) as client:
            return await work(client)

    return asyncio.run(talk())


@main.command()
@click.argument("model_id", metavar="ID")
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation begins.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer in tokens.")
@click.option(
    "--temperature", type=click.FloatRange(0, 2), callback=_finite, help="0 always takes the likeliest token."
)
@url_option
@json_option
def chat(
    model_id: str, system: str | None, max_tokens: int | None, temperature: float | None, url: str, as_json: bool
) -> None:
    """Talk with a model. Each line is a turn, and its answer is printed as it comes.

    Ctrl-C ends an answer, and what has come of it stays in the conversation; Ctrl-D ends the conversation, and
    /clear begins it anew. Lines may also come from a file or a pipe: then the first failure ends it, and with --json
    each answer is an object on a line of its own.

    \b
    Examples:
      gateway chat smollm2-135m
      gateway chat smollm2-135m --system "Answer in one word." --temperature 0
      printf 'Hello!\\nWho are you?\\n' | gateway chat smollm2-135m --json | jq -r .content
    """
    asked: ChatParameters = {"max_tokens": max_tokens, "temperature": temperature}
    conversation = Conversation(system)
    for line in _turns():
        if line == "/clear":
            conversation = Conversation(system)
        elif line.strip():
            _take_turn(conversation, line, url, model_id, asked, as_json)


class Conversation:
    """What was said so far."""

    def __init__(self, system: str | None) -> None:
        self.messages: list[ChatMessage] = [{"role": "system", "content": system}] if system else []

    def say(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})


def _turns() -> Iterator[str]:
    """Yield what the user says, until Ctrl-D or the end of the file."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    talking = sys.stdin.isatty()
    if talking:
        with suppress(ImportError):  # with it the terminal's lines can be edited, and come back by the arrow keys
            importlib.import_module("readline")
    with suppress(EOFError):
        while True:
            yield input("> " if talking else "")


def _take_turn(
    conversation: Conversation, line: str, url: str, model_id: str, asked: ChatParameters, as_json: bool
) -> None:
    """Print the answer to a line. On a terminal the conversation goes on after a failure, without that line."""
    conversation.say("user", line)
    said: list[str] = []
    try:
        _talk(url, lambda client: _print_turn(client, model_id, conversation.messages, asked, said, shown=not as_json))
    except ClientError as error:
        conversation.messages.pop()
        if not sys.stdin.isatty():
            raise
        for words in _lines_about(error):
            click.echo(harmless(words), err=True)
        return
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    conversation.say("assistant", "".join(said))
    if as_json:
        echo_json(conversation.messages[-1])


async def _print_turn(
    client: AsyncInferenceClient,
    model_id: str,
    messages: Sequence[ChatMessage],
    asked: ChatParameters,
    said: list[str],
    *,
    shown: bool,
) -> None:
    """Add to `said` what comes, piece by piece."""

    def take(text: str) -> None:
        said.append(text)
        if shown:
            echo_text(text, end="")

    async with aclosing(client.chat(model_id, messages, **asked)) as texts:
        try:
            take(await with_progress(client, model_id, anext(texts, ""), shown))
            async for text in texts:
                take(text)
        finally:
            if shown and said:
                click.echo()
