"""Commands that talk to a gateway that runs, by the Python client."""

from __future__ import annotations

import asyncio
import importlib
import io
import math
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import click

from gateway.client import (
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
from gateway.commands import about, api_key, json_option, lines_about, url_option
from gateway.terminal import Display, echo_json, echo_text, harmless, how_far, table, with_progress

PULLED = "done: "
DOWN = ("stopped", "failed")

T = TypeVar("T")


@click.command()
@url_option
@json_option
def models(url: str, as_json: bool) -> None:
    """List all models: what runs, what starts, and what has failed.

    \b
    Examples:
      gateway models
      gateway models --json | jq -r '.models[] | select(.running) | .id'
    """
    with InferenceClient(url, api_key=api_key()) as client:
        found = client.models()
        if as_json:
            echo_json({"models": found})
            return
        complaints = _catalog_error(client)
    echo_text(table([["MODEL", "STATE", "ENGINE", "RUNTIME", "GPUS", "BUSY", "QUEUED", "ABOUT"], *map(_row, found)]))
    if complaints:
        more = f" (and {len(complaints) - 1} more)" if complaints[1:] else ""
        click.echo(harmless(f"The changed catalog is not in force: {complaints[0]}{more}"), err=True)


def _catalog_error(client: InferenceClient) -> list[str]:
    """Return what is wrong with the gateway's catalog as it is now; nothing if this key may not know."""
    with suppress(ClientError):
        found = client.status().get("catalog_error")
        return [str(complaint) for complaint in found] if isinstance(found, list) else []
    return []


def _row(model: Model) -> list[str]:
    counts = [str(model["in_flight"]), str(model["queued"])]
    gpus = ",".join(model.get("gpus") or ()) or "-"
    return [model["id"], model["state"], model["engine"], model["runtime"], gpus, *counts, _about_model(model)]


def _about_model(model: Model) -> str:
    if waits_for := model.get("waits_for"):
        return waits_for
    if held_for := model.get("held_for"):
        return f"makes room for {held_for} when its requests have ended"
    if model["progress"]:
        return how_far(model["progress"])
    if model["last_error"] and model["state"] == "failed":
        return " ".join(model["last_error"]["detail"].split())
    if model["state"] == "stopped" and (last_stop := model.get("last_stop")):
        return " ".join(f"stopped: {last_stop['reason']}".split())
    return ""


@click.command()
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


@click.command()
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


@click.command()
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
        echo_json({"stopped": stopped, "failed": {model_id: about(error) for model_id, error in failed.items()}})
    else:
        click.echo(f"Stopped: {', '.join(stopped) or 'nothing was running'}.")
        for model_id, error in failed.items():
            click.echo(harmless(f"{model_id}: {error}"), err=True)
    if failed:
        raise click.exceptions.Exit(1)


@click.command()
@click.argument("model_id", metavar="ID")
@click.option("--follow", "-f", is_flag=True, help="Go on with new lines until the server ends.")
@click.option("--lines", "-n", type=click.IntRange(1, 10_000), default=200, show_default=True, help="How many lines.")
@click.option("--replica", type=click.IntRange(0), default=0, help="Which of a model's replicas, from 0 up.")
@url_option
def logs(model_id: str, follow: bool, lines: int, replica: int, url: str) -> None:
    """Print what a model's server has written.

    That is its newest server, also when it has ended already.

    \b
    Examples:
      gateway logs smollm2-135m --lines 20
      gateway logs smollm2-135m --follow
    """
    with InferenceClient(url, api_key=api_key()) as client:
        for line in client.logs(model_id, lines=lines, follow=follow, replica=replica):
            echo_text(line)


@click.command()
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
    with InferenceClient(url, api_key=api_key()) as client:
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


@click.command()
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
        async with AsyncInferenceClient(url, api_key=api_key()) as client:
            return await work(client)

    return asyncio.run(talk())


@click.command()
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
        for words in lines_about(error):
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


COMMANDS: Sequence[click.Command] = (models, start, stop, restart, logs, pull, generate, chat)
