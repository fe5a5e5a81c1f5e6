"""When something goes out to the caller, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from starlette.types import Message

from gateway.departure import Departed, interruptible, until_departure
from gateway.dialects.native import NativeReply, to_request
from gateway.errors import GenerationFailed, QueueFull
from gateway.generation import Finished, TokenEvent
from gateway.writers import COMMENT, LAST_WORDS_S, Alone, Stream, StreamWriter
from tests.dialects.test_native import body
from tests.fleet.scenes import spec
from tests.simulator.loop import SimulatedLoop


def play(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(loop_factory=lambda: SimulatedLoop(0)) as runner:
        runner.run(scene())


class Wire:
    """What was sent, and when."""

    def __init__(self, *, blocked: bool = False) -> None:
        self.sent: list[tuple[float, Message]] = []
        self._blocked = blocked

    async def send(self, message: Message) -> None:
        self.sent.append((asyncio.get_running_loop().time(), message))
        if self._blocked and message["type"] == "http.response.body":
            await asyncio.get_running_loop().create_future()

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for _, message in self.sent if message["type"] == "http.response.body"]


def writer(wire: Wire) -> StreamWriter:
    asked = body(stream=True)
    return StreamWriter(Alone(NativeReply(spec(), asked, to_request(spec(), asked))), wire.send)


def test_a_failure_before_the_first_event_keeps_its_status() -> None:
    async def scene() -> None:
        wire = Wire()
        with writer(wire) as stream:
            await asyncio.sleep(9)
            with pytest.raises(QueueFull):
                await stream.fail(QueueFull("full"))

        assert wire.sent == []

    play(scene)


def test_the_status_goes_out_after_ten_seconds_of_silence_with_comments_from_then_on() -> None:
    async def scene() -> None:
        wire = Wire()
        with writer(wire) as stream:
            await asyncio.sleep(25)
            await stream.part(0).take([TokenEvent(1, "x")])
            await asyncio.sleep(11)
            await stream.fail(GenerationFailed("broke"))
        times = [round(when) for when, _ in wire.sent]

        assert times == [10, 10, 20, 25, 35, 36]
        assert wire.sent[0][1]["status"] == 200
        assert [piece == COMMENT for piece in wire.bodies] == [True, True, False, True, False]
        assert b"GENERATION_FAILED" in wire.bodies[-1]
        assert wire.sent[-1][1]["more_body"] is False

    play(scene)


def test_tokens_that_come_at_once_go_out_at_once_and_the_last_one_is_part_of_the_end() -> None:
    async def scene() -> None:
        wire, same = Wire(), TokenEvent(None, "x")
        with writer(wire) as stream:
            await stream.part(0).take([same, same, same], last=True)
            await stream.finish([Finished("eos", 3, 3)])

        assert [body.count(b"data:") for body in wire.bodies] == [2, 1]
        assert b'"generated_text":"xxx"' in wire.bodies[1]

    play(scene)


def test_nothing_goes_out_any_more_once_the_exchange_is_over() -> None:
    async def scene() -> None:
        wire = Wire()
        with writer(wire) as stream:
            await stream.part(0).take([TokenEvent(1, "x")])
            await stream.finish([Finished("eos", 1, 3)])
        sent = len(wire.sent)
        await asyncio.sleep(60)

        assert len(wire.sent) == sent
        assert asyncio.all_tasks() == {asyncio.current_task()}

    play(scene)


def test_a_caller_who_does_not_read_is_not_told_for_ever() -> None:
    async def scene() -> None:
        wire = Wire()
        stream = writer(wire)
        with stream:
            await stream.part(0).take([TokenEvent(1, "x")])
            wire._blocked = True
            began = asyncio.get_running_loop().time()
            await stream.fail(GenerationFailed("broke"))

            assert asyncio.get_running_loop().time() - began == LAST_WORDS_S

    play(scene)


def test_no_comment_goes_out_within_an_event_and_an_error_gets_one_of_its_own() -> None:
    async def scene() -> None:
        wire = Wire()
        with Stream(wire.send) as stream:
            await stream.write(b'data: {"half":')
            await asyncio.sleep(25)
            await stream.fail(GenerationFailed("broke"), b"data: {}\n\n")

        assert wire.bodies == [b'data: {"half":', b"\n\ndata: {}\n\n"]

    play(scene)


@pytest.mark.parametrize("event", [b"data: x\n\n", b"data: x\r\n\r\n"])
def test_comments_go_out_after_an_event_with_either_kind_of_line_ends(event: bytes) -> None:
    async def scene() -> None:
        wire = Wire()
        with Stream(wire.send) as stream:
            for at in range(len(event)):
                await stream.write(event[at : at + 1])
            await asyncio.sleep(25)

        assert b"".join(wire.bodies) == event + COMMENT * 2

    play(scene)


def test_a_comment_that_waited_for_its_turn_does_not_go_out_within_an_event() -> None:
    async def scene() -> None:
        bodies: list[bytes] = []

        async def slowly(message: Message) -> None:
            await asyncio.sleep(30 if message.get("body") == b"data: 1\n\n" else 0)
            bodies.append(message.get("body", b""))

        with Stream(slowly) as stream:
            first = asyncio.create_task(stream.write(b"data: 1\n\n"))
            await asyncio.sleep(5)
            await stream.write(b'data: {"half":')  # both wait for the first; the comment from 15 s on
            await first
            await asyncio.sleep(3)
            await stream.write(b"1}\n\n")
            await asyncio.sleep(12)

        assert bodies[1:] == [b"data: 1\n\n", b'data: {"half":', b"1}\n\n", COMMENT]

    play(scene)


def test_writes_of_several_never_go_out_before_the_status() -> None:
    async def scene() -> None:
        sent: list[str] = []

        async def slowly(message: Message) -> None:
            await asyncio.sleep(1)
            sent.append(message["type"])

        with Stream(slowly) as stream:
            await asyncio.gather(*(stream.write(b"data: x\n\n") for _ in range(3)))

        assert sent == ["http.response.start"] + ["http.response.body"] * 3

    play(scene)


def test_an_interrupt_raises_its_reason_and_only_the_first() -> None:
    async def scene() -> None:
        async def work() -> None:
            loop = asyncio.get_running_loop()
            with interruptible() as interrupt:
                loop.call_later(1, interrupt.fire, GenerationFailed("first"))
                loop.call_later(1, interrupt.fire, GenerationFailed("second"))
                await asyncio.sleep(5)

        with pytest.raises(GenerationFailed, match="first"):
            await work()
        await asyncio.sleep(1)  # and the task goes on as if nothing had been

    play(scene)


def test_an_interrupt_that_comes_too_late_does_nothing() -> None:
    async def scene() -> None:
        with interruptible() as interrupt:
            pass
        asyncio.get_running_loop().call_soon(interrupt.fire, GenerationFailed("too late"))
        await asyncio.sleep(1)

    play(scene)


def test_a_cancellation_from_elsewhere_stays_one() -> None:
    async def scene() -> None:
        async def work() -> None:
            with interruptible() as interrupt:
                asyncio.get_running_loop().call_soon(interrupt.fire, GenerationFailed("ours"))
                await asyncio.sleep(5)

        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

        assert task.cancelled()

    play(scene)


def test_a_departure_ends_what_is_inside() -> None:
    async def scene() -> None:
        async def receive() -> Message:
            await asyncio.sleep(3)
            return {"type": "http.disconnect"}

        async def work() -> None:
            with until_departure({}, receive):
                await asyncio.sleep(60)

        with pytest.raises(Departed):
            await work()
        assert asyncio.get_running_loop().time() == 3
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    play(scene)
