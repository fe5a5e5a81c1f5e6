"""How much of a GPU a TGI may take that shares it with others. Pure.

TGI fills what it is given. Once its weights are loaded and the largest batch was tried, it makes its cache as large as
`free - (1 - fraction * wiggle) * total` (`get_cuda_free_memory`, as its `warmup` calls it; `fraction` is
--cuda-memory-fraction, `wiggle` TGI_WIGGLE_ROOM). What it loaded before is missing in `free` then. So it stops where
`fraction * wiggle` of the whole GPU is in use, by whomever: a fraction says nothing of a model's own share, and depends
on who was there before.

A model that reserved `r` is to fill `wiggle * r`: the rest is for what comes after the cache (CUDA graphs, say), as if
the GPU were as large as its reservation. With `used` the bytes that others have, it is therefore to stop at

    fraction * wiggle * total = used + wiggle * r

TGI takes no fraction above 1. Where the others have so much that it would have to be, the fraction is 1 and TGI gets
another wiggle room, which comes to the same. Several GPUs have one fraction: the smallest that any of them asks for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gateway.devices import Share
from gateway.errors import NoCapacity

WIGGLE = 0.9
"""TGI_WIGGLE_ROOM, if nobody says otherwise."""
STEPS = 10_000
"""A fraction has four digits: a step is 8 MiB of 80 GiB."""
RETRY_S = 30.0


def memory_fraction(model: str, shares: Sequence[Share], wiggle: float = WIGGLE) -> tuple[float, float]:
    """Return the memory fraction and the wiggle room with which a TGI takes no more than its shares.

    Raises:
        NoCapacity: a share is not there, whatever was reserved: other programs use the GPU.
    """
    limit = min(_limit(model, share, wiggle) for share in shares)
    for share in shares:
        if limit * share.total_bytes <= share.total_bytes - _free(share, wiggle):
            raise _uneven(model, shares, wiggle)
    if limit <= wiggle:
        return _rounded_down(limit / wiggle), wiggle
    return 1.0, min(_rounded_down(limit), 1 - 1 / STEPS)  # it must be less than 1, TGI says


def _limit(model: str, share: Share, wiggle: float) -> float:
    """Return the part of the GPU that may be in use, by whomever, when this model has all that it may have."""
    free, planned = _free(share, wiggle), wiggle * share.reserved_bytes
    if free < planned:
        raise _missing(model, share, free)
    return (share.total_bytes - free + planned) / share.total_bytes


def _free(share: Share, wiggle: float) -> float:
    """Return what is free before the start. Unmeasured, others fill what they plan to: no more is sure to be."""
    if share.free_bytes is not None:
        return min(share.free_bytes, share.total_bytes)
    return max(share.total_bytes - wiggle * share.others_bytes, 0.0)


def _rounded_down(part: float) -> float:
    return max(math.floor(part * STEPS), 1) / STEPS


def _missing(model: str, share: Share, free: float) -> NoCapacity:
    return NoCapacity(
        f"{model} has {_gib(share.reserved_bytes)} reserved of GPU {share.gpu}, and only {_gib(free)} of its "
        f"{_gib(share.total_bytes)} are free: {_gib(share.others_bytes)} are reserved for other models, and the rest "
        "is used by other programs. `nvidia-smi` shows them: end them, or give the model less (`gpu_memory`).",
        retry_after_s=RETRY_S,
    )


def _uneven(model: str, shares: Sequence[Share], wiggle: float) -> NoCapacity:
    free = ", ".join(f"GPU {share.gpu} has {_gib(_free(share, wiggle))} free" for share in shares)
    return NoCapacity(
        f"{model} cannot share GPUs of which others use so different parts, as TGI has one memory fraction for all: "
        f"{free}. Name GPUs that are alike (`gpus`), or stop the models on them.",
        retry_after_s=RETRY_S,
    )


def _gib(amount: float) -> str:
    return f"{amount / 2**30:.3g} GiB"
