"""How long a body may take to come, and how large it may be: in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from gateway.api.body_limit import BODY_PIECE_S, BODY_S, LOOK_S, BodyLimit, at_once_or
from gateway.errors import BodyTimeout, BodyTooLarge, GatewayError
from tests.simulator.loop import SimulatedLoop

MOST_BYTES = 10
HALF: Message = {"type": "http.request", "body": b"1", "more_body": True}
REST: Message = {"type": "http.request", "body": b"2", "more_body": False}
LEFT: Message = {"type": "http.disconnect"}


class Caller:
    """Sends messages, each a while after the one before; then it is silent."""

    def __init__(self, *messages: tuple[float, Message]) -> None:
        self._messages = list(messages)

    async def receive(self) -> Message:
        if not self._messages:
            await asyncio.Event().wait()
        after_s, message = self._messages.pop(0)
        if after_s:
            await asyncio.sleep(after_s)
        return message


class Gateway:
    """The limit before an application that reads a body, and then waits for its caller to leave."""

    def __init__(self) -> None:
        self.closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.read = b""
        self.limited = BodyLimit(self._read, MOST_BYTES, lambda: self.closing)

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = HALF
        while message.get("more_body", False):
            message = await receive()
            self.read += message.get("body", b"")
        assert await receive() == LEFT

    async def ask(self, caller: Caller, *headers: tuple[bytes, bytes]) -> list[Message]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        await self.limited({"type": "http", "path": "/generate", "headers": headers}, caller.receive, send)
        return sent


def played(scene: Callable[[], Coroutine[Any, Any, None]]) -> SimulatedLoop:
    """Return the loop after the scene, and after all that it has left to be done."""
    loop = SimulatedLoop(seed=1)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(scene())
        over_at = loop.time()
        runner.run(asyncio.sleep(10 * LOOK_S))
        assert loop.timers() == []
        loop.now = over_at
    return loop


async def fails(asked: Awaitable[Any], kind: type[GatewayError]) -> float:
    """Return when it failed."""
    with pytest.raises(kind):
        await asked
    return asyncio.get_running_loop().time()


def test_a_body_may_take_its_time_and_its_caller_may_stay_for_ever() -> None:
    async def scene() -> None:
        gateway = Gateway()
        await gateway.ask(Caller((0, HALF), (BODY_PIECE_S - 1, HALF), (BODY_PIECE_S - 1, REST), (10 * BODY_S, LEFT)))
        assert gateway.read == b"112"

    played(scene)


def test_a_piece_that_does_not_come_is_given_up() -> None:
    async def scene() -> None:
        for so_far in ([], [(0.0, HALF)]):
            began_at = asyncio.get_running_loop().time()
            failed_at = await fails(Gateway().ask(Caller(*so_far)), BodyTimeout)
            assert BODY_PIECE_S <= failed_at - began_at <= BODY_PIECE_S + LOOK_S

    played(scene)


def test_a_body_that_comes_drop_by_drop_is_given_up() -> None:
    async def scene() -> None:
        drops: list[tuple[float, Message]] = [(BODY_PIECE_S - 1, HALF)] * 9
        assert BODY_S <= await fails(Gateway().ask(Caller(*drops)), BodyTimeout) <= BODY_S + LOOK_S

    played(scene)


def test_each_of_many_bodies_has_its_own_time() -> None:
    async def scene() -> None:
        gateway = Gateway()

        async def late(after_s: float) -> float:
            await asyncio.sleep(after_s)
            return await fails(gateway.ask(Caller((0, HALF))), BodyTimeout) - after_s

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(gateway.ask(Caller((BODY_PIECE_S - 1, REST), (BODY_S, LEFT))))
            others = [tasks.create_task(late(after_s)) for after_s in (0.0, 0.3, 4.2, 9.9)]
        assert all(BODY_PIECE_S <= other.result() <= BODY_PIECE_S + LOOK_S for other in others)

    played(scene)


def test_bodies_that_are_awaited_are_refused_at_once_when_the_gateway_closes() -> None:
    async def scene() -> None:
        gateway = Gateway()
        async with asyncio.TaskGroup() as tasks:
            waiting = [tasks.create_task(fails(gateway.ask(Caller((0, HALF))), GatewayError)) for _ in range(3)]
            here = tasks.create_task(gateway.ask(Caller((0, REST), (20, LEFT))))
            await asyncio.sleep(2)
            gateway.closing.set_result(None)
        assert [each.result() for each in waiting] == [2.0] * 3
        assert here.result() == []

    played(scene)


def test_while_the_gateway_closes_only_a_body_that_is_there_is_taken() -> None:
    async def scene() -> None:
        gateway = Gateway()
        gateway.closing.set_result(None)
        assert await gateway.ask(Caller((0, HALF), (0, REST), (20, LEFT))) == []
        assert await fails(gateway.ask(Caller((0, HALF), (1, REST))), GatewayError) == 20.0

    played(scene)


def test_what_is_cancelled_while_a_body_is_awaited_is_cancelled() -> None:
    async def scene() -> None:
        asked = asyncio.create_task(Gateway().ask(Caller()))
        await asyncio.sleep(1)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked

    played(scene)


def test_a_body_that_is_too_large_is_refused() -> None:
    async def scene() -> None:
        large = (0.0, {**HALF, "body": b"1" * 6})
        await fails(Gateway().ask(Caller(large, large)), BodyTooLarge)

        gateway = Gateway()
        [start, _] = await gateway.ask(Caller(), (b"content-length", b"%d" % (MOST_BYTES + 1)))
        assert (start["status"], gateway.read) == (413, b"")
        assert (b"connection", b"close") in start["headers"]

        for fine in (b"%d" % MOST_BYTES, b"many", b""):
            assert await gateway.ask(Caller((0, REST), (0, LEFT)), (b"content-length", fine)) == []

    played(scene)


# ---- what need not be waited for, mostly ----


class Ledger:
    """Makes contexts, and counts those who are inside."""

    def __init__(self) -> None:
        self.inside = 0
        self.entered = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.inside += 1
        self.entered += 1
        try:
            yield
        finally:
            self.inside -= 1


async def after(*waits_s: float, fails: bool = False) -> str:
    for wait_s in waits_s:
        await asyncio.sleep(wait_s)
    if fails:
        raise KeyError("failed")
    return "done"


@pytest.mark.parametrize(("waits_s", "entered"), [((), 0), ((1,), 1), ((1, 2, 3), 1)])
def test_what_is_there_is_not_waited_for_and_what_is_not_is_waited_for_in_one_context(
    waits_s: tuple[float, ...], entered: int
) -> None:
    async def scene() -> None:
        ledger = Ledger()

        assert await at_once_or(after(*waits_s), ledger.waiting) == "done"
        assert asyncio.get_running_loop().time() == sum(waits_s)
        assert (ledger.entered, ledger.inside) == (entered, 0)

    played(scene)


@pytest.mark.parametrize("waits_s", [(), (1, 2)])
def test_what_fails_at_once_or_later_fails_as_it_is(waits_s: tuple[float, ...]) -> None:
    async def scene() -> None:
        ledger = Ledger()
        with pytest.raises(KeyError, match="failed"):
            await at_once_or(after(*waits_s, fails=True), ledger.waiting)

        assert ledger.inside == 0

    played(scene)


def test_a_cancel_reaches_what_is_waited_for_and_leaves_the_context() -> None:
    async def scene() -> None:
        ledger, ended = Ledger(), []

        async def stubborn() -> str:
            try:
                return await after(60)
            except asyncio.CancelledError:
                ended.append(asyncio.get_running_loop().time())
                await after(1)  # it may even wait once more
                raise

        task = asyncio.ensure_future(at_once_or(stubborn(), ledger.waiting))
        await asyncio.sleep(5)
        task.cancel()
        await asyncio.wait([task])

        assert task.cancelled()
        assert (ended, asyncio.get_running_loop().time()) == ([5], 6)
        assert (ledger.entered, ledger.inside) == (1, 0)

    played(scene)
