"""What a model's files tell of it: GGUF heads and config.json, good and bad."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import pytest

from gateway.facts import Facts, facts_of
from gateway.gguf import ArrayOf, NotGguf, read_metadata
from tests.fleet.scenes import spec


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words.encode())) + words.encode()


def number(name: str, value: int) -> bytes:
    return text(name) + struct.pack("<II", 4, value)


def texts(name: str, *words: str) -> bytes:
    return text(name) + struct.pack("<IIQ", 9, 8, len(words)) + b"".join(map(text, words))


def gguf(*pairs: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, 0, len(pairs)) + b"".join(pairs)


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("llama")
WHOLE = gguf(
    ARCHITECTURE,
    number("llama.block_count", 24),
    texts("tokenizer.ggml.tokens", "a", "b", "ü"),
    text("tokenizer.ggml.scores") + struct.pack("<IIQ3f", 9, 6, 3, 0.0, 0.5, 1.0),
    number("llama.embedding_length", 1536),
    number("llama.context_length", 2048),
    number("general.file_type", 1),
    text("llama.tied") + struct.pack("<I?", 7, True),
)


def test_every_key_of_a_head_is_read_and_arrays_are_told_by_their_length() -> None:
    found = read_metadata(io.BytesIO(WHOLE + b"the weights"))

    assert found["general.architecture"] == "llama"
    assert found["tokenizer.ggml.tokens"] == found["tokenizer.ggml.scores"] == ArrayOf(3)
    assert found["llama.tied"] is True
    assert len(found) == 8


def test_the_facts_of_a_gguf_file(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(WHOLE)
    model = spec(weights=str(file))

    assert facts_of(model) == Facts(24, 1536, 3, 2048, "F16")

    file.write_bytes(gguf(ARCHITECTURE, number("llama.block_count", 2)))
    assert facts_of(model) == Facts(layers=2)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"GGML" + WHOLE[4:],
        gguf(version=1),
        gguf(version=77),
        *(WHOLE[:size] for size in range(0, len(WHOLE), 7)),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63),
        gguf(struct.pack("<Q", 2**62) + b"long"),
        gguf(text("kind") + struct.pack("<I", 99)),
        gguf(text("nested") + struct.pack("<IIQ", 9, 9, 1)),
        gguf(text("endless") + struct.pack("<IIQ", 9, 8, 2**40)),
    ],
)
def test_a_damaged_head_is_no_fact(tmp_path: Path, head: bytes) -> None:
    with pytest.raises(NotGguf):
        read_metadata(io.BytesIO(head))

    (tmp_path / "m.gguf").write_bytes(head)
    assert facts_of(spec(weights=str(tmp_path / "m.gguf"))) == Facts()


def test_what_is_not_there_is_no_fact(tmp_path: Path) -> None:
    model = spec(engine="tgi", runtime="docker", hf_name="org/m", weights=None)

    assert facts_of(spec(weights=str(tmp_path / "gone.gguf"))) == Facts()
    assert facts_of(spec(weights=str(tmp_path))) == Facts()
    assert facts_of(model, {"HF_HOME": str(tmp_path)}) == Facts()


CONFIG = {"n_layer": 12, "n_embd": 768, "vocab_size": 50257, "n_positions": 1024, "torch_dtype": "float16"}


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"])
@pytest.mark.parametrize("revision", [None, "main", "607a30d"])
def test_the_facts_of_a_model_in_the_hubs_cache(tmp_path: Path, variable: str, revision: str | None) -> None:
    below = {"HF_HOME": "hub", "HF_HUB_CACHE": "", "XDG_CACHE_HOME": "huggingface/hub"}[variable]
    folder = tmp_path / below / "models--openai-community--gpt2"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("607a30d\n")
    (folder / "snapshots" / "607a30d").mkdir(parents=True)
    (folder / "snapshots" / "607a30d" / "config.json").write_text(json.dumps(CONFIG))
    model = spec(engine="tgi", runtime="docker", hf_name="openai-community/gpt2", weights=None, revision=revision)

    assert facts_of(model, {variable: str(tmp_path)}) == Facts(12, 768, 50257, 1024, "float16")


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (b"[1]", None),
        (b"no json", None),
        (b'{"n_layer": true}', None),
        (b'{"num_hidden_layers": 3}', 3),
        (b"\xff", None),
    ],
)
def test_a_folder_as_hf_name_has_its_own_config(tmp_path: Path, config: bytes, layers: int | None) -> None:
    (tmp_path / "config.json").write_bytes(config)
    model = spec(engine="tgi", runtime="docker", hf_name=str(tmp_path), weights=None)

    assert facts_of(model).layers == layers
