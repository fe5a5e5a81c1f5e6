"""The upstream of streams: `python -m tests.bench.paced_server PORT TOKENS_PER_S`. Each answer is as long as asked for.

It writes on schedule whoever reads, and each token tells when it was written. `GET /late` tells how far behind its
schedule the tokens since the last such question were (p99, in ms): above a few, the machine is too small for the pace.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping
from typing import Any, cast

import uvloop

from tests.bench.answers import DONE, TGI_STREAM, event, paced_parts
from tests.bench.arithmetic import percentile

SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CLOSED_WITHIN = b"0\r\n\r\n"


class Pace:
    """How fast all answers are, and how late their tokens were."""

    def __init__(self, tokens_per_s: float) -> None:
        self.interval_s = 1 / tokens_per_s
        self.late_s: list[float] = []

    def told(self) -> bytes:
        late_s, self.late_s = self.late_s, []
        return json.dumps({"late_p99_ms": percentile(late_s, 99) * 1000 if late_s else 0.0}).encode()


class Answerer(asyncio.Protocol):
    """One connection. Whoever is on it asks again only when the answer has ended."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._loop = asyncio.get_running_loop()
        self._heard = b""
        self._transport: asyncio.WriteTransport
        self._timer: asyncio.TimerHandle | None = None
        self._left = 0
        self._due = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._heard += data
        head, found, body = self._heard.partition(b"\r\n\r\n")
        if not found or len(body) < _length(head):
            return
        self._heard = b""
        method, path = head.split(b" ", 2)[:2]
        if method == b"GET":
            self._whole(self._pace.told() if path == b"/late" else b'{"object":"list","data":[]}')
        else:
            self._begin(path.decode(), json.loads(body))

    def _whole(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self._transport.write(head % len(body) + body)

    def _begin(self, path: str, asked: Mapping[str, Any]) -> None:
        self._path = path
        self._before, self._behind = paced_parts(path)
        self._left = tokens_of(asked)
        self._transport.write(SSE)
        self._due = self._loop.time()
        self._say()

    def _say(self) -> None:
        self._pace.late_s.append(time.monotonic() - self._due)
        self._left -= 1
        now = b"%d" % time.monotonic_ns()
        if self._left > 0:
            self._transport.write(_chunk(self._before + now + self._behind))
            self._due += self._pace.interval_s
            self._timer = self._loop.call_at(self._due, self._say)
            return
        last = event(self._path, f" @{now.decode()}@", 0)
        self._transport.write(_chunk(last + (b"" if self._path == TGI_STREAM else DONE)) + CLOSED_WITHIN)


def tokens_of(asked: Mapping[str, Any]) -> int:
    """Return how many tokens a body asks for, in TGI's words or OpenAI's."""
    parameters = asked.get("parameters") or {}
    said = (parameters.get("max_new_tokens"), asked.get("max_tokens"), asked.get("max_completion_tokens"))
    return next((int(each) for each in said if each), 1)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return int(value)
    return 0


async def main(port: int, tokens_per_s: float) -> None:
    pace = Pace(tokens_per_s)
    server = await asyncio.get_running_loop().create_server(lambda: Answerer(pace), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), float(sys.argv[2])))
