"""What a model's server is called, and what tells whether it is still the one that the catalog asks for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace

from gateway.catalog import ModelSpec
from gateway.engines.base import Engine
from gateway.errors import StartFailed
from gateway.runtimes.base import Launch


def server_key(spec: ModelSpec, replica: int = 0) -> str:
    """Return what tells one server of a model from all others: no other model may have it as its id."""
    return f"{spec.id}-{replica}" if replica else spec.id


def server_name(spec: ModelSpec, replica: int = 0) -> str:
    """Return what a server of a model is called on every runtime."""
    return f"tgi-{server_key(spec, replica)}"


def launch_of(engine: Engine, spec: ModelSpec, secret: str, replica: int = 0) -> Launch:
    """Return what to run for a model, with its fingerprint, which all its replicas share.

    Raises:
        StartFailed: something that the catalog names cannot be used.
    """
    return replace(engine.launch(spec, server_name(spec, replica), secret), fingerprint=fingerprint(engine, spec))


def same_server(engine: Engine, one: ModelSpec, other: ModelSpec) -> bool:
    """Say whether two entries ask for the same server; `engine` is the one's."""
    if any(getattr(one, key) != getattr(other, key) for key in ("engine", "runtime")):
        return False
    try:
        return fingerprint(engine, one) == fingerprint(engine, other)
    except StartFailed:  # one of them cannot be launched at all
        return False


def fingerprint(engine: Engine, spec: ModelSpec) -> str:
    """Return 16 hex digits that change when, and only when, the catalog asks for another server.

    Its bounds, its queue and its names are the gateway's own affair, and keys and tokens may be renewed: none of them
    is a reason to load a model again.

    Raises:
        StartFailed: as `launch_of`.
    """
    said = asdict(engine.launch(spec, server_name(spec), secret=""))
    if container := said["container"]:
        del container["secrets"], container["pull_policy"]
    text = json.dumps([said, spec.gpus, spec.gpu_memory_bytes], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
