"""A caller that leaves, by whatever address, in whatever phase and however, leaves nothing behind (promise P10).

How soon is measured by `scripts/bench`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.end_to_end.addresses import EVERY, Address, Caller
from tests.end_to_end.departures import AT_THE_ENGINE, Phase, Scene, scene
from tests.runtimes.processes import wait_until

Leaving = Callable[[Caller], None]

by_every_address = pytest.mark.parametrize("address", EVERY, ids=lambda address: address.name)
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
    assert stage.begun(phase) == begun + address.asks * address.counted  # and it was not asked again
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
        pass

    wait_until(lambda: stage.begun("queued") == begun + 2)


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
    caller = stage.caller("amid the answer", EVERY[0])
    caller.say_no_more()
    caller.hear_all()
    caller.close()

    assert caller.heard == b""
