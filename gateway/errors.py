"""Every error the gateway reports, in one tree.

GatewayError                 code, HTTP status, words for the reader, and when a retry helps
  CatalogError               stops `serve` or `check`; never reaches a caller
  BadRequest                 400 to 422: the caller can mend it
    EmptyPrompt PromptTooLong UnknownModel ModelNotRunning NotFound MethodNotAllowed
    BodyTooLarge BodyTimeout InvalidRequest Unsupported Unauthorized Forbidden RateLimited
  NotAvailable               503: waiting or an operator can mend it
    StartFailed (LoadingFailed) ModelNotLoaded ModelUnhealthy NoCapacity QueueFull
    RuntimeUnavailable (NameTaken) ShuttingDown
  UpstreamFailed             502: the model's server broke before its first byte
  GenerationFailed           500: it broke afterwards, or was stopped by an operator
  StopFailed                 500
  GenerationTimeout          504
  StartTimeout               504

The codes are the contract's (section 5): scripts rely on them, so they never change.
`gateway.api.problems` alone knows how an error looks on the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar


class GatewayError(Exception):
    """What went wrong, and what the reader can do about it.

    `retry_after_s` is set where waiting helps; it becomes `Retry-After`. `extra` holds further
    JSON fields of the answer (`cause`, `fix`, `evidence`), never a prompt, a token or a key.
    """

    code: ClassVar[str] = "INTERNAL_ERROR"
    status: ClassVar[int] = 500

    def __init__(self, detail: str, *, retry_after_s: float | None = None, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.extra = extra


class CatalogError(GatewayError):
    """models.yaml, the keys or the environment cannot be used. `complaints` holds every fault found, a line each."""

    code = "CATALOG_ERROR"

    def __init__(self, complaints: Sequence[str]) -> None:
        super().__init__("\n".join(complaints))
        self.complaints = tuple(complaints)


class BadRequest(GatewayError):
    code = "VALIDATION_ERROR"
    status = 422


class EmptyPrompt(BadRequest):
    code = "EMPTY_PROMPT"
    status = 400


class PromptTooLong(BadRequest):
    code = "PROMPT_TOO_LONG"
    status = 400


class UnknownModel(BadRequest):
    code = "MODEL_NOT_FOUND"
    status = 404


class ModelNotRunning(BadRequest):
    code = "MODEL_NOT_RUNNING"
    status = 404


class NotFound(BadRequest):
    code = "NOT_FOUND"
    status = 404


class MethodNotAllowed(BadRequest):
    code = "METHOD_NOT_ALLOWED"
    status = 405


class BodyTooLarge(BadRequest):
    code = "BODY_TOO_LARGE"
    status = 413


class BodyTimeout(BadRequest):
    code = "BODY_TIMEOUT"
    status = 408


class InvalidRequest(BadRequest):
    """The engine found a parameter it cannot take, or the request is for no model at all."""


class Unauthorized(BadRequest):
    """The request shows no key, or one that is not known."""

    code = "UNAUTHORIZED"
    status = 401


class Forbidden(BadRequest):
    code = "FORBIDDEN"
    status = 403


class RateLimited(BadRequest):
    """The key's own limit is reached; the gateway may well be idle."""

    code = "RATE_LIMITED"
    status = 429


class Unsupported(BadRequest):
    """The request is fine, but this model's engine cannot do it."""

    code = "UNSUPPORTED"


class NotAvailable(GatewayError):
    status = 503


class StartFailed(NotAvailable):
    """The model's server could not be started, or ended while it loaded or served."""

    code = "START_FAILED"


class LoadingFailed(StartFailed):
    """A failed start with the status that documents/autotrain-inference.md has for it."""

    status = 500


class ModelNotLoaded(NotAvailable):
    """The model is still loading, and the caller did not want to wait that long."""

    code = "MODEL_NOT_LOADED"


class ModelUnhealthy(NotAvailable):
    code = "MODEL_UNHEALTHY"


class NoCapacity(NotAvailable):
    """The queue's wait ran out before the model had a free slot."""

    code = "NO_CAPACITY"


class QueueFull(NotAvailable):
    code = "QUEUE_FULL"


class RuntimeUnavailable(NotAvailable):
    """What runs the model (a container engine, say) does not answer: nothing is known about the server."""

    code = "RUNTIME_UNAVAILABLE"


class NameTaken(RuntimeUnavailable):
    """Another gateway of the same name (GATEWAY_NAME) lives and owns what this one would own."""


class ShuttingDown(NotAvailable):
    code = "SHUTTING_DOWN"


class StopFailed(GatewayError):
    code = "STOP_FAILED"


class GenerationFailed(GatewayError):
    code = "GENERATION_FAILED"


class UpstreamFailed(GatewayError):
    code = "UPSTREAM_FAILED"
    status = 502


class GenerationTimeout(GatewayError):
    code = "GENERATION_TIMEOUT"
    status = 504


class StartTimeout(GatewayError):
    code = "START_TIMEOUT"
    status = 504
