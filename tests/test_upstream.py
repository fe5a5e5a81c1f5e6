"""The relay's client over real sockets, before servers that behave in every way (tests/raw_servers.py)."""

from __future__ import annotations

import asyncio
import socket
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop

from gateway.dialing import address_of, connect
from gateway.engines.base import Call
from gateway.http11 import MOST_BUFFERED_BYTES, Answer
from gateway.relay import Broken, ConnectFailed
from gateway.upstream import MOST_KEPT, HttpClient
from tests import raw_servers
from tests.raw_servers import Says, SaysAndCloses, SaysAndWaits, SaysByteByByte, chunked, said, serving
from tests.runtimes.processes import descriptors, until
from tests.tgi_double.process import free_port
from tests.tls import certificate_in, serves_with

ASK = Call("/x", b"{}")
FRESH = Call("/x", b"{}", fresh=True)

Scene = Callable[[HttpClient], Awaitable[None]]
Play = Callable[..., None]


@pytest.fixture(params=["asyncio", "uvloop"])
def play(request: pytest.FixtureRequest) -> Play:
    """Return what plays a scene with a client, in either loop, and sees to it that it leaves nothing behind."""
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop

    def run(scene: Scene, **settings: Any) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:  # the first loop of its kind keeps some for ever
            runner.run(asyncio.sleep(0))
        before = descriptors()
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(_played(scene, HttpClient(**{"idle_s": 60.0, **settings})))
        assert descriptors() <= before

    return run


async def _played(scene: Scene, client: HttpClient) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    try:
        async with asyncio.timeout(30):
            await scene(client)
    finally:
        await client.aclose()
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
    assert complaints == []


async def body_of(answer: Answer) -> bytes:
    pieces = []
    while piece := await answer.more():
        pieces.append(piece)
    assert await answer.more() == b""
    return b"".join(pieces)


async def ask(client: HttpClient, url: str, call: Call = ASK) -> tuple[int, bytes]:
    async with client.send(url, call, {"x-request-id": "1"}) as answer:
        return answer.status, await body_of(answer)


async def hears_nothing_more(client: HttpClient, url: str) -> None:
    """Ask, and leave once the head is there."""
    async with client.send(url, ASK, {}):
        pass


# ---- answers ----

WELL = {
    "a length": (said(b"hello"), (200, b"hello")),
    "chunks": (chunked(b"he", b"llo", trailers=b"X: y\r\n"), (200, b"hello")),
    "no body": (b"HTTP/1.1 204 No Content\r\n\r\n", (204, b"")),
    "interim answers": (b"HTTP/1.1 100 Go\r\n\r\nHTTP/1.1 103 Hm\r\nX: y\r\n\r\n" + said(b"hello"), (200, b"hello")),
    "an error": (said(b"no", status="503 Busy"), (503, b"no")),
}


@pytest.mark.parametrize("what", WELL)
@pytest.mark.parametrize("manner", [Says, SaysByteByByte])
def test_an_answer_comes_as_it_was_said_and_its_connection_is_used_again(
    play: Play, manner: Callable[[bytes], raw_servers.Manner], what: str
) -> None:
    data, expected = WELL[what]

    async def scene(client: HttpClient) -> None:
        async with serving(manner(data)) as server:
            assert [await ask(client, server.url) for _ in range(3)] == [expected] * 3
            assert len(server.peers) == 1
            await client.aclose()

    play(scene)


def test_an_answer_without_a_length_ends_with_its_connection(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(SaysAndCloses(b"HTTP/1.1 200 OK\r\n\r\nhello")) as server:
            assert [await ask(client, server.url) for _ in range(2)] == [(200, b"hello")] * 2
            assert len(server.peers) == 2

    play(scene)


HALF = {
    "half a status": b"HTTP/1.1 2",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-",
    "an interim answer alone": b"HTTP/1.1 100 Continue\r\n\r\n",
    "half a length": said(b"hello")[:-1],
    "chunks without an end": chunked(b"hello")[:-5],
    "half a chunk": chunked(b"hello")[:-9],
}


@pytest.mark.parametrize("what", HALF)
def test_an_answer_that_is_cut_short_is_broken(play: Play, what: str) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(SaysAndCloses(HALF[what])) as server:
            with pytest.raises(Broken, match="closed the connection"):
                await ask(client, server.url)
            assert len(server.heads) == 1

    play(scene)


def test_what_came_before_the_cut_is_not_lost(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(SaysAndCloses(said(b"hello")[:-1])) as server, client.send(server.url, ASK, {}) as answer:
            assert await answer.more() == b"hell"
            for _ in range(2):
                with pytest.raises(Broken):
                    await answer.more()

    play(scene)


@pytest.mark.parametrize("data", [b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\nA: " + b"secret" * 60_000, b"\0" * 100])
def test_nonsense_is_broken_at_once_and_not_repeated(play: Play, data: bytes) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(SaysAndWaits(data)) as server:
            with pytest.raises(Broken, match="its answer") as caught:
                await ask(client, server.url)
            assert "secret" not in str(caught.value)

    play(scene)


def test_what_follows_an_answer_is_never_taken_for_another(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(Says(said(b"first") + said(b"junk"))) as server:
            assert [await ask(client, server.url) for _ in range(3)] == [(200, b"first")] * 3
            assert len(server.peers) == 3

    play(scene)


def test_a_server_that_says_when_to_come_again(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        for words, expected in {"7": 7.0, "999999999999": 3600.0, "tomorrow": None, "": None, "-1": None}.items():
            async with serving(Says(said(b"", f"Retry-After: {words}"))) as server:
                async with client.send(server.url, ASK, {}) as answer:
                    assert answer.retry_after_s == expected
                await client.aclose()

    play(scene)


# ---- requests ----


def test_a_request_says_which_host_it_is_for(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(Says(said(b""))) as server, serving(Says(said(b"")), "::1") as other:
            for each, host in ((server, "127.0.0.1"), (other, "[::1]")):
                await ask(client, f"{each.url}/v1", Call("/models", method="GET"))
                assert each.heads[0].startswith(f"GET /v1/models HTTP/1.1\r\nHost: {host}:{each.port}\r\n".encode())
            await client.aclose()

    play(scene)


def test_a_name_is_tried_at_all_its_addresses(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(Says(said(b"ok"))) as server:  # not at ::1, where localhost may be too
            assert await ask(client, f"http://localhost:{server.port}") == (200, b"ok")
            await client.aclose()

    play(scene)


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 5_000_000])
def test_a_body_of_any_size_arrives(play: Play, size: int) -> None:
    async def scene(client: HttpClient) -> None:
        body = bytes(range(256)) * (size // 256 + 1)
        async with serving(raw_servers.Echoes()) as server:
            for _ in range(2):
                assert await ask(client, server.url, Call("/x", body[:size])) == (200, body[:size])
            assert len(server.peers) == 1
            await client.aclose()

    play(scene)


def test_a_large_body_waits_until_the_server_reads_and_is_not_copied(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        manner = raw_servers.HearsSlowly()
        async with serving(manner) as server:
            call = Call("/x", bytes(20_000_000))
            tracemalloc.start()
            asking = asyncio.create_task(ask(client, server.url, call))
            done, _ = await asyncio.wait([asking], timeout=0.2)
            _, peak_bytes = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert not done
            assert peak_bytes < 2_000_000
            manner.now.set()
            assert await asking == (200, b"20000000")
            await client.aclose()

    play(scene)


def test_a_server_that_refuses_before_it_has_heard_all_is_heard(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        manner = raw_servers.RefusesBeforeItHasHeardAll()
        async with serving(manner) as server:
            async with client.send(server.url, Call("/x", bytes(20_000_000)), {}) as answer:
                assert (answer.status, await body_of(answer)) == (413, b"too large")
                manner.now.set()
                heard_bytes = -1
                while heard_bytes != manner.heard_bytes:  # nothing is under way any more
                    heard_bytes = manner.heard_bytes
                    await asyncio.sleep(0.05)
                assert heard_bytes < 20_000_000
            await server.peers[0].has_left.wait()  # else the next request would be taken for the rest of the body

    play(scene)


def test_what_is_no_call_is_refused_before_anything_is_sent(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(raw_servers.is_silent) as server:
            for call in (Call("/x", headers={"a": "b\r\nc: d"}), Call("/x y"), Call("/x\r\n\r\n")):
                with pytest.raises(ValueError, match="a call"):
                    await ask(client, server.url, call)
            assert server.peers == []

    play(scene)


# ---- no connection ----


def test_where_nobody_listens_nothing_was_sent(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        for host in ("127.0.0.1", "localhost", "no-such-host.invalid", f"{'x' * 64}.example"):
            with pytest.raises(ConnectFailed):
                await ask(client, f"http://{host}:{free_port()}")

    play(scene)


def test_a_server_that_takes_no_connection_is_given_up_after_the_bound(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        with ExitStack() as stack, socket.create_server(("127.0.0.1", 0), backlog=1) as full:
            for _ in range(4):  # more than it has room for
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(full.getsockname())
            with pytest.raises(ConnectFailed, match="TimeoutError"):
                await ask(client, f"http://127.0.0.1:{full.getsockname()[1]}")

    play(scene, connect_s=0.2)


def test_a_server_that_does_not_speak_tls_was_sent_nothing(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(SaysAndWaits(said(b"ok"))) as server:
            with pytest.raises(ConnectFailed):
                await ask(client, server.url.replace("http:", "https:"))
            assert server.heads == []

    play(scene, connect_s=0.5)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate_in(tmp_path_factory.mktemp("certificate"))


def test_a_server_whose_certificate_nobody_vouches_for_is_sent_nothing(play: Play, certificate: Path) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(Says(said(b"ok")), certificate=serves_with(certificate)) as server:
            with pytest.raises(ConnectFailed, match="SSLCertVerificationError"):
                await ask(client, server.url)
            assert server.heads == []

    play(scene)


def test_a_certificate_that_is_trusted_is_good_for_its_own_host_alone(
    play: Play, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))

    async def scene(client: HttpClient) -> None:
        async with serving(raw_servers.Echoes(), certificate=serves_with(certificate)) as server:
            for size in (2, 1_000_000):
                assert await ask(client, server.url, Call("/x", bytes(size))) == (200, bytes(size))
            assert len(server.peers) == 1
            with pytest.raises(ConnectFailed, match="SSLCertVerificationError"):
                await ask(client, f"https://localhost:{server.port}")
            await client.aclose()

    play(scene)


# ---- kept connections ----


def test_connections_are_as_many_as_there_were_requests_at_once(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(Says(said(b"ok"))) as server:
            for _ in range(3):
                answers = await asyncio.gather(*[ask(client, server.url) for _ in range(5)])
                assert answers == [(200, b"ok")] * 5
            assert len(server.peers) == 5
            await ask(client, server.url)
            assert max(server.peers, key=lambda peer: len(peer.heads)).heads[3:]  # one alone goes over the last one
            await client.aclose()

    play(scene)


def test_no_more_are_kept_than_there_is_room_for(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(Says(said(b"ok"))) as server:
            async with asyncio.TaskGroup() as group:
                everybody = asyncio.Barrier(MOST_KEPT + 3)
                for _ in range(MOST_KEPT + 3):
                    group.create_task(self_restrained(client, server.url, everybody))
            await until(lambda: sum(peer.has_left.is_set() for peer in server.peers) == 3)
            await client.aclose()

    async def self_restrained(client: HttpClient, url: str, everybody: asyncio.Barrier) -> None:
        async with client.send(url, ASK, {}) as answer:
            await everybody.wait()
            await body_of(answer)

    play(scene)


@pytest.mark.parametrize(
    "data",
    [
        said(b"ok", "Connection: close"),
        said(b"ok", "Keep-Alive: max=1"),
        said(b"ok", "Keep-Alive: timeout=0"),
        said(b"ok", "KEEP-alive: max=1"),
        said(b"ok").replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
)
def test_a_connection_that_the_server_will_end_is_closed_by_us(play: Play, data: bytes) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(SaysAndWaits(data)) as server:
            for number in range(2):
                assert await ask(client, server.url) == (200, b"ok")
                await server.peers[number].has_left.wait()

    play(scene)


def test_a_fresh_call_has_a_connection_of_its_own(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(Says(said(b"ok"))) as server:
            for call in (ASK, FRESH, FRESH):
                await ask(client, server.url, call)
            assert [len(peer.heads) for peer in server.peers] == [1, 1, 1]
            await asyncio.gather(*[peer.has_left.wait() for peer in server.peers[1:]])
            assert not server.peers[0].has_left.is_set()
            await client.aclose()

    play(scene)


def test_a_connection_that_waits_for_too_long_is_closed(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(Says(said(b"ok"))) as server:
            for number in range(2):
                await ask(client, server.url)
                await server.peers[number].has_left.wait()
            assert len(server.peers) == 2

    play(scene, idle_s=0.05)


def test_a_connection_that_has_waited_for_too_long_is_not_used_even_if_the_loop_was_late(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(Says(said(b"ok"))) as server:
            await ask(client, server.url)
            time.sleep(0.1)  # noqa: ASYNC251 - no timer can run
            await ask(client, server.url)
            assert len(server.peers) == 2

    play(scene, idle_s=0.05)


def test_a_connection_that_the_server_closes_meanwhile_is_not_used_again(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        manner = raw_servers.ClosesWhileIdle()
        async with serving(manner) as server:
            await ask(client, server.url)
            manner.now.set()
            await server.peers[0].has_left.wait()  # the loop may not have told the client yet
            assert await ask(client, server.url) == (200, b"ok")
            assert len(server.peers) == 2

    play(scene)


@pytest.mark.parametrize("uses", [1, 3])
def test_a_connection_whose_end_the_loop_has_not_noticed_yet_is_not_used_again(play: Play, uses: int) -> None:
    async def scene(client: HttpClient) -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)

            async def answer(times: int) -> socket.socket:
                peer, _ = await loop.sock_accept(listener)
                for _ in range(times):
                    await loop.sock_recv(peer, 4096)
                    await loop.sock_sendall(peer, said(b"ok"))
                return peer

            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            answering = asyncio.create_task(answer(uses))
            for _ in range(uses):
                assert await ask(client, url) == (200, b"ok")
            (await answering).close()  # and from here to the next request the loop has no turn
            answering = asyncio.create_task(answer(1))
            assert await ask(client, url) == (200, b"ok")
            (await answering).close()

    play(scene)


def test_a_connection_on_which_the_server_speaks_unasked_is_not_used_again(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        manner = raw_servers.SpeaksUnasked()
        async with serving(manner) as server:
            await ask(client, server.url)
            manner.now.set()
            await server.peers[0].has_left.wait()
            assert await ask(client, server.url) == (200, b"ok")
            assert len(server.peers) == 2

    play(scene)


def test_a_request_that_may_have_been_read_is_not_sent_again(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(raw_servers.ClosesAtTheSecond()) as server:
            await ask(client, server.url)
            with pytest.raises(Broken, match="did not answer"):
                await ask(client, server.url)
            assert [len(peer.heads) for peer in server.peers] == [2]

    play(scene)


def test_a_server_that_closes_everything_breaks_and_is_asked_once(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(raw_servers.closes_unanswered) as server:
            with pytest.raises(Broken, match="did not answer"):
                await ask(client, server.url)
            assert len(server.heads) == 1
        async with serving(raw_servers.closes_at_once) as server:
            with pytest.raises((Broken, ConnectFailed)):  # whichever is noticed first: the sending or the closing
                await ask(client, server.url)
            assert len(server.peers) == 1

    play(scene)


def test_over_a_connection_that_is_closed_already_nothing_is_sent(play: Play) -> None:
    async def scene(_: HttpClient) -> None:
        async with serving(raw_servers.closes_at_once) as server:
            connection = await connect(address_of(server.url), None)
            await until(cast("Any", connection)._transport.is_closing)
            with pytest.raises(ConnectFailed):
                await connection.ask(b"GET / HTTP/1.1\r\n\r\n", b"")
            assert server.heads == []

    play(scene)


def test_after_the_end_nothing_is_kept(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(Says(said(b"ok"))) as server:
            async with client.send(server.url, ASK, {}) as answer:
                await client.aclose()
                assert await body_of(answer) == b"ok"
            await server.peers[0].has_left.wait()

    play(scene)


# ---- leaving ----

LEFT_EARLY = {
    "no body yet": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
    "half a body": said(b"hello")[:-1],
    "chunks": chunked(b"hello")[:-5],
    "no length": b"HTTP/1.1 200 OK\r\n\r\nhello",
}


@pytest.mark.parametrize("what", LEFT_EARLY)
def test_who_leaves_before_the_end_closes_the_connection(play: Play, what: str) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(SaysAndWaits(LEFT_EARLY[what])) as server:
            for number in range(2):
                await hears_nothing_more(client, server.url)
                await server.peers[number].has_left.wait()

    play(scene)


def test_an_answer_that_was_complete_when_it_was_left_keeps_its_connection(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(Says(said(b"ok"))) as server:
            for _ in range(3):
                await hears_nothing_more(client, server.url)
            assert len(server.peers) == 1
            await client.aclose()

    play(scene)


def test_an_answer_that_was_left_cannot_be_read_any_more(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(SaysAndWaits(LEFT_EARLY["no body yet"])) as server:
            async with client.send(server.url, ASK, {}) as answer:
                pass
            with pytest.raises(Broken, match="left"):
                await body_of(answer)

    play(scene)


async def cancelled(work: asyncio.Task[Any]) -> None:
    work.cancel()
    await asyncio.wait([work])
    assert work.cancelled()


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 2", *LEFT_EARLY.values()])
def test_a_cancelled_request_closes_its_connection(play: Play, data: bytes) -> None:
    async def scene(client: HttpClient) -> None:
        async with serving(SaysAndWaits(data)) as server:
            asking = asyncio.create_task(ask(client, server.url))
            await until(lambda: server.heads)
            await asyncio.sleep(0.01)
            await cancelled(asking)
            await server.peers[0].has_left.wait()

    play(scene)


def test_a_request_can_be_cancelled_while_its_body_goes_out(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        manner = raw_servers.HearsSlowly()
        async with serving(manner) as server:
            asking = asyncio.create_task(ask(client, server.url, Call("/x", bytes(20_000_000))))
            await until(lambda: server.peers)
            await asyncio.sleep(0.01)
            await cancelled(asking)
            manner.now.set()
            await server.peers[0].has_left.wait()

    play(scene)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_request_can_be_cancelled_in_every_round_of_the_loop(
    play: Play, certificate: Path, monkeypatch: pytest.MonkeyPatch, host: str, scheme: str
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls = serves_with(certificate) if scheme == "https" else None

    async def scene(client: HttpClient) -> None:
        async with serving(SaysByteByByte(said(b"hello")), certificate=tls) as server:
            for rounds in range(60):
                asking = asyncio.create_task(ask(client, f"{scheme}://{host}:{server.port}", FRESH))
                for _ in range(rounds):
                    await asyncio.sleep(0)
                asking.cancel()
                await asyncio.wait([asking])
                if not asking.cancelled():
                    asking.exception()
            for peer in list(server.peers):
                await peer.has_left.wait()

    play(scene)


def test_a_server_that_speaks_faster_than_it_is_heard_is_slowed_down(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        manner = raw_servers.SpeaksFasterThanItIsHeard()
        async with serving(manner) as server:
            async with client.send(server.url, ASK, {}) as answer:
                await until(lambda: manner.sent_bytes > MOST_BUFFERED_BYTES)
                before = -1
                while before != manner.sent_bytes:
                    before = manner.sent_bytes
                    await asyncio.sleep(0.1)
                heard = len(await answer.more())
                assert heard < 4 * MOST_BUFFERED_BYTES
                while heard <= before:
                    heard += len(await answer.more())
            await server.peers[0].has_left.wait()

    play(scene)


def test_a_server_that_was_slowed_down_and_goes_is_noticed(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        manner = raw_servers.SaysAndGoes(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n" + bytes(1_000_000))
        async with serving(manner) as server, client.send(server.url, ASK, {}) as answer:
            await until(lambda: manner.has_said_all)
            with pytest.raises(Broken):
                await body_of(answer)

    play(scene)


def test_a_kept_connection_that_was_slowed_down_listens_again(play: Play) -> None:
    async def scene(client: HttpClient) -> None:
        large = said(b"x" * 2 * MOST_BUFFERED_BYTES)
        async with serving(Says(large)) as server:
            for _ in range(3):
                async with client.send(server.url, ASK, {}) as answer:
                    await asyncio.sleep(0.05)
                    assert len(await body_of(answer)) == 2 * MOST_BUFFERED_BYTES
            assert len(server.peers) == 1
            await client.aclose()

    play(scene)
