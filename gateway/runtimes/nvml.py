"""The GPUs as NVIDIA's driver tells of them, by its library NVML (package `nvidia-ml-py`).

The driver may be absent, half updated, or hang: each call is made in a thread of its own kind, which nobody waits for
longer than a bound, and which does not keep the process from ending.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import pynvml  # type: ignore[import-untyped]

from gateway.devices import Device, Memory

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_ANSWER_S = 10.0
"""A driver that nobody used so far has to wake every GPU first."""
ANSWER_S = 2.0
NO_ANSWER = "the NVIDIA driver does not answer (NVML): `nvidia-smi` and `dmesg` may tell why; a restart may be needed"
NO_LIBRARY = "no library of the NVIDIA driver is here (libnvidia-ml.so.1)"
NO_GPUS = "the NVIDIA driver is here and knows of no GPU"
_WORDS = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: NO_LIBRARY,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is installed and not loaded: `nvidia-smi` says more",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the NVIDIA driver was updated under way: restart the machine",
    pynvml.NVML_ERROR_NO_PERMISSION: "this user may not ask the NVIDIA driver",
}
_FAILURES = (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError, OSError, AttributeError, ValueError)
"""Whatever the binding raises, also of a library that is not what it should be."""


class Nvml:
    """An inventory (`gateway.runtimes.inventory`). The ids are NVML's numbers, which the Docker Engine means too."""

    source = "NVML"

    def __init__(self, *, first_answer_s: float = FIRST_ANSWER_S, answer_s: float = ANSWER_S) -> None:
        self.silence: str | None = None
        """Why nothing is known, in words."""
        self._first_answer_s = first_answer_s
        self._answer_s = answer_s
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._late: Future[Any] | None = None  # the last call, as long as it is under way past its bound
        self._opened: bool | None = None  # None: not tried yet
        self._devices: Sequence[Device] | None = None
        self._told: set[str] = set()

    def devices(self) -> Sequence[Device] | None:
        if self._opened is None:
            self._open()
        return self._devices

    async def memory(self, gpus: Collection[str]) -> Mapping[str, Memory]:
        if not self._opened or not gpus:
            return {}
        if self._late and not self._late.done():
            return {}
        answer = self._ask(partial(_memory_of, tuple(gpus)))
        try:
            async with asyncio.timeout(self._answer_s):
                found, failures = await asyncio.wrap_future(answer)
        except TimeoutError:
            if not answer.done():  # one that had not begun is called off
                self._late = answer
            self._tell(NO_ANSWER)
            return {}
        for failure in failures:
            self._tell(failure)
        return found

    async def aclose(self) -> None:
        if not self._opened:
            return
        self._opened = False
        last = self._ask(_shut)
        self._calls.put(None)
        if self._late and not self._late.done():  # it is left behind with its thread
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(self._answer_s):
                await asyncio.wrap_future(last)

    def _open(self) -> None:
        self._opened = False
        threading.Thread(target=_work, args=(self._calls,), name="nvml", daemon=True).start()
        answer = self._ask(_open)
        try:
            self._devices, failures = answer.result(self._first_answer_s)
        except TimeoutError:
            self._stays_silent(NO_ANSWER)
        except _FAILURES as error:
            self._stays_silent(_words(error))
        else:
            self._opened = True
            if not self._devices:
                self.silence = NO_GPUS
            for failure in failures:
                self._tell(failure)

    def _stays_silent(self, words: str) -> None:
        self.silence = words
        self._calls.put(None)
        self._tell(words)

    def _ask(self, call: Callable[[], T]) -> Future[T]:
        answer: Future[T] = Future()
        self._calls.put((answer, call))
        return answer

    def _tell(self, words: str) -> None:
        """Log something once, however often it is found again."""
        if words not in self._told:
            self._told.add(words)
            log.log(logging.INFO if words == NO_LIBRARY else logging.WARNING, "GPUs: %s", words)


_Call = tuple[Future[Any], Callable[[], Any]]


def _work(calls: SimpleQueue[_Call | None]) -> None:
    """Make calls one after the other, until None comes. One that nobody waits for any more is left out."""
    while (todo := calls.get()) is not None:
        answer, call = todo
        if not answer.set_running_or_notify_cancel():
            continue
        try:
            answer.set_result(call())
        except Exception as error:  # whoever waits for the answer gets it
            answer.set_exception(error)


# ---- calls, in the thread --------------------------------------------------------------------------------------------


def _open() -> tuple[list[Device] | None, list[str]]:
    """Return the GPUs (None: the driver knows of none), and in words what could not be told of them."""
    pynvml.nvmlInit()
    failures: list[str] = []
    found = list(_devices(failures))
    return found or None, failures


def _devices(failures: list[str]) -> Iterator[Device]:
    for number in range(pynvml.nvmlDeviceGetCount()):
        gpu = str(number)
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            uuid, name = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)
        except pynvml.NVMLError_NoPermission as error:  # not for us, but perhaps for a model's server
            failures.append(f"GPU {gpu}: {_words(error)}")
            yield Device(gpu)
        except _FAILURES as error:
            failures.append(f"GPU {gpu} is left out: {_words(error)}")
        else:
            yield Device(gpu, _total_of(gpu, handle, failures), uuid, name)


def _total_of(gpu: str, handle: object, failures: list[str]) -> int | None:
    if _is_divided(handle):
        failures.append(
            f"GPU {gpu} is divided (MIG): what its parts have is not known. Name them and their memory in "
            "GATEWAY_GPUS, as `nvidia-smi -L` lists them: MIG-...=20GiB"
        )
        return None
    try:
        return _read(handle).total_bytes
    except _FAILURES as error:
        failures.append(f"GPU {gpu}: its memory is not known: {_words(error)}")
        return None


def _memory_of(gpus: Sequence[str]) -> tuple[dict[str, Memory], list[str]]:
    found, failures = {}, []
    for gpu in gpus:
        try:
            handle = _handle(gpu)
            if not _is_divided(handle):
                found[gpu] = _read(handle)
        except _FAILURES as error:
            failures.append(f"GPU {gpu}: what is free of it is not known: {_words(error)}")
    return found, failures


def _handle(gpu: str) -> object:
    by_number = gpu.isdecimal()
    return pynvml.nvmlDeviceGetHandleByIndex(int(gpu)) if by_number else pynvml.nvmlDeviceGetHandleByUUID(gpu)


def _is_divided(handle: object) -> bool:
    try:
        now, _ = pynvml.nvmlDeviceGetMigMode(handle)
    except _FAILURES:  # a GPU that cannot be divided, a part of one, or an older driver
        return False
    return bool(now)


def _read(handle: object) -> Memory:
    """Return memory without what the driver keeps to itself, as CUDA counts it; an older driver does not tell that."""
    try:
        told = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except _FAILURES:
        told = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return Memory(int(told.total), int(told.free))
    return Memory(int(told.total - told.reserved), int(told.free))


def _shut() -> None:
    with suppress(*_FAILURES):
        pynvml.nvmlShutdown()


def _words(error: Exception) -> str:
    code = getattr(error, "value", None)
    return _WORDS.get(code) or f"the NVIDIA driver says: {error}"
