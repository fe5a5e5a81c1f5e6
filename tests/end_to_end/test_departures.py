"""A caller that leaves, by whatever address, in whatever phase and however, leaves nothing behind (promise P10).

How soon is measured by `scripts/bench`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

from tests.end_to_end.addresses import ADDRESSES, STREAMS, Address, Caller
from tests.end_to_end.departures import AT_THE_ENGINE, ENDLESS, TOKENS, Phase, Scene, id_of, scene
from tests.runtimes.processes import wait_until

Leaving = Callable[[Caller], None]

by_every_address = pytest.mark.parametrize("address", ADDRESSES, ids=lambda address: address.name)
however = pytest.mark.parametrize("leave", [Caller.close, Caller.reset, Caller.say_no_more])


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("departures")) as running:
        yield running


@by_every_address
@pytest.mark.parametrize("phase", AT_THE_ENGINE)
@however
def test_the_engines_connection_is_closed_and_the_lease_given_back(
    stage: Scene, address: Address, phase: Phase, leave: Leaving
) -> None:
    begun, aborted = stage.begun(phase), stage.aborted(phase)
    caller = stage.caller(phase, address)
    assert stage.in_flight(phase) == address.asks
    leave(caller)

    wait_until(lambda: stage.aborted(phase) == aborted + address.asks)
    wait_until(lambda: stage.in_flight(phase) == 0)
    assert stage.begun(phase) == begun + address.asks  # and it was not asked again
    caller.close()


@by_every_address
@however
def test_who_leaves_the_queue_is_never_sent_to_the_engine(stage: Scene, address: Address, leave: Leaving) -> None:
    begun = stage.begun("queued")
    with stage.place_taken():
        caller = stage.caller("queued", address)
        leave(caller)
        wait_until(lambda: stage.queued("queued") == 0)
    caller.close()
    with stage.place_taken():  # whoever had been in the queue would be before this one
        assert stage.begun("queued") == begun + 2


@by_every_address
@however
def test_who_leaves_while_the_model_loads_is_never_sent_to_the_engine(
    stage: Scene, address: Address, leave: Leaving
) -> None:
    caller = stage.caller("loading", address)
    leave(caller)

    wait_until(lambda: stage.queued("loading") == 0)
    assert stage.model("loading")["state"] == "loading"
    assert stage.begun("loading") == 0
    caller.close()


def test_who_only_says_no_more_is_told_so_by_the_end_of_the_connection(stage: Scene) -> None:
    """As most servers do, uvicorn takes a half-closed connection for one that is closed."""
    caller = stage.caller("amid the answer", ADDRESSES[0])
    caller.say_no_more()
    caller.hear_all()
    caller.close()

    assert caller.heard == b""


GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
AHEAD = {"one": GET, "several": GET * 3, "half of one": GET[:20], "an empty line": b"\r\n"}


@pytest.mark.parametrize("phase", AT_THE_ENGINE)
@pytest.mark.parametrize("ahead", AHEAD.values(), ids=AHEAD)
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("address", [ADDRESSES[0], STREAMS[0]], ids=["whole", "streamed"])
def test_who_has_sent_the_next_request_already_has_left_all_the_same(
    stage: Scene, phase: Phase, ahead: bytes, at_once: bool, address: Address
) -> None:
    begun, aborted = stage.begun(phase), stage.aborted(phase)
    request = address.request(id_of(phase), ENDLESS, TOKENS)
    caller = Caller(stage.gateway.port, request + ahead if at_once else request)
    wait_until(lambda: stage.begun(phase) == begun + 1)
    if not at_once:
        caller.say(ahead)
    caller.close()

    wait_until(lambda: stage.aborted(phase) == aborted + 1)
    wait_until(lambda: stage.in_flight(phase) == 0)
    assert stage.begun(phase) == begun + 1


@pytest.mark.parametrize("pieces", [1, 2, 7, 100])
def test_requests_that_come_ahead_are_answered_in_their_order(stage: Scene, pieces: int) -> None:
    wrong = [b'{"prompt": "", "n": %d}' % number for number in range(3)]
    head = (
        b"POST /generate HTTP/1.1\r\nHost: x\r\nX-Request-ID: id-%d\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
    )
    posts = [head % (number, len(body), body) for number, body in enumerate(wrong)]
    last = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Request-ID: id-3\r\nConnection: close\r\n\r\n"
    everything = b"".join([*posts, last])
    cut = -(-len(everything) // pieces)
    caller = Caller(stage.gateway.port, b"")
    for start in range(0, len(everything), cut):
        caller.say(everything[start : start + cut])
    caller.hear_all()
    caller.close()

    assert re.findall(rb"HTTP/1.1 (\d+)", caller.heard) == [b"400", b"400", b"400", b"200"]
    assert re.findall(rb"x-request-id: id-(\d)", caller.heard) == [b"0", b"1", b"2", b"3"]
