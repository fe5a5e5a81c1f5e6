"""A Docker Engine of a test's own, for what the machine's engine must not suffer: restarts, crashes, a GPU hook.

It has its own storage, socket, bridge and addresses, runs beside any other engine, and leaves nothing behind. It makes
no firewall rules: another engine's would be flushed when this one starts. So its containers reach each other and the
machine, and published ports work on the machine itself, but nothing further can be reached from inside.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import suppress
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Self

import docker
import pytest
from docker.errors import DockerException
from requests.exceptions import RequestException

from tests.docker_engine import connect
from tests.runtimes.processes import wait_until

START_S = 60.0
END_S = 60.0
HOOK = "nvidia-container-runtime-hook"


def why_not() -> str | None:
    """Return why no engine of its own can be started here, or None."""
    missing = [program for program in ("dockerd", "ip", "iptables") if shutil.which(program) is None]
    if missing:
        return (
            f"an engine of the test's own needs {', '.join(missing)}: scripts/docker-engine --for-tests installs them"
        )
    return None if os.geteuid() == 0 else "an engine of the test's own must be started by root"


IMPOSSIBLE = why_not() or ""
needs_own_engine = pytest.mark.skipif(bool(IMPOSSIBLE) and not os.environ.get("NEED_DOCKER"), reason=IMPOSSIBLE)


class OwnEngine:
    """An engine that lives within a `with`. With `gpu_hook` it offers GPUs as if the NVIDIA toolkit were installed.

    The hook does nothing, so a container sees its GPUs in NVIDIA_VISIBLE_DEVICES only. Without it the engine
    answers as one without the toolkit, unless the machine really has that. With `live_restore` its containers
    outlive it, whether it is stopped, restarted or killed. Its log goes into `folder`.
    """

    def __init__(self, folder: Path, *, gpu_hook: bool = False, live_restore: bool = False) -> None:
        # its sockets lie below: their paths may have 107 characters, and pytest's folders are long
        self._root = Path(tempfile.mkdtemp(prefix="own-engine-"))
        self._name = f"own{secrets.token_hex(4)}"
        self._bridges = [self._name]
        self._socket = self._root / "docker.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self.log = folder / f"{self._name}.log"
        self.url = f"unix://{self._socket}"
        self._live_restore = live_restore
        self._hooks = self._root / "bin"
        self._hooks.mkdir()
        if gpu_hook:
            (self._hooks / HOOK).write_text("#!/bin/sh\nexit 0\n")
            (self._hooks / HOOK).chmod(0o755)

    def __enter__(self) -> Self:
        try:
            self._make_network()
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        assert self._process, "it does not run"
        return self._process.pid

    def client(self) -> docker.DockerClient:
        """Return a client of it, to be closed by the caller."""
        return connect(self.url)

    def start(self) -> None:
        """Start it and return when it answers. Containers of its earlier life are as it left them."""
        assert self._process is None, "it runs already"
        self._forget_the_dead()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["dockerd", *self._flags()],
                env={**os.environ, "PATH": f"{self._hooks}:{os.environ['PATH']}"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # the terminal's Ctrl-C is not for it
            )
        wait_until(lambda: self._answers() or self._has_ended(), START_S)
        assert not self._has_ended(), self.log.read_text()[-3000:]

    def stop(self) -> None:
        """Ask it to end, and return when it has: its containers end with it, as when its service is stopped."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Let it crash. Its containers run on; the next start stops them, or with `live_restore` finds them."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Do as `systemctl restart docker` does: its containers are stopped and, by default, not started again."""
        self.stop()
        self.start()

    def copy_image(self, tag: str, source_url: str | None = None) -> None:
        """Copy an image from the machine's engine, or from that at `source_url`."""
        source, target = connect(source_url) if source_url else connect(), self.client()
        try:
            target.images.load(source.images.get(tag).save(named=True))  # type: ignore[arg-type]
        finally:
            source.close()
            target.close()

    def close(self) -> None:
        """End it and remove all it made: containers, processes, mounts, interfaces, folder. May be called twice."""
        if self._root.exists():
            self._empty()
            if self._process:
                self.stop()
            self._kill_the_rest()
            self._remove_network()
            for mount in reversed(_mounts_below(self._root)):
                _run("umount", "--lazy", mount)
            shutil.rmtree(self._root)

    def _flags(self) -> list[str]:
        return [
            f"--data-root={self._root / 'data'}",
            f"--exec-root={self._root / 'run'}",
            f"--pidfile={self._root / 'pid'}",
            f"--host={self.url}",
            f"--bridge={self._name}",
            # no --default-address-pool: with that, a restart removes docker0, which is the other engine's
            "--iptables=false",
            "--ip6tables=false",
            # where a containerd runs as a service, engines share it: without names of its own, one would clear up the
            # containers of the other
            f"--containerd-namespace={self._name}",
            f"--containerd-plugins-namespace={self._name}-plugins",
            f"--live-restore={str(self._live_restore).lower()}",
            "--shutdown-timeout=5",
        ]

    def _answers(self) -> bool:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(5)
            asking.connect(str(self._socket))
            asking.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            return b" 200 " in asking.recv(64)
        return False

    def _has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def _end(self, number: signal.Signals) -> None:
        assert self._process, "it does not run"
        self._process.send_signal(number)
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _forget_the_dead(self) -> None:
        """Remove what a killed engine left in the way of the next one.

        Its containerd died with it; where nobody reaps that one, its pid would be taken for a life.
        """
        for left in (self._root / "pid", self._socket, self._root / "run" / "containerd" / "containerd.pid"):
            left.unlink(missing_ok=True)

    def _empty(self) -> None:
        """Remove all containers and networks. An engine that was killed is started once more for that."""
        if self._has_ended():
            self._process = None
            if not (self._root / "run" / "containerd").exists():
                return
            with suppress(AssertionError):
                self.start()
        with suppress(DockerException, RequestException):
            client = self.client()
            try:
                for container in client.containers.list(all=True, ignore_removed=True):
                    container.remove(force=True, v=True)
                self._bridges += [f"br-{network.short_id}" for network in client.networks.list()]
                client.networks.prune()
            finally:
                client.close()

    def _kill_the_rest(self) -> None:
        """Wait for what the engine ends itself (containerd), then kill what is left: shims, proxies."""
        with suppress(AssertionError):
            wait_until(lambda: not self._processes(), 10.0)
        for pid in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self._processes(), END_S)

    def _processes(self) -> list[int]:
        """Return the processes whose command line names this engine's folder."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if str(self._root).encode() in (entry / "cmdline").read_bytes() and int(entry.name) != os.getpid():
                    found.append(int(entry.name))
        return found

    def _make_network(self) -> None:
        _run("ip", "link", "add", self._name, "type", "bridge")
        _run("ip", "address", "add", _free_address(), "dev", self._name)
        _run("ip", "link", "set", self._name, "up")
        _run("iptables", "-w", "-I", "FORWARD", *self._within_bridges())

    def _within_bridges(self) -> list[str]:
        """Return the rule that lets its containers talk: another engine drops what is forwarded, bridged or not."""
        return ["-m", "physdev", "--physdev-is-bridged", "-m", "comment", "--comment", self._name, "-j", "ACCEPT"]

    def _remove_network(self) -> None:
        for bridge in self._bridges:
            if Path("/sys/class/net", bridge).exists():
                _run("ip", "link", "delete", bridge)
        with suppress(subprocess.CalledProcessError):  # it was not made
            _run("iptables", "-w", "-D", "FORWARD", *self._within_bridges())


def _free_address() -> str:
    """Return an address for a bridge, in a network that no interface of this machine lies in."""
    links = json.loads(_run("ip", "-json", "-4", "address"))
    taken = [ip_address(info["local"]) for link in links for info in link.get("addr_info", ()) if "local" in info]
    networks = [f"10.{second}.{third}" for second in range(192, 256) for third in range(256)]
    free = [network for network in networks if not any(each in ip_network(f"{network}.0/24") for each in taken)]
    return f"{random.choice(free)}.1/24"


def _mounts_below(folder: Path) -> list[str]:
    """Return the mount points below a folder, outer ones first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [point for line in lines if (point := line.split()[4]).startswith(f"{folder}/")]


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
