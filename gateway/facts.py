"""What can be known of a model without running it: from its GGUF file, or the hub's config.json where it is at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gateway.catalog import ModelSpec
from gateway.gguf import ArrayOf, NotGguf, Plain, read_metadata

MOST_CONFIG_BYTES = 2**20
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 32: "BF16",
}  # fmt: skip
"""llama.cpp's names for the precision of most of the weights (`general.file_type`)."""


@dataclass(frozen=True, slots=True)
class Facts:
    """A model's architecture. None is what is not known."""

    layers: int | None = None
    dim: int | None = None
    vocab_size: int | None = None
    context_tokens: int | None = None
    """What the model was made for."""
    precision: str | None = None


def facts_of(spec: ModelSpec, environ: Mapping[str, str] = os.environ) -> Facts:
    """Return what its files tell of a model. Reads them, which may take a moment: not for the event loop."""
    if spec.engine == "llamacpp":
        return _of_file(spec.weights, _gguf_facts) if spec.weights else Facts()
    return next((_of_file(path, _config_facts) for path in _configs(spec, environ) if path.is_file()), Facts())


def _of_file(path: Path, read: Any) -> Facts:
    """Return what a file tells: read once for as long as it stays the same, and nothing if it cannot be read."""
    try:
        about = path.stat()
        return _read(path, about.st_mtime_ns, about.st_size, read)
    except (OSError, NotGguf, ValueError):
        return Facts()


@lru_cache(maxsize=256)
def _read(path: Path, mtime_ns: int, size: int, read: Any) -> Facts:  # noqa: ARG001 - another file if they change
    found = read(path)
    assert isinstance(found, Facts)
    return found


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def _gguf_facts(path: Path) -> Facts:
    with path.open("rb") as file:
        said = read_metadata(file)
    family = said.get("general.architecture")
    tokens = said.get("tokenizer.ggml.tokens")
    return Facts(
        layers=_count(said.get(f"{family}.block_count")),
        dim=_count(said.get(f"{family}.embedding_length")),
        vocab_size=tokens.length if isinstance(tokens, ArrayOf) else _count(said.get(f"{family}.vocab_size")),
        context_tokens=_count(said.get(f"{family}.context_length")),
        precision=_precision(said.get("general.file_type")),
    )


def _precision(file_type: Plain | ArrayOf | None) -> str | None:
    return _FILE_TYPES.get(file_type) if isinstance(file_type, int) else None


# ---- the hub's config.json ------------------------------------------------------------------------------------------


def _configs(spec: ModelSpec, environ: Mapping[str, str]) -> Iterator[Path]:
    """Yield where the config.json of a model may be: in the folder that is its name, or in the hub's cache."""
    if spec.hf_name is None:
        return
    if spec.hf_name.startswith("/"):
        yield Path(spec.hf_name, "config.json")
        return
    folder = _cache(environ) / f"models--{spec.hf_name.replace('/', '--')}"
    revision = spec.revision or "main"
    reference = folder / "refs" / revision
    try:
        revision = reference.read_text().strip() if reference.is_file() else revision
    except (OSError, ValueError):
        return
    yield folder / "snapshots" / revision / "config.json"


def _cache(environ: Mapping[str, str]) -> Path:
    """Return the hub's cache, as its own library finds it."""
    home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "huggingface")
    return Path(environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def _config_facts(path: Path) -> Facts:
    with path.open("rb") as file:
        said = json.loads(file.read(MOST_CONFIG_BYTES))
    if not isinstance(said, dict):
        return Facts()
    precision = said.get("torch_dtype") or said.get("dtype")

    def count(*names: str) -> int | None:
        return next((found for name in names if (found := _count(said.get(name))) is not None), None)

    return Facts(
        layers=count("num_hidden_layers", "n_layer", "num_layers"),
        dim=count("hidden_size", "n_embd", "d_model"),
        vocab_size=count("vocab_size"),
        context_tokens=count("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
        precision=precision if isinstance(precision, str) else None,
    )


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
