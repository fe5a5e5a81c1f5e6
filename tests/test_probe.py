"""Health checks over real sockets: what a server says, and what is nothing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from gateway.fleet.health import MOST_BYTES, Answer
from gateway.probe import HttpProbe
from gateway.upstream import HttpClient
from tests.raw_servers import Manner, Peer, RawServer, Says, said, serving

Scene = Callable[[HttpProbe, RawServer], Awaitable[None]]


def play(manner: Manner, scene: Scene) -> None:
    async def run() -> None:
        client = HttpClient()
        async with serving(manner) as server:
            await scene(HttpProbe(client), server)
            await client.aclose()

    asyncio.run(run())


async def leaves(peer: Peer) -> None:
    await peer.hear()


async def says_nothing(peer: Peer) -> None:
    await peer.hear()
    await peer.until_caller_leaves()


async def talks_for_ever(peer: Peer) -> None:
    await peer.hear()
    await peer.say(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while True:
        await peer.say(b"x" * 65536)


async def breaks_off(peer: Peer) -> None:
    await peer.hear()
    await peer.say(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")


@pytest.mark.parametrize("path", ["/health", "/models"])
def test_a_check_tells_status_and_body(path: str) -> None:
    async def scene(probe: HttpProbe, server: RawServer) -> None:
        answer = await probe.ask(f"{server.url}/v1{path}", 5, {"Authorization": "Bearer k"})

        assert answer == (503, b"busy")
        assert server.heads[0].startswith(f"GET /v1{path} HTTP/1.1\r\n".encode())
        assert b"authorization: bearer k\r\n" in server.heads[0].lower()
        assert b"accept-encoding: identity\r\n" in server.heads[0].lower()

    play(Says(said(b"busy", status="503 Service Unavailable")), scene)


def test_every_check_has_a_connection_of_its_own() -> None:
    async def scene(probe: HttpProbe, server: RawServer) -> None:
        for _ in range(3):
            assert await probe.ask(f"{server.url}/health", 5, {}) == (200, b"")

        assert len(server.peers) == 3
        async with asyncio.timeout(5):
            for peer in server.peers:
                await peer.has_left.wait()

    play(Says(said(b"")), scene)


@pytest.mark.parametrize(
    ("manner", "within_s"), [(leaves, 5), (breaks_off, 5), (says_nothing, 0.05), (Says(b"no HTTP\r\n\r\n"), 5)]
)
def test_what_is_no_answer_in_time_is_nothing(manner: Manner, within_s: float) -> None:
    async def scene(probe: HttpProbe, server: RawServer) -> None:
        answers: list[Answer | None] = [await probe.ask(f"{server.url}/health", within_s, {})]

        assert answers == [None]
        async with asyncio.timeout(5):
            await server.peers[0].has_left.wait()

    play(manner, scene)


def test_where_nobody_listens_there_is_nothing() -> None:
    async def scene(probe: HttpProbe, _: RawServer) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            assert await probe.ask(f"http://127.0.0.1:{closed.getsockname()[1]}/health", 5, {}) is None

    play(leaves, scene)


def test_a_check_that_cannot_be_sent_is_a_missed_one() -> None:
    async def scene(probe: HttpProbe, server: RawServer) -> None:
        assert await probe.ask(f"{server.url}/health", 5, {"Authorization": "Bearer k\n"}) is None
        assert server.peers == []

    play(leaves, scene)


def test_no_more_of_an_answer_is_read_than_matters() -> None:
    async def scene(probe: HttpProbe, server: RawServer) -> None:
        assert await probe.ask(f"{server.url}/health", 20, {}) == (200, b"x" * MOST_BYTES)
        async with asyncio.timeout(5):
            await server.peers[0].has_left.wait()

    play(talks_for_ever, scene)
