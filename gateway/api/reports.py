"""What is told of a model and of what it runs on: `/status` and `/info`, of the gateway and of each model.

Nothing here wakes a model. null is what is not known.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from pydantic import BaseModel, Field

from gateway import machine
from gateway.catalog import ModelSpec
from gateway.devices import Device
from gateway.facts import Facts, facts_of
from gateway.fleet.fleet import Fleet
from gateway.fleet.placement import free_bytes
from gateway.lifecycle import State

MEGABYTE = 2**20
GIGABYTE = 2**30


class Service(BaseModel):
    """The gateway's process."""

    status: str
    version: str
    uptime_seconds: int
    memory_usage_mb: int


class ModelStatus(BaseModel):
    """The model. `precision` is of most of its weights, `max_length` in tokens of prompt and answer together."""

    name: str | None
    loaded: bool
    device: str | None
    precision: str | None
    max_length: int | None
    vocab_size: int | None
    state: str | None


class System(BaseModel):
    """The machine. A model with GPUs of its own is told of the first of them."""

    gpu_available: bool
    gpu_name: str | None
    gpu_memory_total_mb: int | None
    gpu_memory_used_mb: int | None
    cpu_cores: int
    system_memory_gb: float


class ServiceStatus(BaseModel):
    service: Service
    model: ModelStatus
    system: System


class Gpu(BaseModel):
    """One GPU, and the models that have it, or a part of it. Memory is in MB; null where it is not known."""

    id: str
    name: str | None
    memory_mb: int | None
    reserved_mb: int | None
    model: str | None = Field(description="The first of `models`")
    models: list[str]


class GatewayStatus(ServiceStatus):
    """`gpus` is null where it is not known which there are.

    `catalog_error` is all that is wrong with the catalog's file as it is now, and null when nothing is. While there is
    something, the catalog before stays in force.
    """

    gpus: list[Gpu] | None
    catalog_error: list[str] | None


class ModelInfo(BaseModel):
    """The model's architecture, and whatever the catalog's `metadata` says besides."""

    model_config = {"extra": "allow", "protected_namespaces": ()}

    checkpoint: str | None
    step: Any = None
    val_loss: Any = None
    model_layers: int | None
    model_dim: int | None
    vocab_size: int | None


class GatewayInfo(ModelInfo):
    """The default model, as its own `info` has it, and the gateway."""

    version: str
    models: list[str]
    gpus: list[Gpu] | None


class Reports:
    """Makes them. `device` is where llama.cpp computes: auto, cpu or cuda."""

    def __init__(self, fleet: Fleet, version: str, *, device: str) -> None:
        self.version = version
        self._fleet = fleet
        self._device = device
        self._began_at = time.monotonic()
        self._gpu_names = machine.gpu_names() | {each.id: each.name for each in fleet.gpus.devices or () if each.name}

    async def facts(self, spec: ModelSpec) -> Facts:
        return await asyncio.to_thread(facts_of, spec)

    async def status(self, spec: ModelSpec | None, said: str = "running") -> ServiceStatus:
        """Return how the service of a model is, which is the word that is `said`."""
        service = Service(
            status=said,
            version=self.version,
            uptime_seconds=int(time.monotonic() - self._began_at),
            memory_usage_mb=machine.resident_bytes() // MEGABYTE,
        )
        return ServiceStatus(service=service, model=await self._model(spec), system=self._system(spec))

    async def gateway_status(self) -> GatewayStatus:
        status = await self.status(self._default())
        return GatewayStatus(**dict(status), gpus=self._gpus(), catalog_error=self.catalog_error())

    def catalog_error(self) -> list[str] | None:
        """Return what is wrong with the catalog's file as it is now, if anything is."""
        error = self._fleet.catalog_error
        return list(error.complaints) if error else None

    async def info(self, spec: ModelSpec | None) -> dict[str, Any]:
        """Return what is known of a model's architecture.

        What the catalog's `metadata` says beats what a file says, if it is of the documented type.
        """
        facts = await self.facts(spec) if spec else Facts()
        found = {"model_layers": facts.layers, "model_dim": facts.dim, "vocab_size": facts.vocab_size}
        metadata = spec.metadata if spec else {}
        said = {name: value for name, value in metadata.items() if name not in found or type(value) is int}
        return {"step": None, "val_loss": None, **found, **said, "checkpoint": spec.id if spec else None}

    async def gateway_info(self) -> dict[str, Any]:
        info = await self.info(self._default())
        return {**info, "version": self.version, "models": list(self._fleet.catalog.models), "gpus": self._gpus()}

    def device(self, spec: ModelSpec) -> str | None:
        """Return where a model computes: `cpu`, `cuda:0`, or None where the gateway cannot know."""
        if gpus := self._fleet.status(spec).gpus:
            return ",".join(f"cuda:{gpu}" for gpu in gpus)
        if spec.engine == "llamacpp":
            alone = "cpu" if self._fleet.gpus.devices is None else None
            return alone if self._device == "auto" else self._device
        return "cpu" if spec.runtime == "docker" and spec.gpus == 0 else None

    def _default(self) -> ModelSpec | None:
        catalog = self._fleet.catalog
        return catalog.models[catalog.default_model] if catalog.default_model else None

    async def _model(self, spec: ModelSpec | None) -> ModelStatus:
        if spec is None:
            nothing = dict.fromkeys(("name", "device", "precision", "max_length", "vocab_size", "state"))
            return ModelStatus.model_validate({**nothing, "loaded": False})
        facts, state = await self.facts(spec), self._fleet.status(spec).state
        bounds = [tokens for tokens in (spec.context_tokens, facts.context_tokens) if tokens]
        return ModelStatus(
            name=spec.hf_name or spec.name,
            loaded=state is State.READY,
            device=self.device(spec),
            precision=facts.precision,
            max_length=min(bounds) if spec.context_tokens else None,
            vocab_size=facts.vocab_size,
            state=state.value,
        )

    def _system(self, spec: ModelSpec | None) -> System:
        own = self._fleet.status(spec).gpus if spec else ()
        first = next(iter(own or [device.id for device in self._fleet.gpus.devices or ()]), None)
        return System(
            gpu_available=first is not None,
            gpu_name=self._gpu_names.get(first) if first else None,
            gpu_memory_total_mb=self._gpu_mb(first) if first else None,
            gpu_memory_used_mb=None,
            cpu_cores=machine.cpu_cores(),
            system_memory_gb=round(machine.memory_bytes() / GIGABYTE, 1),
        )

    def _gpus(self) -> list[Gpu] | None:
        devices = self._fleet.gpus.devices
        return None if devices is None else [self._gpu(device) for device in devices]

    def _gpu(self, device: Device) -> Gpu:
        holders = self._fleet.gpus.holders(device.id)
        free = free_bytes(device, holders.values())
        return Gpu(
            id=device.id,
            name=self._gpu_names.get(device.id),
            memory_mb=_megabytes(device.memory_bytes),
            reserved_mb=_megabytes(device.memory_bytes and device.memory_bytes - (free or 0)),
            model=next(iter(holders), None),
            models=list(holders),
        )

    def _gpu_mb(self, gpu: str) -> int | None:
        return next((_megabytes(each.memory_bytes) for each in self._fleet.gpus.devices or () if each.id == gpu), None)


def _megabytes(amount: int | None) -> int | None:
    return None if amount is None else amount // MEGABYTE
