"""What this machine and this process have, as Linux tells it."""

from __future__ import annotations

import os
import re
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Return how much memory this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


def memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES


def cpu_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def gpu_names() -> dict[str, str]:
    """Return the names of this machine's NVIDIA GPUs by number; none where its driver does not tell."""
    told = [path.read_text() for path in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    found = [dict(re.findall(r"^(Model|Device Minor):\s*(.+?)\s*$", text, re.MULTILINE)) for text in told]
    return {gpu["Device Minor"]: gpu["Model"] for gpu in found if {"Device Minor", "Model"} <= gpu.keys()}
