"""What a changed catalog means, before anything is done about it: pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.catalog import ModelSpec


@dataclass(frozen=True, slots=True)
class Changes:
    """The models whose entry is not what it was. All others are none of a changed catalog's business (promise P9)."""

    added: tuple[ModelSpec, ...]
    changed: tuple[ModelSpec, ...]
    removed: tuple[ModelSpec, ...]
    """As they were."""

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)

    def ids(self) -> dict[str, list[str]]:
        """Return whom it concerns, for events and the log. A model under another id is one less and one more."""
        said = {"added": self.added, "changed": self.changed, "removed": self.removed}
        return {word: [spec.id for spec in specs] for word, specs in said.items()}


def changes_between(before: Mapping[str, ModelSpec], after: Mapping[str, ModelSpec]) -> Changes:
    """Return what became of the models. Their order is nothing that could change one of them."""
    return Changes(
        added=tuple(spec for model, spec in after.items() if model not in before),
        changed=tuple(spec for model, spec in after.items() if model in before and before[model] != spec),
        removed=tuple(spec for model, spec in before.items() if model not in after),
    )


def known_by_sight(before: Mapping[str, ModelSpec], after: Mapping[str, ModelSpec]) -> dict[str, ModelSpec]:
    """Return the models of `after`, those that are what they were as the very objects that they were.

    So whoever holds one of them sees without comparing it that nothing has changed.
    """
    return {model: before[model] if before.get(model) == spec else spec for model, spec in after.items()}
