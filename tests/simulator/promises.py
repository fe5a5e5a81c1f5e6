"""Days in the life of a gateway, drawn by seed, with the promises watched after every step."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from random import Random

from gateway.catalog import ModelSpec
from gateway.fleet.fleet import Fleet
from gateway.fleet.gpus import Gpus, demand_of
from gateway.fleet.instance import Instance
from gateway.fleet.placement import GIB, Device, misfit
from tests.simulator.changes import ChangingWorld, edit
from tests.simulator.loop import SimulatedLoop
from tests.simulator.servers import BadMannersRuntime, Broke
from tests.simulator.world import World

DAY_S = 24 * 3600.0
REQUESTS, ORDERS, FAULTS, EDITS = 300, 3, 2, 2
CROWDS, CROWD = 2, 90
"""On a day with GPUs so many times so many of the requests ask for more models in turn than there is room for."""
WITH_GPUS = 0.75


@dataclass(frozen=True, slots=True)
class Day:
    """What one simulated day came to. `broke` is the broken promise, if one was."""

    seed: int
    broke: str | None
    outcomes: dict[str, int]
    starts: int
    trace: list[str]
    gpus: int
    evictions: int


def simulate(
    seed: int,
    *,
    instance: type[Instance] = Instance,
    runtime: type[BadMannersRuntime] = BadMannersRuntime,
    fleet: type[Fleet] = Fleet,
    gpus: type[Gpus] = Gpus,
) -> Day:
    """Live one day with this seed. The same seed gives the same day."""
    loop = SimulatedLoop(seed)
    random = Random(seed)
    story: list[World] = []
    errors: list[BaseException] = []
    loop.set_exception_handler(lambda _, context: errors.append(context.get("exception") or Broke(context["message"])))
    broke = None
    made = partial(ChangingWorld, instance=instance, fleet=fleet, gpus=gpus)
    try:
        with _our_faults(errors), asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(_day(seed, random, story, made, runtime))
            _nothing_left(loop)
    except (Exception, asyncio.CancelledError) as error:
        broke = _words(error)
    if errors and not broke:
        broke = f"unhandled: {_words(errors[0])}"
    world = story[0]
    starts, there = sum(world.runtime.starts.values()), len(world.devices or ())
    return Day(seed, broke, world.outcomes, starts, world.trace, there, world.evictions)


async def _day(
    seed: int, random: Random, story: list[World], made: Callable[..., ChangingWorld], runtime: type[BadMannersRuntime]
) -> None:
    devices = _devices(random) if random.random() < WITH_GPUS else None
    most_replicas = random.choice([1, 1, 1, 1, 3])
    specs = [
        _spec(random, number, devices, most_replicas)
        for number in range(random.randint(5, 40) if devices else random.randint(2, 4))
    ]
    world = made(specs, seed, runtime(random), devices=devices)
    story.append(world)
    crowds = [random.uniform(0, DAY_S) for _ in range(CROWDS)] if devices else []
    bursts = _bursts(random, REQUESTS - CROWD * len(crowds))
    busy = crowds * 5 + [when for when, _ in bursts]
    async with asyncio.TaskGroup() as group:
        for _ in range(ORDERS):
            group.create_task(_order(world, random, _moment(random, busy)))
        for _ in range(FAULTS):
            group.create_task(_fault(world, random, _moment(random, busy)))
        for _ in range(EDITS):
            group.create_task(_edit(world, random, _moment(random, busy)))
        for when, size in bursts:
            group.create_task(_burst(world, random, when, size))
        for when in crowds:
            group.create_task(_crowd(world, random, when))
    await world.close()


def _bursts(random: Random, callers: int) -> list[tuple[float, int]]:
    """Return when callers arrive, and how many at once."""
    sizes: list[int] = []
    while (left := callers - sum(sizes)) > 0:
        sizes.append(min(left, random.choice([1, 1, 2, 5, 20, 60])))
    return [(random.uniform(0, DAY_S), size) for size in sizes]


def _moment(random: Random, busy: list[float]) -> float:
    """Return a moment of the day, rather one at which much is going on."""
    at_once = random.choice(busy) + random.expovariate(1 / random.choice([20, 600]))
    return at_once if random.random() < 0.7 else random.uniform(0, DAY_S)


def _devices(random: Random) -> list[Device]:
    """Return the GPUs of a machine, which are of one size as often as not."""
    sizes = random.choice([[24], [80], [24, 40, 80]])
    return [Device(str(number), random.choice(sizes) * GIB) for number in range(random.choice([2, 2, 3, 4, 6, 8]))]


def _on_gpus(random: Random, devices: list[Device]) -> dict[str, object]:
    """Return what a model asks for: GPUs whole or in part, some by name; a few can never fit."""
    count = min(random.choice([1, 1, 1, 1, 2, 4]), len(devices))
    named = [device.id for device in random.sample(devices, count)]
    memory = random.choice([None, "4GiB", "10GiB", "14GiB", "22GiB", "36GiB"])
    return {"gpus": named if random.random() < 0.15 else count, "gpu_memory": memory}


def _spec(random: Random, number: int, devices: list[Device] | None, most_replicas: int) -> ModelSpec:
    """Return a model with bounds of its own, some of them tight."""
    return ModelSpec.model_validate(
        {
            "id": f"model-{number}",
            "engine": "llamacpp",
            "runtime": "process",
            "weights": f"weights-{number}.gguf",
            "start_timeout": random.choice([60.0, 300.0, 1200.0]),
            "stall_timeout": random.choice([20.0, 180.0]),
            "generation_timeout": random.choice([20.0, 60.0, 60.0, 250.0]),
            "queue_timeout": random.choice([5.0, 60.0, 300.0]),
            "drain_timeout": random.choice([2.0, 60.0]),
            "stop_grace": random.choice([1.0, 10.0]),
            "idle_timeout": random.choice([30.0, 900.0, 900.0, "never" if number else 3600.0]),
            "abandon_after": random.choice([5.0, 60.0]),
            "unhealthy_timeout": random.choice([10.0, 60.0]),
            "max_concurrency": random.choice([1, 4, 16]),
            "max_queue": random.choice([0, 8, 256]),
            "preload": random.random() < (0.05 if devices else 0.1),
            "pinned": random.random() < (0.03 if devices else 0.1),
            "replicas": random.choice([1, most_replicas, random.randint(1, most_replicas)]),
            **(_on_gpus(random, devices) if devices else {}),
        }
    )


async def _burst(world: World, random: Random, when: float, size: int) -> None:
    """Let `size` callers arrive within a short time, at a moment when something else is due as often as not."""
    await _until(world, random, when)
    spec = random.choice(list(world.fleet.catalog.models.values()))
    spread_s = random.choice([0.0, 0.0, 1.0, 60.0])
    async with asyncio.TaskGroup() as group:
        for _ in range(size):
            group.create_task(_anyone(world, random, spec, random.uniform(0, spread_s)))


async def _crowd(world: World, random: Random, when: float) -> None:
    """Let callers arrive for several models in turn, who want more GPUs than there are, and have time."""
    await _until(world, random, when)
    models = _contending(world, random)
    gap_s = random.choice([5.0, 15.0, 40.0])
    async with asyncio.TaskGroup() as group:
        for _ in range(CROWD):
            await asyncio.sleep(random.expovariate(1 / gap_s))
            max_wait_s = random.choice([None] * 9 + [60.0])
            work_s = random.choice([0.5, 5.0, 25.0, 55.0, 150.0])
            group.create_task(_caller(world, random, random.choice(models), 0.0, max_wait_s, work_s))


def _contending(world: World, random: Random) -> list[ModelSpec]:
    """Return some models that can run at all, a few more than there are GPUs."""
    assert world.devices is not None
    specs = [
        spec for spec in world.fleet.catalog.models.values() if misfit(demand_of(spec), world.devices) is None
    ] or list(world.fleet.catalog.models.values())
    return random.sample(specs, min(len(specs), len(world.devices) + random.randint(1, 4)))


async def _anyone(world: World, random: Random, spec: ModelSpec, after_s: float) -> None:
    max_wait_s = random.choice([None, None, None, 0.0, 3.0, 30.0])
    await _caller(world, random, spec, after_s, max_wait_s, random.choice([0.0, 0.5, 5.0, 25.0]))


async def _caller(
    world: World, random: Random, spec: ModelSpec, after_s: float, max_wait_s: float | None, work_s: float
) -> None:
    await asyncio.sleep(after_s)
    request = asyncio.create_task(world.request(spec, work_s, max_wait_s=max_wait_s))
    if random.random() < 0.25:
        await asyncio.wait([request], timeout=_patience_s(world, random))
        await world.leave(request)
    if not request.cancelled():
        with contextlib.suppress(asyncio.CancelledError):
            await request


def _patience_s(world: World, random: Random) -> float:
    """Return how long a caller stays, as often as not until the instant at which something else is due."""
    stays_s = random.choice([0.0, 0.5, 5.0, 40.0])
    due = world.due_within(120.0)
    return random.choice(due) - world.loop.time() if due and random.random() < 0.5 else stays_s


async def _order(world: World, random: Random, when: float) -> None:
    await _until(world, random, when)
    spec = random.choice(list(world.fleet.catalog.models.values()))
    verb = random.choice(["start", "start-and-go", "stop", "stop", "force-stop", "restart"])
    order = asyncio.create_task(world.operate(spec, verb))
    if random.random() < 0.2:
        await asyncio.wait([order], timeout=random.choice([0.0, 2.0]))
        order.cancel()
    await asyncio.wait([order])
    if not order.cancelled() and (error := order.exception()):
        raise error


async def _edit(world: ChangingWorld, random: Random, when: float) -> None:
    await _until(world, random, when)
    await edit(world, random)


async def _fault(world: World, random: Random, when: float) -> None:
    await _until(world, random, when)
    running = [server for name in world.runtime.servers for server in world.runtime.alive(name)]
    kind = random.choice(["silence", "death", "hang", "kill", "leave"])
    world.tell(f"fault: {kind}")
    if kind in ("kill", "leave"):
        specs = [_perhaps_changed(random, spec) for spec in world.fleet.catalog.models.values()]
        if random.random() < 0.3:
            world.runtime.fall_silent(random.choice([5.0, 60.0]))
        come_again = world.kill if kind == "kill" else world.leave_and_come_again
        await come_again(specs, down_s=random.choice([0.0, 1.0, 30.0, 700.0]))
    elif kind == "silence" or not running:
        world.runtime.fall_silent(random.choice([10.0, 60.0, 90.0]))
    elif kind == "death":
        random.choice(running).die("killed by SIGKILL")
    else:
        random.choice(running).hang()


def _perhaps_changed(random: Random, spec: ModelSpec) -> ModelSpec:
    """Return the spec of the next gateway's catalog, which asks for another server now and then."""
    return spec.model_copy(update={"args": {"version": random.random()}}) if random.random() < 0.25 else spec


async def _until(world: World, random: Random, when: float) -> None:
    """Sleep until `when`, or to the very instant at which something else is due about then."""
    await asyncio.sleep(max(when - world.loop.time(), 0))
    due = world.due_within(1000.0)
    if due and random.random() < 0.5:
        await asyncio.sleep(random.choice(due) - world.loop.time())


def _words(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) if isinstance(error, Broke) else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _our_faults(errors: list[BaseException]) -> Iterator[None]:
    """Collect what the gateway logs as its own fault, with everything else of the log kept quiet."""
    log = logging.getLogger("gateway")
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append((record.exc_info or (None, None))[1] or Broke(record.getMessage()))  # type: ignore[method-assign]
    log.addHandler(handler)
    propagate, log.propagate = log.propagate, False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagate


def _nothing_left(loop: asyncio.AbstractEventLoop) -> None:
    if tasks := asyncio.all_tasks(loop):
        raise Broke(f"tasks are left: {sorted(task.get_name() for task in tasks)}")
