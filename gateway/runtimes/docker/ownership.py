"""One live gateway per name and engine: a lock that outlives a crash, and never a wrong guess who is alive.

The lock is a labelled volume, because volumes are what an engine keeps for us without running anything. Each gateway
makes one of its own first and looks for others then: of two that start at once at least one sees the other, and
nobody who owns the name is ever overlooked. A lock whose holder is known to be dead is removed; one whose holder
cannot be judged counts as alive.

A volume that no container uses may be pruned, so whoever holds a lock sees to it that it stays. One whose lock was
gone makes it anew as if it had just started, and so yields to another that took the name meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gateway.errors import NameTaken, RuntimeUnavailable
from gateway.runtimes.docker.containers import Seen, look
from gateway.runtimes.docker.engine import Engine, Refused
from gateway.runtimes.docker.place import own_container

log = logging.getLogger(__name__)

LOCK = "tgi-gateway.lock"
HOLDER = "tgi-gateway.holder"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")
PROC = Path("/proc")
RENEW_S = 30.0
"""How often the lock is looked for while it is held."""
GIVE_BACK_S = 3.0
"""How long giving it back may take: what stays, the next gateway removes."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A process, told apart from any other that may have its number: in another boot, namespace or life."""

    boot_id: str
    pid_namespace: int
    pid: int
    start_time: str
    container_id: str = ""
    container_started_at: str = ""

    def __str__(self) -> str:
        return f"container {self.container_id[:12]}" if self.container_id else f"process {self.pid}"


class Ownership:
    """The right to own what carries this name on one engine; taken once, kept up, given back at the end."""

    def __init__(self, engine: Engine, owner: str, *, renew_s: float = RENEW_S) -> None:
        self._engine = engine
        self._owner = owner
        self._renew_s = renew_s
        self._volume = f"tgi-gateway-{re.sub('[^a-zA-Z0-9_.-]', '-', owner)}-{secrets.token_hex(8)}"
        self._held = False
        self._seen_at = 0.0
        """When the lock was last known to be there."""
        self._turn = asyncio.Lock()
        self._keeper: asyncio.Task[None] | None = None

    async def take(self) -> None:
        """Return when the name is ours. To be called before whatever needs it: it may be lost again.

        Raises:
            NameTaken: another gateway has it, and lives as far as can be told.
            RuntimeUnavailable: the engine does not answer.
        """
        async with self._turn:
            if not self._held or _now() - self._seen_at >= self._renew_s:
                await self._renew()
        self._keeper = self._keeper or asyncio.create_task(self._keep(), name=f"lock on {self._owner}")

    async def give_back(self) -> None:
        """Let go of the name, as far as the engine lets us in a short time. Never raises."""
        if self._keeper:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        if self._held:
            self._held = False
            if why := await self._let_go():
                log.warning("The lock on the name %s stays for the next gateway to remove: %s", self._owner, why)

    async def _keep(self) -> None:
        """See to it, for ever, that the lock is there; and once it is lost, that it is got back when it can be."""
        while True:
            await asyncio.sleep(self._renew_s)
            with suppress(RuntimeUnavailable, NameTaken):
                async with self._turn:
                    await self._renew()

    async def _renew(self) -> None:
        looked_at = _now()
        if not (self._held and await self._is_there()):
            if self._held:
                log.warning("The lock on the name %s (volume %s) was removed by somebody.", self._owner, self._volume)
            self._held = False
            await self._make_and_judge()
            self._held = True
        self._seen_at = looked_at

    async def _make_and_judge(self) -> None:
        try:
            own = await self._make()
            for volume, holder in await self._others():
                await self._judge(volume, holder, own)
        except BaseException:
            await self._let_go()
            raise

    async def _is_there(self) -> bool:
        try:
            await self._engine.ask(lambda client: client.inspect_volume(self._volume))
        except Refused as refused:
            if refused.http_status == 404:
                return False
            raise
        return True

    async def _let_go(self) -> str | None:
        """Remove our lock, in one attempt and a short time; return why it may still be there, if so."""
        try:
            async with asyncio.timeout(GIVE_BACK_S):
                await self._engine.ask_once(lambda client: client.remove_volume(self._volume))
        except TimeoutError:
            return f"the engine has not answered within {GIVE_BACK_S:g} s"
        except RuntimeUnavailable as error:
            return None if _is_gone(error) else error.detail
        return None

    async def _make(self) -> Holder:
        holder = this_process(await own_container(self._engine))
        labels = {LOCK: self._owner, HOLDER: json.dumps(asdict(holder))}
        await self._engine.do(lambda client: client.create_volume(self._volume, labels=labels))
        return holder

    async def _others(self) -> list[tuple[str, Holder | None]]:
        filters = {"label": f"{LOCK}={self._owner}"}
        answer: dict[str, Any] = await self._engine.ask(lambda client: client.volumes(filters=filters))
        volumes = [(volume["Name"], volume.get("Labels") or {}) for volume in answer.get("Volumes") or []]
        return [
            (name, _read(labels))
            for name, labels in volumes
            if labels.get(LOCK) == self._owner and name != self._volume
        ]

    async def _judge(self, volume: str, holder: Holder | None, own: Holder) -> None:
        """Remove a dead holder's lock, and yield to any other."""
        if holder and not await self._may_live(holder, own):
            await self._remove(volume)
            return
        raise NameTaken(
            f"Another gateway is named {self._owner!r} on this Docker Engine and owns its containers: "
            f"{holder or 'nobody can tell which'}. Stop it, or give this one a name of its own (GATEWAY_NAME). "
            f"If it is gone for good, remove its lock: docker volume rm {volume}"
        )

    async def _may_live(self, holder: Holder, own: Holder) -> bool:
        if (holder.boot_id, holder.pid_namespace) == (own.boot_id, own.pid_namespace):
            started = start_time(holder.pid)
            return started is not None and (started == holder.start_time or "" in (started, holder.start_time))
        if holder.container_id:
            seen = await look(self._engine, holder.container_id)
            return seen is not None and seen.runs and seen.started_at == holder.container_started_at
        return holder.boot_id == own.boot_id

    async def _remove(self, volume: str) -> None:
        try:
            await self._engine.do(lambda client: client.remove_volume(volume))
        except Refused as refused:
            if not _is_gone(refused):
                raise


def this_process(container: Seen | None) -> Holder:
    """Return how others can tell whether this very process still lives. `container` is the one it runs in."""
    return Holder(
        boot_id=_boot_id(),
        pid_namespace=PID_NAMESPACE.stat().st_ino if PID_NAMESPACE.exists() else 0,
        pid=os.getpid(),
        start_time=start_time(os.getpid()) or "",
        container_id=container.id if container else "",
        container_started_at=container.started_at if container else "",
    )


def start_time(pid: int, proc: Path = PROC) -> str | None:
    """Return when a process started, in ticks since the boot; empty if only its number is known.

    None if there is no such process, or only its remains. With `hidepid`, `/proc` shows no process of another user's.
    """
    with suppress(OSError):
        fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return "" if _exists(pid) else None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _is_gone(error: Exception) -> bool:
    return isinstance(error, Refused) and error.http_status == 404


def _now() -> float:
    return asyncio.get_running_loop().time()


def _boot_id() -> str:
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""


def _read(labels: Mapping[str, str]) -> Holder | None:
    try:
        holder = Holder(**json.loads(labels[HOLDER]))
    except (KeyError, ValueError, TypeError):
        return None
    return holder if isinstance(holder.pid, int) else None
