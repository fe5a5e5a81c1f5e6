"""Where the gateway itself is, seen from its containers; so, how it reaches them.

On the host each container is published on a port of the loopback interface. A gateway in a container has another
loopback: there the containers join a network of its own, and nothing is published at all.
"""

from __future__ import annotations

import hashlib
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from gateway.errors import RuntimeUnavailable, StartFailed
from gateway.runtimes.docker.containers import Seen, look
from gateway.runtimes.docker.engine import Engine, Refused
from gateway.runtimes.docker.ports import HOST

BUILT_IN = frozenset({"bridge", "host", "none"})
MOUNTS = Path("/proc/self/mountinfo")
ENGINE_FILES = frozenset({"/etc/hostname", "/etc/hosts", "/etc/resolv.conf"})
LABEL_LENGTH = 63
"""How long a part between two dots of a DNS name may be."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the gateway is: on the host, or in a network of containers."""

    network: str | None = None
    """The network that it shares with its containers; None on the host."""

    @property
    def on_host(self) -> bool:
        return self.network is None

    @property
    def by_name(self) -> bool:
        """Whether containers can be reached by name: the engine's own network `bridge` has no names."""
        return self.network is not None and self.network not in BUILT_IN

    def base_url(self, seen: Seen, port: int, published: int | None) -> tuple[str, int]:
        """Return where the server that listens on `port` inside a container is reached, and at which port.

        `published` is the port of this machine that leads there, if one does.

        Raises:
            StartFailed: it cannot be reached from here.
        """
        if self.network is None:
            if published is None:
                raise _out_of_reach(seen, "it is not published on this machine")
            return f"http://{HOST}:{published}", published
        if self.network not in seen.addresses:
            raise _out_of_reach(seen, f"it is not in the gateway's network {self.network}")
        name, address = host_name(seen.server), seen.addresses[self.network]
        sure = self.by_name and seen.name == seen.server  # if it was renamed, another may have its name
        host = name if sure else address or name  # one that has ended has no address
        return f"http://{host}:{port}", port


async def find_place(engine: Engine) -> Place:
    """Find out where the gateway is.

    Raises:
        RuntimeUnavailable: the engine does not say, or no container can be reached from where it is.
    """
    own = await own_container(engine)
    if own is None or "host" in own.addresses:
        return Place()
    networks = sorted(own.addresses, key=lambda network: (network in BUILT_IN, network))
    if not networks or networks[0] == "none":
        raise RuntimeUnavailable(
            "The gateway's container is in no network: connect it to one (`docker network connect`)."
        )
    return Place(networks[0])


async def own_container(engine: Engine) -> Seen | None:
    """Return the container that the gateway runs in, or None if it runs in none of this engine's."""
    for container_id in _own_ids():
        try:
            seen = await _by_id(engine, container_id)
        except Refused:  # what we took for an id is none to the engine
            continue
        if seen:
            return seen
    return None


def host_name(name: str) -> str:
    """Return the name by which a container is found in its network: its own, if that can be a DNS name."""
    if all(0 < len(label) <= LABEL_LENGTH for label in name.split(".")):
        return name
    return f"tgi-{hashlib.sha256(name.encode()).hexdigest()[:32]}"


def _own_ids() -> list[str]:
    """Return what may be the id of our own container: from files that an engine mounts, then from the host's name."""
    mounts = MOUNTS.read_text() if MOUNTS.exists() else ""
    return [*_mounted_ids(mounts), *re.findall(r"^[0-9a-f]{12}$", socket.gethostname())]


def _mounted_ids(mounts: str) -> list[str]:
    found = []
    for line in mounts.splitlines():
        root, target = line.split(" ")[3:5]
        match = re.search(r"/containers/([0-9a-f]{64})/", root)
        if match and target in ENGINE_FILES:
            found.append(match[1])
    return list(dict.fromkeys(found))


async def _by_id(engine: Engine, container_id: str) -> Seen | None:
    if len(container_id) < 64:  # a host's name may look like a short id, so it must really be one
        inspected = await engine.ask(lambda client: client.inspect_container(container_id))
        container_id = inspected["Id"] if inspected["Id"].startswith(container_id) else ""
    return await look(engine, container_id) if container_id else None


def _out_of_reach(seen: Seen, why: str) -> StartFailed:
    return StartFailed(f"The container {seen.name} cannot be reached from the gateway: {why}.")
