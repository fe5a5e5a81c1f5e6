"""Where a base URL leads, and which of a name's addresses wins."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from gateway.dialing import Address, Attempt, address_of, alternating, first_of
from gateway.http11 import Connection
from tests.raw_servers import RawServer, is_silent, serving
from tests.runtimes.processes import until


@pytest.mark.parametrize(
    ("base_url", "expected"),
    [
        ("http://127.0.0.1:8080", Address("http", "127.0.0.1", 8080, "127.0.0.1:8080", "", is_literal=True)),
        ("http://model", Address("http", "model", 80, "model", "", is_literal=False)),
        ("HTTPS://Api.Example/v1/", Address("https", "api.example", 443, "api.example", "/v1", is_literal=False)),
        ("https://h:80", Address("https", "h", 80, "h:80", "", is_literal=False)),
        ("http://h:443/a/b", Address("http", "h", 443, "h:443", "/a/b", is_literal=False)),
        ("http://[::1]", Address("http", "::1", 80, "[::1]", "", is_literal=True)),
        ("http://[2001:db8::1]:9/x", Address("http", "2001:db8::1", 9, "[2001:db8::1]:9", "/x", is_literal=True)),
        ("http://gruñón.example", Address("http", "xn--grun-iqa9b.example", 80, "", "", is_literal=False)),
        ("http://h/a b/é/%20", Address("http", "h", 80, "h", "/a%20b/%C3%A9/%20", is_literal=False)),
    ],
)
def test_an_address_is_what_the_url_says(base_url: str, expected: Address) -> None:
    found = address_of(base_url)

    shown = expected.host_header or found.host
    assert (found.scheme, found.port, found.prefix, found.is_literal) == (
        expected.scheme,
        expected.port,
        expected.prefix,
        expected.is_literal,
    )
    assert (found.host_header, found.host.isascii()) == (shown, True)
    assert expected.host_header == "" or found.host == expected.host


@pytest.mark.parametrize("base_url", ["", "model:80", "ftp://h", "http://", "http://a b", "http://h:x", "http://h<"])
def test_what_is_no_address_is_refused(base_url: str) -> None:
    with pytest.raises(ValueError, match=r"address|[Pp]ort"):
        address_of(base_url)


def test_families_are_tried_by_turns_and_no_address_twice() -> None:
    six, four = socket.AF_INET6, socket.AF_INET

    assert alternating([(six, "a"), (six, "b"), (six, "b"), (four, "c")]) == ["a", "c", "b"]
    assert alternating([(four, "c")]) == ["c"]
    assert alternating([]) == []


# ---- races ----


def reaches(server: RawServer) -> Attempt:
    async def attempt() -> Connection:
        connection = Connection()
        await asyncio.get_running_loop().create_connection(lambda: connection, "127.0.0.1", server.port)
        return connection

    return attempt


async def is_refused() -> Connection:
    raise ConnectionRefusedError("nobody")


async def hangs() -> Connection:
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nothing ever sets it")


def race(scene: Callable[[RawServer], Awaitable[None]]) -> None:
    async def played() -> None:
        async with asyncio.timeout(20), serving(is_silent) as server:
            await scene(server)
            await until(lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "connect"])

    asyncio.run(played())


@pytest.mark.parametrize("before", [[], [is_refused], [hangs], [is_refused, hangs, is_refused]])
@pytest.mark.parametrize("after", [[], [hangs], [is_refused]])
def test_the_first_that_is_reached_wins(before: list[Attempt], after: list[Attempt]) -> None:
    async def scene(server: RawServer) -> None:
        connection = await first_of([*before, reaches(server), *after])
        await until(lambda: len(server.peers) == 1)
        assert not server.peers[0].has_left.is_set()
        connection.abort()

    race(scene)


def test_the_others_are_closed() -> None:
    async def scene(server: RawServer) -> None:
        together = asyncio.Event()

        def with_the_other() -> Attempt:
            async def attempt() -> Connection:
                connection = await reaches(server)()
                await together.wait()
                return connection

            return attempt

        racing = asyncio.create_task(first_of([with_the_other(), with_the_other()]))
        await until(lambda: len(server.peers) == 2)
        together.set()
        connection = await racing
        await until(lambda: [peer.has_left.is_set() for peer in server.peers].count(True) == 1)
        connection.abort()

    race(scene)


def test_if_all_fail_the_last_failure_is_told() -> None:
    async def scene(_: RawServer) -> None:
        with pytest.raises(ConnectionRefusedError):
            await first_of([is_refused, is_refused])
        with pytest.raises(OSError, match="no address"):
            await first_of([])

    race(scene)


def test_who_gives_up_leaves_nothing_behind() -> None:
    async def scene(server: RawServer) -> None:
        racing = asyncio.create_task(first_of([hangs, hangs, hangs]))
        await asyncio.sleep(0.01)
        racing.cancel()
        await asyncio.wait([racing])
        assert racing.cancelled()
        assert server.peers == []

    race(scene)
