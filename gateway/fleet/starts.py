"""What the journal tells of starts and stops, in words that are few: what began, how it ended, and how long it took.

The journal speaks to people, and what it says may name anything. Here each reason and phase becomes one of a table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.fleet.journal import Entry
from gateway.lifecycle import STARTING_UP, State

PHASES = {
    "waiting for GPUs": "placing",
    "verifying": "verifying",
    "pulling": "pulling",
    "extracting": "extracting",
    "downloading": "downloading",
    "converting": "converting",
    "loading": "loading",
    "warming up": "warming_up",
    "starting": "starting",
    "ready": "starting",
}
"""The phases of a start, by what its progress says. What is `waiting` was frozen from outside; all else is `other`."""
RESULTS = {
    "START_TIMEOUT": "timeout",
    "NO_CAPACITY": "no_capacity",
    "RUNTIME_UNAVAILABLE": "runtime_unavailable",
}
"""How a start ended, by the code of its error; `failed` for all others. Without an error it was `called_off`."""
REASONS = (
    ("idle", "idle"),
    ("makes room for ", "makes_room"),
    ("operator", "operator"),
    ("restart", "restart"),
    ("shutdown", "shutdown"),
    ("the catalog ", "catalog"),
    ("changed in the catalog", "catalog"),
    ("removed from the catalog", "catalog"),
    ("it had ended", "had_ended"),
)
"""Why a server went, by how the journal's words begin; `failed` and `unhealthy` where it ended in an error."""
_CODE = re.compile(r"([A-Z][A-Z_]+): ")


@dataclass(frozen=True, slots=True)
class Started:
    """A start is over. `took_s` and the phases are those of one that ended well."""

    model: str
    result: str
    took_s: float | None = None
    phases_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stopped:
    """A server that was up is taken down."""

    model: str
    reason: str


_Who = tuple[str, int]
"""A model, and which of its replicas."""


class Moves:
    """Follows every server of every model from entry to entry. `clock` counts seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._starts: dict[_Who, _Start] = {}
        self._drains: dict[_Who, str] = {}

    def heard(self, entry: Entry) -> Started | Stopped | None:
        """Return what an entry of the journal means, if it is the end of a start or the stop of a server."""
        who = str(entry.data.get("model", "")), int(entry.data.get("replica", 0))
        if entry.kind == "state":
            before, now = State(entry.data["from"]), State(entry.data["to"])
            return self._moved(who, before, now, str(entry.data["reason"]))
        if entry.kind == "progress" and who in self._starts:
            self._starts[who].turn_to(phase_of(str(entry.data["phase"])), self._clock())
        return None

    def _moved(self, who: _Who, before: State, now: State, reason: str) -> Started | Stopped | None:
        if now is State.STARTING:
            self._drains.pop(who, None)
            self._starts[who] = _Start(self._clock())
        elif who in self._starts:
            return self._went_on(who, now, reason)
        elif now is State.DRAINING:
            self._drains[who] = reason
        elif now is State.STOPPING and before is not State.FAILED:  # a second look at what failed stops nothing
            return Stopped(who[0], reason_of(self._drains.pop(who, reason), before))
        return None

    def _went_on(self, who: _Who, now: State, reason: str) -> Started | None:
        """Return the end of a start that was under way, if this is it."""
        if now in STARTING_UP:
            self._starts[who].turn_to("loading", self._clock())
            return None
        start = self._starts.pop(who)
        if now is not State.READY:
            return Started(who[0], result_of(reason))
        return Started(who[0], "ok", *start.over(self._clock()))


class _Start:
    def __init__(self, now: float) -> None:
        self.began_at = now
        self.phases_s: dict[str, float] = {}
        self._phase = "starting"
        self._since = now

    def turn_to(self, phase: str, now: float) -> None:
        """Begin a phase; one may be begun again, as layers of an image are pulled and extracted in turn."""
        if spent_s := now - self._since:
            self.phases_s[self._phase] = self.phases_s.get(self._phase, 0.0) + spent_s
        self._phase, self._since = phase, now

    def over(self, now: float) -> tuple[float, dict[str, float]]:
        """Return how long it took in all, and in each phase."""
        self.turn_to("", now)
        return now - self.began_at, self.phases_s


def phase_of(words: str) -> str:
    """Return which phase the words of a progress mean."""
    return PHASES.get(words) or ("waiting" if words.startswith("waiting") else "other")


def result_of(reason: str) -> str:
    """Return how a start ended that did not end well."""
    code = _CODE.match(reason)
    return RESULTS.get(code[1], "failed") if code else "called_off"


def reason_of(words: str, before: State) -> str:
    """Return why a server went that was in the state `before`."""
    if _CODE.match(words):
        return "unhealthy" if before is State.UNHEALTHY else "failed"
    return next((reason for beginning, reason in REASONS if words.startswith(beginning)), "other")
