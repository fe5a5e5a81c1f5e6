"""Runtime `docker`: a server is a container on the Docker Engine of this machine, and may outlive the gateway.

The engine is the only memory. A container is found again by labels that say whose it is and which server, whatever
somebody else calls it since; so a lost answer, a cancelled start or a crash of the gateway leaves nothing that the next
look would not find, and a container that is somebody else's is never touched. Calls for one name take turns.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import Any, ClassVar

from gateway.errors import RuntimeUnavailable, StartFailed
from gateway.runtimes.base import Exit, Found, Handle, Launch, Listener
from gateway.runtimes.docker import images
from gateway.runtimes.docker.container_log import CATCH_UP_S, ContainerLog
from gateway.runtimes.docker.containers import (
    FINGERPRINT,
    GENERATION,
    GPU_MEMORY,
    GPUS,
    NAME,
    OWNER,
    PORT,
    RUNS,
    Seen,
    look,
)
from gateway.runtimes.docker.engine import PATIENCE_S, TIMEOUT_S, Engine, Refused
from gateway.runtimes.docker.failures import foreign, how_it_ended, is_port_taken, not_started
from gateway.runtimes.docker.launch import SECRETS, Plan, secrets_archive
from gateway.runtimes.docker.ownership import RENEW_S, Ownership
from gateway.runtimes.docker.place import Place, find_place
from gateway.runtimes.docker.ports import Ports
from gateway.runtimes.docker.watch import Watch
from gateway.runtimes.files import FileChecks

FIRST_PORT = 8080
LAST_LINES = 200
OLDER_GRACE_S = 5.0
"""How long an older server of the same name may take to leave before a new one is started."""
KILL_S = 15.0
"""How long the engine may take to end a container that was killed."""
REMOVE_S = 30.0
"""How long it may take to remove one that has ended: its files, however many, and its volumes."""
MAKE_S = 30.0
"""How long a container that is being made, by a request whose answer was lost, may take to be seen."""
AGAIN_S = 0.2


class DockerRuntime:
    """Runs servers as containers that carry `owner` on a label. Belongs to one event loop."""

    name: ClassVar[str] = "docker"
    outlives: ClassVar[bool] = True

    def __init__(
        self,
        owner: str,
        *,
        base_url: str | None = None,
        first_port: int = FIRST_PORT,
        timeout_s: float = TIMEOUT_S,
        patience_s: float = PATIENCE_S,
        renew_s: float = RENEW_S,
    ) -> None:
        """Touch nothing yet: the engine at `base_url` (else DOCKER_HOST, else the usual socket) may be absent.

        One call of the engine may take `timeout_s`; it is repeated for `patience_s` before the engine is given up.
        That the name is still ours is made sure of every `renew_s`.
        """
        self._owner = owner
        self._engine = Engine(base_url, timeout_s=timeout_s, patience_s=patience_s)
        self._ownership = Ownership(self._engine, owner, renew_s=renew_s)
        self._watch = Watch(self._engine, owner)
        self._ports = Ports(first_port)
        self._files = FileChecks()
        self._place: Place | None = None
        self._preparing = asyncio.Lock()
        self._turns: dict[str, asyncio.Lock] = {}
        self._starts: dict[str, asyncio.Task[Handle]] = {}
        self._servers: dict[str, _Server] = {}

    async def find(self) -> list[Found]:
        """As the contract has it. Of several containers of one server only the newest that runs is told."""
        await self._prepare()
        found: dict[str, Found] = {}
        for each in map(found_in, await self._list()):
            if each.name not in found or (each.runs and not found[each.name].runs):
                found[each.name] = each
        return list(found.values())

    async def adopt(self, found: Found, listener: Listener) -> Handle:
        """As the contract has it. Any other container of that server is removed."""
        place = await self._prepare()
        async with self._turn(found.name):
            older = await self._look(found.name)
            same = (each for each in older if each.runs and each.labels.get(FINGERPRINT, "") == found.fingerprint)
            if (seen := next(same, None)) is None:
                raise StartFailed(f"{found.name} is gone: it ended, or another took its place, since it was found.")
            handle = _handle(place, seen, seen.published)
            await self._remove_all((each for each in older if each is not seen), OLDER_GRACE_S)
            if seen.published:
                self._ports.take_over(found.name, seen.published)
            return self._serve(seen, handle, listener)

    async def check(self, launch: Launch) -> None:
        await self._files.look(launch.files)

    async def start(self, launch: Launch, listener: Listener) -> Handle:
        start = asyncio.create_task(self._start(launch, listener), name=f"start of {launch.name}")
        self._starts[launch.name] = start
        try:
            return await start
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task and task.cancelling():
                raise
            raise StartFailed(f"{launch.name} was stopped while it started.") from None
        finally:
            if self._starts.get(launch.name) is start:
                del self._starts[launch.name]

    async def ended(self, handle: Handle) -> Exit:
        server = self._servers.get(handle.name)
        if server is None or server.handle != handle:
            return Exit(None, "removed before a newer server took its name")
        await asyncio.wait([server.life])
        if server.life.cancelled():  # we have let go of it: nobody will ever know
            await asyncio.get_running_loop().create_future()
        return server.life.result()

    async def stop(self, name: str, *, grace_s: float) -> None:
        if start := self._starts.get(name):
            start.cancel()
        await self._prepare()
        async with self._turn(name):
            await self._remove_all(await self._look(name), grace_s)
            self._ports.free(name)

    async def logs(self, name: str, *, lines: int, follow: bool) -> AsyncIterator[str]:
        if server := self._servers.get(name):
            async for line in server.output.log.read(lines=lines, follow=follow):
                yield line

    async def aclose(self) -> None:
        """Let go of the engine, and of the right to the name. Containers stay as they are.

        An engine that hangs is not waited for: what it was doing goes on, and is found by the next gateway.
        """
        await self._watch.aclose()
        for start in (starts := list(self._starts.values())):
            start.cancel()
        self._engine.abandon()
        await asyncio.gather(*starts, return_exceptions=True)
        await asyncio.gather(*(server.aclose() for server in self._servers.values()))
        await self._ownership.give_back()
        await self._engine.aclose()
        await self._files.aclose()

    # Before anything is done

    async def _prepare(self) -> Place:
        """Make sure that the name is ours, and return where we are."""
        async with self._preparing:
            await self._ownership.take()
            self._place = self._place or await find_place(self._engine)
            return self._place

    def _turn(self, name: str) -> asyncio.Lock:
        return self._turns.setdefault(name, asyncio.Lock())

    async def _list(self, name: str | None = None) -> list[dict[str, Any]]:
        """Return what the engine lists of our containers, the newest first; with `name`, only those of that server."""
        labels = [f"{OWNER}={self._owner}", *([f"{NAME}={name}"] if name else [])]
        listed: list[dict[str, Any]] = await self._engine.ask(
            lambda client: client.containers(all=True, filters={"label": labels})
        )
        ours = [each for each in listed if (each.get("Labels") or {}).get(OWNER) == self._owner]
        return sorted(ours, key=_made_at, reverse=True)

    async def _look(self, name: str) -> list[Seen]:
        """Return all containers of this server, the newest first, whatever they are called now."""
        server = self._servers.get(name)
        ids = [each["Id"] for each in await self._list(name)] + ([server.container_id] if server else [])
        looks = [await look(self._engine, reference) for reference in dict.fromkeys([*ids, name])]
        seen = {each.id: each for each in looks if each and self._is_ours(each) and each.server == name}
        return list(seen.values())

    def _is_ours(self, seen: Seen) -> bool:
        return seen.labels.get(OWNER) == self._owner

    # The way up

    async def _start(self, launch: Launch, listener: Listener) -> Handle:
        place = await self._prepare()
        async with self._turn(launch.name):
            await self._make_way(launch.name)
            await self._files.check(launch.files, listener.progress)
            plan = await self._plan(launch, place, listener)
            container_id, published = await self._run(plan)
            seen = await look(self._engine, container_id)
            if seen is None:
                raise StartFailed(f"{launch.name} was removed by somebody else while it started.")
            return self._serve(seen, _handle(place, seen, published), listener)

    async def _make_way(self, name: str) -> None:
        """Remove older containers of this server, whatever state they are in.

        Raises:
            StartFailed: the name is taken by one that is not this server's.
        """
        await self._remove_all(await self._look(name), OLDER_GRACE_S)
        self._ports.free(name)
        if seen := await look(self._engine, name):
            raise foreign(seen, name)

    async def _plan(self, launch: Launch, place: Place, listener: Listener) -> Plan:
        container = launch.container
        assert container is not None  # an engine that runs in containers says in which
        image = await images.ensure(self._engine, container.image, container.pull_policy, listener.progress)
        return Plan(launch, container, image, self._owner, secrets.token_hex(8), place)

    async def _run(self, plan: Plan) -> tuple[str, int | None]:
        """Make and start the container; return its id, and the port of this machine that leads to it if one does.

        That a port is taken shows when the container starts. It is removed then, and made anew with the next port.
        """
        port: int | None = None
        while True:
            if plan.place.on_host and plan.container.port is not None:
                port = self._ports.choose(plan.launch.name, above=port or 0)
            container_id = await self._create(plan, port)
            try:
                await self._hand_over_secrets(plan, container_id)
                await self._engine.do(lambda client, made=container_id: client.start(made))  # type: ignore[misc]
            except Refused as refused:
                if port is None or not is_port_taken(refused.words):
                    raise not_started(plan.launch, refused.words) from refused
                await self._delete(container_id)
            else:
                return container_id, port

    async def _create(self, plan: Plan, port: int | None) -> str:
        try:
            return await self._engine.do(lambda client: plan.create(client, port))
        except Refused as refused:
            made = await self._already_made(plan) if refused.http_status == 409 else None
            if made is None:
                raise not_started(plan.launch, refused.words) from refused
            return made

    async def _already_made(self, plan: Plan) -> str | None:
        """Return the id of the container that this very start has made, by a request whose answer was lost."""
        name = plan.launch.name
        with suppress(TimeoutError):
            async with asyncio.timeout(MAKE_S):
                while (seen := await look(self._engine, name)) is None:  # noqa: ASYNC110 - only the engine knows, and takes the name first
                    await asyncio.sleep(AGAIN_S)
                if seen.labels.get(GENERATION) == plan.generation:
                    return seen.id
                if not self._is_ours(seen):
                    raise foreign(seen, name)
        return None

    async def _hand_over_secrets(self, plan: Plan, container_id: str) -> None:
        if plan.container.secrets:
            archive = secrets_archive(plan.container.secrets)
            await self._engine.do(lambda client: client.put_archive(container_id, SECRETS, archive))

    def _serve(self, seen: Seen, handle: Handle, listener: Listener) -> Handle:
        """Watch a container from now on, as the server of its name."""
        self._servers[handle.name] = _Server(self._engine, self._watch, seen, handle, listener)
        return handle

    # The way down

    async def _remove_all(self, containers: Iterable[Seen], grace_s: float) -> None:
        for seen in containers:
            await self._remove(seen, grace_s)

    async def _remove(self, seen: Seen, grace_s: float) -> None:
        """End a container of ours if it runs, and remove it with its volumes that have no name."""
        server = self._server_of(seen)
        if seen.runs:
            await self._end(seen, grace_s)
        elif server:  # it takes down how it ended, which cannot be asked afterwards
            await asyncio.wait([server.life], timeout=CATCH_UP_S)
        await self._delete(seen.id)

    async def _end(self, seen: Seen, grace_s: float) -> None:
        """Ask a container to leave, kill it after `grace_s` seconds, and return when it has ended."""
        if server := self._server_of(seen):
            server.leaves = True
        if seen.paused:  # else it cannot hear
            await self._try(lambda client: client.unpause(seen.id))
        await self._try(lambda client: client.kill(seen.id, seen.stop_signal))
        if await self._ends_within(seen, grace_s):
            return
        await self._try(lambda client: client.kill(seen.id, "SIGKILL"))
        if not await self._ends_within(seen, KILL_S):
            raise RuntimeUnavailable(
                f"{seen.name} (container {seen.short_id}) was killed and has not ended within {KILL_S:g} s: either the "
                "Docker Engine is silent, or the container hangs in the kernel, often in a device driver. "
                "`docker ps` and the machine's log may say which."
            )

    async def _try(self, call: Any) -> None:
        """Ask for something that the engine refuses if it is so already."""
        with suppress(Refused):
            await self._engine.do(call)

    async def _ends_within(self, seen: Seen, bound_s: float) -> bool:
        if server := self._server_of(seen):
            ended, _ = await asyncio.wait([server.life], timeout=bound_s)
            return bool(ended)
        with suppress(TimeoutError):
            async with asyncio.timeout(bound_s):
                await self._watch.until_ended(seen)
                return True
        return False

    async def _delete(self, container_id: str) -> None:
        """Remove a container, and return when the engine knows none of this id any more."""
        refused: Refused | None = None
        try:
            async with asyncio.timeout(REMOVE_S):
                while True:
                    refused = await self._delete_once(container_id)
                    if await look(self._engine, container_id) is None:
                        return
                    await asyncio.sleep(AGAIN_S)
        except TimeoutError:
            words = refused.words if refused else "it does not say why"
            raise RuntimeUnavailable(f"The Docker Engine does not remove {container_id[:12]}: {words}.") from refused

    async def _delete_once(self, container_id: str) -> Refused | None:
        """Ask for its removal; return why not, if so. It may be gone, on its way, or held by something for a moment."""
        try:
            await self._engine.do(lambda client: client.remove_container(container_id, v=True, force=True))
        except Refused as refused:
            return refused
        return None

    def _server_of(self, seen: Seen) -> _Server | None:
        server = self._servers.get(seen.server)
        return server if server and server.container_id == seen.id else None


class _Server:
    """One container that serves, from its start or adoption until it has ended."""

    def __init__(self, engine: Engine, watch: Watch, seen: Seen, handle: Handle, listener: Listener) -> None:
        self.container_id = seen.id
        self.handle = handle
        self.leaves = False
        """Whether the gateway has asked it to."""
        self.output = ContainerLog(engine, seen.id, listener.line)
        self._watch = watch
        self._listener = listener
        self._paused = False
        self.life = asyncio.create_task(self._live(seen), name=f"life of {handle.name}, {handle.ref}")

    async def aclose(self) -> None:
        """Look no further. What it is doing goes on."""
        self.life.cancel()
        await asyncio.wait([self.life])
        await self.output.aclose()

    async def _live(self, seen: Seen) -> Exit:
        end = await self._watch.until_ended(seen, self._look)
        await self.output.finish()
        code, reason = how_it_ended(end, by_gateway=self.leaves)
        return Exit(code, reason, self.output.log.last(LAST_LINES))

    def _look(self, now: Seen) -> None:
        if now.paused and not self._paused:
            self._listener.paused("the container was paused (`docker unpause` thaws it)")
        self._paused = now.paused


def found_in(listed: dict[str, Any]) -> Found:
    """Read what the engine lists of one container."""
    labels = listed["Labels"]
    gpus, memory = labels.get(GPUS, ""), labels.get(GPU_MEMORY, "")
    return Found(
        name=labels.get(NAME) or _plain_name(listed),
        fingerprint=labels.get(FINGERPRINT, ""),
        made_at=_made_at(listed),
        gpus=tuple(gpus.split(",")) if gpus else (),
        runs=listed.get("State") in RUNS,
        gpu_memory_bytes=int(memory) if memory.isdecimal() else None,
    )


def _plain_name(listed: dict[str, Any]) -> str:
    """Return its name, or its id if it has none. Those with another / in them are links to it."""
    plain = (name for name in listed.get("Names") or () if name.count("/") == 1)
    return str(next(plain, listed["Id"])).removeprefix("/")


def _made_at(listed: dict[str, Any]) -> float:
    return float(listed.get("Created") or 0)


def _handle(place: Place, seen: Seen, published: int | None) -> Handle:
    inside = seen.labels.get(PORT)
    base_url, port = place.base_url(seen, int(inside), published) if inside else ("", None)
    return Handle(seen.server, base_url, port, seen.short_id)
