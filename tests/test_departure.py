"""A caller's departure, as the server tells of it: to whoever works for him, at once, and to nobody else."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop
from starlette.types import Message, Receive, Scope, Send

from gateway.departure import Departed, Departure, until_departure, until_disconnect
from tests.test_connection import serving

BOUND_S = 10.0


async def never() -> Message:
    """Be a caller of whom the server says nothing more by `receive`."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError


def test_whoever_works_for_a_caller_is_told_once_and_only_while_he_does() -> None:
    async def scene() -> None:
        departure, ended = Departure(), []
        scope = {"type": "http", "state": {Departure.KEY: departure}}

        async def work(seconds: float) -> None:
            try:
                with until_departure(scope, never):
                    await asyncio.sleep(seconds)
            except Departed:
                ended.append(seconds)

        with until_departure(scope, never):
            pass  # it is over before he goes
        tasks = [asyncio.create_task(work(60)), asyncio.create_task(work(61))]
        await asyncio.sleep(0)
        departure.comes()
        await asyncio.wait(tasks)

        assert ended == [60, 61]
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scene())


def test_who_begins_after_the_departure_is_told_too() -> None:
    async def scene() -> None:
        departure = Departure()
        departure.comes()
        with pytest.raises(Departed), until_departure({"state": {Departure.KEY: departure}}, never):
            await asyncio.sleep(60)

    asyncio.run(scene())


def test_of_two_reasons_to_end_the_first_one_counts() -> None:
    async def work(departure: Departure) -> None:
        with until_departure({"state": {Departure.KEY: departure}}, never) as interrupt:
            asyncio.get_running_loop().call_soon(interrupt.fire, KeyError("first"))
            asyncio.get_running_loop().call_soon(departure.comes)
            await asyncio.sleep(60)

    with pytest.raises(KeyError, match="first"):
        asyncio.run(work(Departure()))


class Worker:
    """An application that reads a request, works until its caller leaves, and notes what becomes of it."""

    def __init__(self) -> None:
        self.began = 0
        self.has_heard = asyncio.Event()
        self.at_work = asyncio.Event()
        self.left = asyncio.Event()
        self.listened = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted() -> Message:
            self.listened += 1
            return await receive()

        self.began += 1
        while (await receive()).get("more_body", False):
            self.has_heard.set()
        self.has_heard.set()
        self.at_work.set()
        try:
            with until_departure(scope, counted):
                await asyncio.sleep(BOUND_S)
        except Departed:
            self.left.set()


def request(size: int) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + b"1" * size


def goes(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    if reset:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.close()


LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]
by_every_loop = pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "uvloop"])
however = pytest.mark.parametrize("reset", [False, True], ids=["closes", "resets"])


def play(scene: Callable[[], Coroutine[Any, Any, None]], loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scene())


@by_every_loop
@however
@pytest.mark.parametrize("size", [1, 300_000])
def test_the_server_tells_of_a_lost_connection_without_anybody_listening(
    size: int, reset: bool, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def scene() -> None:
        app = Worker()
        async with serving(app) as port, asyncio.timeout(BOUND_S):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            sent = request(size)
            writer.write(sent[:60])
            await app.has_heard.wait()
            writer.write(sent[60:])
            await app.at_work.wait()
            goes(writer, reset=reset)
            await app.left.wait()
        assert app.listened == 0

    play(scene, loop)


@by_every_loop
@however
def test_of_requests_that_came_at_once_the_first_hears_of_the_departure_and_no_other_begins(
    reset: bool, loop: Callable[[], asyncio.AbstractEventLoop], caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        app = Worker()
        async with serving(app) as port, asyncio.timeout(BOUND_S):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request(1) * 3)
            await app.at_work.wait()
            goes(writer, reset=reset)
            await app.left.wait()
        assert app.began == 1

    play(scene, loop)
    assert caplog.messages == []  # nobody is told of a fault that is none


@by_every_loop
@however
def test_who_has_not_read_the_body_hears_of_the_departure_too(
    reset: bool, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    class Indifferent(Worker):
        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            self.at_work.set()
            try:
                with until_disconnect(receive):
                    await asyncio.sleep(BOUND_S)
            except Departed:
                self.left.set()

    async def scene() -> None:
        app = Indifferent()
        async with serving(app) as port, asyncio.timeout(BOUND_S):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request(1_000_000))
            await app.at_work.wait()
            goes(writer, reset=reset)
            await app.left.wait()

    play(scene, loop)
