"""What the gateway itself adds to a cold start, seen from outside, at a server that tells when it was reached.

The runtime is `external`, whose start is one connection to the server: when that comes, `runtime.start` was called.
The server says on its health page that it is not ready until its time has come, and notes when the request is there.
One server plays many models, by their paths; they are started one after another, so a connection is nobody else's.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.answers import TGI_STREAM, streamed
from tests.bench.callers import Target, ask
from tests.bench.machine import Cores, pinned
from tests.bench.own_server import served
from tests.bench.rivals import GENERATE, Place, gateway_of
from tests.bench.upstream import Upstream

TOKENS = 2
LOADS_S = (0.2, 0.6)
"""How long a server loads: each another time within these, so that the gateway's checks do not fall in step."""


@dataclass(frozen=True)
class ColdStart:
    """One cold start. `to_start_ms`: from the request to `runtime.start`; `to_request_ms`: from ready to asked."""

    to_start_ms: float
    to_request_ms: float


class LoadingServer:
    """A TGI that loads for `loads_s` from its first connection on; told so anew for each model."""

    def __init__(self) -> None:
        self.loads_s = 0.0
        self.first_reached_at = 0.0
        self.asked_at = 0.0

    def load(self, loads_s: float) -> None:
        self.loads_s, self.first_reached_at, self.asked_at = loads_s, 0.0, 0.0

    @property
    def ready_at(self) -> float:
        return self.first_reached_at + self.loads_s

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reached()
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                writer.write(self._answer(head))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _reached(self) -> float:
        """Return the time; a health check on a kept connection may be read before the new connection is."""
        now = time.monotonic()
        self.first_reached_at = self.first_reached_at or now
        return now

    def _answer(self, head: bytes) -> bytes:
        now = self._reached()
        if b"/health" in head.partition(b"\r\n")[0]:
            status = b"200 OK" if now >= self.ready_at else b"503 Service Unavailable"
            return b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % status
        self.asked_at = now
        body = streamed(TGI_STREAM, TOKENS)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        return head % len(body) + body


def measure(starts: int, cores: Cores, told: Callable[[str], object]) -> list[ColdStart]:
    """Return what so many cold starts took, each of another model of one gateway.

    Raises:
        CannotMeasure: the gateway does not run, or a start fails.
    """
    told(f"cold start, {starts} times")
    server = LoadingServer()
    with tempfile.TemporaryDirectory() as name, pinned(cores.others), served(server.serve) as port:
        place = Place(Path(name), Upstream({}), cores.tested)
        with gateway_of(place, {f"m{each}": _model(each, port) for each in range(starts + 1)}) as (_, at, key):
            headers = {"Authorization": f"Bearer {key}"}
            found = [
                _one(server, each, starts, Target(at, GENERATE, _body(each), headers)) for each in range(starts + 1)
            ]
    return found[1:]  # the first one also loads what the gateway needs for any


def _model(number: int, port: int) -> dict[str, Any]:
    url = f"http://127.0.0.1:{port}/m{number}"
    # one that is ready is not asked again while others start: it would be taken for them
    return {"engine": "tgi", "hf_name": f"m{number}", "runtime": "external", "url": url, "health_interval": "1h"}


def _body(number: int) -> bytes:
    return b'{"model_id": "m%d", "prompt": "Hello", "max_new_tokens": %d}' % (number, TOKENS)


def _one(server: LoadingServer, number: int, starts: int, target: Target) -> ColdStart:
    least_s, most_s = LOADS_S
    server.load(least_s + (most_s - least_s) * number / max(starts, 1))
    sent_at = time.monotonic()
    ask(target)
    return ColdStart((server.first_reached_at - sent_at) * 1000, (server.asked_at - server.ready_at) * 1000)


def medians(found: list[ColdStart]) -> tuple[float, float]:
    """Return the medians of both times."""
    return (
        statistics.median(each.to_start_ms for each in found),
        statistics.median(each.to_request_ms for each in found),
    )
