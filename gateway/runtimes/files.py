"""Checks the files that a server needs before it is started: they exist, can be read, and are what they should be.

A damaged file of weights would fail after minutes, in words of the engine's own, or not fail and answer nonsense.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import stat
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gateway.errors import StartFailed
from gateway.runtimes.base import Progress, RequiredFile

THREADS = 4
BLOCK_BYTES = 4 << 20
REPORT_BYTES = 64 << 20
CLOSE_S = 5.0
LOOK_S = 5.0

Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class _Version:
    """One content of a file, as far as it can be told without reading it."""

    path: Path
    size_bytes: int
    mtime_ns: int


@dataclass(eq=False, slots=True)
class _Hashing:
    """A file being hashed in a thread, for everybody who wants to know at the time."""

    version: _Version
    loop: asyncio.AbstractEventLoop
    called_off: threading.Event = field(default_factory=threading.Event)
    reports: list[Report] = field(default_factory=list)
    result: asyncio.Future[str | None] = field(init=False)

    def run(self) -> str | None:
        """Return the SHA-256 in hex, or None if it was called off. Runs in a thread."""
        digest, done_bytes, next_report_bytes = hashlib.sha256(), 0, 0
        block = memoryview(bytearray(BLOCK_BYTES))
        with self.version.path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                if self.called_off.is_set():
                    return None
                digest.update(block[:count])
                done_bytes += count
                if done_bytes >= next_report_bytes:
                    next_report_bytes = done_bytes + REPORT_BYTES
                    self.loop.call_soon_threadsafe(self.tell, done_bytes)
        return digest.hexdigest()

    def tell(self, done_bytes: int) -> None:
        for report in self.reports:
            report(Progress("verifying", float(done_bytes), float(self.version.size_bytes), "bytes"))


class FileChecks:
    """Checks files in threads of its own, each version of a file once, however many ask and whenever they do."""

    def __init__(self, look_s: float = LOOK_S) -> None:
        """`look_s` is how long a disk may take to say whether files are there."""
        self._look_s = look_s
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="files")
        self._known: dict[_Version, str] = {}
        self._running: dict[_Version, _Hashing] = {}

    async def check(self, files: Sequence[RequiredFile], report: Report) -> None:
        """Return if every file is there and what it should be. Phase `verifying` is reported in bytes.

        Raises:
            StartFailed: one is not; the words say which, how, and what to do.
        """
        for file in files:
            version = await self._version(file.path)
            if file.sha256 is not None:
                _compare(file, await self._sha256(version, report))

    async def look(self, files: Sequence[RequiredFile]) -> None:
        """Return if every file is there and can be read, or if that is not known soon. Nothing is hashed.

        Raises:
            StartFailed: as `check`.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(self._look_s):
                for file in files:
                    await self._version(file.path)

    async def aclose(self) -> None:
        """Call off what is being hashed and let the threads go. One that hangs in a dead disk is not waited for."""
        running = list(self._running.values())
        for hashing in running:
            hashing.called_off.set()
        if running:
            await asyncio.wait([hashing.result for hashing in running], timeout=CLOSE_S)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _version(self, path: Path) -> _Version:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, _look_at, path)
        except OSError as error:
            raise _unusable(path, error) from error

    async def _sha256(self, version: _Version, report: Report) -> str:
        if version in self._known:
            return self._known[version]
        hashing = self._running.get(version) or self._begin(version)
        hashing.reports.append(report)
        try:
            found = await asyncio.shield(hashing.result)
        except OSError as error:
            raise _unusable(version.path, error) from error
        finally:
            hashing.reports.remove(report)
            self._leave(hashing)
        if found is None:
            raise _failed(f"{version.path} was not verified", "The gateway is shutting down.")
        return self._known.setdefault(version, found)

    def _begin(self, version: _Version) -> _Hashing:
        loop = asyncio.get_running_loop()
        hashing = self._running[version] = _Hashing(version, loop)
        hashing.result = loop.run_in_executor(self._threads, hashing.run)
        return hashing

    def _leave(self, hashing: _Hashing) -> None:
        """Forget a hashing that nobody waits for. Whoever comes later begins a new one."""
        if not hashing.reports and self._running.get(hashing.version) is hashing:
            hashing.called_off.set()
            del self._running[hashing.version]


def _look_at(path: Path) -> _Version:
    """Return the version of a file that can be read. Runs in a thread: a disk may take its time."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
        raise OSError(errno.EINVAL, "it is not a regular file")
    path.open("rb").close()
    return _Version(path, status.st_size, status.st_mtime_ns)


def _compare(file: RequiredFile, found: str) -> None:
    if file.sha256 is not None and found != file.sha256.lower():
        raise _failed(
            f"{file.path} is damaged or not the file that is meant: its SHA-256 is {found}, not {file.sha256}",
            "Download or reinstall it; if the new file is the right one, correct weights_sha256 in models.yaml.",
        )


def _unusable(path: Path, error: OSError) -> StartFailed:
    if isinstance(error, FileNotFoundError):
        return _failed(f"{path} does not exist", "Put the file there, or correct its path in models.yaml.")
    if isinstance(error, PermissionError):
        return _failed(f"{path} may not be read by the gateway", "Give the gateway's user the right to read it.")
    return _failed(f"{path} cannot be read ({error.strerror})", "Check the path in models.yaml, and the disk.")


def _failed(cause: str, fix: str) -> StartFailed:
    return StartFailed(f"{cause}. {fix}", cause=cause, fix=fix)
