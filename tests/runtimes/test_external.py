"""Runtime `external`: servers that already run are reached, and let be."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway.errors import StartFailed
from gateway.runtimes.base import Handle, Launch
from gateway.runtimes.external import ExternalRuntime
from tests.runtimes.processes import Ear
from tests.tgi_double.process import free_port
from tests.tls import certificate_in, serves_with


@asynccontextmanager
async def listening(context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Run something that takes connections and says nothing; yield its port."""

    async def take(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0, ssl=context)
    async with server:
        yield int(server.sockets[0].getsockname()[1])


def start(url: str | None) -> Handle:
    return asyncio.run(ExternalRuntime(connect_s=0.5).start(Launch("tgi-m", url=url), Ear()))


def failure(url: str | None) -> StartFailed:
    with pytest.raises(StartFailed) as caught:
        start(url)
    assert caught.value.extra["fix"]
    return caught.value


def test_a_server_that_takes_connections_is_there() -> None:
    async def scene() -> None:
        async with listening() as port:
            runtime, url = ExternalRuntime(), f"http://127.0.0.1:{port}/v1"

            assert await runtime.start(Launch("tgi-m", url=url), Ear()) == Handle("tgi-m", url, port, url)
            await runtime.stop("tgi-m", grace_s=1)
            await runtime.start(Launch("tgi-m", url=url), Ear())  # it was not stopped
            await runtime.aclose()

    asyncio.run(scene())


def test_it_never_ends_and_who_waits_can_leave() -> None:
    async def scene() -> None:
        waiting = asyncio.create_task(ExternalRuntime().ended(Handle("tgi-m", "http://127.0.0.1:1", 1, "")))
        done, _ = await asyncio.wait([waiting], timeout=0.05)
        assert not done
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()

    asyncio.run(scene())


def test_nothing_of_it_is_ever_found_and_its_output_is_elsewhere() -> None:
    async def scene() -> list[str]:
        runtime = ExternalRuntime()
        assert await runtime.find() == []
        return [line async for line in runtime.logs("tgi-m", lines=10, follow=True)]

    assert len(asyncio.run(scene())) == 1
    assert not ExternalRuntime.outlives


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}", "https://127.0.0.1:{port}"])
def test_where_nothing_listens_it_says_so(url: str) -> None:
    error = failure(url.format(port=free_port()))

    assert "Connect" in error.detail
    assert url.partition(":{")[0] in error.detail
    assert "`url`" in error.extra["fix"]


def test_a_name_that_does_not_exist() -> None:
    assert "http://no-such-host.invalid" in failure("http://no-such-host.invalid").detail
    assert "is reached" in failure(f"http://{'x' * 64}.example").detail
    assert "has no address" in failure(None).detail


def test_a_server_that_does_not_speak_tls_is_not_https() -> None:
    async def scene() -> None:
        async with listening() as port:
            with pytest.raises(StartFailed, match="No server is reached"):
                await ExternalRuntime().start(Launch("tgi-m", url=f"https://127.0.0.1:{port}"), Ear())

    asyncio.run(scene())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate_in(tmp_path_factory.mktemp("certificate"))


def test_a_certificate_that_nobody_vouches_for_is_refused(certificate: Path) -> None:
    async def scene() -> None:
        async with listening(serves_with(certificate)) as port:
            with pytest.raises(StartFailed, match=r"certificate of \S+ is not trusted") as caught:
                await ExternalRuntime().start(Launch("tgi-m", url=f"https://127.0.0.1:{port}"), Ear())
            assert "SSL_CERT_FILE" in caught.value.extra["fix"]

    asyncio.run(scene())


def test_a_certificate_of_an_authority_that_the_environment_names_is_trusted(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))

    async def scene() -> None:
        async with listening(serves_with(certificate)) as port:
            handle = await ExternalRuntime().start(Launch("tgi-m", url=f"https://127.0.0.1:{port}"), Ear())
            assert handle.port == port
            with pytest.raises(StartFailed, match="not trusted"):
                await ExternalRuntime().start(Launch("tgi-m", url=f"https://localhost:{port}"), Ear())

    asyncio.run(scene())


def test_who_takes_no_connection_is_not_waited_for_longer_than_the_bound() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        crowd = [socket.socket() for _ in range(4)]
        for each in crowd:
            each.setblocking(False)
            each.connect_ex(("127.0.0.1", port))
        try:
            assert "no answer within 0.5 s" in failure(f"http://127.0.0.1:{port}").detail
        finally:
            for each in crowd:
                each.close()
