"""What a gateway says of its GPUs, with the double of NVIDIA's library in its process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.gateway import serving
from tests.nvml_double import gpu, make, needs_compiler

MODEL = {"hf_name": "org/m", "engine": "openai", "runtime": "external", "url": "http://127.0.0.1:9"}


@needs_compiler
@pytest.mark.parametrize(
    ("lines", "declared", "known"),
    [
        ([gpu("GPU-a", 24564, reserved_mib=564), gpu("GPU-b", 1024)], "", [("0", 24000), ("1", 1024)]),
        ([gpu("GPU-a", 24564), gpu("GPU-b", 24564)], "1=20GiB", [("1", 20480)]),
        ([gpu("GPU-a", 24564, mig=1), gpu("GPU-b", 1024)], "", [("0", None), ("1", 1024)]),
        (["init 18"], "0=1GiB", [("0", 1024)]),
    ],
)
def test_the_status_lists_what_the_driver_tells_or_what_is_declared(
    tmp_path: Path, lines: list[str], declared: str, known: list[tuple[str, int | None]]
) -> None:
    nvml = make(tmp_path)
    nvml.tell(*lines)
    environ = {"LD_LIBRARY_PATH": str(nvml.folder), "NVML_DOUBLE": str(nvml.facts), "GATEWAY_GPUS": declared}

    with serving(tmp_path, environ, m=MODEL) as gateway:
        told: list[dict[str, Any]] = gateway.get("/status").json()["gpus"]

    assert [(each["id"], each["memory_mb"]) for each in told] == known
    assert ("NVIDIA A10" in [each["name"] for each in told]) == (lines[0] != "init 18")
