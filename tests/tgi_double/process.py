"""The double as a process of its own, for tests that need no engine."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

LAUNCHER = Path(__file__).with_name("launcher.py")
INTERPRETER = (sys.executable, "-I", "-S")
START_BOUND_S = 20.0
STOP_BOUND_S = 20.0
POLL_S = 0.01
ABORTED = "aborted at "
COLORS = re.compile(r"\x1b\[[0-9;]*m")


class Double:
    """Runs the double; `with` it, it is there, answers, and is killed at the end if it has not ended.

    Flags come as on TGI's command line, a personality by name: `Double("--max-top-n-tokens", "50", token_s=0.01)`.
    `log` has its lines so far, standard error among them, without colours.
    """

    def __init__(
        self,
        *flags: str,
        port: int | None = None,
        waits: bool = True,
        env: Mapping[str, str] | None = None,
        **personality: object,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log: list[str] = []
        self._command = [*INTERPRETER, str(LAUNCHER), "--port", str(self.port), *flags]
        self._env = {**(env or {}), **variables(personality)}
        self._waits = waits

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._command, env=self._env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        try:
            if self._waits:
                self._wait_until_it_answers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        assert self.process.stdout
        self.process.stdout.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def terminate(self) -> None:
        """Ask it to stop."""
        self.process.terminate()

    def wait(self, bound_s: float = STOP_BOUND_S) -> int:
        """Return its exit status as soon as it has ended and all it said is in `log`; minus the signal's number."""
        status = self.process.wait(bound_s)
        self._reading.join(bound_s)
        return status

    def stop(self) -> int:
        """Ask it to stop; return its exit status when it has."""
        self.terminate()
        return self.wait()

    def wait_for_line(self, words: str, bound_s: float = START_BOUND_S) -> str:
        """Return the first line with these words as soon as it is there."""
        deadline = time.monotonic() + bound_s
        while True:
            if found := next((line for line in self.log if words in line), None):
                return found
            assert time.monotonic() < deadline, f"never said {words!r}, but {self.log}"
            time.sleep(POLL_S)

    @property
    def aborted_at(self) -> list[float]:
        """When callers left, as time.monotonic() tells it here too; needs `tells_aborts`."""
        return [float(line.removeprefix(ABORTED)) for line in list(self.log) if line.startswith(ABORTED)]

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.log.append(COLORS.sub("", line.rstrip("\n")))

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_BOUND_S
        while not answers(self.port):
            assert self.process.poll() is None, f"ended with {self.wait()}: {self.log}"
            assert time.monotonic() < deadline, f"does not answer: {self.log}"
            time.sleep(POLL_S)


def run(*words: str, env: Mapping[str, str] | None = None, **personality: object) -> subprocess.CompletedProcess[str]:
    """Run it to its end: for command lines, downloads and starts that fail."""
    return subprocess.run(
        [*INTERPRETER, str(LAUNCHER), *words],
        env={**(env or {}), **variables(personality)},
        capture_output=True,
        text=True,
        timeout=START_BOUND_S,
        check=False,
    )


def variables(personality: Mapping[str, object]) -> dict[str, str]:
    """Return a personality as the environment that describes it."""
    return {f"DOUBLE_{name.upper()}": str(int(v) if isinstance(v, bool) else v) for name, v in personality.items()}


def answers(port: int) -> bool:
    """Say whether somebody listens there."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
