"""A caller's departure, as the server tells of it: to whoever works for him, at once, and to nobody else."""

from __future__ import annotations

import asyncio
import socket

import pytest
from starlette.types import Message, Receive, Scope, Send

from gateway.departure import Departed, Departure, until_departure
from tests.test_connection import serving

BOUND_S = 10.0
REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n1"


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
    """An application that works until its caller leaves, and notes what becomes of each request."""

    def __init__(self) -> None:
        self.at_work = asyncio.Event()
        self.left = asyncio.Event()
        self.listened = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted() -> Message:
            self.listened += 1
            return await receive()

        await receive()
        self.at_work.set()
        try:
            with until_departure(scope, counted):
                await asyncio.sleep(BOUND_S)
        except Departed:
            self.left.set()


@pytest.mark.parametrize("reset", [False, True])
def test_the_server_tells_of_a_lost_connection_without_anybody_listening(reset: bool) -> None:
    async def scene() -> None:
        app = Worker()
        async with serving(app) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(REQUEST)
            async with asyncio.timeout(BOUND_S):
                await app.at_work.wait()
                if reset:
                    linger = b"\1\0\0\0\0\0\0\0"
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.close()
                await app.left.wait()
        assert app.listened == 0

    asyncio.run(scene())
