"""GPUs, as values: what there is, what is free of it, and what of it a model is to have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU. `memory_bytes` is all that it has, None where that is not known.

    `uuid` is its other name, if known: its number, where the UUID is the id.
    """

    id: str
    memory_bytes: int | None = None
    uuid: str = ""
    name: str = ""
    """What kind it is, for people: `NVIDIA A10`."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names by which this one GPU may be meant."""
        return tuple(name for name in (self.id, self.uuid) if name)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a GPU really has for programs, and what no program on this machine uses of it right now."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Share:
    """What a model is to have of one GPU that it does not have whole."""

    gpu: str
    reserved_bytes: int
    total_bytes: int
    free_bytes: int | None
    """What is really free before the model starts; None if that cannot be told."""
    others_bytes: int = 0
    """What other models have reserved of this GPU."""
