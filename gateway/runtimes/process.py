"""Runtime `process`: a server is a child process of the gateway, and never outlives it.

Three things tie it down. It leads a process group of its own, which is signalled as a whole. The kernel kills it when
the gateway goes, however that happens (`leash.py`). And whatever of its group is left when it ends is killed then.
What has left the group (a daemon) is out of reach.

Nothing is awaited between the fork and the moment at which the child is known by its name, so a start that is
cancelled, wherever, leaves nothing unknown behind.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from gateway.errors import RuntimeUnavailable, StartFailed
from gateway.runtimes.base import Exit, Found, Handle, Launch, Listener
from gateway.runtimes.files import FileChecks
from gateway.runtimes.output import LineSplitter, Log

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
LEASH = Path(__file__).with_name("leash.py")
LAST_LINES = 200
READ_BYTES = 32 * 1024

OLDER_GRACE_S = 5.0
"""How long an older server of the same name may take to leave before a new one is started."""
KILL_S = 10.0
"""How long the kernel may take to end a process that was killed; one that hangs in a driver takes longer."""
OUTPUT_S = 1.0
"""How long the last output of an ended server is waited for; something that left its group may hold the pipe."""
GROUP_S = 0.2
"""How long the rest of a killed group, which has closed its output, is waited for: nobody may be there to reap it."""

# fmt: off
INHERITED = frozenset({
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR",
    "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONPATH", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE",
})
INHERITED_PREFIXES = (
    "LC_", "CUDA_", "NVIDIA_", "NCCL_", "GGML_", "LLAMA_", "OMP_", "HIP_", "HSA_", "ROCR_", "VK_", "MALLOC_",
)
# fmt: on
SECRET_ENDINGS = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")


class ProcessRuntime:
    """Runs servers as child processes. A program that is to listen on `{port}` must set SO_REUSEPORT.

    The gateway itself keeps the port bound, though it never listens there: so the port is known at once, free, and
    nobody else's until the server has ended. Belongs to one event loop, whose thread must outlive the servers.
    """

    name: ClassVar[str] = "process"
    outlives: ClassVar[bool] = False

    def __init__(self) -> None:
        self._files = FileChecks()
        self._servers: dict[str, _Server] = {}
        self._starts: dict[str, object] = {}
        self._closed = False

    async def find(self) -> list[Found]:
        return []  # the kernel has seen to it

    async def adopt(self, found: Found, listener: Listener) -> Handle:  # noqa: ARG002 - the seam's
        raise StartFailed(f"{found.name} is gone: a process never outlives its gateway.")

    async def check(self, launch: Launch) -> None:
        await self._files.look(launch.files)
        _check_program(list(launch.command), _environment(launch.env))

    async def start(self, launch: Launch, listener: Listener) -> Handle:
        start = self._starts[launch.name] = object()
        try:
            await self._remove(launch.name, OLDER_GRACE_S)
            await self._files.check(launch.files, listener.progress)
            if self._closed or self._starts.get(launch.name) is not start:
                raise StartFailed(f"{launch.name} was stopped while it started.")
            server = self._servers[launch.name] = _Server(launch, listener)
        finally:
            if self._starts.get(launch.name) is start:
                del self._starts[launch.name]
        return server.handle

    async def ended(self, handle: Handle) -> Exit:
        server = self._servers.get(handle.name)
        if server is None or server.handle != handle:
            return Exit(None, "removed before a newer server took its name")
        return await asyncio.shield(server.life)

    async def stop(self, name: str, *, grace_s: float) -> None:
        self._starts.pop(name, None)  # a start that has not come to its fork yet will never come to it
        await self._remove(name, grace_s)

    async def logs(self, name: str, *, lines: int, follow: bool) -> AsyncIterator[str]:
        if server := self._servers.get(name):
            async for line in server.log.read(lines=lines, follow=follow):
                yield line

    async def aclose(self) -> None:
        """Kill every server and wait until all are gone. Nothing can be started afterwards."""
        self._closed = True
        kills = (server.kill() for server in self._servers.values() if server.lives)
        for failure in await asyncio.gather(*kills, return_exceptions=True):
            if isinstance(failure, BaseException):
                log.error("%s", failure)
        await self._files.aclose()

    async def _remove(self, name: str, grace_s: float) -> None:
        server = self._servers.get(name)
        if server is not None and server.lives:
            await server.leave(grace_s)


class _Server:
    """One child process, from its fork until nothing is left of it."""

    def __init__(self, launch: Launch, listener: Listener) -> None:
        """Fork. Waits for nothing, so that no cancellation can come between the child and this object.

        Raises:
            StartFailed: the program cannot be run, or no port was to be had.
        """
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._port = _hold_port()
        port = self._port.getsockname()[1]
        try:
            self._process = _spawn(launch, port)
        except BaseException:
            self._port.close()
            raise
        self.handle = Handle(launch.name, f"http://{HOST}:{port}", port, f"pid {self._process.pid}")
        self.log = Log()
        self._killed = False
        self._splitter = LineSplitter()
        self._silent = asyncio.Event()
        self._listen()
        self.life = asyncio.create_task(self._live(), name=f"life of {launch.name}, {self.handle.ref}")

    @property
    def lives(self) -> bool:
        return not self.life.done()

    async def leave(self, grace_s: float) -> None:
        """Ask it to leave, kill it after `grace_s` seconds, and return when nothing of it is left."""
        self._signal(signal.SIGTERM)
        if not await self._ends_within(grace_s):
            await self.kill()

    async def kill(self) -> None:
        """Kill it and return when nothing of it is left.

        Raises:
            RuntimeUnavailable: the kernel has not ended it in time.
        """
        self._killed = True
        self._signal(signal.SIGKILL)
        if not await self._ends_within(KILL_S):
            raise RuntimeUnavailable(
                f"{self.handle.name} ({self.handle.ref}) was killed and has not ended within {KILL_S:g} s: it hangs in "
                "the kernel, often in a device driver. Its memory and port stay taken; the machine's log may say why."
            )

    async def _live(self) -> Exit:
        try:
            await _until_exit(self._process)
            _signal_group(self._process.pid, signal.SIGKILL)  # the rest; not reaped yet, the number is its own
            code = self._process.wait()
            await self._until_silent()
            await _until_gone(self._process.pid)
            return Exit(code, _how_it_ended(code, killed=self._killed), self.log.last(LAST_LINES))
        finally:
            self._let_go()

    async def _ends_within(self, bound_s: float) -> bool:
        ended, _ = await asyncio.wait([self.life], timeout=bound_s)
        return bool(ended)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            _signal_group(self._process.pid, number)

    def _listen(self) -> None:
        os.set_blocking(self._output, False)
        self._loop.add_reader(self._output, self._read)

    @property
    def _output(self) -> int:
        assert self._process.stdout is not None  # for the type checker: `_spawn` made a pipe
        return self._process.stdout.fileno()

    def _read(self) -> None:
        """Take what the child has written. It never waits for its readers."""
        try:
            chunk = os.read(self._output, READ_BYTES)
        except BlockingIOError:
            return
        if chunk:
            self._hear(self._splitter.feed(chunk))
        else:
            self._loop.remove_reader(self._output)
            self._silent.set()

    def _hear(self, lines: list[str]) -> None:
        self.log.add(lines)
        for line in lines:
            self._listener.line(line)

    async def _until_silent(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(OUTPUT_S):
                await self._silent.wait()
        self._hear(self._splitter.end())

    def _let_go(self) -> None:
        self._signal(signal.SIGKILL)  # only if the loop ends before the runtime is closed
        self._loop.remove_reader(self._output)
        if self._process.stdout:
            self._process.stdout.close()
        self._port.close()
        self.log.end()


def _hold_port() -> socket.socket:
    """Return a socket that holds a free port of this machine and never listens on it."""
    held = socket.socket()
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((HOST, 0))
    except OSError as error:
        held.close()
        raise StartFailed(f"No port is to be had on {HOST} ({error.strerror}).") from error
    return held


def _spawn(launch: Launch, port: int) -> subprocess.Popen[bytes]:
    command = [item.replace("{port}", str(port)) for item in launch.command]
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(launch.gpus)} if launch.gpus else {}
    env = _environment({**visible, **launch.env})
    _check_program(command, env)
    leash = [sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), "--"]
    try:
        return subprocess.Popen(  # noqa: S603 - the command is the operator's
            [*leash, *command],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:  # out of processes or files; a NUL in an argument
        raise StartFailed(f"{command[0]} cannot be run: {error}.") from error


def _environment(added: Mapping[str, str]) -> dict[str, str]:
    """Return what a server gets of our environment, and `added`: no key or token of ours unless it is added."""
    inherited = {name: value for name, value in os.environ.items() if _is_inherited(name)}
    return {**inherited, **added}


def _is_inherited(name: str) -> bool:
    return name in INHERITED or (name.startswith(INHERITED_PREFIXES) and not name.endswith(SECRET_ENDINGS))


def _check_program(command: list[str], env: Mapping[str, str]) -> None:
    if not command:
        raise StartFailed("There is no command to run.")
    if shutil.which(command[0], path=env.get("PATH")) is None:
        cause = f"There is no program {command[0]} that the gateway may run"
        fix = "Install it, or make it executable and give its full path."
        raise StartFailed(f"{cause}. {fix}", cause=cause, fix=fix)


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
        os.killpg(group, number)


async def _until_exit(process: subprocess.Popen[bytes]) -> None:
    """Return as soon as the process has ended. It is not reaped yet, so its number is still its own."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    try:
        descriptor = os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # not Linux, an old kernel, a container's filter: a thread waits, and reaps
        threading.Thread(target=_wait_and_tell, args=(process, loop, ended), daemon=True).start()
        await ended.wait()
        return
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _wait_and_tell(process: subprocess.Popen[bytes], loop: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
    process.wait()
    with suppress(RuntimeError):  # the loop is closed: nobody wants to know any more
        loop.call_soon_threadsafe(ended.set)


async def _until_gone(group: int) -> None:
    """Return when no process of a killed group is left, or after a bound."""
    with suppress(ProcessLookupError, PermissionError, TimeoutError):
        async with asyncio.timeout(GROUP_S):
            while True:
                os.killpg(group, 0)
                await asyncio.sleep(0.005)


def _how_it_ended(code: int, *, killed: bool) -> str:
    if code >= 0:
        return f"exit status {code}"
    words = f"killed by {_signal_name(-code)}"
    if code == -signal.SIGKILL:
        words += " (by the gateway)" if killed else " (often the kernel's out-of-memory killer)"
    return words


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
