"""TGI on a shared GPU: its own formula shows that no model takes more than it reserved, whoever came first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.catalog import ModelSpec
from gateway.devices import Share
from gateway.engines.tgi import Tgi
from gateway.engines.tgi_memory import WIGGLE, memory_fraction
from gateway.errors import NoCapacity, StartFailed
from gateway.fleet.identity import fingerprint, launch_of

GIB = 2**30
STEP = 0.0002
"""What rounding may cost of a whole GPU."""


def takes(free: float, total: float, fraction: float, wiggle: float) -> float:
    """Return what TGI has of a GPU when its cache is made, weights included.

    It is `get_cuda_free_memory(device, MEMORY_FRACTION * TGI_WIGGLE_ROOM)` of TGI 3.3, and what it loaded before that:
    the weights cancel out, as they are missing in its free memory and are its own.
    """
    return max(0.0, free - (1 - fraction * wiggle) * total)


def share(reserved: float, free: float | None, total: float = 24, *, others: float = 0, gpu: str = "0") -> Share:
    """Return a share from numbers of GiB."""
    free_bytes = None if free is None else int(free * GIB)
    return Share(gpu, int(reserved * GIB), int(total * GIB), free_bytes, int(others * GIB))


@pytest.mark.parametrize(
    ("reserved", "free", "total", "fraction", "wiggle"),
    [
        (10, 24, 24, 0.4166, WIGGLE),  # the first of two: its part of the GPU
        (10, 15, 24, 0.8333, WIGGLE),  # the second, beside one that fills nine of its ten
        (10, 14, 24, 0.8796, WIGGLE),  # the second, beside one that has taken all ten
        (24, 24, 24, 1.0, WIGGLE),
        (12, 12, 24, 1.0, 0.95),  # no fraction would do, so the wiggle room is another
        (3, 3, 24, 1.0, 0.9875),
        (4, 3.6 + 1e-6, 24, 1.0, 0.9999),  # what is free is just what it plans with
        (1, 141, 141, 0.007, WIGGLE),
    ],
)
def test_the_fraction_follows_what_is_free(
    reserved: float, free: float, total: float, fraction: float, wiggle: float
) -> None:
    assert memory_fraction("m", [share(reserved, free, total)]) == (fraction, wiggle)


def test_two_models_of_ten_gib_on_a_card_of_24_never_have_more_than_they_reserved() -> None:
    fraction, wiggle = memory_fraction("first", [share(10, 24)])
    first = takes(24, 24, fraction, wiggle)
    later, same = memory_fraction("second", [share(10, 24 - first, others=10)])
    second = takes(24 - first, 24, later, same)

    assert later > fraction, "a fraction counts what others have"
    assert 8.99 < first <= 10
    assert 8.99 < second <= 10
    # the usual mistake: the same fraction again leaves the second with nothing
    assert takes(24 - first, 24, fraction, wiggle) == 0


@given(
    st.lists(st.integers(256, 30_000), min_size=1, max_size=6),
    st.integers(0, 2000),
    st.floats(0.5, 0.99),
    st.floats(0, 1),
)
def test_however_many_start_after_one_another_each_takes_what_it_planned_with_and_no_more(
    reserved_mib: list[int], strangers_mib: int, wiggle: float, growth: float
) -> None:
    """`growth` is how much of the rest of its reservation a model takes after its cache is made."""
    mib = 2**20
    total = (sum(reserved_mib) + strangers_mib) * mib
    free = float(total - strangers_mib * mib)
    for number, each in enumerate(reserved_mib):
        reserved, others = each * mib, sum(reserved_mib[:number]) * mib
        told, room = memory_fraction("m", [Share("0", reserved, total, int(free), others)], wiggle)
        assert 0 < told <= 1
        assert 0 < room < 1
        taken = takes(free, total, told, room)
        assert taken <= wiggle * reserved + 1
        assert taken >= wiggle * reserved - STEP * total - 1
        free -= taken + growth * (reserved - taken)


def test_unmeasured_others_are_held_to_have_what_they_plan_with() -> None:
    unmeasured = memory_fraction("m", [share(10, None, others=10)])

    assert unmeasured == memory_fraction("m", [share(10, 15)])
    # if they have taken all that they reserved, it takes less, and never more
    assert takes(14 * GIB, 24 * GIB, *unmeasured) < takes(15 * GIB, 24 * GIB, *unmeasured) <= 9 * GIB


def test_of_several_gpus_the_one_that_allows_least_counts() -> None:
    both = [share(10, 20, gpu="0"), share(10, 18, gpu="1")]
    fraction, wiggle = memory_fraction("m", both)

    assert (fraction, wiggle) == memory_fraction("m", both[:1])
    assert all(takes(free, 24, fraction, wiggle) <= 9 for free in (20, 18))


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        (
            [share(10, 8.5, others=5)],
            "m has 10 GiB reserved of GPU 0, and only 8.5 GiB of its 24 GiB are free: 5 GiB are reserved for other",
        ),
        ([share(10, 24), share(10, 0, gpu="GPU-a")], "m has 10 GiB reserved of GPU GPU-a, and only 0 GiB of its 24"),
        (
            [share(10, 24), share(10, 10, gpu="1")],
            "m cannot share GPUs of which others use so different parts, as TGI has one memory fraction for all: GPU 0",
        ),
    ],
)
def test_a_share_that_is_not_there_is_refused_with_the_numbers(shares: list[Share], words: str) -> None:
    with pytest.raises(NoCapacity) as refusal:
        memory_fraction("m", shares)

    assert refusal.value.detail.startswith(words)
    assert "`nvidia-smi` shows them" in refusal.value.detail or "GPU 1 has 10 GiB free" in refusal.value.detail
    assert refusal.value.retry_after_s


# ---- on the command line ---------------------------------------------------------------------------------------------

ENGINE = Tgi()


def spec(**more: Any) -> ModelSpec:
    return ModelSpec(**{"id": "m", "hf_name": "acme/model-7b", **more})


def test_a_model_that_shares_is_told_its_fraction_and_one_with_whole_gpus_is_not() -> None:
    launch = launch_of(ENGINE, spec(gpu_memory="10GiB"), "s")

    placed = ENGINE.placed(launch, [share(10, 24)])
    assert placed == replace(launch, command=(*launch.command, "--cuda-memory-fraction", "0.4166"))
    assert ENGINE.placed(launch, []) == launch

    crowded = ENGINE.placed(launch, [share(10, 10)])
    assert crowded.command[-2:] == ("--cuda-memory-fraction", "1.0")
    assert crowded.env == {"TGI_WIGGLE_ROOM": "0.9583"}


def test_the_fraction_of_a_start_makes_no_other_server_of_it() -> None:
    chosen = spec(gpu_memory="10GiB")
    launch = launch_of(ENGINE, chosen, "s")

    one, other = (ENGINE.placed(launch, [share(10, free)]) for free in (24, 14))

    assert one.command != other.command
    assert one.fingerprint == other.fingerprint == fingerprint(ENGINE, chosen)


@pytest.mark.parametrize(
    ("said", "fraction"),
    [("0.5", "0.4166"), ("0.95", "0.4166"), ("2", "0.4166"), ("much", "0.4166")],
)
def test_the_wiggle_room_of_the_catalog_is_counted_with(said: str, fraction: str) -> None:
    launch = ENGINE.launch(spec(gpu_memory="10GiB", env={"TGI_WIGGLE_ROOM": said}), "m", "s")

    placed = ENGINE.placed(launch, [share(10, 24)])

    assert placed.command[-1] == fraction
    assert placed.env["TGI_WIGGLE_ROOM"] == said


def test_a_wiggle_room_of_the_catalog_is_used_where_others_are_too() -> None:
    launch = ENGINE.launch(spec(gpu_memory="10GiB", env={"TGI_WIGGLE_ROOM": "0.5"}), "m", "s")

    fraction = float(ENGINE.placed(launch, [share(10, 20)]).command[-1])

    assert 4.99 < takes(20, 24, fraction, 0.5) <= 5


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("args", {"cuda-memory-fraction": 0.5}),
        ("args", {"cuda_memory_fraction": 0.5}),
        ("env", {"CUDA_MEMORY_FRACTION": "0.5"}),
    ],
)
def test_a_fraction_of_ones_own_goes_with_whole_gpus_only(where: str, names: dict[str, Any]) -> None:
    own = ENGINE.launch(spec(**{where: names}), "m", "s")
    assert "0.5" in (*own.command, *own.env.values())
    assert ENGINE.placed(own, []) == own

    with pytest.raises(StartFailed) as refusal:
        ENGINE.launch(spec(gpu_memory="10GiB", **{where: names}), "m", "s")
    assert "`gpu_memory` does this, anew for every start" in refusal.value.extra["cause"]
    assert "(for whole GPUs) `gpu_memory`" in refusal.value.extra["fix"]
