"""What the witness knows of each model and of those who wait for it, from what it has seen alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.catalog import ModelSpec
from gateway.fleet.life import Lease
from gateway.lifecycle import State


@dataclass(eq=False, frozen=True)
class Waiter:
    """One who waits: a request for a lease, or an operator for the model."""

    asked_at: float
    max_wait_s: float | None = None
    wants_lease: bool = True


@dataclass(frozen=True)
class Room:
    """For whom a model made room, and when."""

    claimant: str
    at: float


@dataclass
class Watched:
    """What the witness knows of one model, from what it has seen alone."""

    spec: ModelSpec
    state: State = State.STOPPED
    since: float = 0.0
    before: State = State.STOPPED
    before_since: float = 0.0
    hard_stop_at: float = 0.0
    adopting: bool = False
    waiting: dict[Waiter, None] = field(default_factory=dict)
    serving_since: float = 0.0
    last_use: float = 0.0
    asked_for: bool = True
    holding: dict[Lease, None] = field(default_factory=dict)
    last_waiter_left: float = 0.0
    promised_until: float = 0.0
    kept: bool = False
    start_s: float = 0.0  # the bounds of the start that is under way, which a changed catalog does not touch
    stall_s: float = 0.0
    placed: bool = True
    placed_at: float = 0.0
    claimed_at: float = 0.0
    """Since when it wanted the GPUs that it has now."""
    starved_s: float = 0.0
    """How long it has waited for GPUs with nobody before it whose turn it was."""
    owed: frozenset[Waiter] = frozenset()
    """Who waited for it when it became ready, and could have been served from then on."""
    served: int = 0
    """How many it has served since then."""
    made_room: Room | None = None
    """For whom it last made room."""
    forced: bool = False
    stop_asked: bool = False

    @property
    def claims(self) -> bool:
        """Whether it waits for GPUs."""
        return self.state is State.STARTING and not self.placed

    @property
    def asked_at(self) -> float:
        """Since when it has wanted GPUs: since its oldest waiter came, or its start began, or it had made room."""
        oldest = min((waiter.asked_at for waiter in self.waiting if waiter.wants_lease), default=self.since)
        return max(min(oldest, self.since), self.made_room.at if self.made_room else 0.0)
