"""What runtime `docker` says when there is no engine, or none that answers. Needs no engine."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gateway.errors import RuntimeUnavailable
from gateway.runtimes.base import Container, Found, Launch
from gateway.runtimes.docker.runtime import DockerRuntime
from tests.runtimes.containers import play
from tests.runtimes.processes import Ear

LAUNCH = Launch("model", container=Container("image"))
VERBS: dict[str, Callable[[DockerRuntime], Awaitable[object]]] = {
    "find": lambda runtime: runtime.find(),
    "adopt": lambda runtime: runtime.adopt(Found("model", "", 0.0, (), runs=True), Ear()),
    "start": lambda runtime: runtime.start(LAUNCH, Ear()),
    "stop": lambda runtime: runtime.stop("model", grace_s=60),
}
BOUND_S = 10.0


async def refusal_of(verb: str, url: str) -> str:
    """Return what the runtime says when it is asked for `verb`, well before its own bounds would end."""
    runtime = DockerRuntime("nobody", base_url=url, timeout_s=0.2, patience_s=60)
    try:
        async with asyncio.timeout(BOUND_S):
            with pytest.raises(RuntimeUnavailable) as refused:
                await VERBS[verb](runtime)
    finally:
        await runtime.aclose()
    return refused.value.detail


@contextmanager
def mute_engine(path: Path) -> Iterator[str]:
    """An engine that takes connections and never answers."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        yield f"unix://{path}"


@pytest.mark.parametrize("verb", VERBS)
def test_without_an_engine_every_verb_says_so_at_once(verb: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        said = await refusal_of(verb, f"unix://{tmp_path}/no.sock")
        assert f"no Docker Engine at unix://{tmp_path}/no.sock" in said
        assert "gateway doctor" in said

    play(scenario())


@pytest.mark.parametrize("verb", VERBS)
def test_an_engine_that_never_answers_is_given_up(verb: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        with mute_engine(tmp_path / "mute.sock") as url:
            assert "has not answered within 0.2 s" in await refusal_of(verb, url)

    play(scenario())


def test_an_engine_that_was_stopped_is_told_as_such(tmp_path: Path) -> None:
    async def scenario() -> None:
        with mute_engine(tmp_path / "left.sock") as url:
            pass  # closed, and its file is left behind
        assert "is not running" in await refusal_of("find", url)

    play(scenario())


def test_a_socket_of_a_group_that_we_are_not_in_is_told_as_such(tmp_path: Path) -> None:
    async def scenario() -> None:
        with mute_engine(tmp_path / "theirs.sock") as url:
            (tmp_path / "theirs.sock").chmod(0)
            assert "group" in await refusal_of("find", url)

    if os.geteuid() == 0:
        pytest.skip("root may use every socket")
    play(scenario())


@pytest.mark.parametrize(
    "url", ["tcp://10.0.0.7:2375", "ssh://user@host", "tcp://docker.example:2376", "npipe:////./x"]
)
def test_an_engine_on_another_machine_is_refused(url: str) -> None:
    async def scenario() -> None:
        assert "only an engine on this machine" in await refusal_of("start", url)

    play(scenario())


def test_the_environment_names_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/other.sock")

    async def scenario() -> None:
        runtime = DockerRuntime("nobody")
        with pytest.raises(RuntimeUnavailable, match=r"other\.sock"):
            await runtime.find()
        await runtime.aclose()

    play(scenario())


def test_logs_of_nobody_are_empty_and_closing_twice_is_harmless(tmp_path: Path) -> None:
    async def scenario() -> None:
        runtime = DockerRuntime("nobody", base_url=f"unix://{tmp_path}/no.sock")
        assert [line async for line in runtime.logs("model", lines=10, follow=True)] == []
        await runtime.aclose()
        await runtime.aclose()
        with pytest.raises(RuntimeUnavailable, match="let go"):
            await runtime.find()

    play(scenario())
