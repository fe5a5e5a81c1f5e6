"""What a changed catalog does to its models, in virtual time; the witness of P9 looks on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest

from gateway.catalog import Catalog, ModelSpec
from gateway.errors import CatalogError, GatewayError, StartFailed, UnknownModel
from gateway.fleet.changes import changes_between, known_by_sight
from gateway.fleet.fetch import Fetch
from gateway.fleet.figures import FiguresOf, Silent, silent
from gateway.fleet.fleet import Fleet
from gateway.fleet.health import Answer
from gateway.fleet.journal import Journal
from gateway.lifecycle import State
from gateway.runtimes.base import Launch
from tests.fleet.scenes import Scene, play, spec
from tests.fleet.test_fetch import Downloads, OneProgram, told
from tests.simulator.changes import ChangingWorld, catalog_of
from tests.simulator.servers import NEVER, BadMannersRuntime, Deaf, Manners, Server, SimulatedEngine, SimulatedProbe

OTHER = spec(id="other", weights="other.gguf")
BAD = CatalogError(["models.yaml: m: gpus: must be a number", "models.yaml: colour: is no key"])


class Edited(Scene):
    """One model in a catalog that changes."""

    def __init__(self, *manners: Manners, **keys: Any) -> None:
        super().__init__(*manners, **keys)
        self.on_stage.remove(self)
        self.world: ChangingWorld = ChangingWorld([self.spec], seed=0)
        self.on_stage.append(self)
        self.runtime = self.world.runtime
        self.runtime.next_manners = list(manners) or [Manners()] * 9
        self.keys = keys

    async def begun(self) -> Edited:
        await self.world.fleet.begin()
        await self.after(2)
        return self

    def becomes(self, **keys: Any) -> None:
        """Change the model's entry."""
        self.take(spec(**{**self.keys, **keys}))

    def take(self, *specs: ModelSpec) -> None:
        self.world.take(catalog_of(specs))

    def another_server(self, **keys: Any) -> None:
        self.becomes(args={"version": self.loop.time()}, **keys)

    def cools_down(self) -> bool:
        return self.instance.status.retry_after_s is not None

    def has(self, state: State) -> bool:
        """Say whether the model is in this state, whatever the catalog has to say of it."""
        return self.world.fleet.status(self.spec).state is state

    def events(self) -> list[Mapping[str, Any]]:
        return [entry.data for entry in self.world.journal._entries if entry.kind == "catalog"]


def test_only_entries_that_say_something_else_count_as_changed() -> None:
    one, two, gone, new = (spec(id=name) for name in ("one", "two", "gone", "new"))
    same = ModelSpec.model_validate({"id": "one", "engine": "llamacpp", "weights": "weights.gguf", "pinned": False})
    before = {"one": one, "two": two, "gone": gone}

    found = changes_between(before, {"new": new, "two": spec(id="two", max_queue=1), "one": same})

    assert found.ids() == {"added": ["new"], "changed": ["two"], "removed": ["gone"]}
    assert found.removed == (gone,)
    assert not changes_between(before, {"gone": gone, "two": two, "one": same})


def test_what_did_not_change_stays_the_very_object_that_it_was_and_in_the_new_order() -> None:
    one, two = spec(id="one"), spec(id="two")
    changed, new = spec(id="two", max_queue=1), spec(id="new")

    found = known_by_sight({"one": one, "two": two}, {"new": new, "two": changed, "one": spec(id="one")})

    assert list(found) == ["new", "two", "one"]
    assert found["one"] is one
    assert (found["two"], found["new"]) == (changed, new)


def test_a_catalog_read_again_that_says_the_same_changes_no_snapshot_and_names_still_lead_to_their_models() -> None:
    async def scene() -> None:
        on = await Edited(aliases=["nick"]).begun()
        fleet = on.world.fleet
        before = fleet.catalog.models["m"], fleet.status(fleet.catalog.models["m"])
        on.becomes()

        assert fleet.catalog.resolve("nick") is before[0]
        assert fleet.status(before[0]).spec is before[0]

    play(scene)


def test_what_concerns_the_gateway_alone_holds_at_once_and_the_server_stays() -> None:
    async def scene() -> None:
        one = await Edited(max_concurrency=1, idle_timeout=900).begun()
        await one.ready()
        instance, server, request, waiting = one.instance, one.server, one.ask(20), one.ask(5)
        await one.after(1)

        one.becomes(max_concurrency=2, idle_timeout=50, parameters={"seed": 7})

        assert one.instance is instance
        assert await waiting == "answered"  # beside the other one
        assert not request.done()
        assert await request == "answered"
        assert instance.spec.parameters == {"seed": 7}
        await one.after(49)
        assert one.is_in(State.READY)
        await one.after(3)
        assert one.is_in(State.STOPPED)
        assert not server.alive
        assert one.starts == 1

    play(scene)


def test_a_running_servers_checks_come_as_often_as_the_new_entry_says() -> None:
    async def scene() -> None:
        one = await Edited(Manners(hang_lasts_s=NEVER), health_interval=10, health_failures=100).begun()
        await one.ready()
        one.becomes(health_interval=2, health_failures=2)
        one.server.hang()
        await one.after(60)
        assert one.has(State.UNHEALTHY)

    play(scene)


def test_a_request_finishes_on_the_server_before_and_those_who_wait_get_the_next_one() -> None:
    async def scene() -> None:
        one = await Edited().begun()
        await one.ready()
        former, running = one.server, one.ask(30)
        await one.after(1)

        one.another_server()
        waiting = one.ask()

        assert one.has(State.DRAINING)
        await one.after(20)
        assert former.alive
        assert await running == "answered"
        assert await waiting == "answered"
        assert one.server is not former
        assert one.starts == 2

    play(scene)


@pytest.mark.parametrize(("keys", "starts"), [({}, 1), ({"pinned": True}, 2), ({"preload": True}, 2)])
def test_another_server_is_started_at_once_if_there_is_a_reason(keys: dict[str, Any], starts: int) -> None:
    async def scene() -> None:
        one = await Edited(**keys).begun()
        await one.ready()
        one.another_server()
        await one.after(100)
        assert one.starts == starts
        assert one.has(State.READY if starts == 2 else State.STOPPED)
        assert await one.ask() == "answered"

    play(scene)


def test_a_start_that_somebody_waits_for_begins_afresh() -> None:
    async def scene() -> None:
        one = await Edited(Manners(load_s=NEVER), Manners()).begun()
        request, order = one.ask(), one.loop.create_task(one.world.operate(one.spec, "start"))
        await one.after(10)

        one.another_server()

        assert await request == "answered"
        await order
        assert one.starts == 2

    play(scene)


def test_a_changed_entry_ends_a_cool_down() -> None:
    async def scene() -> None:
        one = await Edited(*[Manners(fails_to_start=True)] * 4, Manners()).begun()
        for _ in range(4):
            await one.after(100)
            assert await one.ask() == "START_FAILED"
        assert one.cools_down()

        one.becomes(args={"mended": True})

        assert not one.cools_down()
        assert one.starts == 4
        assert await one.ask() == "answered"

    play(scene)


@pytest.mark.parametrize("mended", [{"args": {"mended": True}}, {"start_timeout": 30}])
def test_a_failed_model_that_is_preloaded_starts_when_it_is_mended(mended: dict[str, Any]) -> None:
    async def scene() -> None:
        one = await Edited(Manners(fails_to_start=True), Manners(), preload=True).begun()
        await one.after(10)
        assert one.has(State.FAILED)
        one.becomes(**mended)
        await one.after(20)
        assert one.has(State.READY)

    play(scene)


def test_what_an_operator_stopped_stays_down_whatever_the_catalog_says_of_it() -> None:
    async def scene() -> None:
        one = await Edited(preload=True).begun()
        await one.ready()
        await one.order("stop")
        one.another_server()
        await one.after(100)
        assert one.has(State.STOPPED)
        one.becomes(preload=False)
        one.becomes(preload=True)
        await one.after(100)
        assert one.has(State.READY)

    play(scene)


def test_a_removed_model_finishes_what_it_has_and_refuses_the_rest() -> None:
    async def scene() -> None:
        one = await Edited(max_concurrency=1).begun()
        await one.ready()
        instance, server, running, waiting = one.instance, one.server, one.ask(30), one.ask()
        await one.after(1)

        one.take(OTHER)

        assert await waiting == "MODEL_NOT_FOUND"
        assert await one.ask() == "MODEL_NOT_FOUND"
        for ask in (instance.start(), instance.restart()):
            with pytest.raises((UnknownModel, GatewayError)) as refused:
                await ask
            assert refused.value.code == "MODEL_NOT_FOUND"
        with pytest.raises(UnknownModel, match="m is no longer in the catalog"):
            one.world.fleet.get(one.spec)
        assert await running == "answered"
        await one.after(1)
        assert not server.alive
        assert [status.spec.id for status in one.world.fleet.statuses()] == ["other"]

    play(scene)


def test_one_that_waits_in_a_start_is_refused_when_the_model_is_removed() -> None:
    async def scene() -> None:
        one = await Edited(Manners(load_s=NEVER)).begun()
        waiting = one.ask()
        await one.after(10)
        one.take(OTHER)
        assert await waiting == "MODEL_NOT_FOUND"
        await one.after(5)
        assert one.has(State.STOPPED)

    play(scene)


def test_a_model_that_comes_back_while_it_leaves_never_has_two_servers() -> None:
    async def scene() -> None:
        one = await Edited().begun()
        await one.ready()
        instance, former, running = one.instance, one.server, one.ask(30)
        await one.after(1)

        one.take(OTHER)
        await one.after(1)
        one.take(OTHER, one.spec)
        again = one.ask()

        assert one.instance is instance
        assert await running == "answered"
        assert await again == "answered"
        assert one.server is not former

    play(scene)


def test_a_removed_model_is_forgotten_when_nothing_is_left_of_it() -> None:
    async def scene() -> None:
        one = await Edited().begun()
        await one.ready()
        instance, running = one.instance, one.ask(30)
        await one.after(1)

        one.take(OTHER)
        await one.after(10)
        one.take(OTHER, one.spec)
        assert one.instance is instance  # its request is under way
        one.take(OTHER)
        assert await running == "answered"
        await one.after(10)
        one.take(OTHER, one.spec)
        assert one.instance is not instance
        assert await one.ask() == "answered"

    play(scene)


def test_a_removed_model_of_which_something_is_perhaps_left_is_not_forgotten() -> None:
    async def scene() -> None:
        here, _ = two_runtimes()
        fleet = fleet_of({"docker": here}, tgi(stop_grace=10), OTHER)
        await fleet.begin()
        await fleet.get(tgi()).start()
        instance = fleet.get(tgi())
        here.fall_silent(100)

        fleet.change(catalog_of([OTHER]))
        await asyncio.sleep(60)
        fleet.change(catalog_of([OTHER, tgi()]))
        assert fleet.get(tgi()) is instance
        fleet.change(catalog_of([OTHER]))
        await asyncio.sleep(100)
        assert not here.alive("tgi-m")
        fleet.change(catalog_of([OTHER, tgi()]))
        assert fleet.get(tgi()) is not instance
        await fleet.aclose()

    play(scene)


@pytest.mark.parametrize("serves", [True, False])
def test_a_model_does_not_move_to_a_runtime_where_a_server_of_its_name_is_still_being_removed(*, serves: bool) -> None:
    async def scene() -> None:
        here, there = BadMannersRuntime(Random(0)), BadMannersRuntime(Random(0))
        there.next_manners = [Manners()] * 9
        there.servers["tgi-m"] = [Server("tgi-m", Manners(leaves_s=9.0), Deaf(), Launch("tgi-m"))]
        other = spec(id="other", weights="other.gguf", runtime="docker", engine="tgi", hf_name="a")
        here.next_manners = [Manners(make_s=0.1, load_s=0.5, fails_to_start=not serves)] * 9
        before, after = spec(), tgi()
        fleet = fleet_of({"process": here, "docker": there}, before, other)
        await fleet.begin()
        with suppress(StartFailed):
            await fleet.get(before).start()
        state = fleet.status(before).state

        with pytest.raises(CatalogError, match="an earlier server tgi-m is still there on runtime docker: leave"):
            fleet.change(catalog_of([after, other]))
        assert fleet.status(before).state is state
        await asyncio.sleep(20)
        assert not there.alive("tgi-m")
        fleet.change(catalog_of([after, other]))
        await asyncio.sleep(20)
        await fleet.get(after).start()
        assert there.alive("tgi-m")
        await fleet.aclose()

    play(scene)


def test_a_model_that_comes_back_is_counted_by_figures_that_are_not_forgotten() -> None:
    async def scene() -> None:
        here, _ = two_runtimes()
        made: list[Silent] = []

        def figures(_: str) -> Silent:
            made.append(Silent())
            return made[-1]

        fleet = fleet_of({"docker": here}, tgi(), OTHER, figures=figures)
        await fleet.begin()
        instance = fleet.get(tgi())
        await instance.start()
        async with instance.lease():
            fleet.change(catalog_of([OTHER]))
            fleet.change(catalog_of([OTHER, tgi()]))
            assert fleet.get(tgi()) is instance
            assert instance.figures is made[1]
        await fleet.aclose()

    play(scene)


def test_an_added_model_is_there_at_once_and_preloaded_if_it_says_so() -> None:
    async def scene() -> None:
        one = await Edited().begun()
        new, eager = spec(id="new"), spec(id="eager", weights="e.gguf", preload=True, aliases=["E"])
        one.take(one.spec, new.model_copy(update={"weights_source": "n.gguf"}), eager)
        assert await one.world.request(new, 1.0) == "answered"
        assert one.world.fleet.status(eager).state is State.READY
        assert one.world.fleet.catalog.resolve("E").id == "eager"

    play(scene)


def test_of_changes_in_quick_succession_the_last_one_wins() -> None:
    async def scene() -> None:
        one = await Edited().begun()
        await one.ready()
        running = one.ask(30)
        await one.after(1)
        for version in (1, 2, 3):
            one.becomes(args={"version": version}, max_queue=version)
        waiting = one.ask()
        await one.after(1)
        one.becomes(args={"version": 4}, queue_timeout=77)
        assert await running == "answered"
        assert await waiting == "answered"
        assert one.starts == 2
        assert (one.instance.spec.args, one.instance.spec.queue_timeout_s) == ({"version": 4}, 77)
        assert one.instance.spec.max_queue == 256

    play(scene)


def test_a_change_that_is_taken_back_leaves_a_server_that_fits() -> None:
    async def scene() -> None:
        one = await Edited().begun()
        await one.ready()
        running = one.ask(30)
        await one.after(1)
        one.another_server()
        one.take(one.spec)
        assert await running == "answered"
        assert await one.ask() == "answered"
        assert one.starts == 2

    play(scene)


def test_a_bad_catalog_is_told_of_until_it_is_mended_and_changes_nothing() -> None:
    async def scene() -> None:
        one = await Edited(generation_timeout=200).begun()
        await one.ready()
        running = one.ask(100)
        await one.after(1)
        one.world.file.save(BAD)
        await one.after(5)
        assert one.world.fleet.catalog_error is BAD
        assert await running == "answered"
        one.world.file.save(catalog_of([one.spec, spec(id="new", weights="n.gguf")]))
        await one.after(5)
        told, mended = one.events()
        assert told["catalog_error"] == list(BAD.complaints)
        assert (mended["catalog_error"], mended["added"], mended["changed"]) == (None, ["new"], [])

    play(scene)


def test_a_catalog_that_says_the_same_is_no_event() -> None:
    async def scene() -> None:
        one = await Edited().begun()
        one.take(spec())
        one.take(*reversed(list(one.world.fleet.catalog.models.values())))
        assert one.events() == []

    play(scene)


def test_a_gateway_that_ends_takes_no_more_changes() -> None:
    async def scene() -> None:
        here, _ = two_runtimes()
        fleet = fleet_of({"docker": here}, tgi())
        await fleet.begin()
        fleet.close()
        fleet.change(catalog_of([tgi(id="other", preload=True)]))
        assert list(fleet.catalog.models) == ["m"]
        await fleet.aclose()
        assert not here.servers

    play(scene)


def test_a_download_of_a_model_that_is_removed_is_called_off() -> None:
    async def scene() -> None:
        program, other = OneProgram([], None), spec(id="other", weights="o.gguf")
        fleet = fleet_of({"process": program}, spec(), other, engine=Downloads())
        fetches: list[Fetch] = [fleet.fetch(spec()), fleet.fetch(other)]
        following = [asyncio.create_task(told(fetch)) for fetch in fetches]
        await asyncio.sleep(1)
        fleet.change(catalog_of([other]))
        assert (await following[0])[-1] == "MODEL_NOT_LOADED"
        await asyncio.sleep(1)
        assert program.running == ["tgi-other.PULL"]
        assert not following[1].done()
        await fleet.aclose()
        await following[1]

    play(scene)


# ---- runtimes -------------------------------------------------------------------------------------------------------


class Elsewhere(BadMannersRuntime):
    """A second runtime, for models that move; its servers go with the gateway."""

    outlives: ClassVar[bool] = False


class ProbeOfAll:
    """Health checks of the servers of several runtimes: the one that has such a server answers."""

    def __init__(self, *runtimes: BadMannersRuntime) -> None:
        self._probes = {runtime: SimulatedProbe(runtime) for runtime in runtimes}

    async def ask(self, url: str, timeout_s: float, headers: Mapping[str, str]) -> Answer | None:
        name = url.removeprefix("sim://").removesuffix("/health")
        for runtime, probe in self._probes.items():
            if runtime.alive(name):
                return await probe.ask(url, timeout_s, headers)
        return None


def fleet_of(
    runtimes: Mapping[str, Any],
    *specs: ModelSpec,
    engine: SimulatedEngine | None = None,
    figures: FiguresOf = silent,
) -> Fleet:
    simulated = [each for each in runtimes.values() if isinstance(each, BadMannersRuntime)]
    engines = dict.fromkeys(("tgi", "llamacpp"), engine or SimulatedEngine())
    journal = Journal(asyncio.get_running_loop().time)
    probe = ProbeOfAll(*simulated)
    return Fleet(catalog_of(specs), engines, runtimes, probe, journal, figures=figures, keep_servers=False)


def tgi(**keys: Any) -> ModelSpec:
    model = keys.get("id", "m")
    return ModelSpec.model_validate({"id": model, "engine": "tgi", "hf_name": f"hub/{model}", "gpus": 0, **keys})


def two_runtimes() -> tuple[BadMannersRuntime, BadMannersRuntime]:
    here, there = BadMannersRuntime(Random(0)), Elsewhere(Random(0))
    here.next_manners, there.next_manners = [Manners()] * 9, [Manners()] * 9
    return here, there


def test_a_model_moves_to_another_runtime_when_its_server_has_gone() -> None:
    async def scene() -> None:
        here, there = two_runtimes()
        fleet = fleet_of({"docker": here, "external": there}, tgi())
        await fleet.begin()
        await fleet.get(tgi()).start()
        moved = tgi(runtime="external", url="http://127.0.0.1:9")

        fleet.change(catalog_of([moved]))
        await fleet.get(moved).start()

        assert not here.alive("tgi-m")
        assert len(there.alive("tgi-m")) == 1
        await fleet.aclose()

    play(scene)


def test_a_model_does_not_move_before_its_former_server_is_known_to_be_gone() -> None:
    async def scene() -> None:
        here, there = two_runtimes()
        fleet = fleet_of({"docker": here, "external": there}, tgi(stop_grace=10))
        await fleet.begin()
        await fleet.get(tgi()).start()
        here.fall_silent(100)
        moved = tgi(runtime="external", url="http://127.0.0.1:9", preload=True)

        fleet.change(catalog_of([moved]))
        await asyncio.sleep(60)

        with pytest.raises(GatewayError, match="its former server must be gone first") as refused:
            await fleet.get(moved).start()
        assert (refused.value.code, refused.value.retry_after_s) == ("RUNTIME_UNAVAILABLE", 15)
        assert here.alive("tgi-m")
        await asyncio.sleep(100)
        assert not here.alive("tgi-m")
        assert fleet.status(moved).state is State.READY  # it was to be preloaded, and that was not forgotten
        assert there.alive("tgi-m")
        await fleet.aclose()

    play(scene)


def test_a_runtime_that_only_a_changed_catalog_uses_is_asked_then_what_runs_there() -> None:
    async def scene() -> None:
        here, there = two_runtimes()
        former = fleet_of({"docker": here}, tgi(), tgi(id="old"))
        former.keeps = True
        await former.begin()
        await asyncio.gather(former.get(tgi()).start(), former.get(tgi(id="old")).start())
        await former.aclose()
        served = here.newest("tgi-m")
        fleet = fleet_of({"docker": here, "external": there}, tgi(id="x", runtime="external", url="http://h"))
        await fleet.begin()

        fleet.change(catalog_of([tgi()]))

        with pytest.raises(GatewayError, match="not known yet"):
            fleet.get(tgi())
        await asyncio.sleep(5)
        await fleet.get(tgi()).start()
        assert here.newest("tgi-m") is served
        assert not here.alive("tgi-old")
        await fleet.aclose()

    play(scene)


def test_a_model_that_is_added_while_its_former_server_is_removed_waits_for_the_end_of_that() -> None:
    async def scene() -> None:
        here, _ = two_runtimes()
        here.next_manners = [Manners(leaves_s=8)] * 9
        former = fleet_of({"docker": here}, tgi())
        former.keeps = True
        await former.begin()
        await former.get(tgi()).start()
        await former.aclose()
        other = tgi(id="other")
        fleet = fleet_of({"docker": here}, other)
        await fleet.begin()
        await asyncio.sleep(1)
        assert here.alive("tgi-m")

        fleet.change(catalog_of([other, tgi()]))
        await fleet.get(tgi()).start()

        assert len(here.alive("tgi-m")) == 1
        await asyncio.sleep(60)
        assert len(here.alive("tgi-m")) == 1
        await fleet.aclose()

    play(scene)


def test_a_catalog_is_told_from_another_by_what_it_says_and_by_nothing_else() -> None:
    one, two = spec(id="one"), spec(id="two", weights="2.gguf")
    catalog = Catalog(path=Path("a"), models={"one": one, "two": two})
    same = Catalog(path=Path("a"), models={"two": two, "one": one})
    catalog.resolve("one")  # which remembers all names
    assert catalog == same
