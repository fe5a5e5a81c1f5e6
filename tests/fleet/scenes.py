"""A stage for scenarios: one instance in virtual time, with servers whose manners the test names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from gateway.catalog import ModelSpec
from gateway.fleet.instance import Instance
from gateway.fleet.life import Lease
from gateway.lifecycle import State
from gateway.runtimes.base import Handle
from tests.simulator.loop import SimulatedLoop
from tests.simulator.servers import Manners, Server
from tests.simulator.world import World


def spec(**keys: Any) -> ModelSpec:
    return ModelSpec.model_validate(
        {"id": "m", "engine": "llamacpp", "runtime": "process", "weights": "weights.gguf", **keys}
    )


class Scene:
    """One model. Time passes by `after`; nothing is really waited for."""

    on_stage: ClassVar[list[Scene]] = []

    def __init__(self, *manners: Manners, keeps: bool = False, **keys: Any) -> None:
        self.loop = asyncio.get_running_loop()
        self.on_stage.append(self)
        self.spec = spec(**keys)
        self.world = World([self.spec], seed=0, keep=keeps)
        self.runtime = self.world.runtime
        self.runtime.next_manners = list(manners) or [Manners()] * 9

    @property
    def instance(self) -> Instance:
        """The model's instance, of the gateway that is there now."""
        instance = self.world.fleet.get(self.world.fleet.catalog.models[self.spec.id])
        assert isinstance(instance, Instance)
        return instance

    def is_in(self, state: State) -> bool:
        return self.instance.status.state is state

    @property
    def server(self) -> Server:
        return self.runtime.newest(self.instance.name)

    @property
    def starts(self) -> int:
        return self.runtime.starts.get(self.instance.name, 0)

    def ask(self, work_s: float = 1.0, *, max_wait_s: float | None = None) -> asyncio.Task[str]:
        """Send a request; its result is `answered`, an error code, or how it ended."""
        return self.loop.create_task(self.world.request(self.spec, work_s, max_wait_s=max_wait_s))

    @contextmanager
    def held(self, lease: Lease) -> Iterator[None]:
        """Hold a lease in the sight of the witness."""
        holding = self.world.watched[self.spec.id].holding
        holding[lease] = None
        yield
        del holding[lease]

    async def after(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def order(self, verb: str) -> Handle | None:
        """Carry out an operator's order, in the sight of the witness."""
        return await self.world.order(self.spec, verb)

    async def ready(self) -> None:
        await self.order("start")


def play(scene: Callable[[], Coroutine[Any, Any, None]], seed: int = 0) -> None:
    """Play a scenario to its end in virtual time, and see that it leaves no task behind."""
    loop = SimulatedLoop(seed)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(_to_its_end(scene))
        assert [task.get_name() for task in asyncio.all_tasks(loop)] == []


async def _to_its_end(scene: Callable[[], Coroutine[Any, Any, None]]) -> None:
    Scene.on_stage = []
    await scene()
    for one in Scene.on_stage:
        await one.world.close()
