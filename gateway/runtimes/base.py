"""Where a model's server runs: the contract of every runtime, and the values it speaks of.

A runtime knows nothing of models. It takes a `Launch`, makes one server of it, and knows that
server by its name from then on: names are identity, so that a lost handle does no harm.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Protocol

PullPolicy = Literal["missing", "always", "never"]
"""When an image is pulled: only if it is not there, before every start, or never."""


@dataclass(frozen=True, slots=True)
class RequiredFile:
    """A file that the server cannot run without, and its SHA-256 in hex where one is known."""

    path: Path
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Mount:
    """What a container sees of its machine at `target`: a directory (`source` is absolute) or a named volume."""

    source: str
    target: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Container:
    """What a launch needs beyond its command when it runs in a container. Sizes are in bytes."""

    image: str
    pull_policy: PullPolicy = "missing"
    entrypoint: tuple[str, ...] = ()
    """Run in place of the image's own entrypoint, if any."""
    port: int | None = None
    """The port that the server listens on inside; None for a program that serves nobody."""
    mounts: tuple[Mount, ...] = ()
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Secrets by the variable that names their file: `HF_TOKEN_PATH`. Never in the environment, never logged."""
    shm_bytes: int | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Launch:
    """What to run. Made by an engine from a `ModelSpec`; the fleet adds the GPUs and the fingerprint."""

    name: str
    """Names the server on its runtime, and nothing else there may have this name."""
    command: tuple[str, ...] = ()
    """Program and arguments; for a container, the arguments. Runtime process puts the port it chose for `{port}`."""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Added to the server's environment. May hold secrets: never logged."""
    files: tuple[RequiredFile, ...] = ()
    """Checked before the server is made: each must exist and be what it should be. Hashed once per file."""
    url: str | None = None
    """Where a server that already runs is reached; only runtime `external` reads it."""
    container: Container | None = None
    """Only runtime `docker` reads it, and needs it."""
    model: str = ""
    """The id of the model it serves."""
    gpus: tuple[str, ...] = ()
    """The ids of the GPUs that it gets: these and no others."""
    gpu_memory_bytes: int | None = None
    """What it takes of each of them; None: all of it."""
    fingerprint: str = ""
    """The same for two launches that would make the same server. A server that outlives the gateway keeps it."""


@dataclass(frozen=True, slots=True)
class Handle:
    """Where a server is reached. `ref` is what its runtime calls it (a pid, a container id), for people only."""

    name: str
    base_url: str
    port: int | None
    ref: str


@dataclass(frozen=True, slots=True)
class Exit:
    """How a server ended. `reason` is for people: `exit status 1`, `killed by SIGKILL`."""

    code: int | None
    reason: str
    last_lines: tuple[str, ...] = ()
    """The last lines of its output, oldest first."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a start has come: 3 of 5 `shards` in phase `loading`, say. `done` and `total` count in `unit`."""

    phase: str
    done: float | None = None
    total: float | None = None
    unit: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A server that an earlier life of this gateway made. `made_at` is in seconds since 1970."""

    name: str
    fingerprint: str
    made_at: float
    gpus: tuple[str, ...]
    runs: bool
    gpu_memory_bytes: int | None = None
    """What it takes of each of its GPUs; None: all of it."""


class Listener(Protocol):
    """Who hears what a server says while it lives. Called on the event loop's thread; must not block or raise."""

    def line(self, text: str) -> None:
        """Hear one line of the server's output, without its line end."""

    def progress(self, progress: Progress) -> None:
        """Hear how far the runtime's own work has come (a pull, say)."""

    def paused(self, reason: str) -> None:
        """Hear that somebody froze the server: it is there, and answers nobody until it is thawed."""


class Runtime(Protocol):
    """A place that can run servers. Calls for different names may overlap; for one name only `stop` may overlap."""

    name: ClassVar[str]
    outlives: ClassVar[bool]
    """Whether its servers can go on when the gateway has ended, to be found and adopted by the next one."""

    async def find(self) -> list[Found]:
        """Return the servers that an earlier life of this gateway left here, running or not; nobody else's.

        Raises:
            RuntimeUnavailable: the runtime does not answer: what is there is not known.
            NameTaken: another gateway of the same name lives and owns them.
        """

    async def adopt(self, found: Found, listener: Listener) -> Handle:
        """Take over a server that `find` returned, as if it had just been started here.

        Its output is heard from its beginning, as far as it is kept.

        Raises:
            StartFailed: it is gone.
            RuntimeUnavailable: the runtime does not answer.
        """

    async def check(self, launch: Launch) -> None:
        """Return if nothing is seen that keeps `launch` from being run: a look before a start, of seconds at most.

        Nothing is made, read through or asked of others. What cannot be seen in time is left to `start`.

        Raises:
            StartFailed: a start would surely fail; in its words.
        """

    async def start(self, launch: Launch, listener: Listener) -> Handle:
        """Run `launch` and return once its server exists; it need not answer yet.

        An older server of the same name is removed first. A start that raised or was cancelled may
        leave something behind; `stop(launch.name)` finds it by name and removes it.

        Raises:
            StartFailed: the program, image, port or device could not be had.
            RuntimeUnavailable: the runtime does not answer; whether something runs is not known.
        """

    async def ended(self, handle: Handle) -> Exit:
        """Return how the server ended, as soon as it is *known* to have ended.

        Waits as long as it lives, and also while the runtime cannot be asked: not knowing is not dead.
        """

    async def stop(self, name: str, *, grace_s: float) -> None:
        """Remove the server of this name; return when it is gone. What is already gone is no error.

        Waits first for a `start` of that name that was cancelled and has not let go yet. The server is
        asked to leave, then killed after `grace_s` seconds.

        Raises:
            RuntimeUnavailable: the runtime does not answer; whether something still runs is not known.
        """

    def logs(self, name: str, *, lines: int, follow: bool) -> AsyncIterator[str]:
        """Yield the last `lines` lines of the newest server of this name, oldest first, also after its end.

        With `follow`, go on with new lines until the server has ended.
        """

    async def aclose(self) -> None:
        """Let go of the runtime's own connections and tasks. A server that must not outlive the gateway is killed."""
