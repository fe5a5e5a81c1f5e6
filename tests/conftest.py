"""What holds for the whole run: it leaves no process and no socket behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

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


@pytest.fixture(autouse=True, scope="session")
def nothing_is_left() -> Iterator[None]:
    """Fail the run if a process or a socket outlives it."""
    processes_before, sockets_before = children(), sockets()
    yield
    gc.collect()
    assert children() <= processes_before, "a test left a process running"
    assert sockets() <= sockets_before, "a test left a socket open"
