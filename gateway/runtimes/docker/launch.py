"""Turns a launch into the container that the engine is to make: what it runs, sees, gets, and must not do."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from docker import APIClient
from docker.types import DeviceRequest, LogConfig
from docker.types import Mount as EngineMount

from gateway.catalog_values import SECRETS_TARGET
from gateway.runtimes.base import Container, Launch, Mount
from gateway.runtimes.docker.containers import FINGERPRINT, GENERATION, GPU_MEMORY, GPUS, MODEL, NAME, OWNER, PORT
from gateway.runtimes.docker.images import Image
from gateway.runtimes.docker.place import Place, host_name
from gateway.runtimes.docker.ports import HOST

SECRETS = SECRETS_TARGET
READ_ONLY = "tgi-gateway.read-only"
"""The label by which an image says that it writes to /tmp and its volumes only."""
PIDS = 4096
LOGS = {"max-size": "10m", "max-file": "2"}  # a log never fills the disk


@dataclass(frozen=True, slots=True)
class Plan:
    """One container, ready to be made."""

    launch: Launch
    container: Container
    image: Image
    owner: str
    generation: str
    place: Place

    def create(self, client: APIClient, host_port: int | None) -> str:
        """Make the container, published on `host_port` of the loopback interface if given; return its id."""
        port, network = self.container.port, self.place.network
        published = host_port is not None and port is not None
        made = client.create_container(
            image=self.container.image,
            name=self.launch.name,
            entrypoint=list(self.container.entrypoint) or None,
            command=list(self.launch.command) or None,
            environment=environment(self.launch, self.container),
            labels=self._labels(),
            ports=[port] if published else None,
            networking_config=self._networking(client),
            host_config=client.create_host_config(
                port_bindings={port: (HOST, host_port)} if published and port else None,
                network_mode=network or "bridge",
                mounts=_mounts(self.container),
                device_requests=_devices(self.launch.gpus),
                log_config=LogConfig(type=LogConfig.types.JSON, config=LOGS),
                **self._hardening(),
            ),
        )
        return str(made["Id"])

    def _labels(self) -> dict[str, str]:
        return {
            OWNER: self.owner,
            NAME: self.launch.name,
            MODEL: self.launch.model,
            FINGERPRINT: self.launch.fingerprint,
            GENERATION: self.generation,
            GPUS: ",".join(self.launch.gpus),
            GPU_MEMORY: str(self.launch.gpu_memory_bytes or ""),
            PORT: str(self.container.port or ""),
        }

    def _networking(self, client: APIClient) -> Any:
        """Give it a name in the network that it keeps, even if somebody renames the container while it serves."""
        alias = host_name(self.launch.name)
        if not self.place.by_name:
            return None
        return client.create_networking_config(
            {self.place.network: client.create_endpoint_config(aliases=[alias])}  # type: ignore[arg-type]
        )

    def _hardening(self) -> dict[str, Any]:
        """Return what keeps a model from more than it needs: an image or its weights may come from anybody."""
        read_only = ((self.image.get("Config") or {}).get("Labels") or {}).get(READ_ONLY) == "true"
        memory_bytes = self.container.memory_bytes
        return {
            "security_opt": ["no-new-privileges"],
            "cap_drop": ["ALL"],
            "cap_add": _capabilities(self.container.mounts),
            "pids_limit": PIDS,
            "init": True,  # reaps what a server leaves, and hands signals on
            "mem_limit": memory_bytes,
            "memswap_limit": memory_bytes,  # the same: no swap beyond it
            "shm_size": self.container.shm_bytes,
            "read_only": read_only,
            "tmpfs": {"/tmp": ""} if read_only else None,  # noqa: S108 - the container's own
        }


def environment(launch: Launch, container: Container) -> dict[str, str]:
    """Return the container's environment: the launch's own, where its secrets lie, and no GPU beyond what it gets.

    The engine itself tells a container with GPUs which they are. One without must say so, or an engine
    whose default runtime is NVIDIA's shows all of them to an image that asks for them, as CUDA's do.
    """
    env = {**launch.env, **{variable: f"{SECRETS}/{variable}" for variable in container.secrets}}
    env.pop("NVIDIA_VISIBLE_DEVICES", None)
    return env if launch.gpus else {**env, "NVIDIA_VISIBLE_DEVICES": "void"}


def secrets_archive(secrets: Mapping[str, str]) -> bytes:
    """Return a tar archive with one file a secret, readable by root alone."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for variable, content in secrets.items():
            data = content.encode()
            file = tarfile.TarInfo(variable)
            file.size, file.mode = len(data), 0o400
            tar.addfile(file, io.BytesIO(data))
    return archive.getvalue()


def _mounts(container: Container) -> list[EngineMount]:
    mounts = [
        EngineMount(mount.target, mount.source, type="bind" if _is_bind(mount) else "volume", read_only=mount.read_only)
        for mount in container.mounts
    ]
    if container.secrets:  # a volume without a name: it goes with its container
        mounts.append(EngineMount(SECRETS, None, type="volume"))
    return mounts


def _is_bind(mount: Mount) -> bool:
    return mount.source.startswith("/")


def _capabilities(mounts: tuple[Mount, ...]) -> list[str] | None:
    """Return the one capability that root needs to write to a directory of an ordinary user's.

    Without any, it may write only to what is its own, as a named volume is.
    """
    writes = any(_is_bind(mount) and not mount.read_only for mount in mounts)
    return ["DAC_OVERRIDE"] if writes else None


def _devices(gpus: tuple[str, ...]) -> list[DeviceRequest] | None:
    return [DeviceRequest(device_ids=list(gpus), capabilities=[["gpu"]])] if gpus else None
