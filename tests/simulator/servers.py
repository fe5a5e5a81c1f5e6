"""The simulated twins of what touches sockets and threads: a runtime of bad manners, its servers, and the probe."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from gateway.catalog import ModelSpec
from gateway.devices import Share
from gateway.engines.base import Api, Call, Decoder, Diagnosis
from gateway.errors import GatewayError, NoCapacity, RuntimeUnavailable, StartFailed, Unsupported
from gateway.fleet.health import Answer
from gateway.generation import GenerationRequest, PromptToken
from gateway.runtimes.base import Exit, Found, Handle, Launch, Listener, Progress

NEVER = math.inf
TAKEN_BY_OTHERS = "('memory', 'taken by others')"
"""In the command of a model whose reservation others than ours use: `args: {memory: taken by others}`."""
GPU_MEMORY = "GPU_MEMORY"
"""What a server takes of each of its GPUs, if it does not take all of it."""


class Broke(Exception):
    """A promise was broken; the words say which and how."""


@dataclass(frozen=True, slots=True)
class Manners:
    """How one server behaves, in seconds from its making. Drawn anew for every start."""

    make_s: float = 1.0
    load_s: float = 5.0
    fails_to_start: bool = False
    silent_load: bool = False  # prints nothing while it loads
    dies_loading_s: float = NEVER
    dies_serving_s: float = NEVER
    hangs_s: float = NEVER
    hang_lasts_s: float = 0.0
    leaves_s: float = 0.2  # from being asked to leave until it is gone; above the grace it is killed


def draw_manners(random: Random) -> Manners:
    """Return polite manners most of the time, and every bad one now and then."""
    make_s, load_s = random.uniform(0.1, 5), random.choice([0.5, 5, 30, 90])
    match random.choices(
        ["polite", "slow", "never ready", "fails", "dies loading", "dies serving", "hangs", "stubborn"],
        [60, 5, 4, 5, 5, 8, 12, 5],
    )[0]:
        case "slow":
            return Manners(make_s=random.uniform(5, 60), load_s=random.uniform(60, 700))
        case "never ready":
            return Manners(make_s, NEVER, silent_load=random.random() < 0.5)
        case "fails":
            return Manners(make_s, load_s, fails_to_start=True)
        case "dies loading":
            return Manners(make_s, load_s, dies_loading_s=random.uniform(0, load_s))
        case "dies serving":
            return Manners(make_s, load_s, dies_serving_s=random.choice([0.0, 1.0, 30.0, 600.0]))
        case "hangs":
            lasts_s = random.choice([5.0, 35.0, 50.0, 65.0, 80.0, NEVER])
            return Manners(
                make_s, load_s, hangs_s=random.choice([0.0, 1.0, 10.0, random.uniform(0, 900)]), hang_lasts_s=lasts_s
            )
        case "stubborn":
            return Manners(make_s, load_s, leaves_s=random.uniform(1, 300))
        case _:
            return Manners(make_s, load_s)


class Server:
    """One simulated server process."""

    def __init__(self, name: str, manners: Manners, listener: Listener, launch: Launch | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.name = name
        self.fingerprint = launch.fingerprint if launch else ""
        self.gpus = launch.gpus if launch else ()
        taken = launch.env.get(GPU_MEMORY) if launch else None
        self.gpu_memory_bytes = int(taken) if taken else None
        self.manners = manners
        self.listener = listener
        self.made_at = self.loop.time()
        self.alive = True
        self.removed = False
        self.hung_since: float | None = None
        self.recovered_at = -NEVER
        self.ended: asyncio.Future[Exit] = self.loop.create_future()
        self.disturbed: asyncio.Future[None] = self.loop.create_future()
        self.requests: dict[object, None] = {}
        self._timers = [self._at(self._dies_at(), self.die), self._at(self.ready_at + manners.hangs_s, self.hang)]
        self._timers.append(self._at(self.made_at, self._say, 0))

    @property
    def ready_at(self) -> float:
        return self.made_at + self.manners.load_s

    @property
    def loads(self) -> bool:
        return self.alive and self.hung_since is None and self.loop.time() < self.ready_at

    @property
    def is_ready(self) -> bool:
        return self.alive and self.hung_since is None and self.loop.time() >= self.ready_at

    def die(self, reason: str = "exit status 1") -> None:
        if self.alive:
            self.alive = False
            self.ended.set_result(Exit(1, reason))
            self._changed()
            for timer in self._timers:
                if timer:
                    timer.cancel()

    def hang(self) -> None:
        if self.alive and self.hung_since is None:
            self.hung_since = self.loop.time()
            self._changed()
            self._timers.append(self._at(self.loop.time() + self.manners.hang_lasts_s, self.recover))

    def recover(self) -> None:
        self.hung_since = None
        self.recovered_at = self.loop.time()

    def _dies_at(self) -> float:
        return min(self.made_at + self.manners.dies_loading_s, self.ready_at + self.manners.dies_serving_s)

    def _at(self, when: float, what: object, *args: object) -> asyncio.TimerHandle | None:
        return None if when == NEVER else self.loop.call_at(when, what, *args)  # type: ignore[arg-type]

    def _say(self, lines: int) -> None:
        """Print a line of progress twenty times a load, or every half minute of an endless one."""
        if not self.alive or self.loop.time() >= self.ready_at:
            return
        if not self.manners.silent_load:
            self.listener.line(f"loading {lines}")
        pause_s = min(max(self.manners.load_s / 20, 1.0), 30.0)
        self._timers.append(self._at(self.loop.time() + pause_s, self._say, lines + 1))

    def _changed(self) -> None:
        disturbed, self.disturbed = self.disturbed, self.loop.create_future()
        disturbed.set_result(None)


class BadMannersRuntime:
    """A runtime whose servers behave as badly as real ones, and whose daemon falls silent for a while."""

    name: ClassVar[str] = "simulated"
    outlives: ClassVar[bool] = True

    def __init__(self, random: Random) -> None:
        self.random = random
        self.servers: dict[str, list[Server]] = {}
        self.broken: str | None = None
        """The first promise that was broken here: who waits for the order may never look what came of it."""
        self.starting: dict[str, int] = {}
        self.starts: dict[str, int] = {}
        self.silent_until = 0.0
        self.silent_after_find_s = 0.0
        self.perhaps_left: dict[str, bool] = {}  # names whose last stop did not succeed
        self.last_sign: dict[str, float] = {}  # when a server of the name last said anything
        self.next_manners: list[Manners] = []
        self.lacks_files: set[str] = set()
        """Names whose weights are not there."""
        self.stopping: set[str] = set()
        """Names of which a stop is under way."""
        self.looks_for_s = 0.0
        """How long it takes to see whether a server can be started."""
        self.let_go: set[str] = set()
        """Names whose servers the gateway stops at a time of its own choice."""
        self._making: dict[str, Launch] = {}
        self.grabbed: dict[str, Counter[str]] = {}
        """What each name's server has of its GPUs beyond its share: what came free there while it started."""

    def _broken(self, words: str) -> Broke:
        self.broken = self.broken or words
        return Broke(words)

    def alive(self, name: str) -> list[Server]:
        return [server for server in self.servers.get(name, []) if server.alive]

    def newest(self, name: str) -> Server:
        return self.servers[name][-1]

    async def find(self) -> list[Found]:
        await self._answer()
        if self.silent_after_find_s:
            self.fall_silent(self.silent_after_find_s)
        left = [servers[-1] for servers in self.servers.values() if not servers[-1].removed]
        return [
            Found(each.name, each.fingerprint, each.made_at, each.gpus, each.alive, each.gpu_memory_bytes)
            for each in left
        ]

    async def adopt(self, found: Found, listener: Listener) -> Handle:
        await self._answer()
        server = self.newest(found.name)
        if not server.alive:
            raise StartFailed("it is gone")
        server.listener = _Noting(self, found.name, listener)
        return _handle(server)

    async def check(self, launch: Launch) -> None:
        if self.looks_for_s:
            await asyncio.sleep(self.looks_for_s)
        if launch.name in self.lacks_files:
            raise StartFailed("its weights do not exist")

    async def start(self, launch: Launch, listener: Listener) -> Handle:
        name = launch.name
        if self.starting.get(name):
            raise self._broken(f"P2: two starts of {name} at once")
        self.starting[name] = 1
        self.starts[name] = self.starts.get(name, 0) + 1
        self._making[name], self.grabbed[name] = launch, Counter()
        try:
            return await self._start(launch, listener)
        finally:
            self.starting[name] = 0
            self._making.pop(name, None)

    async def _start(self, launch: Launch, listener: Listener) -> Handle:
        name = launch.name
        manners = self.next_manners.pop(0) if self.next_manners else draw_manners(self.random)
        await self._answer()
        for older in self.alive(name):
            if not self.perhaps_left.get(name):
                raise self._broken(f"P2: {name} is started, and the server before it was never removed")
            older.die("replaced")
        self._removed(name)
        await asyncio.sleep(manners.make_s)
        if manners.fails_to_start:
            raise StartFailed("no such image")
        if self.alive(name):
            raise self._broken(f"P2: a second server of {name}")
        server = Server(name, manners, _Noting(self, name, listener), launch)
        self.servers.setdefault(name, []).append(server)
        del self._making[name]
        self.perhaps_left[name] = False
        del self.servers[name][:-3]
        await self._answer()  # it exists, but the daemon has not said so yet
        return _handle(server)

    async def ended(self, handle: Handle) -> Exit:
        end = await asyncio.shield(self.newest(handle.name).ended)
        await self._answer()
        return end

    async def stop(self, name: str, *, grace_s: float) -> None:
        self.stopping.add(name)
        try:
            await self._stop(name, grace_s)
        finally:
            self.stopping.discard(name)

    async def _stop(self, name: str, grace_s: float) -> None:
        was_perhaps_left = self.perhaps_left.get(name)
        self.perhaps_left[name] = True
        await self._answer()
        for server in self.alive(name):
            if server.requests:
                raise self._broken(f"P1: {name} is stopped while it serves {len(server.requests)} requests")
            await asyncio.sleep(min(server.manners.leaves_s, grace_s))
            server.die("stopped")
            if name in self.let_go and server.gpu_memory_bytes and not was_perhaps_left:
                self._grab(server.gpus, server.gpu_memory_bytes)
        self.let_go.discard(name)
        self._removed(name)
        self.perhaps_left[name] = False

    def _grab(self, free: tuple[str, ...], free_bytes: int) -> None:
        """Have those who start on GPUs take what a server leaves there: they were told how much of them to leave free.

        What comes free as a server dies or an operator stops it they leave alone, for nobody can help that; nor that
        of a server of which nobody knew whether it was gone.
        """
        loading = [servers[-1] for servers in self.servers.values() if servers[-1].loads]
        shares = {
            each.name: each.gpus for each in loading if each.gpu_memory_bytes and not self.perhaps_left[each.name]
        }
        shares |= {name: launch.gpus for name, launch in self._making.items() if launch.gpu_memory_bytes}
        for name, gpus in shares.items():
            for gpu in set(gpus).intersection(free):
                self.grabbed[name][gpu] += free_bytes

    def _removed(self, name: str) -> None:
        for server in self.servers.get(name, []):
            server.removed = True

    async def logs(self, name: str, *, lines: int, follow: bool) -> AsyncIterator[str]:
        yield f"the last {lines} lines of {name}"

    async def aclose(self) -> None:
        for name in self.servers:
            for server in self.alive(name):
                server.die("gateway gone")

    def fall_silent(self, seconds: float) -> None:
        self.silent_until = asyncio.get_running_loop().time() + seconds

    async def _answer(self) -> None:
        """Wait as long as the daemon is silent; after half a minute the client library gives up."""
        left_s = self.silent_until - asyncio.get_running_loop().time()
        if left_s > 0:
            await asyncio.sleep(min(left_s, 30.0))
        if left_s > 30.0:
            raise RuntimeUnavailable("the daemon does not answer")


def _handle(server: Server) -> Handle:
    return Handle(server.name, f"sim://{server.name}", None, str(server.made_at))


class _Noting:
    """Passes on what a server says, and notes when it did."""

    def __init__(self, runtime: BadMannersRuntime, name: str, listener: Listener) -> None:
        self._runtime = runtime
        self._name = name
        self._listener = listener

    def line(self, text: str) -> None:
        self._runtime.last_sign[self._name] = asyncio.get_running_loop().time()
        self._listener.line(text)

    def progress(self, progress: Progress) -> None:
        self._listener.progress(progress)

    def paused(self, reason: str) -> None:
        self._listener.paused(reason)


class Deaf:
    """Hears nothing: the gateway that listened is gone."""

    def line(self, text: str) -> None:
        pass

    def progress(self, progress: Progress) -> None:
        pass

    def paused(self, reason: str) -> None:
        pass


class SimulatedProbe:
    """Health checks of simulated servers."""

    def __init__(self, runtime: BadMannersRuntime) -> None:
        self._runtime = runtime
        self._was_well: dict[str, bool] = {}

    async def ask(self, url: str, timeout_s: float, headers: Mapping[str, str]) -> Answer | None:
        server = self._runtime.newest(url.removeprefix("sim://").removesuffix("/health"))
        answer = await self._ask(server, timeout_s)
        self._was_well[server.name] = answer is not None and answer[0] == 200
        return answer

    async def _ask(self, server: Server, timeout_s: float) -> Answer | None:
        if not server.alive:
            return None
        if server.hung_since is not None:
            await asyncio.sleep(timeout_s)
            return None
        return (200 if server.is_ready else 503), b""

    async def rest(self, handle: Handle, seconds: float) -> None:
        """Rest as the real one does, but jump over all checks that could only find the server well, or loading."""
        loop = asyncio.get_running_loop()
        server, began = self._runtime.newest(handle.name), loop.time()
        if self._was_well.get(handle.name) and server.is_ready:
            await asyncio.shield(server.disturbed)
        elif server.loads:
            left_s = None if server.ready_at == NEVER else server.ready_at - began
            await asyncio.wait([server.disturbed], timeout=left_s)
        checks = math.ceil((loop.time() - began) / seconds) or 1
        await asyncio.sleep(began + checks * seconds - loop.time())


class SimulatedEngine:
    """The engine of simulated servers; the conversation itself is played by the callers of the simulation."""

    name: ClassVar[str] = "simulated"
    health_path: ClassVar[str] = "/health"
    default_slots: ClassVar[int] = 4
    speaks: ClassVar[Api | None] = None

    def launch(self, spec: ModelSpec, name: str, secret: str) -> Launch:
        env = {GPU_MEMORY: str(spec.gpu_memory_bytes)} if spec.gpu_memory_bytes else {}
        return Launch(name, command=tuple(map(str, spec.args.items())), env=env)

    def placed(self, launch: Launch, shares: Sequence[Share]) -> Launch:
        if TAKEN_BY_OTHERS in launch.command:
            raise NoCapacity("other programs have the memory")
        return launch

    def download(self, spec: ModelSpec, name: str) -> Launch | None:
        return None

    def is_ready(self, status: int, body: bytes) -> bool:
        return status == 200

    def is_alive(self, status: int, body: bytes) -> bool:
        return status == 200

    def progress(self, line: str) -> Progress | None:
        return Progress("loading", float(line.split()[1]), 20.0, "steps")

    def diagnose(self, end: Exit) -> Diagnosis:
        return Diagnosis(f"it ended with {end.code}", "Try again.")

    def check(self, spec: ModelSpec, request: GenerationRequest) -> None:
        pass

    def call(self, spec: ModelSpec, request: GenerationRequest, secret: str) -> Call:
        raise Unsupported("the simulation has no wire")

    def decoder(self, request: GenerationRequest) -> Decoder:
        raise Unsupported("the simulation has no wire")

    def refusal(self, status: int, body: bytes) -> GatewayError:
        raise Unsupported("the simulation has no wire")

    def tokenize(self, spec: ModelSpec, request: GenerationRequest, secret: str) -> Call:
        raise Unsupported("the simulation has no wire")

    def tokens(self, request: GenerationRequest, body: bytes) -> tuple[PromptToken, ...]:
        raise Unsupported("the simulation has no wire")

    def forward(self, spec: ModelSpec, call: Call, secret: str) -> Call:
        raise Unsupported("the simulation has no wire")
