"""NVIDIA's library, played by a double that is loaded as the real one is; each time in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.nvml_double import NvmlDouble, gpu, make, needs_compiler
from tests.runtimes.processes import PROGRAMS

MIB = 2**20
WITHOUT_HASTE, HASTY = "20", "0.3"
ENDS_WITHIN_S = 30  # a call of the double that hangs takes longer


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> NvmlDouble:
    return make(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def nvml(compiled: NvmlDouble) -> NvmlDouble:
    compiled.tell()
    return compiled


class Asker:
    """A process that asks NVML, and what it said."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.first = self._heard()
        self.log = ""
        self.last: Any = None

    def free(self, *groups: str) -> Any:
        """Return what it was told of these ids, asked for at the same time; a group is `0,1`."""
        assert self._process.stdin
        self._process.stdin.write(" ".join(groups) + "\n")
        self._process.stdin.flush()
        return self._heard()

    def end(self) -> None:
        said, self.log = self._process.communicate(timeout=ENDS_WITHIN_S)
        self.last = json.loads(said)
        assert self._process.returncode == 0

    def _heard(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())


@contextmanager
def asking(environment: dict[str, str], answer_s: str = WITHOUT_HASTE) -> Iterator[Asker]:
    """Run an asker. After the block it has ended by itself, and its log is known."""
    command = [sys.executable, str(PROGRAMS / "gpu_asker.py"), answer_s]
    pipe = subprocess.PIPE
    here = {**environment, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=here, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            asker = Asker(process)
            yield asker
            asker.end()
        finally:
            process.kill()


def device(number: str, memory_mib: int | None, uuid: str) -> dict[str, Any]:
    memory_bytes = None if memory_mib is None else memory_mib * MIB
    return {"id": number, "memory_bytes": memory_bytes, "uuid": uuid, "name": "NVIDIA A10"}


def memory(total_mib: int, free_mib: int) -> dict[str, int]:
    return {"total_bytes": total_mib * MIB, "free_bytes": free_mib * MIB}


@needs_compiler
def test_gpus_are_known_with_the_memory_that_programs_may_have(nvml: NvmlDouble) -> None:
    nvml.tell(gpu("GPU-a", 24564, reserved_mib=564, used_mib=1000), gpu("GPU-b", 24564, mig=0))

    with asking(nvml.environment) as asker:
        assert asker.first == {
            "devices": [device("0", 24000, "GPU-a"), device("1", 24564, "GPU-b")],
            "silence": None,
        }
        assert asker.free("0,1", "GPU-a") == [
            {"0": memory(24000, 23000), "1": memory(24564, 24564)},
            {"GPU-a": memory(24000, 23000)},
        ]

    assert asker.last == {}, "something is known after the end"
    assert asker.log == "nvmlShutdown\n"


@needs_compiler
def test_an_older_driver_that_does_not_tell_what_it_reserves_is_understood(nvml: NvmlDouble) -> None:
    nvml.tell("memory-v2 13", gpu("GPU-a", 24000, used_mib=1000))

    with asking(nvml.environment) as asker:
        assert asker.first["devices"] == [device("0", 24000, "GPU-a")]
        assert asker.free("0") == [{"0": memory(24000, 23000)}]


@needs_compiler
def test_what_is_free_is_asked_anew_every_time_and_a_gpu_that_falls_off_the_bus_is_only_not_known(
    nvml: NvmlDouble,
) -> None:
    nvml.tell(gpu("GPU-a"), gpu("GPU-b"))

    with asking(nvml.environment) as asker:
        nvml.tell(gpu("GPU-a", 24000, used_mib=4000), gpu("GPU-b", handle=15))
        for _ in range(3):
            assert asker.free("0,1") == [{"0": memory(24000, 20000)}]

    assert asker.log.splitlines() == [
        "WARNING GPUs: GPU 1: what is free of it is not known: the NVIDIA driver says: GPU is lost",
        "nvmlShutdown",
    ]


@needs_compiler
@pytest.mark.parametrize(
    ("line", "known", "words"),
    [
        (gpu("GPU-x", handle=15), None, "GPU 0 is left out: the NVIDIA driver says: GPU is lost"),
        (gpu("GPU-x", mig=1), device("0", None, "GPU-x"), "GPU 0 is divided (MIG): what its parts have is not known."),
        (gpu("GPU-x", memory=3), device("0", None, "GPU-x"), "GPU 0: its memory is not known: the NVIDIA driver says"),
        (
            gpu("GPU-x", handle=4),
            {"id": "0", "memory_bytes": None, "uuid": "", "name": ""},
            "GPU 0: this user may not ask the NVIDIA driver",
        ),
    ],
    ids=["lost", "divided", "memory-not-told", "not-permitted"],
)
def test_a_gpu_of_which_not_all_is_known_does_no_harm_to_the_others(
    nvml: NvmlDouble, line: str, known: object, words: str
) -> None:
    nvml.tell(line, gpu("GPU-y"))

    with asking(nvml.environment) as asker:
        assert asker.first["devices"] == [*([known] if known else []), device("1", 24564, "GPU-y")]
        assert asker.free("0,1") == [{"1": memory(24564, 24564)}]

    assert asker.log.startswith(f"WARNING GPUs: {words}")


@needs_compiler
def test_a_part_of_a_divided_gpu_is_measured_by_its_name_and_what_does_not_exist_is_not_known(
    nvml: NvmlDouble,
) -> None:
    nvml.tell(gpu("GPU-a", mig=1), gpu("MIG-b", 5000, used_mib=100))

    with asking(nvml.environment) as asker:
        assert asker.free("MIG-b,GPU-none,0:0,7") == [{"MIG-b": memory(5000, 4900)}]


@needs_compiler
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (9, "the NVIDIA driver is installed and not loaded: `nvidia-smi` says more"),
        (18, "the NVIDIA driver was updated under way: restart the machine"),
        (4, "this user may not ask the NVIDIA driver"),
        (999, "the NVIDIA driver says: Unknown Error"),
    ],
)
def test_a_driver_that_does_not_open_is_not_known_and_said_once(nvml: NvmlDouble, code: int, words: str) -> None:
    nvml.tell(f"init {code}", gpu("GPU-a"))

    with asking(nvml.environment) as asker:
        assert asker.first == {"devices": [], "silence": words}
        assert asker.free("0", "0") == [{}, {}]

    assert asker.log == f"WARNING GPUs: {words}\n"


@needs_compiler
def test_a_driver_without_a_gpu_says_so(nvml: NvmlDouble) -> None:
    with asking(nvml.environment) as asker:
        assert asker.first == {"devices": [], "silence": "the NVIDIA driver is here and knows of no GPU"}


@needs_compiler
def test_a_driver_that_hangs_at_once_is_not_waited_for_nor_at_the_end(nvml: NvmlDouble) -> None:
    nvml.tell("hangs init", gpu("GPU-a"))

    with asking(nvml.environment, HASTY) as asker:
        assert asker.first["devices"] == []
        assert asker.first["silence"].startswith("the NVIDIA driver does not answer")
        assert asker.free("0") == [{}]


@needs_compiler
def test_a_driver_that_hangs_later_is_not_waited_for_nor_at_the_end(nvml: NvmlDouble) -> None:
    nvml.tell(gpu("GPU-a"))

    with asking(nvml.environment, "3") as asker:
        assert asker.free("0") == [{"0": memory(24564, 24564)}]
        nvml.tell("hangs memory", gpu("GPU-a"))
        assert asker.free("0", "0", "0") == [{}, {}, {}]
        assert asker.free("0") == [{}]

    assert asker.log.count("the NVIDIA driver does not answer") == 1


@needs_compiler
def test_a_library_that_is_none_of_nvidias_is_not_known(nvml: NvmlDouble, tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("this is no library")

    with asking({**nvml.environment, "LD_LIBRARY_PATH": str(tmp_path)}) as asker:
        assert asker.first["devices"] == []
        assert asker.first["silence"]


def test_a_machine_without_the_driver_is_not_known_and_no_warning_is_due(tmp_path: Path) -> None:
    program = (
        "import pynvml\ntry:\n    pynvml.nvmlInit()\nexcept pynvml.NVMLError_LibraryNotFound:\n    print('absent')\n"
    )
    probe = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if probe.stdout.strip() != "absent":
        pytest.skip("this machine has the NVIDIA driver")

    with asking({"PATH": "/usr/bin"}) as asker:
        words = "no library of the NVIDIA driver is here (libnvidia-ml.so.1)"
        assert asker.first == {"devices": [], "silence": words}

    assert asker.log == f"INFO GPUs: {words}\n"
