"""What a model is told of GPUs that it shares: from its place, the others' places, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from gateway.catalog import ModelSpec
from gateway.devices import Device, Memory, Share
from gateway.engines.tgi import Tgi
from gateway.fleet.identity import launch_of
from gateway.fleet.placement import NOWHERE, Place
from gateway.fleet.sharing import launch_at, reserved_bytes, shares
from tests.gpus import GIB

DEVICES = [Device("0", 24 * GIB, "GPU-a"), Device("1", 24 * GIB, "GPU-b"), Device("2")]
MEASURED = {"0": Memory(22 * GIB, 12 * GIB), "1": Memory(22 * GIB, 22 * GIB)}
OTHER = Place(("0",), 9 * GIB)


def gib(share: Share) -> tuple[str, float, float, float | None, float]:
    free = None if share.free_bytes is None else share.free_bytes / GIB
    return share.gpu, share.reserved_bytes / GIB, share.total_bytes / GIB, free, share.others_bytes / GIB


@pytest.mark.parametrize(
    ("place", "memory", "told"),
    [
        (NOWHERE, MEASURED, []),
        (Place(("0", "1")), MEASURED, []),  # it has them whole
        (Place(("0",), 8 * GIB), MEASURED, [("0", 8, 22, 12, 9)]),
        (Place(("0", "1"), 8 * GIB), MEASURED, [("0", 8, 22, 12, 9), ("1", 8, 22, 22, 0)]),
        (Place(("0",), 8 * GIB), {}, [("0", 8, 24, None, 9)]),  # what is declared, where nothing is measured
        (Place(("GPU-b",), 8 * GIB), {}, [("GPU-b", 8, 24, None, 0)]),
        (Place(("2",), 8 * GIB), MEASURED, []),  # of unknown size, so nobody else has any of it
        (Place(("7",), 8 * GIB), MEASURED, []),
    ],
)
def test_shares(place: Place, memory: Mapping[str, Memory], told: list[tuple[object, ...]]) -> None:
    assert [gib(each) for each in shares(place, DEVICES, [OTHER], memory)] == told


def test_who_has_a_gpu_whole_has_reserved_all_of_it() -> None:
    held = [OTHER, Place(("0", "1"), GIB), Place(("1",))]

    assert reserved_bytes("0", held, 24 * GIB) == 10 * GIB
    assert reserved_bytes("1", held, 24 * GIB) == 25 * GIB
    assert reserved_bytes("2", held, 24 * GIB) == 0


def test_a_launch_gets_its_gpus_and_its_part_of_them() -> None:
    engine = Tgi()
    spec = ModelSpec.model_validate({"id": "m", "hf_name": "gpt2", "gpu_memory": "8GiB"})
    plain = launch_of(engine, spec, "s")

    launch = launch_at(Place(("0",), 8 * GIB), plain, engine, devices=DEVICES, others=[OTHER], memory=MEASURED)
    assert launch.gpus == ("0",)
    assert launch.command == (*plain.command, "--cuda-memory-fraction", "0.8686")  # (10 / 0.9 + 8) / 22
    assert launch.fingerprint == plain.fingerprint

    whole = launch_at(Place(("0",)), plain, engine, devices=DEVICES, others=[], memory=MEASURED)
    assert (whole.gpus, whole.command) == (("0",), plain.command)
