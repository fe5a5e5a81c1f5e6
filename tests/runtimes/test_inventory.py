"""Which GPUs there are: what is declared, else what is measured, else what has a file, else nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from gateway.devices import Device, Memory
from gateway.runtimes.inventory import DeviceFiles, Inventory, JoinedInventory
from tests.gpus import GIB, WrittenInventory

MEASURED = [Device("0", 22 * GIB, "GPU-a", "NVIDIA A10"), Device("1", 22 * GIB, "GPU-b", "NVIDIA A10")]
ABSENT = "no driver"


def joined(
    declared: Mapping[str, int] | None, measured: list[Device] | None, files: list[Device] | None
) -> JoinedInventory:
    silence = None if measured else ABSENT
    return JoinedInventory(
        declared, WrittenInventory(measured, silence=silence), WrittenInventory(files, source="device files")
    )


def test_device_files_tell_the_numbers_in_order_and_no_memory(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia10", "nvidia2", "nvidiactl", "nvidia-uvm", "nvidia0extra", "null"):
        (tmp_path / name).touch()
    files: Inventory = DeviceFiles(tmp_path, {"2": "NVIDIA A10"})

    assert files.devices() == [Device("0"), Device("2", name="NVIDIA A10"), Device("10")]
    assert asyncio.run(files.memory(["0"])) == {}


def test_without_device_files_nothing_is_known(tmp_path: Path) -> None:
    assert DeviceFiles(tmp_path).devices() is None
    assert DeviceFiles(tmp_path / "none").devices() is None


@pytest.mark.parametrize(
    ("declared", "measured", "files", "known", "source"),
    [
        (None, None, None, None, "nothing"),
        (None, None, [Device("0")], [Device("0")], "device files"),
        (None, MEASURED, [Device("0")], MEASURED, "NVML"),
        ({"0": 20 * GIB}, None, [Device("0"), Device("1")], [Device("0", 20 * GIB)], "GATEWAY_GPUS"),
        ({"0": 20 * GIB}, MEASURED, None, [Device("0", 20 * GIB, "GPU-a", "NVIDIA A10")], "GATEWAY_GPUS"),
        ({"GPU-b": GIB}, MEASURED, None, [Device("GPU-b", GIB, "1", "NVIDIA A10")], "GATEWAY_GPUS"),
        ({"0": GIB, "GPU-a": 2 * GIB}, MEASURED, None, [Device("0", GIB, "GPU-a", "NVIDIA A10")], "GATEWAY_GPUS"),
        ({"GPU-a": GIB, "0": 2 * GIB}, MEASURED, None, [Device("GPU-a", GIB, "0", "NVIDIA A10")], "GATEWAY_GPUS"),
        ({"7": GIB, "MIG-x": GIB}, MEASURED, None, [Device("7", GIB), Device("MIG-x", GIB)], "GATEWAY_GPUS"),
    ],
)
def test_what_is_declared_wins_then_what_is_measured_then_what_has_a_file(
    declared: Mapping[str, int] | None,
    measured: list[Device] | None,
    files: list[Device] | None,
    known: list[Device] | None,
    source: str,
) -> None:
    inventory = joined(declared, measured, files)

    assert inventory.devices() == known
    assert inventory.source == source
    assert inventory.silence == (None if measured else ABSENT)


def test_what_is_free_is_measured_whatever_is_declared() -> None:
    inventory = joined({"0": 2 * GIB}, MEASURED, None)

    assert asyncio.run(inventory.memory(["0", "7"])) == {"0": Memory(22 * GIB, 22 * GIB)}
    assert asyncio.run(joined({"0": GIB}, None, None).memory(["0"])) == {}


def test_closing_it_closes_what_it_was_joined_of() -> None:
    measured, files = WrittenInventory(), WrittenInventory()

    asyncio.run(JoinedInventory(None, measured, files).aclose())

    assert measured.closed
    assert files.closed
