"""What is told of an instance: snapshots, for reports only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gateway.catalog import ModelSpec
from gateway.errors import GatewayError
from gateway.lifecycle import State
from gateway.runtimes.base import Handle, Progress


@dataclass(frozen=True, slots=True)
class Failure:
    """How the last life that failed ended. `at` is wall-clock time, in seconds since 1970."""

    error: GatewayError
    at: float


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a model last began to go down: `idle`, `makes room for x`. `at` is wall-clock time, as in `Failure`."""

    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class Status:
    """A snapshot: by the time it is read it may be out of date. Times are in seconds."""

    spec: ModelSpec
    name: str
    state: State
    state_s: float
    in_flight: int
    queued: int
    idle_s: float | None
    handle: Handle | None
    progress: Progress | None
    progress_s: float | None
    failure: Failure | None
    retry_after_s: float | None
    """While the model cools down after a failure: for how much longer."""
    gpus: tuple[str, ...] = ()
    """Those that it has."""
    held_for: str | None = None
    """The model for which it takes no new requests, and goes when it has finished those that it has."""
    waits_for: str | None = None
    """While it waits for GPUs: who has them and what must happen, in words."""
    last_stop: Stop | None = None
    replicas: tuple[Status, ...] = ()
    """Of a model with several servers: each of them."""
    estimate: Callable[[], float | None] | None = None
    """Works `eta_s` out: a snapshot is taken more often than that is asked for."""

    @property
    def eta_s(self) -> float | None:
        """While it starts: in how long it is ready, as its starts go; where that is not known, None."""
        return self.estimate() if self.estimate else None


def described(status: Status) -> dict[str, object] | None:
    """Return how far a model's start is, as the API shows it: also of one that has only been estimated so far."""
    eta_s = status.eta_s
    first = None if eta_s is None else Progress(status.state.value)
    return describe(status.progress or first, eta_s)


def describe(progress: Progress | None, eta_s: float | None) -> dict[str, object] | None:
    """Return progress as the API shows it, with the estimate of how long it goes on."""
    if progress is None:
        return None
    done, total = _plain(progress.done), _plain(progress.total)
    return {"phase": progress.phase, "done": done, "total": total, "unit": progress.unit, "eta_s": eta_s}


def told(progress: Progress) -> str:
    """Return progress as a line for people: `downloading, 3 of 5 files`."""
    if progress.done is None:
        return progress.phase
    if progress.unit == "bytes":
        done, total = _megabytes(progress.done), _megabytes(progress.total)
    else:
        done, total = str(_plain(progress.done)), str(_plain(progress.total))
    of_total = f" of {total}" if progress.total is not None else ""
    unit = f" {progress.unit}" if progress.unit and progress.unit != "bytes" else ""
    return f"{progress.phase}, {done}{of_total}{unit}"


def _megabytes(amount: float | None) -> str:
    return f"{(amount or 0) / 1e6:.1f} MB"


def _plain(amount: float | None) -> float | None:
    return int(amount) if amount is not None and float(amount).is_integer() else amount
