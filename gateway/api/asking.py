"""What every generation address does with a request: which model, how long to wait for it, and the exchange itself."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Header, Request
from fastapi.exceptions import RequestValidationError

from gateway.api.middleware import request_id_of
from gateway.catalog import Catalog, ModelSpec
from gateway.fleet.replicas import Served
from gateway.generation import GenerationRequest
from gateway.relay import Client, Exchange

Prefer = Annotated[str | None, Header()]
_WAIT = re.compile(r"(?:^|,)\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(?=$|[,;])", re.ASCII | re.IGNORECASE)


def model_of(catalog: Catalog, name: str | None, field: str) -> ModelSpec:
    """Return the model of this name, or the default model for none.

    Raises:
        UnknownModel: there is none of this name.
        RequestValidationError: `field` is missing, and there is no default.
    """
    name = name or catalog.default_model
    if name is None:
        raise invalid("the catalog has no default_model, so the request must name its model", "missing", field)
    return catalog.resolve(name)


def within_context(spec: ModelSpec, asked: int | None, *field: str) -> None:
    """Return if the length asked for fits into the model's context.

    Raises:
        RequestValidationError: it does not.
    """
    most = spec.context_tokens
    if asked is not None and most is not None and asked > most:
        raise invalid(f"must be at most {most}, the context of {spec.id} in tokens", "less_than_equal", *field)


def exchange(
    instance: Served, wanted: GenerationRequest, client: Client, request: Request, prefer: str | None
) -> Exchange:
    """Return the exchange that answers `request`, and have the log name its model.

    Raises:
        Unsupported: the engine cannot do what is asked.
    """
    request.scope["state"]["model"] = instance.spec.id
    return Exchange(instance, wanted, client, request_id=request_id_of(request.scope), max_wait_s=max_wait_s(prefer))


def invalid(words: str, kind: str, *field: str) -> RequestValidationError:
    """Return the error for a field of the body that pydantic alone could not judge."""
    return RequestValidationError([{"loc": ("body", *field), "msg": words, "type": kind}])


def max_wait_s(prefer: str | None) -> float | None:
    """Return the bound that `Prefer: wait=N` (RFC 7240) sets on the wait for a cold model, in seconds."""
    found = _WAIT.search(prefer) if prefer else None
    return float(found[1]) if found else None
