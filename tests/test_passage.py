"""When something goes out to a caller that is put through, in virtual time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest
from starlette.types import Message

from gateway.departure import Interrupt
from gateway.dialects.tgi import Untouched
from gateway.engines.base import Call
from gateway.errors import GatewayError, GenerationFailed, StartFailed
from gateway.fleet.life import Lease
from gateway.passage import Passage, PutThrough, Whole
from gateway.writers import COMMENT
from tests.fleet.scenes import Scene, play
from tests.simulator.servers import Manners
from tests.test_writers import Wire

EVENT = b'data: {"index":1}\n\n'
END = b'data: {"index":2,"generated_text":"x"}\n\n'


class Said:
    """An answer whose pieces come at their moments, in seconds from its head."""

    retry_after_s = None

    def __init__(self, pieces: Mapping[float, bytes], status: int = 200, kind: str = "text/event-stream") -> None:
        self.status = status
        self.headers = {"content-type": kind}
        self._pieces = iter(pieces.items())
        self._began_at: float | None = None

    async def more(self) -> bytes:
        loop = asyncio.get_running_loop()
        self._began_at = loop.time() if self._began_at is None else self._began_at
        for when, piece in self._pieces:
            await asyncio.sleep(self._began_at + when - loop.time())
            return piece
        return b""


class Speaker:
    """A client whose server says the same to every call."""

    def __init__(self, said: Said) -> None:
        self._said = said

    @asynccontextmanager
    async def send(self, base_url: str, call: Call, headers: Mapping[str, str]) -> AsyncIterator[Said]:
        yield self._said


class Watched(Passage):
    """A passage to a server of the simulation, whose engine has no wire and whose witness wants to know of leases."""

    stage: Scene

    async def _under(self, lease: Lease, interrupt: Interrupt, *, streamed: bool) -> Whole | None:
        with self.stage.held(lease):
            return await super()._under(lease, interrupt, streamed=streamed)

    def call(self, secret: str) -> Call:
        return self._call

    def no_stream(self, whole: Whole) -> GatewayError:
        return super().no_stream(whole) if whole.status == 200 else GenerationFailed("refused")


async def waiting() -> Message:
    await asyncio.get_running_loop().create_future()
    raise AssertionError


async def answered(stage: Scene, said: Said, *, streamed: bool = True) -> Wire:
    """Return what was sent to a caller who asks now, and when."""
    wire = Wire()
    manner = Untouched(as_openai=False)
    passage = Watched(stage.instance, Call("/x"), Speaker(said), manner, streamed=streamed, request_id="1")
    passage.stage = stage
    await PutThrough(passage)({"type": "http"}, waiting, wire.send)
    return wire


def test_a_slow_cold_start_is_told_of_in_comments_and_then_the_stream_goes_on_as_it_is() -> None:
    async def scene() -> None:
        stage = Scene(Manners(make_s=5, load_s=30))
        wire = await answered(stage, Said({1: EVENT, 2: END[:5], 3: END[5:]}))

        assert wire.sent[0][1]["status"] == 200
        assert wire.bodies == [COMMENT] * 3 + [EVENT, END, b""]
        assert wire.sent[-1][1]["more_body"] is False

    play(scene)


def test_no_comment_comes_between_the_pieces_of_one_event_however_long_they_take() -> None:
    async def scene() -> None:
        stage = Scene(Manners(make_s=0.1, load_s=0.1))
        wire = await answered(stage, Said({1: EVENT[:-1], 40: EVENT[-1:], 55: END}))

        assert wire.bodies == [EVENT[:-1], EVENT[-1:], COMMENT, END, b""]

    play(scene)


def test_a_whole_answer_waits_for_a_cold_start_in_silence() -> None:
    async def scene() -> None:
        stage = Scene(Manners(make_s=5, load_s=40))
        wire = await answered(stage, Said({1: b"{}"}, kind="application/json"), streamed=False)

        assert wire.bodies == [b"{}"]
        assert dict(wire.sent[0][1]["headers"])[b"content-length"] == b"2"

    play(scene)


def test_a_start_that_fails_soon_has_a_status_of_its_own_and_a_late_one_an_event() -> None:
    async def scene() -> None:
        with pytest.raises(StartFailed):
            await answered(Scene(Manners(make_s=1, load_s=60, dies_loading_s=3)), Said({}))

        wire = await answered(Scene(Manners(make_s=1, load_s=60, dies_loading_s=30)), Said({}))
        *comments, last = wire.bodies
        assert set(comments) == {COMMENT}
        assert json.loads(last.removeprefix(b"data: "))["error_code"] == "START_FAILED"

    play(scene)


@pytest.mark.parametrize(("status", "code"), [(200, "UPSTREAM_FAILED"), (422, "GENERATION_FAILED")])
def test_an_answer_that_is_no_stream_becomes_an_event_once_a_status_has_gone_out(status: int, code: str) -> None:
    async def scene() -> None:
        stage = Scene(Manners(make_s=5, load_s=30))
        said = Said({0.1: b'{"error":"no"}'}, status, "application/json")
        wire = await answered(stage, said)

        *comments, last = wire.bodies
        assert set(comments) == {COMMENT}
        assert json.loads(last.removeprefix(b"data: "))["error_code"] == code
        assert [message.get("status") for _, message in wire.sent].count(200) == 1

    play(scene)


def test_a_refusal_that_comes_soon_keeps_its_status_and_bytes() -> None:
    async def scene() -> None:
        stage = Scene(Manners(make_s=1, load_s=1))
        wire = await answered(stage, Said({0.1: b"no", 0.2: b"!"}, 422, "text/plain"))

        assert wire.sent[0][1]["status"] == 422
        assert wire.bodies == [b"no!"]

    play(scene)
