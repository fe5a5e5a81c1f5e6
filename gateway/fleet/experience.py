"""What the starts and stops of models took, and what that says of the next ones.

It is remembered by model, by what its server is made of (the launch's fingerprint, which its image is part of) and by
host, and only ever used to estimate: without it the gateway works as well, and knows less to say.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from gateway.catalog import ModelSpec
from gateway.engines.base import Engine
from gateway.errors import GatewayError
from gateway.fleet.estimates import (
    Durations,
    Estimate,
    in_turn,
    learned,
    left_of,
    lengthened,
    told_s,
    usual,
    whole,
)
from gateway.fleet.identity import fingerprint
from gateway.fleet.life import Life
from gateway.lifecycle import DOWN, STARTING_UP, State

KEPT_MODELS = 256
KEPT_ANSWERS = 31
DEFAULT_COST_S = 30.0
"""What a start is taken to cost, in the choice of who makes room, while none was measured."""


@dataclass(frozen=True, slots=True)
class Key:
    """What a measurement is of. `made_of` is the launch's fingerprint."""

    model: str
    made_of: str
    host: str


@dataclass(frozen=True, slots=True)
class Record:
    """What was measured, in seconds: each phase of the starts, drains, and stops."""

    phases: Mapping[str, Durations] = field(default_factory=dict)
    drains: Durations = ()
    stops: Durations = ()


class Experience:
    """All that is remembered, of the models that were last started. Nothing in here waits."""

    def __init__(self, host: str = "") -> None:
        self.host = host
        self.version = 0
        """Grows with everything that is learned."""
        self._records: dict[Key, Record] = {}

    def of(self, spec: ModelSpec, engine: Engine) -> Past:
        """Return what is remembered of one model, and what learns of it."""
        return Past(self, spec, engine)

    def get(self, key: Key) -> Record:
        return self._records.get(key, Record())

    def put(self, key: Key, record: Record) -> None:
        """Remember `record`, and forget what nobody has learned of for the longest time."""
        self._records.pop(key, None)
        self._records[key] = record
        self.version += 1
        while len(self._records) > KEPT_MODELS:
            del self._records[next(iter(self._records))]

    def recall(self, records: Mapping[Key, Record]) -> None:
        """Take what an earlier life of the gateway remembered. What was learned since is newer."""
        self._records = {**records, **self._records}

    def snapshot(self) -> Mapping[Key, Record]:
        """Return all of it, the oldest first; it does not change any more."""
        return dict(self._records)


class Past:
    """What is remembered of one model. Its instance tells it what happens; times are readings of the loop's clock."""

    def __init__(self, experience: Experience, spec: ModelSpec, engine: Engine) -> None:
        self._experience = experience
        self._spec = spec
        self._engine = engine
        self._known_key: Key | None = None
        self._was_ready = False
        self._answers: deque[float] = deque(maxlen=KEPT_ANSWERS)

    # What happens

    def moved(self, before: State, to: State, lasted_s: float, life: Life | None, now: float) -> None:
        """Hear that the instance has left a state in which it was for `lasted_s`."""
        record = self._record
        if before is State.LOADING and to is State.READY and life and not life.adopted:
            self._learn(replace(record, phases=learned(record.phases, life.course, now)))
        elif before is State.DRAINING and to is State.STOPPING:
            self._learn(replace(record, drains=lengthened(record.drains, lasted_s)))
        elif before is State.STOPPING and to is State.STOPPED and self._was_ready:
            self._learn(replace(record, stops=lengthened(record.stops, lasted_s)))
        self._was_ready = to not in DOWN and (self._was_ready or to is State.READY)

    def answered(self, took_s: float) -> None:
        """Hear that a request had its slot for so long. That is not kept beyond the gateway's life."""
        self._answers.append(took_s)

    # What is to be expected

    @property
    def cost_s(self) -> float:
        """What a start costs, with its image and weights at hand: as measured, or else a fixed guess."""
        known = whole(self._record.phases)
        return known.seconds if known else DEFAULT_COST_S

    def ready_in(self, state: State, life: Life | None, now: float) -> Estimate | None:
        """Return in how long the model is ready, if it is started now or is starting; a wait for GPUs comes on top."""
        if state in DOWN:
            return whole(self._record.phases)
        if state not in STARTING_UP or not life or life.adopted:
            return None
        return life.course.left(self._record.phases, now)

    def eta_s(self, state: State, life: Life | None, now: float) -> float | None:
        """Return what people are told of a start that is under way; None while it waits for GPUs."""
        if not life or state not in STARTING_UP or life.course.waits:
            return None
        return told_s(self.ready_in(state, life, now))

    def come_back_in(self, state: State, lasted_s: float, life: Life | None, now: float) -> Estimate | None:
        """Return in how long it is of use to ask again: when it is ready, or when it can be started again."""
        record, stop = self._record, usual(self._record.stops)
        if state is State.DRAINING:
            drain = left_of(record.drains, lasted_s)
            most_s = max(self._spec.drain_timeout_s - lasted_s, 0.0)
            return in_turn(drain and replace(drain, seconds=min(drain.seconds, most_s)), stop)
        if state is State.STOPPING:
            return left_of(record.stops, lasted_s)
        return self.ready_in(state, life, now)

    def gone_in(self, state: State, requests: int, lasted_s: float, life: Life | None, now: float) -> Estimate | None:
        """Return in how long its server has gone once these requests, which it has or will have, are answered."""
        if state in DOWN:  # of what is perhaps left nobody knows
            return None
        if state in (State.DRAINING, State.STOPPING):
            return self.come_back_in(state, lasted_s, life, now)
        stop = usual(self._record.stops)
        busy = [self.served_in(max(requests, self._spec.max_concurrency))] if requests else []
        up = [self.ready_in(state, life, now)] if state in STARTING_UP else []
        return in_turn(*up, *busy, stop)

    def served_in(self, waiting: int) -> Estimate | None:
        """Return in how long those who wait for a slot now have been answered."""
        each = usual(tuple(self._answers))
        return each and replace(each, seconds=each.seconds * max(waiting, 1) / self._spec.max_concurrency)

    # What is kept

    @property
    def _record(self) -> Record:
        key = self._key()
        return self._experience.get(key) if key else Record()

    def _learn(self, record: Record) -> None:
        if key := self._key():
            self._experience.put(key, record)

    def _key(self) -> Key | None:
        """Return what this model is remembered by, or None if it cannot even be launched."""
        if self._known_key is None:
            try:
                self._known_key = Key(self._spec.id, fingerprint(self._engine, self._spec), self._experience.host)
            except GatewayError:
                return None
        return self._known_key


def host_name() -> str:
    """Return what this machine is remembered by. A container's own name is made up anew with each container."""
    return "a container" if Path("/.dockerenv").exists() else socket.gethostname()[:64]
