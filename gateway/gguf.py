"""The metadata at the head of a GGUF file (docs/gguf.md of ggml-org/ggml), without the weights behind it. Pure.

Arrays are skipped and told by their length only: a tokenizer's are long, and nothing here needs what is in them.
"""

from __future__ import annotations

import struct
from typing import BinaryIO, NamedTuple

Plain = int | float | bool | str


class ArrayOf(NamedTuple):
    """An array that was skipped."""

    length: int


class NotGguf(Exception):
    """The file is not GGUF, of a version that is not known here, or damaged."""


VERSIONS = (2, 3)
MOST_PAIRS = 100_000
MOST_TEXT_BYTES = 16 * 2**20
MOST_ELEMENTS = 10_000_000
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_TEXT, _ARRAY = 8, 9


def read_metadata(file: BinaryIO) -> dict[str, Plain | ArrayOf]:
    """Return every key with its value.

    Raises:
        NotGguf: the file has no such head.
        OSError: it cannot be read.
    """
    if file.read(4) != b"GGUF" or _number(file, "<I") not in VERSIONS:
        raise NotGguf("it does not begin as a GGUF file of version 2 or 3 does")
    _number(file, "<Q")  # how many tensors there are
    pairs = int(_number(file, "<Q"))
    if pairs > MOST_PAIRS:
        raise NotGguf(f"it says that it has {pairs} keys")
    return dict(_pair(file) for _ in range(pairs))


def _pair(file: BinaryIO) -> tuple[str, Plain | ArrayOf]:
    name = _text(file)
    return name, _value(file, int(_number(file, "<I")))


def _value(file: BinaryIO, kind: int) -> Plain | ArrayOf:
    if kind == _TEXT:
        return _text(file)
    if kind == _ARRAY:
        return _array(file)
    if kind not in _NUMBERS:
        raise NotGguf(f"it has a value of an unknown kind ({kind})")
    return _number(file, _NUMBERS[kind])


def _array(file: BinaryIO) -> ArrayOf:
    kind, length = int(_number(file, "<I")), int(_number(file, "<Q"))
    if length > MOST_ELEMENTS or (kind != _TEXT and kind not in _NUMBERS):
        raise NotGguf(f"it has an array of {length} elements of kind {kind}")
    if kind == _TEXT:
        for _ in range(length):
            _bytes(file, _length(file))
    else:
        file.seek(length * struct.calcsize(_NUMBERS[kind]), 1)
    return ArrayOf(length)


def _text(file: BinaryIO) -> str:
    return _bytes(file, _length(file)).decode(errors="replace")


def _length(file: BinaryIO) -> int:
    length = int(_number(file, "<Q"))
    if length > MOST_TEXT_BYTES:
        raise NotGguf(f"it has a text of {length} bytes")
    return length


def _number(file: BinaryIO, form: str) -> int | float | bool:
    [value] = struct.unpack(form, _bytes(file, struct.calcsize(form)))
    return value  # type: ignore[no-any-return]


def _bytes(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise NotGguf("it ends in the middle of its head")
    return data
