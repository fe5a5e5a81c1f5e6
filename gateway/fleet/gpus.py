"""Which model has which GPU: one model per GPU."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import count, islice

from gateway.catalog import ModelSpec
from gateway.errors import NoCapacity, StartFailed

BUSY_RETRY_S = 30.0


class Gpus:
    """The one owner of the GPUs' reservations. Nothing here waits.

    `inventory` is the ids of the GPUs there are. Without one the ids are counted up from 0, and the runtime says
    which of them do not exist.
    """

    def __init__(self, inventory: Collection[str] | None) -> None:
        self.inventory = None if inventory is None else tuple(inventory)
        self._taken: dict[str, tuple[str, ...]] = {}

    def take(self, spec: ModelSpec) -> tuple[str, ...]:
        """Reserve what `spec` asks for and return the ids; what it has already stays its own.

        Raises:
            NoCapacity: other models have too many of them; says which, and what to do.
            StartFailed: it names a GPU that there is not.
        """
        if spec.runtime == "external":
            return ()
        if spec.id not in self._taken:
            self._taken[spec.id] = self._named(spec) if isinstance(spec.gpus, tuple) else self._counted(spec)
        return self._taken[spec.id]

    def claim(self, model: str, gpus: tuple[str, ...]) -> None:
        """Note the GPUs of a server that was found running, whatever else is known of them."""
        self._taken[model] = gpus

    def give_back(self, model: str) -> None:
        self._taken.pop(model, None)

    def of(self, model: str) -> tuple[str, ...]:
        """Return the GPUs that a model has now."""
        return self._taken.get(model, ())

    def holders(self) -> dict[str, str]:
        """Return who has each GPU that is taken."""
        return {gpu: model for model, gpus in self._taken.items() for gpu in gpus}

    def _named(self, spec: ModelSpec) -> tuple[str, ...]:
        assert isinstance(spec.gpus, tuple)
        self._must_be_there(spec, [gpu for gpu in spec.gpus if gpu.isdigit()])
        if any(gpu in self.holders() for gpu in spec.gpus):
            raise self._in_use(spec, f"GPU {', '.join(spec.gpus)}")
        return spec.gpus

    def _must_be_there(self, spec: ModelSpec, numbers: Collection[str]) -> None:
        """Only numbers can be judged: an inventory by number does not tell the names (`GPU-...`) of the same GPUs."""
        known = self.inventory
        if missing := [gpu for gpu in numbers if known is not None and gpu not in known]:
            cause = (
                f"{spec.id} is to have GPU {', '.join(missing)}, which is not there: there are {', '.join(known or ())}"
            )
            fix = "Correct `gpus` of this model in models.yaml, or GATEWAY_GPUS."
            raise StartFailed(f"{cause}. {fix}", cause=cause, fix=fix)

    def _counted(self, spec: ModelSpec) -> tuple[str, ...]:
        assert isinstance(spec.gpus, int)
        free = tuple(islice(self._free(), spec.gpus))
        if len(free) < spec.gpus:
            raise self._in_use(spec, f"{spec.gpus} of the {len(self.inventory or ())} GPUs that are known")
        return free

    def _free(self) -> Iterator[str]:
        known = map(str, count()) if self.inventory is None else iter(self.inventory)
        taken = self.holders()
        return (gpu for gpu in known if gpu not in taken)

    def _in_use(self, spec: ModelSpec, wanted: str) -> NoCapacity:
        holders = "; ".join(f"GPU {gpu} is used by {model}" for gpu, model in sorted(self.holders().items()))
        return NoCapacity(
            f"{spec.id} needs {wanted} for itself, and they are not free ({holders or 'none is in use'}). Stop a model "
            "(POST /models/ID/stop), or tell of more GPUs with GATEWAY_GPUS.",
            retry_after_s=BUSY_RETRY_S,
        )
