"""What is said to those who cannot be served now: pure, one function a reason, each with what to do next."""

from __future__ import annotations

import math

from gateway.catalog import ModelSpec
from gateway.engines.base import Diagnosis
from gateway.errors import (
    GatewayError,
    GenerationFailed,
    ModelNotLoaded,
    ModelNotRunning,
    ModelUnhealthy,
    NoCapacity,
    NotAvailable,
    QueueFull,
    RuntimeUnavailable,
    ShuttingDown,
    StartFailed,
    StartTimeout,
    StopFailed,
    UnknownModel,
)
from gateway.fleet.admission import retry_after_s
from gateway.fleet.estimates import Estimate
from gateway.fleet.status import Status, described
from gateway.lifecycle import State
from gateway.runtimes.base import Exit

BUSY_RETRY_S = 5.0
"""What a caller is told to wait when nothing better is known."""
BUSY_GPUS_RETRY_S = 30.0
"""The same, where GPUs are in use by others, and nothing was measured of them."""


def shutting_down() -> ShuttingDown:
    return ShuttingDown(
        "The gateway is shutting down; send the request again when it is back.", retry_after_s=BUSY_RETRY_S
    )


def called_off(spec: ModelSpec) -> ModelNotLoaded:
    words = f"{spec.id} is being stopped by an operator; send the request again to start it afresh."
    return ModelNotLoaded(words, retry_after_s=BUSY_RETRY_S)


def removed(spec: ModelSpec) -> UnknownModel:
    return UnknownModel(f"{spec.id} is no longer in the catalog. GET /models lists what is.")


def former_server_left(spec: ModelSpec, error: GatewayError, retry_after_s: float) -> RuntimeUnavailable:
    words = f"{spec.id} is to run elsewhere, by a changed catalog, and its former server must be gone first"
    return RuntimeUnavailable(f"{words}. {error.detail}", retry_after_s=retry_after_s)


def download_called_off(spec: ModelSpec) -> ModelNotLoaded:
    words = f"The download of {spec.id} was called off before its end; what is here of it is kept."
    return ModelNotLoaded(f"{words} Pull it again.", retry_after_s=BUSY_RETRY_S)


def queue_full(spec: ModelSpec, served: Estimate | None) -> QueueFull:
    """`served` is in how long those who wait now have been answered."""
    words = f"{spec.max_queue} requests wait for {spec.id} already (max_queue); send this one again later."
    return QueueFull(words, retry_after_s=retry_after_s(served, BUSY_RETRY_S))


def not_ours(spec: ModelSpec) -> ModelNotRunning:
    return ModelNotRunning(
        f"{spec.id} runs elsewhere (runtime external), at {spec.url}: the gateway neither stops nor restarts it."
    )


def unhealthy(spec: ModelSpec, ailment: str, left_s: float) -> ModelUnhealthy:
    then = "Its requests are given up" if spec.runtime == "external" else "It is replaced"
    return ModelUnhealthy(
        f"The server of {spec.id} does not answer: {ailment}. {then} unless it recovers within {left_s:.0f} s.",
        retry_after_s=max(left_s, 1.0),
    )


def rests(spec: ModelSpec, error: GatewayError, left_s: float) -> NotAvailable:
    words = f"{spec.id} failed and is not started again for another {left_s:.0f} s: {error.detail}"
    kind = type(error) if isinstance(error, NotAvailable) else StartFailed
    return kind(words, retry_after_s=max(left_s, 1.0), **error.extra)


def again(error: GatewayError, retry_after_s: float) -> GatewayError:
    """Return a fresh error that says the same, for one more of those who waited."""
    return type(error)(error.detail, retry_after_s=retry_after_s or None, **error.extra)


def no_slot(spec: ModelSpec, waited_s: float, served: Estimate | None) -> NoCapacity:
    """`served` is in how long those who wait now have been answered."""
    words = f"All {spec.max_concurrency} slots of {spec.id} were busy for {waited_s:.0f} s (queue_timeout)"
    return NoCapacity(f"{words}; send the request again later.", retry_after_s=retry_after_s(served, BUSY_RETRY_S))


def held(spec: ModelSpec, claimant: str, waited_s: float, serves: Estimate | None) -> NoCapacity:
    """`serves` is in how long the model serves again, if it goes now and is started after `claimant`."""
    words = f"{spec.id} takes no new requests since it makes room for {claimant}; this one waited for {waited_s:.0f} s"
    told_s = _for_gpus_s(spec, serves)
    return NoCapacity(f"{words} (queue_timeout). Send it again later.", retry_after_s=told_s)


def no_room(spec: ModelSpec, why: str, waited_s: float, ready: Estimate | None) -> NoCapacity:
    """`ready` is in how long the model serves, as those who have its GPUs, or come before it, usually go and start."""
    words = f"{spec.id} got no GPUs for {waited_s:.0f} s" + (f": {why}" if why else "")
    told_s = _for_gpus_s(spec, ready)
    return NoCapacity(f"{words}. Send the request again later, or stop a model.", retry_after_s=told_s)


def _for_gpus_s(spec: ModelSpec, ready: Estimate | None) -> float:
    return min(retry_after_s(ready, BUSY_GPUS_RETRY_S), max(spec.queue_timeout_s, BUSY_GPUS_RETRY_S))


def not_loaded(status: Status, max_wait_s: float, ready: Estimate | None) -> ModelNotLoaded:
    """`ready` is in how long it is of use to ask again."""
    return ModelNotLoaded(
        f"{status.spec.id} is {status.state} and was not ready within the {max_wait_s:g} s that this request would "
        "wait; the start goes on.",
        retry_after_s=retry_after_s(ready, max(max_wait_s, BUSY_RETRY_S)),
        progress=described(status),
    )


def not_loaded_in_time(status: Status, max_wait_s: float, ready: Estimate) -> ModelNotLoaded:
    return ModelNotLoaded(
        f"{status.spec.id} is {status.state} and takes about {math.ceil(ready.seconds)} s more, as its starts go; this "
        f"request would wait for {max_wait_s:g} s. The start goes on: send the request again then.",
        retry_after_s=retry_after_s(ready, BUSY_RETRY_S),
        progress=described(status),
    )


def never_ready(spec: ModelSpec, state: State, waited_s: float, ready: Estimate | None) -> StartTimeout:
    """`ready` is in how long it is of use to ask again: whatever goes on goes on without the caller."""
    words = f"{spec.id} was not ready after {waited_s:.0f} s; it was {state}. See its log."
    return StartTimeout(words, retry_after_s=retry_after_s(ready, BUSY_RETRY_S))


def ended(spec: ModelSpec, end: Exit, diagnosis: Diagnosis, *, served: bool) -> GatewayError:
    when = "while it served" if served else "while it loaded"
    words = f"The server of {spec.id} ended {when} ({end.reason}): {diagnosis.cause}. {diagnosis.fix}"
    error = GenerationFailed if served else StartFailed
    return error(words, cause=diagnosis.cause, fix=diagnosis.fix, evidence=list(diagnosis.evidence))


def unhealthy_too_long(spec: ModelSpec, ailment: str) -> GenerationFailed:
    then = "its requests were given up" if spec.runtime == "external" else "was removed"
    return GenerationFailed(
        f"The server of {spec.id} did not recover within {spec.unhealthy_timeout_s:g} s and {then}: {ailment}."
    )


def let_go(spec: ModelSpec) -> ShuttingDown:
    words = f"The gateway ended before this request to {spec.id} had; the model goes on. Send it again."
    return ShuttingDown(words, retry_after_s=BUSY_RETRY_S)


def not_known_yet(runtime: str) -> RuntimeUnavailable:
    words = f"It is not known yet what runs on runtime {runtime}: the gateway is asking it."
    return RuntimeUnavailable(f"{words} Send the request again in a moment.", retry_after_s=1.0)


def stopped(spec: ModelSpec, reason: str) -> GenerationFailed:
    return GenerationFailed(f"The server of {spec.id} was stopped ({reason}) before this request had ended.")


def perhaps_left(spec: ModelSpec, why: str) -> StopFailed:
    return StopFailed(
        f"It is not known whether the server of {spec.id} is gone ({why}). "
        "The next start clears what is left of it first."
    )


def our_fault(spec: ModelSpec, error: BaseException | None) -> StartFailed:
    return StartFailed(f"The gateway failed while it ran {spec.id} ({type(error).__name__}); see its log.")
