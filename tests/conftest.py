"""What holds for the whole run: it leaves no process, no socket, and on the Docker Engine nothing at all."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import docker_engine
from tests.runtimes.processes import children


def sockets() -> int:
    """Return how many sockets this process has open."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(descriptor.readlink()))
        except OSError:  # the descriptor of this very listing
            continue
    return sum(link.startswith("socket:") for link in links)


# How long Hypothesis takes to think of examples says something of the machine and nothing of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

OURS = re.compile(r"test-[0-9a-f]{8}|tgi-hub-cache")
"""How tests name what they make on the engine; it may have other users."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a Docker Engine where none answers, and say so; with NEED_DOCKER=1 (in CI) let it fail."""
    marked = [item for item in items if item.get_closest_marker("docker")]
    why_not = docker_engine.why_not() if marked else None
    if why_not and os.environ.get("NEED_DOCKER"):
        raise pytest.UsageError(f"NEED_DOCKER is set, and {why_not}")
    for item in marked if why_not else ():
        item.add_marker(pytest.mark.skip(reason=why_not or ""))


@pytest.fixture(autouse=True, scope="session")
def nothing_is_left_on_the_engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the run if a container, a network or a volume outlives it."""
    uses_engine = any(item.get_closest_marker("docker") for item in request.session.items)
    before = docker_engine.everything() if uses_engine else set()
    yield
    left = docker_engine.everything() - before if uses_engine else set()
    assert [each for each in left if OURS.search(each)] == [], "a test left something on the Docker Engine"


@pytest.fixture(autouse=True, scope="session")
def nothing_is_left() -> Iterator[None]:
    """Fail the run if a process or a socket outlives it."""
    processes_before, sockets_before = children(), sockets()
    yield
    gc.collect()
    assert children() <= processes_before, "a test left a process running"
    assert sockets() <= sockets_before, "a test left a socket open"
