"""Serving the application: the listening socket, the log, uvicorn, and what becomes of signals."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import logging.config
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import uvicorn
from fastapi import FastAPI
from uvicorn.supervisors import ChangeReload

from gateway.app import check_one_worker, compose
from gateway.catalog import Catalog
from gateway.catalog_file import load_catalog
from gateway.catalog_values import did_you_mean
from gateway.connection import CallersConnection
from gateway.errors import CatalogError, UnknownModel
from gateway.fleet.fleet import Fleet
from gateway.settings import Settings, check_exposure, load_settings, unknown_variables

log = logging.getLogger(__name__)

UNUSABLE = 2
CUT_SHORT = 128 + signal.SIGINT
LAST_WORDS_S = 2.0
"""How long a caller may read nothing of what was written for it, once the gateway ends."""
DRAIN_MARGIN_S = 10.0
"""What the server waits for open connections beyond the longest drain of the catalog."""
CHECKPOINT = "_GATEWAY_CHECKPOINT"
"""How `--checkpoint` reaches a reloaded gateway: not one of the documented variables."""


class CannotListen(Exception):
    """The address cannot be listened at; the words say why, and what to do."""


class Prepared(NamedTuple):
    """What to serve. `load` makes a catalog of what its file says later on."""

    settings: Settings
    catalog: Catalog
    load: Callable[[bytes], Catalog]


def prepared(environ: Mapping[str, str], checkpoint: str | None) -> Prepared:
    """Return what to serve, and set up the log.

    Raises:
        CatalogError: it cannot be served like this.
    """
    settings = load_settings(environ)
    check_exposure(settings, environ)
    check_one_worker(environ, sys.argv)
    load = partial(catalog_with, settings.catalog, dict(environ), checkpoint)
    catalog = load()
    logging.config.dictConfig(_log_config(settings.log_format))
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # no line tells of them
    for complaint in unknown_variables(environ):
        log.warning("%s", complaint)
    return Prepared(settings, catalog, load)


def catalog_with(
    path: Path, environ: Mapping[str, str], checkpoint: str | None, content: bytes | None = None
) -> Catalog:
    """Return the catalog that the file holds, or `content`, with `--checkpoint` in the place of its default model.

    Raises:
        CatalogError: as `load_catalog`; or it has no such model.
    """
    catalog = load_catalog(path, environ, content)
    return catalog.model_copy(update={"default_model": _chosen(catalog, checkpoint)}) if checkpoint else catalog


def _chosen(catalog: Catalog, name: str) -> str:
    try:
        return catalog.resolve(name).id
    except UnknownModel:
        hint = did_you_mean(name, catalog.models)
        words = f"--checkpoint: there is no model {name!r} in {catalog.path}{hint}; it has {', '.join(catalog.models)}"
        raise CatalogError([words]) from None


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at this address; a connection waits until it is accepted.

    Raises:
        CannotListen: the words say why, and what to do.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # `localhost` has two addresses: the one that the documents use
        family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        return socket.create_server(address, family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(host, port, error) from None


def _cannot_listen(host: str, port: int, error: OSError | UnicodeError) -> CannotListen:
    match getattr(error, "errno", None):
        case errno.EADDRINUSE:
            finder = f"ss -ltnp 'sport = :{port}'" if sys.platform == "linux" else f"lsof -nP -i TCP:{port}"
            rule = f"another program listens there (`{finder}` shows which); name another one with --port, or 0 for any"
        case errno.EACCES:
            rule = "only root may listen there; name a port above 1023 with --port"
        case _:
            rule = f"{getattr(error, 'strerror', None) or error}; name an address of this machine with --host"
    return CannotListen(f"Cannot listen on port {port} of {host}: {rule}.")


def serve(what: Prepared, listener: socket.socket) -> int:
    """Serve until a signal; return the exit status."""
    app = compose(*what)
    server = Server(_config(app, what), _url_of(listener) + what.settings.root_path, app.state.fleet)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.end)
    try:
        server.run(sockets=[listener])
    except SystemExit:  # it could not be started; the log says why
        return 1
    if server.lifespan.startup_failed:
        return 1
    return CUT_SHORT if server.force_exit else 0


def serve_reloading(what: Prepared, listener: socket.socket) -> int:
    """Serve in a process of its own, which makes room for another one whenever the gateway's code has changed.

    A changed catalog needs none: each of them follows it as `serve` does.
    """
    package = str(Path(__file__).parent)
    config = _config("gateway.serving:reloaded_app", what, factory=True, reload=True, reload_dirs=[package])
    server = Server(config, _url_of(listener) + what.settings.root_path)
    ChangeReload(config, target=server.run, sockets=[listener]).run()
    return 0


def reloaded_app() -> FastAPI:
    """Return the application in each new process of `serve --reload`; the flags come through the environment."""
    try:
        return compose(*prepared(os.environ, os.environ.get(CHECKPOINT)))
    except CatalogError as error:
        for complaint in error.complaints:
            log.error("%s", complaint)
        sys.exit(UNUSABLE)


class Server(uvicorn.Server):
    """Says where it is once it serves. A signal is how it is meant to end, so that is no failure."""

    def __init__(self, config: uvicorn.Config, url: str, fleet: Fleet | None = None) -> None:
        """Take what it needs. `fleet` tells how long its models may drain by then; the configuration, by now."""
        super().__init__(config)
        self._url = url
        self._fleet = fleet

    def end(self, *_: object) -> None:
        """Handle a signal that comes before uvicorn handles them, or that it raises once more after the end."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._fleet:
            self.config.timeout_graceful_shutdown = _patience_s(self._fleet.longest_drain_s)
        sweeping = asyncio.create_task(self._cut_those_who_do_not_read(), name="sweep")
        try:
            await super().shutdown(sockets)
        finally:
            sweeping.cancel()

    async def _cut_those_who_do_not_read(self) -> None:
        """Give what is on its way to callers a moment to be read, and cut off who has read nothing in that time."""
        unread: dict[Any, int] = {}
        while True:
            await asyncio.sleep(LAST_WORDS_S)
            before, unread = unread, {each: _unread(each) for each in list(self.server_state.connections)}
            for connection, size in unread.items():
                if size and size == before.get(connection):
                    connection.transport.abort()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        _spare_what_stays()
        _say(f"TGI Gateway serves at {self._url} (documentation: {self._url}/docs)")


def _spare_what_stays() -> None:
    """Keep what is there by now, and stays, out of garbage collections: a full one would halt all streams for 60 ms."""
    gc.collect()
    gc.freeze()


def _unread(connection: Any) -> int:
    """Return how many bytes wait for this caller to read them."""
    transport = connection.transport
    return int(transport.get_write_buffer_size()) if transport else 0


def _say(line: str) -> None:
    """Tell whoever started the gateway; one who has stopped reading does not stop it."""
    try:
        click.echo(line)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - only compared
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def _patience_s(drain_s: float) -> int:
    return math.ceil(drain_s + DRAIN_MARGIN_S)


def _config(app: FastAPI | str, what: Prepared, **more: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=CallersConnection,
        ws="none",
        lifespan="on",
        workers=1,
        access_log=False,  # the gateway has its own
        proxy_headers=False,  # nothing here depends on who called the proxy, or how
        log_config=_log_config(what.settings.log_format),
        timeout_graceful_shutdown=_patience_s(max(spec.drain_timeout_s for spec in what.catalog.models.values())),
        **more,
    )


def _log_config(log_format: str) -> dict[str, Any]:
    """Return the log's configuration: a line on stderr for each event, uvicorn's own among them."""
    lines = JsonLines if log_format == "json" else TextLines
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": lines}},
        "handlers": {"stderr": {"()": ToStderr, "formatter": "lines"}},
        "root": {"level": "INFO", "handlers": ["stderr"]},
    }


class ToStderr(logging.Handler):
    """Writes each line at once: Python's stderr is flushed at every line's end, and need not be told to."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
        except Exception:
            self.handleError(record)


class TextLines(logging.Formatter):
    """Lines for people; the time, in seconds, is written out once for all lines of a second."""

    _second = -1
    _time = ""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{self._at(int(record.created))} {record.levelname} {record.name}: {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line

    def _at(self, second: int) -> str:
        if second != self._second:
            self._second, self._time = second, time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(second))
        return self._time


class JsonLines(logging.Formatter):
    """One JSON object a line; what a record has as `facts` are fields of it."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        event = {"time": at, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        event |= getattr(record, "facts", {})
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event, ensure_ascii=False)
