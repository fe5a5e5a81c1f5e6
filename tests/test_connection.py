"""What a caller's connection does beyond what uvicorn's does: heads go out with what follows them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from gateway.connection import LARGE_BYTES, CallersConnection, Joining

BOUND_S = 10.0
HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


class Wire(asyncio.Transport):
    """A transport that keeps what is written, piece by piece."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.ended = ""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.pieces.append(bytes(data))

    def close(self) -> None:
        self.ended = "closed"

    def abort(self) -> None:
        self.ended = "aborted"

    def is_closing(self) -> bool:
        return bool(self.ended)

    def get_write_buffer_size(self) -> int:
        return 1000


def written(act: Callable[[Joining], None]) -> Wire:
    """Return what has gone out after `act`, and one round of the loop."""

    async def scene() -> Wire:
        wire = Wire()
        act(Joining(wire, asyncio.get_running_loop()))
        await asyncio.sleep(0)
        return wire

    return asyncio.run(scene())


def write(*pieces: bytes) -> Callable[[Joining], None]:
    def act(joining: Joining) -> None:
        for piece in pieces:
            joining.write(piece)

    return act


@pytest.mark.parametrize(
    ("pieces", "sent"),
    [
        ((HEAD, b"body"), [HEAD + b"body"]),
        ((HEAD, b"one", b"two"), [HEAD + b"one", b"two"]),
        ((HEAD,), [HEAD]),
        ((b"HTTP/1.1 100 Continue\r\n\r\n", HEAD, b"body"), [b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD, b"body"]),
        ((b"body",), [b"body"]),
        ((HEAD, b"body", HEAD, b"next"), [HEAD + b"body", HEAD + b"next"]),
        ((HEAD, b""), [HEAD]),
        ((HEAD, b"x" * LARGE_BYTES), [HEAD + b"x" * LARGE_BYTES]),
        ((HEAD, b"x" * (LARGE_BYTES + 1)), [HEAD, b"x" * (LARGE_BYTES + 1)]),
    ],
)
def test_all_that_is_written_goes_out_in_its_order_and_a_head_with_what_follows(
    pieces: tuple[bytes, ...], sent: list[bytes]
) -> None:
    assert written(write(*pieces)).pieces == sent


def test_a_head_waits_for_one_round_of_the_loop_at_most() -> None:
    async def scene() -> None:
        wire = Wire()
        joining = Joining(wire, asyncio.get_running_loop())
        joining.write(HEAD)
        assert (wire.pieces, joining.get_write_buffer_size()) == ([], 1000 + len(HEAD))
        await asyncio.sleep(0)
        assert (wire.pieces, joining.get_write_buffer_size()) == ([HEAD], 1000)
        joining.write(b"late")
        assert wire.pieces == [HEAD, b"late"]

    asyncio.run(scene())


def test_who_closes_sends_the_head_first_and_who_aborts_does_not() -> None:
    def close(joining: Joining) -> None:
        joining.write(HEAD)
        joining.close()

    def abort(joining: Joining) -> None:
        joining.write(HEAD)
        joining.abort()

    assert (written(close).pieces, written(close).ended) == ([HEAD], "closed")
    assert (written(abort).pieces, written(abort).ended) == ([], "aborted")


def test_a_head_whose_caller_has_gone_meanwhile_is_not_written() -> None:
    async def scene() -> None:
        wire = Wire()
        joining = Joining(wire, asyncio.get_running_loop())
        joining.write(HEAD)
        wire.abort()
        await asyncio.sleep(0)
        assert wire.pieces == []

    asyncio.run(scene())


@asynccontextmanager
async def serving(app: Callable[[Scope, Receive, Send], object]) -> AsyncIterator[int]:
    config = uvicorn.Config(app, http=CallersConnection, port=0, lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


def test_a_caller_gets_the_head_of_a_stream_before_its_first_piece_is_there() -> None:
    async def scene() -> None:
        goes_on = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await goes_on.wait()
            await send({"type": "http.response.body", "body": b"piece"})

        async with serving(app) as port, asyncio.timeout(BOUND_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            goes_on.set()
            rest = await reader.read()
            writer.close()
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"piece" in rest

    asyncio.run(scene())


def test_an_answer_that_is_there_at_once_comes_in_one_piece() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"body"})

    async def scene() -> None:
        async with serving(app) as port, asyncio.timeout(BOUND_S):
            loop, came = asyncio.get_running_loop(), []

            class Caller(asyncio.Protocol):
                def data_received(self, data: bytes) -> None:
                    came.append(data)
                    ended.set()

            ended = asyncio.Event()
            transport, _ = await loop.create_connection(Caller, "127.0.0.1", port)
            transport.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await ended.wait()
            transport.close()
        assert len(came) == 1
        assert came[0].endswith(b"\r\n\r\nbody")

    asyncio.run(scene())
