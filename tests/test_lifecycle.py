"""Every (state, event) pair: in the table, or illegal."""

import itertools

import pytest

from gateway.lifecycle import DOWN, MADE, RUNNING, SERVING, STARTING_UP, TRANSITIONS, Event, IllegalMove, State, after

PAIRS = list(itertools.product(State, Event))


@pytest.mark.parametrize(("state", "event"), PAIRS)
def test_a_move_is_in_the_table_or_raises(state: State, event: Event) -> None:
    if event in TRANSITIONS[state]:
        assert after(state, event) is TRANSITIONS[state][event]
    else:
        with pytest.raises(IllegalMove, match=f"{event.name} is not possible while {state}"):
            after(state, event)


def test_every_way_down_leads_through_stopping_unless_the_server_is_left_running() -> None:
    into_down = {(state, event) for state, moves in TRANSITIONS.items() for event, to in moves.items() if to in DOWN}

    assert {state for state, event in into_down if event is not Event.KEEP} == {State.STOPPING}
    assert {state for state, event in into_down if event is Event.KEEP} == MADE | {State.DRAINING}


def test_stop_and_fail_are_possible_wherever_something_may_run() -> None:
    for state in STARTING_UP | RUNNING:
        assert TRANSITIONS[state][Event.STOP] is State.STOPPING
        assert TRANSITIONS[state][Event.FAIL] is State.STOPPING


def test_a_draining_server_comes_back_to_no_other_state() -> None:
    assert set(TRANSITIONS[State.DRAINING].values()) == {State.DRAINING, State.STOPPING, State.STOPPED}


def test_every_state_can_be_reached_and_left() -> None:
    reached = {to for moves in TRANSITIONS.values() for to in moves.values()}

    assert reached == set(State)
    assert all(TRANSITIONS[state] for state in State)


def test_the_groups_of_states() -> None:
    assert SERVING < RUNNING
    assert not DOWN & (STARTING_UP | RUNNING)
