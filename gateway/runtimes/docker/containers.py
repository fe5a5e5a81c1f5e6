"""What the engine says of one container, as a value; and the labels by which a gateway knows its own."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.runtimes.docker.engine import Engine, Refused

OWNER = "tgi-gateway.owner"
NAME = "tgi-gateway.name"
"""The name of the server, whatever somebody else calls its container since."""
MODEL = "tgi-gateway.model"
FINGERPRINT = "tgi-gateway.fingerprint"
GENERATION = "tgi-gateway.generation"
"""Random for each start, so that a start whose answer was lost finds what it made."""
GPUS = "tgi-gateway.gpus"
GPU_MEMORY = "tgi-gateway.gpu-memory"
PORT = "tgi-gateway.port"
"""Where the server listens inside; empty if it serves nobody."""

RUNS = frozenset({"running", "paused", "restarting"})


@dataclass(frozen=True, slots=True)
class Seen:
    """A container as it was when it was looked at."""

    id: str
    name: str
    labels: Mapping[str, str]
    status: str
    """`created`, `running`, `paused`, `restarting`, `removing`, `exited` or `dead`."""
    started_at: str
    exit_code: int
    out_of_memory: bool
    stop_signal: str
    published: int | None
    """The port of this machine that leads to it."""
    addresses: Mapping[str, str]
    """Its IP address in each network that it is connected to."""

    @property
    def server(self) -> str:
        """The name of the server that it was made for."""
        return self.labels.get(NAME) or self.name

    @property
    def runs(self) -> bool:
        return self.status in RUNS

    @property
    def paused(self) -> bool:
        return self.status == "paused"

    @property
    def short_id(self) -> str:
        return self.id[:12]


async def look(engine: Engine, reference: str, *, patiently: bool = True) -> Seen | None:
    """Return the container with exactly this id or name, or None if there is none.

    Raises:
        RuntimeUnavailable: the engine does not say.
    """
    ask = engine.ask if patiently else engine.ask_once
    try:
        inspected: dict[str, Any] = await ask(lambda client: client.inspect_container(reference))
    except Refused as refused:
        if refused.http_status == 404:
            return None
        raise
    seen = read(inspected)
    return seen if reference in (seen.id, seen.name) else None  # the engine takes the start of an id for the id


def read(inspected: Mapping[str, Any]) -> Seen:
    """Read what `inspect` says."""
    state, config, network = inspected["State"], inspected["Config"], inspected["NetworkSettings"]
    return Seen(
        id=inspected["Id"],
        name=inspected["Name"].removeprefix("/"),
        labels=config.get("Labels") or {},
        status=state["Status"],
        started_at=state.get("StartedAt", ""),
        exit_code=state.get("ExitCode", 0),
        out_of_memory=bool(state.get("OOMKilled")),
        stop_signal=config.get("StopSignal") or signal.SIGTERM.name,
        published=_published(network.get("Ports") or {}),
        addresses={name: end.get("IPAddress") or "" for name, end in (network.get("Networks") or {}).items()},
    )


def _published(ports: Mapping[str, list[dict[str, str]] | None]) -> int | None:
    bound = (binding.get("HostPort") for bindings in ports.values() for binding in bindings or ())
    return next((int(port) for port in bound if port), None)
