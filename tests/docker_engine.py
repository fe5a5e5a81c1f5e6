"""The Docker Engine that tests marked `docker` use, and what must not be left on it."""

from __future__ import annotations

import os

import docker
from docker.errors import DockerException
from requests.exceptions import RequestException

ENGINE_URL = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
ANSWER_S = 30


def connect(url: str = ENGINE_URL) -> docker.DockerClient:
    """Return a client of this engine.

    Raises:
        DockerException: no engine answers there.
    """
    return docker.DockerClient(base_url=url, version="auto", timeout=ANSWER_S)


def why_not() -> str | None:
    """Return why no test can use an engine here, or None if they can."""
    try:
        client = connect()
    except DockerException as error:
        return f"no Docker Engine answers at {ENGINE_URL} ({error}); scripts/docker-engine installs and starts one"
    client.close()
    return None


def everything(url: str = ENGINE_URL) -> set[str]:
    """Return every container, network and volume of the engine, in words."""
    try:
        client = connect(url)
    except DockerException:
        return set()
    try:
        containers = {
            f"container {each.name} {each.id}" for each in client.containers.list(all=True, ignore_removed=True)
        }
        networks = {f"network {each.name}" for each in client.networks.list()}
        volumes = {f"volume {each.name}" for each in client.volumes.list()}
    except RequestException:
        return set()
    finally:
        client.close()
    return containers | networks | volumes
