"""A long mixed load, with callers who leave and models that fail, and what it leaves behind in the gateway.

It is seen from outside: resident memory, file descriptors, and what the gateway says of its tasks and of the requests
that are under way.
"""

from __future__ import annotations

import asyncio
import random
import re
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
from tests.bench.machine import CannotMeasure, Cores, descriptors, pinned, rss_mib, tree
from tests.bench.own_server import served
from tests.bench.rivals import GENERATE, Place, gateway_of
from tests.bench.upstream import Upstream, upstream
from tests.tgi_double.process import free_port

CALLERS = 24
SAMPLE_EVERY_S = 1.0
WARM_UP_S = 75.0
"""Of the load, what does not count: a key's requests of the last minute, say, are remembered."""
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
class Open:
    """What a gateway has open; or how much more than before."""

    descriptors: int
    sockets: int
    tasks: int

    def beyond(self, before: Open) -> Open:
        """Return how much more this is."""
        return Open(self.descriptors - before.descriptors, self.sockets - before.sockets, self.tasks - before.tasks)


@dataclass(frozen=True)
class Soaked:
    """What was seen. `rss_mib` is by seconds since the load began; `more` is what is open beyond what was before it."""

    asked: dict[str, int]
    answered: dict[str, int]
    rss_mib: list[tuple[float, float]]
    more: Open
    under_way: int

    @property
    def growth_mb_per_minute(self) -> float:
        """How fast memory grows once the load is warm."""
        warm = [(at_s / 60, mib * 2**20 / 1e6) for at_s, mib in self.rss_mib if at_s >= WARM_UP_S]
        return slope(warm)


def measure(minutes: float, cores: Cores, told: Callable[[str], object], callers: int = CALLERS) -> Soaked:
    """Return what so many minutes of load leave behind, after those in which it warms up.

    Raises:
        CannotMeasure: the gateway or the upstream does not run.
    """
    told(f"mixed load for {minutes:g} minutes, and {WARM_UP_S:g} s before them")
    with tempfile.TemporaryDirectory() as name, pinned(cores.others), served(_break_off) as broken:
        folder = Path(name)
        with upstream(folder, 8, cores.others) as behind:
            models = _models(behind, broken)
            with gateway_of(Place(folder, behind, cores.tested), models) as (pid, port, key):
                lasts_s = WARM_UP_S + minutes * 60
                return asyncio.run(_soaked(pid, port, _habits(port, key), key, lasts_s, callers))


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


async def _soaked(pid: int, port: int, habits: Sequence[Habit], key: str, lasts_s: float, count: int) -> Soaked:
    asked, answered = Counter[str](), Counter[str]()
    headers = {"Authorization": f"Bearer {key}"}
    figures, listed = (Target(port, path, headers=headers, method="GET") for path in ("/metrics", "/models"))
    for habit in habits:  # everything that is made once is made before
        await _carry_out(habit, asked, answered)
    before = await _least_open(pid, figures)
    rss: list[tuple[float, float]] = []
    began = time.monotonic()
    callers = [asyncio.create_task(_call(habits, seed, began + lasts_s, asked, answered)) for seed in range(count)]
    while not all(caller.done() for caller in callers):
        rss.append((time.monotonic() - began, rss_mib(tree(pid))))
        await asyncio.sleep(SAMPLE_EVERY_S)
    for caller in callers:
        caller.result()
    more = (await _least_open(pid, figures)).beyond(before)
    under_way = sum(each["in_flight"] + each["queued"] for each in json_of(ask(listed))["models"])
    return Soaked(dict(asked), dict(answered), rss, more, under_way)


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


async def _least_open(pid: int, figures: Target) -> Open:
    """Return the least that is open within a while: what checks health comes and goes."""
    seen = []
    deadline = time.monotonic() + QUIET_S
    while time.monotonic() < deadline:
        opened = descriptors(tree(pid))
        sockets = sum(each.startswith("socket:") for each in opened)
        seen.append(Open(len(opened), sockets, _tasks(ask(figures))))
        await asyncio.sleep(0.2)
    return Open(
        min(each.descriptors for each in seen), min(each.sockets for each in seen), min(each.tasks for each in seen)
    )


def _tasks(figures: bytes) -> int:
    found = re.search(rb"^gateway_event_loop_tasks (\S+)$", figures, re.MULTILINE)
    if not found:
        raise CannotMeasure("The gateway's /metrics tells nothing of its tasks.")
    return int(float(found[1]))
