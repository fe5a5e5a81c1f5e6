"""The states of a model instance, and the only moves between them.

Whatever decides "may this happen now?" lives here; nothing here waits, logs or does I/O.
Every way down leads through STOPPING, where leftovers are removed, but for the one that leaves a server
running when the gateway goes. A STOPPED model has nothing that this gateway runs. A FAILED one has nothing
that is *known* to run: if the runtime could not be asked, the next start clears what may be left before it
makes anything new.
"""

from __future__ import annotations

from enum import StrEnum, auto


class State(StrEnum):
    STOPPED = auto()  # nothing exists
    STARTING = auto()  # the runtime is making the server: pulling, creating, placing
    LOADING = auto()  # the server exists and does not pass its readiness check yet
    READY = auto()  # it takes requests
    UNHEALTHY = auto()  # it exists and has missed too many checks in a row
    DRAINING = auto()  # it is to go: no new leases, the old ones finish
    STOPPING = auto()  # it is being removed
    FAILED = auto()  # nothing is known to run, and the last life ended in an error


class Event(StrEnum):
    START = auto()  # somebody wants the model
    ADOPT = auto()  # a server of an earlier life of the gateway was found
    LAUNCHED = auto()  # the runtime has made its server
    PASS = auto()  # a health check passed
    LOSE = auto()  # too many health checks in a row were missed
    DRAIN = auto()  # it shall go when its last request has ended
    STOP = auto()  # it shall go now
    FAIL = auto()  # its life ended in an error
    KEEP = auto()  # the gateway goes, and leaves the server running for the next one to adopt
    CLEARED = auto()  # nothing is left of a life that was stopped
    GAVE_UP = auto()  # what could be cleared of a life that failed is cleared


_DOWN = {Event.STOP: State.STOPPING, Event.FAIL: State.STOPPING}
_MADE = {**_DOWN, Event.KEEP: State.STOPPED}

TRANSITIONS: dict[State, dict[Event, State]] = {
    State.STOPPED: {Event.START: State.STARTING, Event.ADOPT: State.LOADING},
    State.STARTING: {Event.LAUNCHED: State.LOADING, **_DOWN},
    State.LOADING: {Event.PASS: State.READY, **_MADE},
    State.READY: {Event.LOSE: State.UNHEALTHY, Event.DRAIN: State.DRAINING, **_MADE},
    State.UNHEALTHY: {Event.PASS: State.READY, Event.DRAIN: State.DRAINING, **_MADE},
    # A draining server is on its way out whatever its checks say: they no longer move it.
    State.DRAINING: {Event.PASS: State.DRAINING, Event.LOSE: State.DRAINING, **_MADE},
    State.STOPPING: {Event.CLEARED: State.STOPPED, Event.GAVE_UP: State.FAILED},
    State.FAILED: {Event.START: State.STARTING, Event.STOP: State.STOPPING},  # what may be left of it is cleared
}

DOWN = frozenset({State.STOPPED, State.FAILED})
STARTING_UP = frozenset({State.STARTING, State.LOADING})
SERVING = frozenset({State.READY, State.UNHEALTHY})
MADE = frozenset({State.LOADING, *SERVING})
RUNNING = frozenset({State.READY, State.UNHEALTHY, State.DRAINING})


class IllegalMove(RuntimeError):
    """The code tried a move that the table lacks: a bug of ours, never a caller's mistake."""


def after(state: State, event: Event) -> State:
    """Return the state that `event` leads to from `state`.

    Raises:
        IllegalMove: the table has no such move.
    """
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalMove(f"{event.name} is not possible while {state}") from None
