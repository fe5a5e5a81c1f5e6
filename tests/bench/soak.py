"""A long mixed load, with callers who leave and models that fail, and what it leaves behind in the gateway.

It is seen from outside: resident memory, file descriptors, and the requests that the gateway says are under way.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.answers import CHAT, PROMPT
from tests.bench.arithmetic import slope
from tests.bench.callers import READ_BYTES, Target, ask, is_whole, json_of
from tests.bench.machine import Cores, descriptors, pinned, rss_mib, tree
from tests.bench.own_server import served
from tests.bench.rivals import GENERATE, Place, gateway_of
from tests.bench.upstream import Upstream, upstream
from tests.tgi_double.process import free_port

CALLERS = 24
SAMPLE_EVERY_S = 1.0
WARM_UP_SHARE = 0.25
QUIET_S = 12.0
"""How long is looked before and after the load; what is open for a health check closes meanwhile."""
ANSWER_S = 60.0
BROKEN = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 500\r\n\r\ndata: {"


@dataclass(frozen=True)
class Habit:
    """What a caller does: asks for `target`, and leaves after `leaves_after` reads, if it does not wait for the end."""

    name: str
    target: Target
    leaves_after: int | None = None


@dataclass(frozen=True)
class Soaked:
    """What was seen. `rss_mib` is by seconds since the load began; the others are what is there more than before."""

    asked: dict[str, int]
    answered: dict[str, int]
    rss_mib: list[tuple[float, float]]
    more_descriptors: int
    more_sockets: int
    under_way: int

    @property
    def growth_mb_per_minute(self) -> float:
        """How fast memory grows once the first part of the load is over."""
        warm_from_s = self.rss_mib[-1][0] * WARM_UP_SHARE
        warm = [(at_s / 60, mib * 2**20 / 1e6) for at_s, mib in self.rss_mib if at_s >= warm_from_s]
        return slope(warm)


def measure(minutes: float, cores: Cores, told: Callable[[str], object]) -> Soaked:
    """Return what so many minutes of load leave behind.

    Raises:
        CannotMeasure: the gateway or the upstream does not run.
    """
    told(f"mixed load for {minutes:g} minutes")
    with tempfile.TemporaryDirectory() as name, pinned(cores.others), served(_break_off) as broken:
        folder = Path(name)
        with upstream(folder, 8, cores.others) as behind:
            models = _models(behind, broken)
            with gateway_of(Place(folder, behind, cores.tested), models) as (pid, port, key):
                return asyncio.run(_soaked(pid, port, _habits(port, key), key, minutes * 60))


async def _break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Be a TGI that is well until it is asked for something, and then breaks off within the first event."""
    with suppress(OSError, asyncio.IncompleteReadError):
        while head := await reader.readuntil(b"\r\n\r\n"):
            if not head.startswith(b"GET"):
                writer.write(BROKEN)
                break
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    writer.close()


def _models(behind: Upstream, broken: int) -> dict[str, Any]:
    at = {
        "tgi": behind.url("whole"),
        "paced": behind.url("paced"),
        "broken": f"http://127.0.0.1:{broken}",
        "absent": f"http://127.0.0.1:{free_port()}",
    }
    # checked so often that the connections of the checks are always kept, before the load as after it
    watched = {"runtime": "external", "health_interval": "1s", "idle_timeout": "never"}
    models: dict[str, Any] = {
        name: {"engine": "tgi", "hf_name": name, "url": url, **watched} for name, url in at.items()
    }
    models["openai"] = {"engine": "openai", "url": behind.url("whole"), "args": {"model": "m"}, **watched}
    models["crowded"] = {**models["paced"], "hf_name": "crowded", "max_concurrency": 1, "max_queue": 2}
    return models


def _habits(port: int, key: str) -> list[Habit]:
    headers = {"Authorization": f"Bearer {key}"}

    def generate(model: str, tokens: int, *, stream: bool = False) -> Target:
        said = '{"model_id": "%s", "prompt": "%s", "max_new_tokens": %d, "stream": %s}'
        body = said % (model, PROMPT, tokens, "true" if stream else "false")
        return Target(port, GENERATE, body.encode(), headers)

    chat = b'{"model": "openai", "messages": [{"role": "user", "content": "x"}], "max_tokens": 8}'
    relayed = b'{"inputs": "x", "parameters": {"max_new_tokens": 8}}'
    return [
        Habit("whole", generate("tgi", 8)),
        Habit("chat", Target(port, CHAT, chat, headers)),
        Habit("relayed", Target(port, "/models/tgi/tgi/generate", relayed, headers)),
        Habit("streamed", generate("paced", 20, stream=True)),
        Habit("leaves amid a stream", generate("paced", 200, stream=True), leaves_after=3),
        Habit("leaves at once", generate("paced", 200), leaves_after=0),
        Habit("queues, or is refused", generate("crowded", 10)),
        Habit("queues, and leaves", generate("crowded", 10), leaves_after=0),
        Habit("the server breaks off", generate("broken", 8)),
        Habit("the server breaks off a stream", generate("broken", 8, stream=True)),
        Habit("there is no server", generate("absent", 8)),
        Habit("an unknown model", generate("nobody", 8)),
        Habit("a body that is no JSON", Target(port, GENERATE, b"{", headers)),
        Habit("no key", Target(port, GENERATE, b"{}")),
        Habit("lists models", Target(port, "/models", headers=headers, method="GET")),
        Habit("reads figures", Target(port, "/metrics", headers=headers, method="GET")),
    ]


async def _soaked(pid: int, port: int, habits: Sequence[Habit], key: str, seconds: float) -> Soaked:
    asked, answered = Counter[str](), Counter[str]()
    for habit in habits:  # everything that is made once is made before
        await _carry_out(habit, asked, answered)
    before = await _least_open(pid)
    rss: list[tuple[float, float]] = []
    began = time.monotonic()
    callers = [asyncio.create_task(_call(habits, seed, began + seconds, asked, answered)) for seed in range(CALLERS)]
    while not all(caller.done() for caller in callers):
        rss.append((time.monotonic() - began, rss_mib(tree(pid))))
        await asyncio.sleep(SAMPLE_EVERY_S)
    for caller in callers:
        caller.result()
    after = await _least_open(pid)
    listed = Target(port, "/models", headers={"Authorization": f"Bearer {key}"}, method="GET")
    models = json_of(ask(listed))["models"]
    under_way = sum(each["in_flight"] + each["queued"] for each in models)
    return Soaked(dict(asked), dict(answered), rss, after[0] - before[0], after[1] - before[1], under_way)


async def _call(habits: Sequence[Habit], seed: int, until: float, asked: Counter[str], answered: Counter[str]) -> None:
    """Be one caller after another, each with another habit."""
    chance = random.Random(seed)
    while time.monotonic() < until:
        await _carry_out(chance.choice(habits), asked, answered)
        await asyncio.sleep(chance.uniform(0, 0.05))


async def _carry_out(habit: Habit, asked: Counter[str], answered: Counter[str]) -> None:
    """Ask, and count by its habit who asked, and by status who was answered; one that stays is always answered.

    Raises:
        TimeoutError: it was not.
    """
    asked[habit.name] += 1
    reader, writer = await asyncio.open_connection("127.0.0.1", habit.target.port)
    try:
        writer.write(habit.target.request)
        heard, reads = b"", 0
        async with asyncio.timeout(ANSWER_S):
            while reads != habit.leaves_after and not is_whole(heard) and (came := await reader.read(READ_BYTES)):
                heard, reads = heard + came, reads + 1
        answered[heard[9:12].decode() or "left"] += 1
    finally:
        writer.transport.abort()


async def _least_open(pid: int) -> tuple[int, int]:
    """Return the fewest descriptors, and sockets among them, that are open within a while."""
    seen = []
    deadline = time.monotonic() + QUIET_S
    while time.monotonic() < deadline:
        opened = descriptors(tree(pid))
        seen.append((len(opened), sum(each.startswith("socket:") for each in opened)))
        await asyncio.sleep(0.2)
    return min(seen)
