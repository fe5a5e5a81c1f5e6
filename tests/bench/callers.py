"""Those who call: wrk as fast as it can, one at a fixed rate, and many who read streams. All in this process but wrk.

The one at a fixed rate asks when it is time to, whatever has become of those before: each answer's time counts from
when its request was due, so that a stall shows in every request that it held up.
"""

from __future__ import annotations

import gc
import json
import select
import socket
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.answers import stamps
from tests.bench.machine import CannotMeasure, needed

PATIENCE_S = 3.0
"""How long after the last request was due its answers are still waited for."""
READ_BYTES = 256 * 1024


@dataclass(frozen=True)
class Target:
    """One request that is made again and again, and where."""

    port: int
    path: str
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "POST"

    @property
    def request(self) -> bytes:
        """The request as it goes over the wire, on a connection that is kept."""
        lines = [f"{self.method} {self.path} HTTP/1.1", f"Host: 127.0.0.1:{self.port}"]
        lines += ["Content-Type: application/json", f"Content-Length: {len(self.body)}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join([*lines, "", ""]).encode() + self.body


def is_whole(answer: bytes) -> bool:
    """Say whether this is a whole HTTP answer: as long as it says, or up to its last chunk."""
    head, found, body = answer.partition(b"\r\n\r\n")
    if not found:
        return False
    head = head.lower()
    length = head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
    if length.strip():
        return len(body) >= int(length)
    return b"transfer-encoding: chunked" in head and body.endswith(b"0\r\n\r\n")


def ask(target: Target, timeout_s: float = 30.0) -> bytes:
    """Return the whole answer to one request, on a connection of its own.

    Raises:
        CannotMeasure: its status is not 200, or there is none.
    """
    answer = b""
    try:
        with socket.create_connection(("127.0.0.1", target.port), timeout=timeout_s) as connection:
            connection.sendall(target.request)
            while not is_whole(answer) and (came := connection.recv(READ_BYTES)):
                answer += came
    except OSError as error:
        raise CannotMeasure(f"{target.path} is not answered: {error}") from None
    if not answer.startswith(b"HTTP/1.1 200"):
        raise CannotMeasure(f"{target.path} is answered so: {answer[:600].decode(errors='replace')}")
    return answer


def json_of(answer: bytes) -> Any:
    """Return the body of a whole answer, which is not chunked."""
    return json.loads(answer.partition(b"\r\n\r\n")[2])


# ---- as fast as it can ----


@dataclass(frozen=True)
class Throughput:
    requests: int
    seconds: float
    failed: int


LUA = """\
wrk.method = %(method)s
wrk.body = %(body)s
for name, value in pairs({%(headers)s}) do wrk.headers[name] = value end
done = function(summary)
  local e = summary.errors
  io.write(string.format('\\n{"requests": %%d, "us": %%d, "failed": %%d}\\n', summary.requests, summary.duration,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


def wrk(target: Target, connections: int, seconds: float, folder: Path) -> Throughput:
    """Return how many requests are answered when `connections` callers each ask again at once.

    Raises:
        CannotMeasure: wrk is not there, or fails.
    """
    script = folder / "wrk.lua"
    script.write_text(lua(target))
    url = f"http://127.0.0.1:{target.port}{target.path}"
    command = [needed("wrk", "wrk"), "-t1", f"-c{connections}", f"-d{max(round(seconds), 1)}s", "--timeout", "10s"]
    ran = subprocess.run(
        [*command, "-s", str(script), url], capture_output=True, text=True, timeout=seconds + 60, check=False
    )
    if ran.returncode:
        raise CannotMeasure(f"wrk failed: {ran.stderr or ran.stdout}")
    return throughput(ran.stdout)


def lua(target: Target) -> str:
    """Return the script that has wrk make this request and tell its figures as JSON."""
    headers = {"Content-Type": "application/json", **target.headers}
    pairs = ", ".join(f"[{json.dumps(name)}] = {json.dumps(value)}" for name, value in headers.items())
    body = f"[==[{target.body.decode()}]==]"
    return LUA % {"method": json.dumps(target.method), "body": body, "headers": pairs}


def throughput(output: str) -> Throughput:
    """Return what wrk told at the end of its output.

    Raises:
        CannotMeasure: it told nothing.
    """
    told = [line for line in output.splitlines() if line.startswith('{"requests"')]
    if not told:
        raise CannotMeasure(f"wrk has told nothing: {output[-300:]}")
    said = json.loads(told[-1])
    return Throughput(said["requests"], said["us"] / 1e6, said["failed"])


# ---- at a fixed rate ----


@dataclass
class Latencies:
    """How long after it was due each request was answered. One that never was counts as long as it was waited for."""

    took_ms: list[float] = field(default_factory=list)
    failed: int = 0


class Caller:
    """One kept connection, on which one request at a time is made."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._heard = b""
        self.due = 0.0
        self.connection = self._connected()

    def _connected(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self._target.port), timeout=PATIENCE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def fileno(self) -> int:
        return self.connection.fileno()

    def ask(self, due: float) -> None:
        self.due, self._heard = due, b""
        self.connection.sendall(self._target.request)

    def hear(self) -> bool | None:
        """Take what has come; return True when the answer is whole, None when it never will be."""
        try:
            came = self.connection.recv(READ_BYTES)
        except OSError:
            came = b""
        self._heard += came
        if is_whole(self._heard):
            return True if self._heard.startswith(b"HTTP/1.1 200") else None
        if came:
            return False
        self.connection.close()
        self.connection = self._connected()
        return None


def at_fixed_rate(target: Target, connections: int, rate_per_s: float, seconds: float) -> Latencies:
    """Ask at this rate for so long, over so many connections; a request whose turn finds none free waits for one."""
    found = Latencies()
    callers = [Caller(target) for _ in range(connections)]
    idle, busy, waiting = deque(callers), set[Caller](), deque[float]()
    with _without_collections():
        began = time.perf_counter() + 0.05
        dues = (began + number / rate_per_s for number in range(max(round(rate_per_s * seconds), 1)))
        next_due = next(dues, None)
        deadline = began + seconds + PATIENCE_S
        while (next_due is not None or waiting or busy) and (now := time.perf_counter()) < deadline:
            while next_due is not None and next_due <= now:
                waiting.append(next_due)
                next_due = next(dues, None)
            while waiting and idle:
                caller = idle.popleft()
                caller.ask(waiting.popleft())
                busy.add(caller)
            rest_s = max((deadline if next_due is None else next_due) - time.perf_counter(), 0)
            for caller in select.select(list(busy), [], [], rest_s)[0]:
                heard = caller.hear()
                if heard is False:
                    continue
                found.took_ms.append((time.perf_counter() - caller.due) * 1000)
                found.failed += heard is None
                busy.discard(caller)
                idle.append(caller)
        _give_up([caller.due for caller in busy] + list(waiting), found)
    for caller in callers:
        caller.connection.close()
    return found


def _give_up(dues: list[float], found: Latencies) -> None:
    now = time.perf_counter()
    found.took_ms += [(now - due) * 1000 for due in dues]
    found.failed += len(dues)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Have no garbage collected meanwhile: it would look like a stall of the one under test."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# ---- streams ----


@dataclass
class Streams:
    """How late each token came, from when it was written to when it was read; `tokens` has those of the warm-up too."""

    late_ms: list[float] = field(default_factory=list)
    tokens: int = 0
    ended: int = 0


def read_streams(target: Target, streams: int, seconds: float, *, warm_up_s: float, spread_s: float) -> Streams:
    """Read so many streams at once, begun one by one within `spread_s`; tokens before `warm_up_s` do not count."""
    found, tails = Streams(), dict[int, bytes]()
    poll = select.epoll()
    open_: dict[int, socket.socket] = {}
    with _without_collections():
        began = time.monotonic()
        deadline = began + spread_s + seconds + PATIENCE_S
        counts_from_ns = round((began + warm_up_s) * 1e9)
        begun = 0
        while (begun < streams or open_) and (now := time.monotonic()) < deadline:
            if begun < streams and now >= began + begun * spread_s / streams:
                connection = _streaming(target)
                open_[connection.fileno()], tails[connection.fileno()] = connection, b""
                poll.register(connection.fileno(), select.EPOLLIN)
                begun += 1
            for number, _ in poll.poll(0.001 if begun < streams else 0.1):
                data = open_[number].recv(READ_BYTES)
                came_ns = time.monotonic_ns()
                told, tails[number] = stamps(tails[number] + data)
                found.tokens += len(told)
                found.late_ms += [(came_ns - each) / 1e6 for each in told if each >= counts_from_ns]
                if not data or data.endswith(b"0\r\n\r\n"):
                    found.ended += bool(data)
                    poll.unregister(number)
                    open_.pop(number).close()
    for connection in open_.values():
        connection.close()
    poll.close()
    return found


def _streaming(target: Target) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", target.port), timeout=PATIENCE_S)
    connection.sendall(target.request)
    return connection
