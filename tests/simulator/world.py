"""One simulated gateway: real fleet and policies, simulated servers and callers, and a witness of the promises."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from gateway.catalog import Catalog, ModelSpec
from gateway.errors import GatewayError, ModelNotRunning
from gateway.fleet.admission import STOP_MARGIN_S
from gateway.fleet.fleet import Fleet
from gateway.fleet.gpus import Gpus
from gateway.fleet.health import CHECK_TIMEOUT_S, RECOVERY_REST_S
from gateway.fleet.identity import fingerprint, server_key, server_name
from gateway.fleet.instance import BESIDE_S, CLEAR_AGAIN_S, IDLE, Instance
from gateway.fleet.journal import Journal
from gateway.fleet.life import Lease
from gateway.fleet.placement import Device
from gateway.fleet.status import Status
from gateway.lifecycle import DOWN, SERVING, STARTING_UP, State
from gateway.relay import SECOND_ATTEMPT_S
from gateway.runtimes.base import Handle
from tests.simulator import rooms, turns
from tests.simulator.loop import SimulatedLoop
from tests.simulator.servers import BadMannersRuntime, Broke, Deaf, Manners, Server, SimulatedEngine, SimulatedProbe
from tests.simulator.watched import Room, Waiter, Watched

COME_BACK = {"MODEL_NOT_LOADED", "QUEUE_FULL", "NO_CAPACITY", "MODEL_UNHEALTHY", "SHUTTING_DOWN"}
STOPS = ("stop", "force-stop", "restart")
REFUSED = "connection refused"
CLOSED_AT_ONCE_S = 0.1
ROUNDING_S = 1e-6
OF_THE_GATEWAY = ("begin ", "serve ", "live ", "exit of ", "look at ", "remove ", "forget ", "preload ", "watch ")
"""How the names of the gateway's own tasks begin."""
FORMER = "tgi-former"
"""A server of ours that the catalog knows nothing of any more."""
CLEARED_AFTER_S = 60.0
ADOPTED = "found running"


class World:
    """A gateway in virtual time. `outcomes` counts how requests ended; `trace` tells the story of a failing seed."""

    def __init__(
        self,
        specs: list[ModelSpec],
        seed: int,
        runtime: BadMannersRuntime | None = None,
        instance: type[Instance] = Instance,
        *,
        keep: bool = False,
        devices: Sequence[Device] | None = None,
        fleet: type[Fleet] = Fleet,
        gpus: type[Gpus] = Gpus,
    ) -> None:
        self.random = Random(seed)
        self.devices = devices
        self.loop = asyncio.get_running_loop()
        assert isinstance(self.loop, SimulatedLoop)
        self.runtime = runtime or BadMannersRuntime(self.random)
        self._instance = instance
        self._fleet = fleet
        self._gpus = gpus
        self._open(specs, keep=keep)
        self.down = False
        self._came_at = 0.0
        self._change: asyncio.Task[None] | None = None
        self._beginning: asyncio.Task[None] | None = None
        self._callers: dict[asyncio.Task[Any], None] = {}
        self.outcomes: dict[str, int] = {}
        self.trace: list[str] = []
        self.broken: str | None = None
        self.evictions = 0
        self._in_vain: Counter[str] = Counter()
        """How often each model has made room since anybody was served."""
        self._checked_at = -1.0
        self.loop.after_step = self.check
        self.loop.before_time_passes = self.time_passes

    def _open(self, specs: list[ModelSpec], *, keep: bool) -> None:
        """Make a gateway, and a witness who has seen nothing of it yet."""
        probe = SimulatedProbe(self.runtime)
        self.journal = WitnessedJournal(self)
        self.fleet = self._fleet(
            Catalog(path=Path("models.yaml"), default_model=None, models={spec.id: spec for spec in specs}),
            {"llamacpp": SimulatedEngine()},
            {"process": self.runtime},
            probe,
            self.journal,
            gpus=self._gpus(self.devices),
            keep_servers=keep,
            rest=probe.rest,
            instance=self._instance,
        )
        self.watched = {spec.id: Watched(spec, since=self.loop.time()) for spec in specs}
        self.many = {spec.id for spec in specs if spec.replicas > 1}
        """Models that have or had replicas. What is watched of each model takes it for one server, so that of these
        only what concerns the GPUs and the servers themselves is."""

    # The gateway goes, and comes again (P6)

    async def kill(self, specs: list[ModelSpec], *, down_s: float = 0.0) -> None:
        """Kill the gateway with everything it was about, and start another one with these models."""
        if not self._change:
            self._change = self.loop.create_task(self._kill(specs, down_s), name="kill")
            await asyncio.shield(self._change)

    async def leave_and_come_again(self, specs: list[ModelSpec], *, down_s: float = 0.0) -> None:
        """Shut the gateway down in peace, with its servers kept, and start another one with these models."""
        if not self._change:
            self._change = self.loop.create_task(self._leave(specs, down_s), name="leave")
            await asyncio.shield(self._change)

    async def _kill(self, specs: list[ModelSpec], down_s: float) -> None:
        self.down = self.journal.unread = True
        self.tell("the gateway is killed")
        known = sorted(asyncio.all_tasks(), key=asyncio.Task.get_name)  # they come in no order
        own = [task for task in known if task.get_name().startswith(OF_THE_GATEWAY)]
        dying = own + list(self._callers)
        self.fleet.gpus.close()
        for task in dying:
            task.cancel()
        if dying:
            await asyncio.wait(dying)
        self._hear_no_more()
        for name in self.runtime.servers:
            self.runtime.newest(name).listener = Deaf()
        await self._come_again(specs, down_s)

    def _hear_no_more(self) -> None:
        """Take note of what had ended in this very tick: whoever was to hear of it is dead."""
        for instance in self.fleet._instances():
            if instance._life and instance._life.serve.done() and not instance._life.serve.cancelled():
                instance._life.serve.exception()

    async def _leave(self, specs: list[ModelSpec], down_s: float) -> None:
        await self._begun()
        self.tell("the gateway leaves")
        for watched in self.watched.values():
            watched.stop_asked = True
        await self.fleet.aclose()
        self.down = self.journal.unread = True
        await self._come_again(specs, down_s)

    async def _come_again(self, specs: list[ModelSpec], down_s: float) -> None:
        self.runtime.servers[FORMER] = [Server(FORMER, Manners(), Deaf())]
        await asyncio.sleep(down_s)
        self.tell("a gateway comes")
        self._came_at = self.loop.time()
        self._open(specs, keep=self.random.random() < 0.5)
        self._beginning = self.loop.create_task(self.fleet.begin(), name="begin the gateway")
        while not (self.fleet.unknown or self._beginning.done()):  # nobody reaches it before it has begun to look
            await asyncio.sleep(0)
        self.down, self._change = False, None

    async def _begun(self) -> None:
        """Return when the gateway's start is over: nobody shuts it down before."""
        if self._beginning:
            await asyncio.wait([self._beginning])

    def witness_adoption(self, data: Mapping[str, Any]) -> None:
        """See a server being found: one that fits is adopted, within what is left of its start; others go."""
        watched = self.watched[data["model"]]
        server, spec = self.runtime.newest(server_name(watched.spec)), watched.spec
        if (data["reason"] == ADOPTED) is not (server.alive and self._fits(spec, server)):
            self.breaks(f"P6: {spec.id}: {data['reason']}, alive: {server.alive}, fits: {self._fits(spec, server)}")
        watched.kept = watched.adopting = True

    def _see_adopted(self, watched: Watched) -> None:
        """The bounds of an adopted server begin when its runtime has said where it is, and not before (P11)."""
        if watched.adopting and self.fleet.status(watched.spec).handle:
            server, spec, now = self.runtime.newest(server_name(watched.spec)), watched.spec, self.loop.time()
            watched.adopting, watched.since = False, now
            watched.hard_stop_at = max(server.made_at + spec.start_timeout_s, now + spec.unhealthy_timeout_s)

    def _see_placed(self, watched: Watched) -> None:
        """The bounds of a start begin when it has its GPUs; who waits for it is bounded otherwise until then."""
        found, gives_up = self.fleet.gpus.place_of(watched.spec.id), server_name(watched.spec) in self.runtime.stopping
        has_place = bool(found.gpus) and rooms.is_asked_for(found, watched.spec) and not gives_up
        watched.placed = watched.placed and (has_place or not watched.spec.gpus)
        if watched.state is State.STARTING and not watched.placed and has_place:
            watched.placed, watched.placed_at = True, self.loop.time()
            never_left = self.runtime.perhaps_left.get(server_name(watched.spec))  # then its GPUs were always its own
            watched.claimed_at = 0.0 if never_left else watched.asked_at
            self._witness_return(watched)
            watched.hard_stop_at = watched.placed_at + watched.start_s

    def _witness_return(self, watched: Watched) -> None:
        """Who has made room for another does not take it again while that one could have it (P3)."""
        room = watched.made_room
        claimant = self.watched.get(room.claimant) if room else None
        never_left = self.runtime.perhaps_left.get(server_name(watched.spec))  # so that nobody else could have it
        if not room or not claimant or never_left or self.many or self.fleet.gpus.of(room.claimant):
            return
        still_waits = claimant.claims and claimant.since <= room.at
        if still_waits and turns.takes_from(claimant, watched, self.watched.values(), self.fleet):
            self.breaks(f"P3: {watched.spec.id} made room for {room.claimant}, and takes it again itself")

    def _fits(self, spec: ModelSpec, server: Server) -> bool:
        return server.fingerprint == fingerprint(SimulatedEngine(), spec)

    def _check_orphans(self) -> None:
        for name, servers in self.runtime.servers.items():
            owner = self.watched.get(name.removeprefix("tgi-"))
            if servers[-1].alive and owner and owner.spec.id not in self.many:
                self._check_orphan(owner, name)

    def _check_orphan(self, watched: Watched, name: str) -> None:
        """Once it is known what runs, whatever runs belongs to a model that knows of it."""
        known = watched.state not in DOWN or self.runtime.perhaps_left.get(name) or self.fleet.unknown
        if self.fleet.closing.done():
            return
        if not known:
            self.breaks(f"P6: {name} runs, and its model is {watched.state}")
        bound_s = CLEAR_AGAIN_S + 2 * (watched.spec.stop_grace_s + STOP_MARGIN_S)
        if watched.state in DOWN and self.loop.time() > max(watched.since, self.runtime.silent_until) + bound_s:
            self.breaks(f"P6: nobody looks for {name}, which may be left and is")

    # What callers and operators do

    async def request(self, spec: ModelSpec, work_s: float, *, max_wait_s: float | None = None) -> str:
        """Send one request that takes the server `work_s` seconds, and see to it that it ends exactly once (P4)."""
        if self.down:
            return self._ended("gateway down")
        spec = self.fleet.catalog.models.get(spec.id, spec)
        with self._called():
            return self._ended(await self._request(spec, work_s, max_wait_s))

    def _ended(self, outcome: str) -> str:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        return outcome

    @contextmanager
    def _called(self) -> Any:
        """Let the caller's task end with the gateway."""
        task = asyncio.current_task()
        assert task
        self._callers[task] = None
        try:
            yield
        finally:
            self._callers.pop(task, None)

    async def _request(self, spec: ModelSpec, work_s: float, max_wait_s: float | None) -> str:
        began, held = self.loop.time(), None
        try:
            outcome = REFUSED
            for pause_s in (0.0, SECOND_ATTEMPT_S):
                if outcome == REFUSED:
                    await asyncio.sleep(pause_s)
                    with self._waits(spec, Waiter(self.loop.time(), max_wait_s)) as left_queue:
                        async with self.fleet.get(spec).lease(max_wait_s=max_wait_s) as held:
                            left_queue()
                            outcome = await self._converse(spec, held, work_s)
        except GatewayError as error:
            outcome = error.code
            self._refused(spec, error, began)
        except asyncio.CancelledError:
            outcome = "left"
        finally:
            if held and held in held.life.leases:
                raise Broke(f"P4: {spec.id} keeps the lease of a request that has ended")
        return outcome

    async def operate(self, spec: ModelSpec, verb: str) -> None:
        """Carry out an operator's order, whatever comes of it."""
        if self.down:
            self.tell(f"operator: {verb} {spec.id} reaches nobody")
            return
        spec = self.fleet.catalog.models.get(spec.id, spec)
        try:
            with self._called():
                await self.order(spec, verb)
        except GatewayError as error:
            self.tell(f"operator: {verb} {spec.id}: {error.code}")
            self._promised(self.watched[spec.id], error)

    async def order(self, spec: ModelSpec, verb: str) -> Handle | None:
        """Carry out an operator's order: start, start-and-go, stop, force-stop or restart."""
        self.tell(f"operator: {verb} {spec.id}")
        watched, instance = self.watched[spec.id], self.fleet.get(spec)
        was_kept, is_down = watched.kept, watched.state in DOWN
        watched.asked_for = verb not in ("stop", "force-stop") or (watched.asked_for and is_down)
        watched.stop_asked = watched.stop_asked or (verb in STOPS and not is_down)
        watched.forced = watched.forced or (verb == "force-stop" and not is_down)
        watched.kept = verb not in ("stop", "force-stop") and (was_kept or watched.state not in SERVING)
        try:
            match verb:
                case "start" | "start-and-go":
                    return await self._waiting(spec, instance.start(wait=verb == "start"))
                case "restart":
                    watched.kept = True
                    return await self._waiting(spec, instance.restart())
                case _:
                    await instance.stop(force=verb == "force-stop")
        except ModelNotRunning:
            watched.kept = was_kept
            raise
        return None

    async def _waiting(self, spec: ModelSpec, order: Awaitable[Handle | None]) -> Handle | None:
        with self._waits(spec, Waiter(self.loop.time(), wants_lease=False)):
            return await order

    async def close(self) -> None:
        """Shut the gateway down, and see that nothing is left but what cannot be asked."""
        while self._change:
            await asyncio.wait([self._change])
        await self._begun()
        for watched in self.watched.values():
            watched.stop_asked = True
        await self.fleet.aclose()
        for spec in self.watched.values():
            status = self.fleet.status(spec.spec)
            if status.state not in DOWN or status.in_flight or status.queued:
                raise Broke(f"P4: after the shutdown {status.name} is {status.state}, {status.in_flight} in flight")
            for one in status.replicas or (status,):
                self._nothing_left(one.name, one.state)
        if FORMER in self.runtime.servers and self.loop.time() > self._came_at + CLEARED_AFTER_S:
            self._nothing_left(FORMER, State.STOPPED)

    def _nothing_left(self, name: str, state: State) -> None:
        left = [server for server in self.runtime.servers.get(name, []) if not server.removed]
        excused = self.fleet.keeps or self.fleet.unknown or self.runtime.perhaps_left.get(name)
        if state is State.STOPPED and left and not excused:
            raise Broke(f"P2: {name} is stopped, and its server is left (alive: {left[-1].alive})")

    def due_within(self, seconds: float) -> list[float]:
        """Return the instants, not far off, at which a timer is due: good moments to disturb."""
        now = self.loop.time()
        assert isinstance(self.loop, SimulatedLoop)
        return [when for when in sorted(self.loop.timers()) if now <= when < now + seconds]

    def tell(self, line: str) -> None:
        self.trace.append(f"{self.loop.time():12.3f}  {line}")

    # How a request meets its server

    async def _converse(self, spec: ModelSpec, lease: Lease, work_s: float) -> str:
        """Hold the lease while the server works, and let the witness know that it is held."""
        holding = self.watched[spec.id].holding
        holding[lease] = None
        self.watched[spec.id].served += 1
        self._in_vain.clear()
        try:
            return await self._work(spec, lease, work_s)
        finally:
            del holding[lease]
            self.watched[spec.id].last_use = self.loop.time()

    async def _work(self, spec: ModelSpec, lease: Lease, work_s: float) -> str:
        """Play the relay: let the server work, end when it breaks off, when the lease is cut, or with the caller."""
        cut: asyncio.Future[str] = self.loop.create_future()
        lease.on_cut = lambda error: self._cut(spec, lease, cut, error)
        server = self.runtime.newest(lease.handle.name)
        if not server.alive:
            return REFUSED

        def end(outcome: str) -> None:
            if not cut.done():
                cut.set_result(outcome)

        def ended(_: object) -> None:
            end("broken off")

        done = self.loop.call_later(work_s, end, "answered")
        server.requests[cut] = None
        server.ended.add_done_callback(ended)
        try:
            async with asyncio.timeout(spec.generation_timeout_s):
                return await cut
        except TimeoutError:
            return "generation timeout"
        finally:
            server.requests.pop(cut, None)
            server.ended.remove_done_callback(ended)
            done.cancel()

    def _cut(self, spec: ModelSpec, lease: Lease, cut: asyncio.Future[str], error: GatewayError) -> None:
        self._witness_cut(self.watched[spec.id], lease)
        self.runtime.newest(lease.handle.name).requests.pop(cut, None)
        if not cut.done():
            cut.set_result(error.code)

    @contextmanager
    def _waits(self, spec: ModelSpec, waiter: Waiter) -> Any:
        watched = self.watched[spec.id]
        watched.waiting[waiter] = None
        watched.asked_for = True

        def left() -> None:
            if waiter in watched.waiting:
                del watched.waiting[waiter]
                watched.last_waiter_left = watched.last_use = self.loop.time()

        try:
            yield left
        finally:
            left()

    # The witness

    def breaks(self, words: str) -> None:
        """Note that a promise was broken; the run ends after this step, with what was under way completed."""
        self.tell(words)
        self.broken = self.broken or words

    def saw(self, data: Mapping[str, Any]) -> None:
        if data["model"] in self.many:
            self._moved_one_of_many(data)
        else:
            self.moved(data)

    def moved(self, data: Mapping[str, Any]) -> None:
        """See one move of a model, and whether it was allowed."""
        watched, now = self.watched[data["model"]], self.loop.time()
        self.tell(f"{data['model']}: {data['from']} -> {data['to']} ({data['reason']})")
        if data["to"] == State.LOADING and data["from"] == State.STOPPED:
            self.witness_adoption(data)
        watched.before, watched.before_since = State(data["from"]), watched.since
        watched.state, watched.since = State(data["to"]), now
        if watched.state in SERVING and watched.before not in SERVING:
            watched.serving_since = watched.last_use = now
        if watched.state in DOWN:
            self._witness_removal(watched)
        if watched.before in DOWN:
            watched.start_s, watched.stall_s = watched.spec.start_timeout_s, watched.spec.stall_timeout_s
        if watched.state is State.STARTING:
            self._witness_start(watched)
        if watched.state is State.READY:
            watched.kept = False
            waiting = frozenset(waiter for waiter in watched.waiting if waiter.wants_lease)
            watched.served, watched.owed = 0, waiting if watched.before in STARTING_UP else frozenset()
        if watched.adopting and data["reason"].startswith("RUNTIME_UNAVAILABLE"):
            self.breaks(f"P11: {watched.spec.id} is given up because its runtime is silent")
        if watched.state is State.STOPPING and watched.before in STARTING_UP:
            self._witness_calling_off(watched, data["reason"])
            watched.kept = watched.kept and watched.stop_asked  # a failed start has had its chance; a restart goes on
        if watched.state is State.STOPPING and watched.before in (State.READY, State.UNHEALTHY):
            self._witness_cause(watched, data["reason"])

    def _moved_one_of_many(self, data: Mapping[str, Any]) -> None:
        """See one move of a replica: of its cause only that is judged which has to do with the GPUs."""
        key, reason = server_key(self.watched[data["model"]].spec, data.get("replica", 0)), data["reason"]
        self.tell(f"{key}: {data['from']} -> {data['to']} ({reason})")
        makes_room = reason.startswith(rooms.MAKES_ROOM)
        if data["to"] == State.STOPPING and (makes_room or reason == IDLE):
            self.runtime.let_go.add(f"tgi-{key}")
        if makes_room:
            self.evictions += 1
            spec = next(one.spec for one in self.fleet._instances() if one.key == key)
            if wrong := rooms.cause_of_room(reason.removeprefix(rooms.MAKES_ROOM), spec, self.fleet):
                self.breaks(f"P3: {wrong}")

    def _witness_start(self, watched: Watched) -> None:
        if not (watched.asked_for or watched.spec.preload):
            self.breaks(f"{watched.spec.id} was stopped, and is started though nobody asked for it")
        watched.hard_stop_at = watched.since + watched.start_s
        watched.placed = not watched.spec.gpus
        watched.forced = watched.stop_asked = False
        watched.starved_s = 0.0

    def check(self) -> None:
        """After every step: no lease is lost (P4), no state outlives its deadline (P5), no unwanted start goes on."""
        if self.runtime.broken and not self.broken:
            self.breaks(self.runtime.broken)
        if self.broken:
            raise Broke(self.broken)
        now = self.loop.time()
        if self.down or now == self._checked_at:
            return
        self._checked_at = now
        if self.devices is not None:
            rooms.check(self.devices, self.runtime, self.fleet, self.breaks)
        for watched in self.watched.values():
            at_rest = watched.state in DOWN and not watched.waiting and not watched.holding
            if not at_rest and watched.spec.id not in self.many:
                self._check_model(watched, now)
        self._check_orphans()

    def _check_model(self, watched: Watched, now: float) -> None:
        self._see_adopted(watched)
        self._see_placed(watched)
        if (deadline := self._deadline(watched)) is not None and now > deadline + ROUNDING_S:
            self.breaks(f"P5: {watched.spec.id} is {watched.state} beyond its deadline ({deadline:.3f})")
        status = self.fleet.status(watched.spec)
        if (held := status.in_flight) > len(watched.holding):
            self.breaks(f"P4: {held} leases of {watched.spec.id} are out, and {len(watched.holding)} are held")
        self._check_waiting(watched, status, now)
        if watched.state in STARTING_UP and now > self._unwanted_from(watched) + ROUNDING_S:
            self.breaks(f"P8: nobody wants {watched.spec.id} any more, and it is {watched.state}")

    def time_passes(self, seconds: float) -> None:
        """Before time passes, with all done that can be done by now: count who waits for GPUs though it is his turn."""
        if self.devices is None or self.down or self.fleet.closing.done() or self.many:
            return
        models, now = self.watched.values(), self.loop.time()
        for watched in models:
            self._see_placed(watched)
        for watched in turns.starving(models, self.fleet, now):
            watched.starved_s += seconds
            if watched.starved_s > turns.bound_s(models) + ROUNDING_S:
                self.breaks(f"P3: {watched.spec.id} waits for GPUs since {watched.asked_at:.3f}, and it is its turn")

    def _check_waiting(self, watched: Watched, status: Status, now: float) -> None:
        """Nobody waits beside a free slot (P4) or beyond a bound (P7), and nothing idles beyond its time-out."""
        spec = watched.spec
        held = status.held_for is not None and self._waits_for_gpus(status.held_for)
        if watched.state is State.READY and status.queued and status.in_flight < spec.max_concurrency and not held:
            self.breaks(f"P4: {status.queued} requests for {spec.id} wait beside a free slot")
        for waiter in watched.waiting:
            if waiter.wants_lease and now > self._waits_until(watched, waiter) + ROUNDING_S:
                self.breaks(f"P7: a request for {spec.id} waits since {waiter.asked_at:.3f}")
        self._check_idle(watched, now)

    def _check_idle(self, watched: Watched, now: float) -> None:
        spec = watched.spec
        if spec.pinned or spec.idle_timeout_s is None or watched.state not in SERVING:
            return
        if self.fleet.gpus.starts_beside(spec.id):  # it may have to stay until that is over
            watched.last_use = max(watched.last_use, now - spec.idle_timeout_s + 2 * BESIDE_S)
        idle = watched.state is State.READY and not watched.holding and not watched.waiting
        if idle and now > watched.last_use + spec.idle_timeout_s + ROUNDING_S:
            self.breaks(f"{spec.id} is idle since {watched.last_use:.3f}, and still runs")

    def _waits_for_gpus(self, model: str) -> bool:
        return bool(self.fleet.gpus.why(model))

    def _waits_until(self, watched: Watched, waiter: Waiter) -> float:
        spec = watched.spec
        leaving_s = spec.drain_timeout_s + spec.stop_grace_s + STOP_MARGIN_S
        latest = waiter.asked_at + leaving_s + spec.start_timeout_s + spec.queue_timeout_s
        if watched.state in SERVING:
            return min(latest, max(waiter.asked_at, watched.serving_since) + spec.queue_timeout_s)
        if watched.state is State.STARTING and not watched.placed:
            latest = min(latest, max(waiter.asked_at, watched.since) + spec.queue_timeout_s)
        return latest if waiter.max_wait_s is None else min(latest, waiter.asked_at + waiter.max_wait_s)

    def _witness_removal(self, watched: Watched) -> None:
        name = f"tgi-{watched.spec.id}"
        if watched.before is not State.STOPPING:
            if not (self.fleet.keeps and self.fleet.closing.done()):
                self.breaks(f"P6: {name} is let go, and the gateway does not end")
        elif self.runtime.alive(name) and not self.runtime.perhaps_left.get(name):
            self.breaks(f"P2: {name} is {watched.state}, and its server runs")

    def _deadline(self, watched: Watched) -> float | None:
        spec = watched.spec
        match watched.state:
            case State.LOADING if watched.adopting:
                return None
            case State.STARTING if not watched.placed:
                return None
            case State.STARTING | State.LOADING:
                last_sign = max(watched.since, watched.placed_at, self.runtime.last_sign.get(f"tgi-{spec.id}", 0.0))
                return min(watched.hard_stop_at, last_sign + watched.stall_s)
            case State.UNHEALTHY:
                return watched.since + spec.unhealthy_timeout_s
            case State.DRAINING:
                return watched.since + spec.drain_timeout_s
            case State.STOPPING:
                return watched.since + spec.stop_grace_s + STOP_MARGIN_S
            case _:
                return None

    def _unwanted_from(self, watched: Watched) -> float:
        kept = watched.kept or watched.spec.preload or watched.spec.pinned
        kept_until = 0.0
        if kept and not watched.placed:  # a wish counts for as long as a start may take
            began = watched.since if watched.state is State.STARTING else watched.before_since
            kept, kept_until = False, began + watched.start_s
        if watched.waiting or kept:
            return float("inf")
        return max(watched.last_waiter_left, watched.promised_until, kept_until) + watched.spec.abandon_after_s

    def _witness_calling_off(self, watched: Watched, reason: str) -> None:
        failed = reason.partition(":")[0].isupper()  # an error's code
        server = self.runtime.servers.get(server_name(watched.spec), [None])[-1]
        discarded = server is not None and not (server.alive and self._fits(watched.spec, server))
        if (
            not failed
            and not discarded
            and not watched.stop_asked
            and self.loop.time() < self._unwanted_from(watched) - ROUNDING_S
        ):
            self.breaks(f"P8: the start of {watched.spec.id} is called off, and somebody wants it")

    def _witness_cause(self, watched: Watched, reason: str) -> None:
        """A ready server goes for a cause: somebody's order, idleness, its own end, or lasting silence (P11)."""
        server = self.runtime.newest(f"tgi-{watched.spec.id}")
        idle = reason == IDLE and not server.requests
        if idle or reason.startswith(rooms.MAKES_ROOM):
            self.runtime.let_go.add(server.name)
        if reason.startswith(rooms.MAKES_ROOM):
            self._witness_room(watched, reason.removeprefix(rooms.MAKES_ROOM))
            return
        silent = watched.before is State.UNHEALTHY and self._was_silent(server)
        if not (watched.stop_asked or idle or not server.alive or silent):
            self.breaks(f"P11: {watched.spec.id} is stopped ({reason}), and its server is well")

    def _witness_room(self, watched: Watched, claimant: str) -> None:
        """Who makes room is idle, has cause to, and has had its turn (P3)."""
        self.evictions += 1
        self._in_vain[watched.spec.id] += 1
        watched.made_room = Room(claimant, self.loop.time())
        wrong = rooms.cause_of_room(claimant, watched.spec, self.fleet) or turns.wrong_time(watched)
        if wrong:
            self.breaks(f"P3: {wrong}")
        elif not self.many and turns.is_needless(self.watched[claimant], watched, self.watched.values(), self.fleet):
            self.breaks(f"P3: {watched.spec.id} makes room for {claimant}, and those who leave already suffice")
        if self._in_vain[watched.spec.id] > turns.MOST_IN_VAIN:
            self.breaks(f"P3: {watched.spec.id} makes room again and again, and nobody has been served meanwhile")

    def _was_silent(self, server: Server) -> bool:
        """Say whether it was silent when it was last asked, at the latest."""
        asked_at = self.loop.time() - CHECK_TIMEOUT_S - RECOVERY_REST_S - ROUNDING_S
        return server.hung_since is not None or server.recovered_at >= asked_at

    def _witness_cut(self, watched: Watched, lease: Lease) -> None:
        """A server that serves is only stopped for the reasons that promise P1 names."""
        if watched.spec.id in self.many:
            return
        drained = watched.before is State.DRAINING and self._stayed(watched) >= watched.spec.drain_timeout_s
        silent = watched.before is State.UNHEALTHY and self._stayed(watched) >= watched.spec.unhealthy_timeout_s
        late_silent = watched.before is State.DRAINING and self._was_silent(self.runtime.newest(lease.handle.name))
        ended = not self.runtime.newest(lease.handle.name).alive
        if not (drained or silent or late_silent or ended or watched.forced):
            self.breaks(f"P1: a request of {watched.spec.id} is cut for no good reason")

    def _stayed(self, watched: Watched) -> float:
        return watched.since - watched.before_since + ROUNDING_S

    def _refused(self, spec: ModelSpec, error: GatewayError, began: float) -> None:
        """A refusal is typed, in time, and says when to come back where that helps (P7)."""
        watched, now = self.watched[spec.id], self.loop.time()
        self._promised(watched, error)
        if error.code in COME_BACK and not error.retry_after_s:
            self.breaks(f"P7: {error.code} without Retry-After")
        if spec.id in self.many:
            return
        hopeless = "pinned" in error.detail or "other programs" in error.detail
        if error.code == "NO_CAPACITY" and not hopeless and now - began < spec.queue_timeout_s - ROUNDING_S:
            self.breaks(f"P7: a request for {spec.id} is refused before its time")

    def _promised(self, watched: Watched, error: GatewayError) -> None:
        until = self.loop.time() + 2 * (error.retry_after_s or 0)
        watched.promised_until = max(watched.promised_until, until)

    async def leave(self, task: asyncio.Task[str]) -> None:
        """Let a caller go, and see that the gateway lets go of the server at once (P10)."""
        task.cancel()
        left_at = self.loop.time()
        await asyncio.wait([task])
        if self.loop.time() - left_at > CLOSED_AT_ONCE_S:
            self.breaks("P10: a caller left, and its request went on")


class WitnessedJournal(Journal):
    """The gateway's journal, read by the witness as it is written."""

    def __init__(self, world: World) -> None:
        super().__init__(world.loop.time)
        self._world = world
        self.unread = False

    def write(self, kind: str, **data: Any) -> None:
        super().write(kind, **data)
        if kind == "state" and not self.unread:
            self._world.saw(data)
