"""Gateways whose models are containers of the TGI double on a real Docker Engine, and what is seen of them there."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import docker
from docker.errors import NotFound
from docker.models.containers import Container

from tests.docker_engine import ENGINE_URL, connect
from tests.end_to_end.gateway import Gateway, catalog
from tests.runtimes.processes import wait_until
from tests.tgi_double.image import build

OWNER = "tgi-gateway.owner"


class Site:
    """A place for gateways of one name: an engine, the double's image on it, and a folder for catalogs.

    A model here is a double without GPUs, unless its keys say otherwise.
    """

    def __init__(self, folder: Path, url: str = ENGINE_URL) -> None:
        self.folder = folder
        self.url = url
        self.client: docker.DockerClient = connect(url)
        self.image = build(url)
        self.owner = f"test-{secrets.token_hex(4)}"

    def model(self, **keys: Any) -> dict[str, Any]:
        """Return a catalog entry; `env` is the double's personality."""
        env = {name: str(value) for name, value in keys.pop("env", {}).items()}
        own = {"HF_HOME": "/root/hub", "GRACEFUL_TERMINATION_TIMEOUT": "5", **env}
        volumes = [f"{self.owner}:/data"]
        return {"hf_name": f"org/{self.owner}", "gpus": 0, "image": self.image, "volumes": volumes, "env": own, **keys}

    def named(self, name: str) -> str:
        """Return a model id that no other test has: containers are named by it alone."""
        return f"{name}-{self.owner}"

    def gateway(self, environ: dict[str, str] | None = None, **models: dict[str, Any]) -> Gateway:
        """Start a gateway for these models, called by their ids."""
        path = catalog(self.folder, **{self.named(name): keys for name, keys in models.items()})
        return Gateway(path, DOCKER_HOST=self.url, GATEWAY_NAME=self.owner, **environ or {})

    def containers(self) -> dict[str, Container]:
        """Return the containers of this site's gateways by name, whatever their state."""
        found = self.client.containers.list(all=True, filters={"label": f"{OWNER}={self.owner}"}, ignore_removed=True)
        return {str(each.name): each for each in found}

    def container(self, name: str) -> Container:
        return self.client.containers.get(f"tgi-{self.named(name)}")

    def ids(self) -> dict[str, str]:
        return {name: str(each.id) for name, each in self.containers().items()}

    def clear(self) -> None:
        """Remove whatever gateways of this site have left: they are over."""
        for container in self.containers().values():
            with suppress(NotFound):
                container.remove(force=True, v=True)
        wait_until(lambda: not self.containers())
        for volume in self.client.volumes.list():
            if self.owner in str(volume.name):
                volume.remove(force=True)
        self.client.close()


@contextmanager
def site(folder: Path, url: str = ENGINE_URL) -> Iterator[Site]:
    place = Site(folder, url)
    try:
        yield place
    finally:
        place.clear()


@contextmanager
def serving(
    place: Site,
    environ: dict[str, str] | None = None,
    *,
    keep: bool = False,
    all_of: dict[str, dict[str, Any]] | None = None,
    **models: dict[str, Any],
) -> Iterator[Gateway]:
    """Run a gateway for these models; it stops them in the end, unless `keep` says otherwise, and ends well."""
    on_exit = {"GATEWAY_ON_EXIT": "keep" if keep else "stop"}
    gateway = place.gateway({**on_exit, **(environ or {})}, **(all_of or {}), **models)
    try:
        yield gateway
    finally:
        status = gateway.end()
    assert status == 0, "".join(gateway.log[-40:])
    assert keep or place.containers() == {}
