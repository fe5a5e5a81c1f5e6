"""A double of NVIDIA's NVML: a shared library of the same name, made with the C compiler of this machine.

The binding that the gateway uses (`pynvml`) loads it as it would load the real one, so a program that is to see it is
started with `environment`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("nvml.c")
COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler here: the double of NVML cannot be made")


@dataclass(frozen=True, slots=True)
class NvmlDouble:
    """The library in `folder`, and the file of what it tells."""

    folder: Path

    @property
    def facts(self) -> Path:
        return self.folder / "gpus.txt"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "LD_LIBRARY_PATH": str(self.folder), "NVML_DOUBLE": str(self.facts)}

    def tell(self, *lines: str) -> None:
        """Tell this from now on, also to programs that run already."""
        fresh = self.folder / "gpus.new"
        fresh.write_text("".join(f"{line}\n" for line in lines))
        fresh.replace(self.facts)


def gpu(
    uuid: str,
    total_mib: int = 24564,
    *,
    reserved_mib: int = 0,
    used_mib: int = 0,
    mig: int = -1,
    handle: int = 0,
    memory: int = 0,
    name: str = "NVIDIA A10",
) -> str:
    """Return the line of a GPU. `mig`: 1 is divided, 0 is not, -1 cannot be. `handle` and `memory` are error codes."""
    return f"gpu {uuid} {total_mib} {reserved_mib} {used_mib} {mig} {handle} {memory} {name}"


def make(folder: Path) -> NvmlDouble:
    """Compile the library into `folder`."""
    assert COMPILER
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, SOURCE], check=True)
    double = NvmlDouble(folder)
    double.tell()
    return double
