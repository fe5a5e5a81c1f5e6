"""The machine under the bench: its cores, and what a tree of processes uses of it (from /proc)."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.runtimes.processes import wait_until

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
END_S = 30.0
LOOK_S = 0.02


class CannotMeasure(Exception):
    """Something that the bench needs is not there, or does not answer as it must; the words say what to do."""


@dataclass(frozen=True)
class Cores:
    """The one core of whatever is under test, and those of everything else."""

    tested: frozenset[int]
    others: frozenset[int]

    def __str__(self) -> str:
        if self.tested == self.others:
            return "one core for everything: nothing can be kept apart, so the numbers tell little"
        return f"core {min(self.tested)} for the one under test, {sorted(self.others)} for all else"


def cores() -> Cores:
    """Return how the cores that this process may use are shared out."""
    mine = sorted(os.sched_getaffinity(0))
    return Cores(frozenset(mine[:1]), frozenset(mine[1:] or mine))


@contextmanager
def pinned(on: frozenset[int]) -> Iterator[None]:
    """Run this process, and what it starts meanwhile, on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, on)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def running(
    command: Sequence[str], log: Path, on: frozenset[int], environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program on these cores, its output in a file, until the context ends; then its whole tree is gone."""
    its_cores = [needed("taskset", "util-linux"), "--cpu-list", ",".join(map(str, sorted(on)))]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*its_cores, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environ or {})},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process)


def until_up(name: str, is_up: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, bound_s: float) -> None:
    """Return when a program that was started is up.

    Raises:
        CannotMeasure: it ended, or is not up within the bound; says what it wrote last.
    """
    deadline = time.monotonic() + bound_s
    while not is_up():
        what = "ended" if process.poll() is not None else f"was not up within {bound_s:g} s"
        if process.poll() is not None or time.monotonic() > deadline:
            raise CannotMeasure(f"{name} {what}: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(LOOK_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    family = tree(process.pid)
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the session was made for it: nobody else is in the group
        process.wait(END_S)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), END_S)


def tree(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    parents = dict(_parents())
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return [each for each in found if each in parents]


def _parents() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            yield int(entry.name), int(fields[1])


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def cpu_s(pids: Sequence[int]) -> float:
    """Return what these processes have used of all cores so far, in user and kernel."""
    found = [fields for pid in pids if (fields := _stat(pid))]
    return sum(int(fields[11]) + int(fields[12]) for fields in found) / TICKS_PER_S


def rss_mib(pids: Sequence[int]) -> float:
    """Return their resident memory; what they share counts for each of them."""
    pages = 0
    for pid in pids:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return pages * PAGE_BYTES / 2**20


def descriptors(pids: Sequence[int]) -> list[str]:
    """Return what these processes have open, as the kernel names it: `socket:[123]`, or a path."""
    found = []
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # it was closed meanwhile
                found.append(str(entry.readlink()))
    return found


def needed(program: str, package: str) -> str:
    """Return where a program is.

    Raises:
        CannotMeasure: it is not there; names Debian's package of it.
    """
    if found := shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin"):
        return found
    raise CannotMeasure(f"There is no {program} on this machine. On Debian or Ubuntu: apt-get install {package}")


def about() -> dict[str, Any]:
    """Return what there is to know of the machine, for whoever reads the numbers."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            "gateway": version("tgi-gateway"),
            "nginx": _said([needed("nginx", "nginx-light"), "-v"], r"nginx/(\S+)"),
            "wrk": _said([needed("wrk", "wrk"), "--version"], r"wrk (\S+)"),
        },
    }


def _cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _said(command: Sequence[str], pattern: str) -> str:
    answer = subprocess.run(command, capture_output=True, text=True, timeout=END_S, check=False)
    found = re.search(pattern, answer.stdout + answer.stderr)
    return found[1] if found else "unknown"


PYTHON = sys.executable
