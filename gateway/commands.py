"""What all commands of the command line share: how they fail in words, and their options."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from gateway.client import DEFAULT_URL, ClientError, GatewayRefused, InferenceClient
from gateway.errors import CatalogError
from gateway.terminal import echo_json, harmless

CUT_SHORT = 128 + signal.SIGINT


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
            told = {"error_code": error.code, "detail": error.detail, "complaints": error.complaints}
            raise Unusable(error.complaints, told, _wants_json(ctx)) from None
        except ClientError as error:
            raise Failed(list(lines_about(error)), about(error), _wants_json(ctx)) from None
        except UnicodeEncodeError:  # of an argument: stdout takes anything
            raise click.UsageError("The arguments must be UTF-8 text.") from None
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                click.echo(err=True)  # the terminal's ^C stands on the line
            raise click.exceptions.Exit(CUT_SHORT) from None


def lines_about(error: ClientError) -> Iterator[str]:
    yield str(error)
    extra = error.extra if isinstance(error, GatewayRefused) else {}
    evidence = extra.get("evidence")
    for line in evidence if isinstance(evidence, list) else ():
        yield f"  | {line}"


def about(error: ClientError) -> dict[str, Any]:
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
        InferenceClient(url, api_key=api_key()).close()
    except ValueError as error:
        raise click.UsageError(f"{error}.") from None
    return url


def api_key() -> str | None:
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
