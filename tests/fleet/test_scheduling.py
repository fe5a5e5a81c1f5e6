"""Who is placed, who makes room and who waits: tables, and what must hold of every snapshot there can be."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.fleet.placement import GIB, Demand, Device, Place, free_bytes, misfit, place
from gateway.fleet.scheduling import (
    HOLD_S,
    LINGER,
    MOST_EXAMINED,
    RESIDENCY,
    TURN_S,
    Claim,
    Decision,
    Phase,
    Resident,
    Snapshot,
    Usage,
    decide,
)

NOW = 10_000.0
LONG_AGO = 1_000.0
COST_S = 40.0
PATIENCE_S = 120.0
WHOLE = Demand(1)


def gpus(count: int) -> list[Device]:
    return [Device(str(number), 24 * GIB) for number in range(count)]


def share(gibibytes: int) -> Demand:
    return Demand(1, gibibytes * GIB)


def used_every(interval_s: float, *, last_at: float = NOW, regularly: bool = False) -> Usage:
    return Usage(last_at, interval_s, 0.0 if regularly else 1.0)


FORGOTTEN = used_every(600.0, last_at=LONG_AGO)
IN_USE = used_every(5.0)


def resident(model: str, gpu: str = "0", **facts: Any) -> Resident:
    at_gpu = Place(tuple(gpu.split(",")), facts.pop("memory", None))
    known = Resident(model, at_gpu, Phase.UP, 0, 0, False, LONG_AGO, LONG_AGO, COST_S, usage=FORGOTTEN)
    return replace(known, **facts)


def claim(model: str, demand: Demand = WHOLE, *, age_s: float = 1.0, patience_s: float = PATIENCE_S) -> Claim:
    return Claim(model, demand, NOW - age_s, 1, COST_S, patience_s)


AGED_S = PATIENCE_S - COST_S


def decided(devices: list[Device], residents: list[Resident], claims: list[Claim], now: float = NOW) -> Decision:
    return decide(Snapshot(now, devices, residents, claims))


def test_what_fits_is_placed_and_the_oldest_claim_comes_first() -> None:
    decision = decided(gpus(1), [], [claim("young", age_s=1), claim("old", age_s=9)])

    assert decision.placed == {"old": Place(("0",))}
    assert decision.waits["young"] == "waits for 1 GPU for itself: old is to get GPU 0"


def test_a_younger_claim_takes_what_the_older_cannot_use_yet() -> None:
    busy = resident("a", "0", in_flight=1)

    decision = decided(gpus(2), [busy], [claim("two", Demand(2), age_s=9), claim("one")])

    assert decision.placed == {"one": Place(("1",))}


def test_two_claims_whose_patience_is_over_are_not_overtaken_though_the_older_one_will_have_what_both_need() -> None:
    new = resident("new", "1", since=NOW, memory=14 * GIB)
    idle = resident("idle", "0,2")
    older = claim("older", Demand(("1",), 14 * GIB), age_s=AGED_S + 9)
    next_one = claim("next", Demand(3, 14 * GIB), age_s=AGED_S)

    decision = decided(gpus(3), [new, idle], [older, next_one, claim("young", Demand(2), age_s=60)])

    assert (decision.placed, decision.evicted) == ({}, {})


def test_a_claim_for_several_gpus_is_not_overtaken_where_an_older_one_is_to_have_one_of_those_that_come_free() -> None:
    leaving = resident("leaving", "0,1", phase=Phase.LEAVING)
    older, both, young = (
        claim(name, demand, age_s=AGED_S + age_s)
        for name, demand, age_s in (("older", share(22), 9), ("both", Demand(2), 5), ("young", share(10), 1))
    )

    decision = decided(gpus(2), [leaving], [older, both, young])

    assert "gets GPU" in decision.waits["older"]
    assert "gets GPU" not in decision.waits["young"]


def test_nobody_starts_beside_one_that_is_to_go_for_a_claim_whose_patience_is_over() -> None:
    new = resident("new", "0,1", since=NOW, memory=14 * GIB)
    older = claim("older", Demand(("0",), 14 * GIB), age_s=AGED_S)

    decision = decided(gpus(2), [new], [older, claim("young", Demand(("1",), 4 * GIB))])

    assert decision.placed == {}


@pytest.mark.parametrize("age_s", [1, AGED_S, 10 * AGED_S])
def test_one_replica_never_makes_room_for_another(age_s: float) -> None:
    first = resident("m", "0", of="m")
    second = replace(claim("m-1", age_s=age_s), of="m")

    decision = decided(gpus(1), [first], [second])

    assert (decision.evicted, decision.held) == ({}, {})
    assert decided(gpus(1), [replace(first, of="n")], [second]).evicted == {"m": "m-1"}


def test_a_claim_whose_patience_is_over_is_not_overtaken() -> None:
    busy = resident("a", "0", in_flight=1, usage=IN_USE)

    decision = decided(gpus(2), [busy], [claim("two", Demand(2), age_s=AGED_S), claim("one")])

    assert decision.placed == {}
    assert decision.held == {"a": "two"}


def test_it_is_not_overtaken_either_while_nobody_can_be_held_for_it_yet() -> None:
    young = resident("a", "0", since=NOW)

    decision = decided(gpus(2), [young], [claim("two", Demand(2), age_s=AGED_S), claim("one")])

    assert (decision.placed, decision.held, decision.evicted) == ({}, {}, {})
    assert decision.look_again_at == NOW + RESIDENCY * COST_S
    assert "two is to get GPU" in decision.waits["one"]


def test_an_idle_resident_whose_callers_are_gone_makes_room_at_once() -> None:
    decision = decided(gpus(1), [resident("a")], [claim("b", age_s=0)])

    assert decision.evicted == {"a": "b"}
    assert "a makes room" in decision.waits["b"]


def test_one_that_is_expected_back_soon_goes_when_the_claim_has_waited() -> None:
    a = resident("a", usage=used_every(10.0, last_at=NOW - 1), last_use_at=NOW - 1)
    b = claim("b", age_s=0)

    decision = decided(gpus(1), [a], [b])

    assert decision.evicted == {}
    assert "a has GPU 0 and is expected to be asked again soon" in decision.waits["b"]
    assert decision.look_again_at is not None
    assert NOW < decision.look_again_at < b.hold_at
    assert decided(gpus(1), [a], [b], decision.look_again_at).evicted == {"a": "b"}


def test_one_that_is_asked_like_clockwork_goes_just_after_it_was_asked() -> None:
    just_asked = resident("a", "0", usage=used_every(300.0, last_at=NOW - 1, regularly=True))
    asked_next = resident("b", "1", usage=used_every(300.0, last_at=NOW - 299, regularly=True))

    assert decided(gpus(2), [just_asked, asked_next], [claim("c")]).evicted == {"a": "c"}


@pytest.mark.parametrize(
    "facts",
    [
        {"in_flight": 1},
        {"queued": 1},
        {"pinned": True},
        {"phase": Phase.STARTING},
        {"since": NOW - RESIDENCY * COST_S + 0.5},
    ],
)
def test_what_must_stay_is_not_evicted(facts: dict[str, Any]) -> None:
    assert decided(gpus(1), [resident("a", **facts)], [claim("b")]).evicted == {}


def test_the_least_regretted_one_goes() -> None:
    cheap = resident("cheap", "0", cost_s=20.0)
    dear = resident("dear", "1", cost_s=90.0)
    wanted = resident("wanted", "2", cost_s=20.0, usage=used_every(200.0, last_at=NOW - 50))

    assert decided(gpus(3), [dear, wanted, cheap], [claim("b")]).evicted == {"cheap": "b"}


def test_none_goes_while_leaving_ones_suffice() -> None:
    decision = decided(gpus(2), [resident("a", "0"), resident("b", "1", phase=Phase.LEAVING)], [claim("c")])

    assert decision.evicted == {}
    assert "b makes room" in decision.waits["c"]


def test_each_leaving_one_makes_room_for_one_claim_only() -> None:
    decision = decided(
        gpus(2), [resident("a", "0"), resident("b", "1", phase=Phase.LEAVING)], [claim("c", age_s=9), claim("d")]
    )

    assert decision.evicted == {"a": "d"}


def test_only_as_many_go_as_are_needed() -> None:
    small = [resident(f"small-{number}", "0", memory=8 * GIB) for number in range(3)]

    assert len(decided(gpus(1), small, [claim("b", share(8))]).evicted) == 1
    assert len(decided(gpus(1), small, [claim("b", share(16))]).evicted) == 2
    assert len(decided(gpus(1), small, [claim("b")]).evicted) == 3


def test_one_large_model_goes_rather_than_two_small_ones_that_are_missed_more() -> None:
    residents = [
        resident("small-1", "0", memory=12 * GIB),
        resident("small-2", "0", memory=12 * GIB),
        resident("large", "1", cost_s=50.0),
    ]

    assert decided(gpus(2), residents, [claim("b")]).evicted == {"large": "b"}


def test_of_those_whom_nobody_misses_the_fewest_go() -> None:
    never_asked = Usage()
    small = resident("small", usage=never_asked)
    wide = resident("wide", usage=never_asked, place=Place(("0", "1"), 4 * GIB))

    assert decided(gpus(2), [small, wide], [claim("new")]).evicted == {"wide": "new"}


def test_a_model_that_names_its_gpu_has_just_that_one_cleared() -> None:
    residents = [resident("a", "0", cost_s=1.0), resident("b", "1", cost_s=90.0)]

    assert decided(gpus(2), residents, [claim("c", Demand(("1",)))]).evicted == {"b": "c"}


def test_several_gpus_are_cleared_for_a_model_that_needs_them() -> None:
    residents = [resident("a", "0"), resident("b", "1", pinned=True), resident("c", "2")]

    assert set(decided(gpus(3), residents, [claim("d", Demand(2))]).evicted) == {"a", "c"}


def test_busy_ones_are_held_once_patience_is_over_and_not_before() -> None:
    busy = resident("a", in_flight=2, queued=3, usage=IN_USE)

    before = decided(gpus(1), [busy], [claim("b", age_s=AGED_S - 1)])
    after = decided(gpus(1), [busy], [claim("b", age_s=AGED_S)])

    assert (before.held, before.look_again_at) == ({}, NOW + 1)
    assert after.held == {"a": "b"}
    assert "a takes no new requests and finishes 2" in after.waits["b"]


def test_who_is_held_stays_held_though_another_is_missed_less_now() -> None:
    held = resident("held", "0", in_flight=1, usage=IN_USE, held_for="c")
    other = resident("other", "1", in_flight=1)

    assert decided(gpus(2), [held, other], [claim("c", age_s=AGED_S)]).held == {"held": "c"}


def test_who_is_held_goes_when_it_is_done_whatever_is_queued() -> None:
    held = resident("a", queued=5, usage=IN_USE, held_for="b")

    assert decided(gpus(1), [held], [claim("b", age_s=AGED_S)]).evicted == {"a": "b"}


@pytest.mark.parametrize(
    ("since_s", "in_flight", "becomes"),
    [
        (HOLD_S - 1, 1, ("held", NOW + 1)),
        (HOLD_S, 1, ("let go on", NOW + HOLD_S)),
        (HOLD_S, 0, ("evicted", None)),
        (1.5 * HOLD_S, 1, ("let go on", NOW + HOLD_S / 2)),
        (2 * HOLD_S, 1, ("held", NOW + HOLD_S)),
    ],
)
def test_a_server_whose_work_outlasts_a_hold_serves_others_as_long_before_the_next(
    since_s: float, in_flight: int, becomes: tuple[str, float | None]
) -> None:
    lasts = resident("a", in_flight=in_flight, queued=3, usage=IN_USE, held_for="b", held_at=NOW - since_s)
    if since_s > HOLD_S:
        lasts = replace(lasts, held_for=None, held_at=math.inf, spared_until=NOW - since_s + 2 * HOLD_S)

    now = decided(gpus(1), [lasts], [claim("b", age_s=AGED_S + 1_000)])

    done = "held" if now.held else "evicted" if now.evicted else "let go on"
    assert (done, now.look_again_at) == becomes


def test_who_gets_gpus_that_come_free_has_nobody_else_go_though_something_starts_elsewhere() -> None:
    there = [resident("idle", "0"), resident("s", "1", phase=Phase.STARTING), resident("l", "2", phase=Phase.LEAVING)]

    now = decided(gpus(3), there, [claim("c", age_s=AGED_S)])

    assert (now.evicted, "gets GPU 2" in now.waits["c"]) == ({}, True)


def test_who_is_not_needed_any_more_is_held_no_longer() -> None:
    held = [resident(name, gpu, in_flight=1, held_for="c") for name, gpu in (("a", "0"), ("b", "1"))]

    assert decided(gpus(2), held, [claim("c", age_s=AGED_S)]).held == {"a": "c"}


def test_nobody_busy_is_held_for_one_replica_more_that_nobody_waits_for() -> None:
    busy = resident("busy", "0", in_flight=1, usage=IN_USE)
    first = resident("m", "1", of="m")
    second = replace(claim("m-1", Demand(("0",)), age_s=10 * AGED_S), of="m")

    assert decided(gpus(2), [busy, first], [replace(second, waiting=0)]).held == {}
    assert decided(gpus(2), [busy, first], [second]).held == {"busy": "m-1"}


@pytest.mark.parametrize("demand", [Demand(("1",)), Demand(1)])
def test_a_crowd_that_waits_for_one_gpu_keeps_nobody_from_another(demand: Demand) -> None:
    there = [resident("busy", "0", in_flight=1, usage=IN_USE), resident("idle", "1")]
    crowd = [claim(f"c-{number}", Demand(("0",)), age_s=50) for number in range(2 * MOST_EXAMINED)]

    assert decided(gpus(2), there, [*crowd, claim("z", demand)]).evicted == {"idle": "z"}


def test_an_aged_claim_reserves_what_it_can_have_and_not_where_something_is_stuck() -> None:
    stuck = resident("stuck", "0", phase=Phase.STUCK, since=0.0)
    starts = resident("starts", "1", phase=Phase.STARTING, memory=10 * GIB)
    big = claim("big", age_s=AGED_S)

    now = decided(gpus(2), [stuck, starts], [big, claim("small", share(10))])

    assert "big is to get GPU 1" in now.waits["small"]


def test_a_crowd_for_any_gpu_is_told_how_many_are_before_it() -> None:
    busy = [resident(name, gpu, in_flight=1, usage=IN_USE) for name, gpu in (("a", "0"), ("b", "1"))]
    crowd = [claim(f"c-{number}", age_s=50) for number in range(MOST_EXAMINED)]

    waits = decided(gpus(2), busy, [*crowd, claim("z", Demand(2)), claim("y", Demand(("1",)))]).waits

    assert f"behind {MOST_EXAMINED} others" in waits["z"]
    assert f"behind {MOST_EXAMINED} others" in waits["y"]


def test_one_replica_more_that_nobody_waits_for_comes_after_who_came_later() -> None:
    busy = resident("m", "0", of="m", in_flight=1)
    second = replace(claim("m-1", age_s=500), of="m", waiting=0)

    assert decided(gpus(2), [busy], [second, claim("b")]).placed == {"b": Place(("1",))}


@pytest.mark.parametrize(("age_s", "evicted"), [(AGED_S, {"idle": "c"}), (1.0, {})])
def test_a_claim_whose_patience_is_over_does_not_wait_for_a_drain_if_others_can_go(
    age_s: float, evicted: dict[str, str]
) -> None:
    drains = resident("drains", "0", phase=Phase.LEAVING, in_flight=1, usage=IN_USE)
    now = decided(gpus(2), [drains, resident("idle", "1")], [claim("c", age_s=age_s)])

    assert now.evicted == evicted
    assert ("drains goes when it has finished 1" in now.waits["c"]) == (not evicted)


def test_where_one_does_not_come_to_an_end_another_is_held() -> None:
    lasts = resident("a", "0", in_flight=1, usage=IN_USE, held_for="c", held_at=NOW - HOLD_S)
    busy = resident("b", "1", in_flight=1, usage=IN_USE)

    assert decided(gpus(2), [lasts, busy], [claim("c", age_s=AGED_S)]).held == {"b": "c"}


def test_who_is_held_is_let_go_when_its_claim_is_gone() -> None:
    held = resident("a", in_flight=1, held_for="gone")

    assert decided(gpus(2), [held], [claim("c")]).held == {}


@pytest.mark.parametrize("facts", [{"pinned": True}, {"since": NOW}, {"phase": Phase.STARTING}])
def test_pinned_and_new_ones_are_not_held_either(facts: dict[str, Any]) -> None:
    stays = resident("a", "0", in_flight=1, **facts)

    assert decided(gpus(1), [stays], [claim("b", age_s=AGED_S)]).held == {}


def test_a_long_start_leaves_some_patience() -> None:
    slow = replace(claim("slow", age_s=0), cost_s=1_000.0)

    assert slow.hold_at == NOW + PATIENCE_S / 4


def test_starts_that_share_a_gpu_come_one_at_a_time() -> None:
    loading = resident("a", "0", phase=Phase.STARTING, memory=8 * GIB)

    decision = decided(gpus(1), [loading], [claim("b", share(8))])
    both = decided(gpus(1), [], [claim("b", share(8), age_s=9), claim("c", share(8))])
    apart = decided(gpus(2), [loading], [claim("b", share(8))])

    assert decision.placed == {}
    assert "a starts on GPU 0" in decision.waits["b"]
    assert set(both.placed) == {"b"}
    assert apart.placed == {"b": Place(("1",), 8 * GIB)}


def test_a_claim_for_what_pinned_models_hold_is_hopeless_and_names_them() -> None:
    residents = [resident("a", "0", pinned=True), resident("b", "1", pinned=True), resident("c", "2")]

    decision = decided(gpus(3), residents, [claim("d", Demand(2))])

    assert decision.hopeless == {
        "d": "needs 2 GPU for itself, and pinned models hold what it could have: a has GPU 0; b has GPU 1"
    }
    assert decision.evicted == {}


def test_pinned_ones_that_leave_are_waited_for() -> None:
    assert decided(gpus(1), [resident("a", pinned=True, phase=Phase.LEAVING)], [claim("b")]).hopeless == {}


def test_a_claim_that_can_never_fit_is_told_the_numbers() -> None:
    assert "24 GiB" in decided(gpus(1), [], [claim("b", share(80))]).hopeless["b"]


def test_a_model_without_gpus_is_placed_at_once() -> None:
    assert decided([], [], [claim("b", Demand(0))]).placed == {"b": Place(())}


def test_nobody_is_promised_a_gpu_that_may_never_come_free() -> None:
    stuck, idle = resident("a", "0", phase=Phase.STUCK), resident("b", "1")

    assert decided(gpus(2), [stuck, idle], [claim("c")]).evicted == {"b": "c"}


def test_an_aged_claim_does_not_wait_for_a_start_beside_which_it_would_fit_if_others_can_go() -> None:
    loading = resident("s", "0", phase=Phase.STARTING, place=Place(("0",), 4 * GIB))
    idle = resident("b", "1", place=Place(("1",), 20 * GIB))
    young, aged = claim("c", share(8)), claim("c", share(8), age_s=PATIENCE_S)

    assert decided(gpus(2), [loading, idle], [young]).evicted == {}
    assert decided(gpus(2), [loading, idle], [aged]).evicted == {"b": "c"}


def test_a_claim_that_is_promised_what_leaves_has_no_more_go_while_others_start() -> None:
    residents = [
        resident("s", "0", phase=Phase.STARTING, memory=4 * GIB),
        resident("leaves", "1", phase=Phase.LEAVING, memory=20 * GIB),
        resident("idle", "2", memory=20 * GIB),
    ]

    decision = decided(gpus(3), residents, [claim("b", share(14), age_s=AGED_S)])

    assert (decision.placed, decision.evicted, decision.held) == ({}, {}, {})
    assert "leaves makes room" in decision.waits["b"]


def test_nobody_starts_on_a_gpu_for_which_an_aged_claim_waits_with_another_though_both_would_fit() -> None:
    residents = [resident("busy", "0", in_flight=1)]
    two, small = Demand(2, 8 * GIB), claim("small", share(4))

    young = decided(gpus(2), residents, [claim("two", two, age_s=1), small])
    aged = decided(gpus(2), residents, [claim("two", two, age_s=AGED_S), small])

    assert young.placed == {"small": Place(("1",), 4 * GIB)}
    assert (aged.held, aged.placed) == ({"busy": "two"}, {})


@pytest.mark.parametrize("in_flight", [0, 1])
def test_nobody_starts_beside_one_that_goes_in_this_very_moment(in_flight: int) -> None:
    large = resident("large", "0,1", memory=20 * GIB, in_flight=in_flight)

    decision = decided(gpus(2), [large], [claim("old", Demand(("0",), 20 * GIB), age_s=AGED_S), claim("b", share(4))])

    assert {**decision.evicted, **decision.held} == {"large": "old"}
    assert decision.placed == {}


def test_nothing_is_placed_beside_a_share_that_is_leaving() -> None:
    leaving = resident("a", "0", phase=Phase.LEAVING, place=Place(("0",), 10 * GIB))

    assert decided(gpus(1), [leaving], [claim("c", share(8))]).placed == {}


def test_a_server_that_took_very_long_to_start_does_not_stay_for_that_long() -> None:
    slow = resident("a", since=NOW - PATIENCE_S, cost_s=1500.0)

    assert decided(gpus(1), [slow], [claim("b", age_s=PATIENCE_S)]).evicted == {"a": "b"}


def test_a_server_serves_those_who_waited_for_it_before_it_is_held_for_others() -> None:
    facts: dict[str, Any] = {"in_flight": 4, "queued": 9, "cost_s": 10.0, "owes": True}
    aged = claim("b", age_s=PATIENCE_S)

    assert decided(gpus(1), [resident("a", since=NOW - 60, **facts)], [aged]).held == {}
    assert decided(gpus(1), [resident("a", since=NOW - TURN_S, **facts)], [aged]).held == {"a": "b"}
    assert decided(gpus(1), [resident("a", since=NOW - 60, **facts | {"owes": False})], [aged]).held == {"a": "b"}


def test_an_idle_server_is_waited_for_no_longer_than_is_in_proportion_to_its_start() -> None:
    used = resident("a", cost_s=30.0, last_use_at=NOW - 5, usage=used_every(5.0, last_at=NOW - 5))

    assert decided(gpus(1), [used], [claim("b", age_s=LINGER * 30 - 1)]).evicted == {}
    assert decided(gpus(1), [used], [claim("b", age_s=LINGER * 30)]).evicted == {"a": "b"}


def test_usage_tells_clockwork_from_chance() -> None:
    clockwork, chance, rng = Usage(), Usage(), random.Random(1)
    at = 0.0
    for number in range(200):
        clockwork = clockwork.asked(number * 60.0)
        at += rng.expovariate(1 / 60)
        chance = chance.asked(at)

    assert clockwork.interval_s == pytest.approx(60.0)
    assert clockwork.next_in_s(199 * 60.0 + 20.0) == pytest.approx(40.0)
    assert clockwork.spread < 0.1 < 0.4 < chance.spread
    assert Usage().next_in_s(5.0) == math.inf


def test_one_long_silence_does_not_spoil_what_is_known() -> None:
    usage = Usage()
    for at in [0.0, 10.0, 20.0, 30.0, 40.0, 4_000.0]:
        usage = usage.asked(at)

    assert usage.interval_s < 60.0


SECONDS = st.floats(0.0, 400.0).map(lambda seconds: round(seconds, 1))
MEMORY = st.sampled_from([None, None, 4, 8, 12, 16, 24]).map(lambda size: size and size * GIB)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Every state that a fleet can be in: nobody has more than there is, and each model is in it once."""
    devices = gpus(draw(st.integers(1, 5)))
    residents: list[Resident] = []
    for number in range(draw(st.integers(0, 8))):
        demand = Demand(draw(st.integers(1, 3)), draw(MEMORY))
        found = place(demand, devices, [each.place for each in residents])
        if found is not None:
            residents.append(draw(residents_at(f"resident-{number}", found)))
    claims = [
        Claim(
            f"claim-{number}",
            Demand(draw(st.one_of(st.integers(0, 3), st.tuples(st.sampled_from("012")))), draw(MEMORY)),
            NOW - draw(SECONDS),
            draw(st.integers(1, 5)),
            draw(SECONDS),
            draw(st.sampled_from([0.0, 30.0, 120.0])),
        )
        for number in range(draw(st.integers(1, 6)))
    ]
    return Snapshot(NOW, devices, residents, claims)


@st.composite
def residents_at(draw: st.DrawFn, model: str, found: Place) -> Resident:
    last_at = NOW - draw(SECONDS)
    phase = draw(st.sampled_from([Phase.UP, Phase.UP, Phase.UP, Phase.STARTING, Phase.LEAVING, Phase.STUCK]))
    usage = Usage(last_at, draw(st.sampled_from([math.inf, 1.0, 20.0, 90.0, 500.0])), draw(st.sampled_from([0.0, 1.0])))
    return Resident(
        model,
        found,
        phase,
        draw(st.integers(0, 2)) if phase is Phase.UP else 0,
        draw(st.integers(0, 2)),
        draw(st.booleans()),
        NOW - draw(SECONDS),
        last_at,
        draw(SECONDS),
        draw(st.sampled_from([None, None, "claim-0", "claim-1", "claim-gone"])) if phase is Phase.UP else None,
        held_at=NOW - draw(SECONDS),
        spared_until=NOW + draw(st.sampled_from([-math.inf, 1.0, 50.0])),
        owes=draw(st.booleans()),
        usage=usage if draw(st.booleans()) else Usage(),
    )


EVERY = settings(max_examples=100, deadline=None, derandomize=True)


@EVERY
@given(snapshots())
def test_no_gpu_is_ever_given_twice(snapshot: Snapshot) -> None:
    held = [each.place for each in snapshot.residents]
    by_age = sorted(snapshot.claims, key=lambda each: (each.asked_at, each.model))
    placed = decide(snapshot).placed
    for model in [each.model for each in by_age if each.model in placed]:
        for device in snapshot.devices:
            if device.id in placed[model].gpus:
                free = free_bytes(device, held)
                assert free is not None
                assert free >= (placed[model].memory_bytes or 24 * GIB)
        held.append(placed[model])


@EVERY
@given(snapshots())
def test_no_busy_no_pinned_and_no_new_one_goes(snapshot: Snapshot) -> None:
    decision = decide(snapshot)
    known = {each.model: each for each in snapshot.residents}
    aged = {each.model for each in snapshot.claims if snapshot.now >= each.hold_at}
    patience_s = {each.model: each.patience_s for each in snapshot.claims}

    for model, of in decision.evicted.items():
        each = known[model]
        assert (each.phase, each.in_flight, each.pinned) == (Phase.UP, 0, False)
        assert not each.queued or of in aged or any(other.held_for == of for other in snapshot.residents)
        assert each.held_for == of or each.since + min(RESIDENCY * each.cost_s, patience_s[of]) <= snapshot.now
    for model, of in decision.held.items():
        each = known[model]
        assert (each.phase, each.pinned) == (Phase.UP, False)
        assert each.held_for == of or each.since + min(RESIDENCY * each.cost_s, patience_s[of]) <= snapshot.now
    assert not decision.held.keys() & decision.evicted.keys()


@EVERY
@given(snapshots())
def test_none_goes_in_vain(snapshot: Snapshot) -> None:
    """Had any victim of the oldest claim been spared, it would not fit; or, aged, only where something starts."""
    decision = decide(snapshot)
    oldest = min(snapshot.claims, key=lambda each: (each.asked_at, each.model))
    victims = {model for model, of in decision.evicted.items() if of == oldest.model}
    staying = [each for each in snapshot.residents if each.phase is not Phase.LEAVING]
    starting = [each.place for each in staying if each.phase is Phase.STARTING]
    avoided = [Place(each.gpus) for each in starting if snapshot.now >= oldest.hold_at]
    for spared in victims:
        gone = (victims | {model for model, of in decision.held.items() if of == oldest.model}) - {spared}
        left = [each.place for each in staying if each.model not in gone]
        assert place(oldest.demand, snapshot.devices, [*left, *avoided]) is None


@EVERY
@given(snapshots())
def test_everybody_is_told_what_becomes_of_it(snapshot: Snapshot) -> None:
    decision = decide(snapshot)
    for each in snapshot.claims:
        assert (each.model in decision.placed) != (each.model in decision.waits)
        assert decision.waits.get(each.model, "it is placed")
        if misfit(each.demand, snapshot.devices):
            assert each.model in decision.hopeless


@EVERY
@given(snapshots(), st.randoms(use_true_random=False))
def test_the_same_snapshot_in_any_order_gives_the_same_decision(snapshot: Snapshot, rng: random.Random) -> None:
    residents, claims = list(snapshot.residents), list(snapshot.claims)
    rng.shuffle(residents)
    rng.shuffle(claims)

    assert decide(replace(snapshot, residents=residents, claims=claims)) == decide(snapshot)


@EVERY
@given(snapshots())
def test_an_aged_claim_that_comes_first_is_not_delayed_by_the_younger_ones(snapshot: Snapshot) -> None:
    oldest = min(snapshot.claims, key=lambda each: (each.asked_at, each.model))
    if snapshot.now < oldest.hold_at:
        return
    decision = decide(snapshot)
    if oldest.model in decision.placed or oldest.model in decision.hopeless:
        return
    pinned = [each.place for each in snapshot.residents if each.pinned and each.phase is not Phase.LEAVING]

    assert place(oldest.demand, snapshot.devices, [*pinned, *decision.placed.values()]) is not None


def _as_the_ledger_has_it(each: Resident, decision: Decision) -> Resident:
    """Return a resident as the next snapshot shows it, if nothing else has happened."""
    if of := decision.held.get(each.model):
        return replace(each, held_for=of, held_at=each.held_at if each.held_for else NOW)
    held_until = each.held_at + each.hold_s
    outlasted = each.held_for is not None and held_until <= NOW
    spared_until = held_until + HOLD_S if outlasted else each.spared_until
    hold_s = 2 * each.hold_s if outlasted else each.hold_s
    return replace(each, held_for=None, held_at=math.inf, hold_s=hold_s, spared_until=spared_until)


@EVERY
@given(snapshots(), st.floats(0.0, 1.0))
def test_nothing_happens_before_one_is_to_look_again(snapshot: Snapshot, part: float) -> None:
    first = decide(snapshot)
    if first.placed or first.evicted:
        return
    held = [_as_the_ledger_has_it(each, first) for each in snapshot.residents]
    quiet = replace(snapshot, residents=held)
    until = first.look_again_at if first.look_again_at is not None else NOW + 10_000.0
    then = decide(replace(quiet, now=min(NOW + part * (until - NOW), math.nextafter(until, 0.0))))

    assert (then.placed, then.evicted, then.held) == (first.placed, first.evicted, first.held)


@EVERY
@given(snapshots())
def test_when_it_is_time_to_look_again_the_time_is_ahead(snapshot: Snapshot) -> None:
    look_again_at = decide(snapshot).look_again_at

    assert look_again_at is None or look_again_at > snapshot.now
