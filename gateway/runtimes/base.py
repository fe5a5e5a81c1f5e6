"""Where a model's server runs: the contract of every runtime, and the values it speaks of.

A runtime knows nothing of models. It takes a `Launch`, makes one server of it, and knows that
server by its name from then on: names are identity, so that a lost handle does no harm.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol


@dataclass(frozen=True, slots=True)
class RequiredFile:
    """A file that the server cannot run without, and its SHA-256 in hex where one is known."""

    path: Path
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Launch:
    """What to run. Made by an engine from a `ModelSpec`."""

    name: str
    """Names the server on its runtime, and nothing else there may have this name."""
    command: tuple[str, ...] = ()
    """Program and arguments. `{port}` stands for the port that the runtime chooses."""
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Added to the server's environment. May hold secrets: never logged."""
    files: tuple[RequiredFile, ...] = ()
    """Checked before the server is made: each must exist and be what it should be. Hashed once per file."""
    url: str | None = None
    """Where a server that already runs is reached; only runtime `external` reads it."""


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


class Listener(Protocol):
    """Who hears what a server says while it lives. Called on the event loop's thread; must not block or raise."""

    def line(self, text: str) -> None:
        """Hear one line of the server's output, without its line end."""

    def progress(self, progress: Progress) -> None:
        """Hear how far the runtime's own work has come (a pull, say)."""


class Runtime(Protocol):
    """A place that can run servers. Calls for different names may overlap; for one name only `stop` may overlap."""

    name: ClassVar[str]

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
