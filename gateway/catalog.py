"""models.yaml as frozen values: `ModelSpec` for an entry, `Catalog` for the file.

`load_catalog` reads the file and reports everything that is wrong with it at once. A complaint
names the file, the model, the key and the rule, and never the value: that may be a secret.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from typing_extensions import TypedDict  # pydantic reads the standard one from Python 3.12 on only

from gateway.errors import CatalogError, UnknownModel

EngineName = Literal["tgi", "llamacpp", "openai"]
RuntimeName = Literal["docker", "process", "external"]
PullPolicy = Literal["missing", "always", "never"]

_RUNTIME_OF: dict[str, RuntimeName] = {"tgi": "docker", "llamacpp": "process", "openai": "external"}
_SLOTS_OF = {"tgi": 128, "llamacpp": 4, "openai": 64}
_STOP_GRACE_S_OF = {"tgi": 95.0, "llamacpp": 10.0, "openai": 10.0}  # TGI itself lets requests finish for 90 s

# ---- amounts with units ---------------------------------------------------------------------------------------------

_SECONDS_IN = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_BYTES_IN = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTES_IN |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_AMOUNT = re.compile(r"([+-]?[0-9]+(?:\.[0-9]+)?) ?([A-Za-z]*)")
_LONGEST_S = 365 * 24 * 3600.0
_LARGEST_BYTES = 2**50


def parse_seconds(value: object) -> float:
    """Return a duration in seconds: `90s`, `15m`, `2h`, `500ms`, or a bare number of seconds.

    Raises:
        ValueError: it is no duration, not above 0, or longer than a year.
    """
    seconds = _amount(value, _SECONDS_IN)
    if seconds is None:
        raise ValueError("must be a duration such as 90s, 15m, 2h or 500ms (a bare number is seconds)")
    if not 0 < seconds <= _LONGEST_S:
        raise ValueError("must be above 0 and at most 8760h")
    return float(seconds)


def parse_bytes(value: object) -> int:
    """Return a size in bytes: `14GiB`, `512MiB`, `2GB`, or a bare number of bytes.

    Raises:
        ValueError: it is no size, below 1 byte, or above 1024 TiB.
    """
    size_bytes = _amount(value, _BYTES_IN)
    if size_bytes is None:
        raise ValueError("must be a size such as 14GiB, 512MiB or 2GB (a bare number is bytes)")
    if not 1 <= size_bytes <= _LARGEST_BYTES:
        raise ValueError("must be at least 1 byte and at most 1024TiB")
    return int(size_bytes)


def _amount(value: object, units: Mapping[str, float]) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    found = _AMOUNT.fullmatch(value) if isinstance(value, str) else None
    if found is None or found[2] not in units:
        return None
    return float(found[1]) * units[found[2]]


def _seconds_or_never(value: object) -> float | None:
    return None if value is None or value == "never" else parse_seconds(value)


# ---- the other kinds of value ---------------------------------------------------------------------------------------

_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_ID_RULE = "an id is 1 to 63 of a-z, 0-9, `.`, `_` and `-`, and begins with a letter or digit"
_PACKAGE = re.compile(r"package:([A-Za-z_][A-Za-z0-9_]*)/(.+)")
_GPUS_RULE = "must be a count from 0 to 64, or a list of different device ids such as [0, 1]"


def _id(text: str) -> str:
    if not _ID.fullmatch(text):
        raise ValueError(_ID_RULE)
    return text


def _one_line(text: str) -> str:
    if not 0 < len(text) <= 1000 or text != text.strip() or any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise ValueError("must be one line of text, at most 1000 characters, without spaces around it")
    return text


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not contain the character NUL")
    return text


def _one_word(text: str) -> str:
    if any(char.isspace() for char in _one_line(text)):
        raise ValueError("must not contain spaces")
    return text


def _url(text: str) -> str:
    try:
        url = urlsplit(_one_word(text))
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        usable = False
    if not usable or "?" in text or "#" in text:
        raise ValueError("must be an address such as http://10.0.0.5:8080, without query")
    if "@" in url.netloc:
        raise ValueError("must not contain a user or password: use api_key")
    return text.rstrip("/")


def _written_weights(text: str) -> str:
    found = _PACKAGE.fullmatch(text)
    if text.startswith("package:") and (found is None or _leaves_its_folder(found[2])):
        raise ValueError("must be a path, or package:NAME/FILE with a file inside an installed Python package")
    return _one_line(text)


def _leaves_its_folder(file: str) -> bool:
    return Path(file).is_absolute() or ".." in Path(file).parts


def _sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9A-Fa-f]{64}", text):
        raise ValueError("must be 64 hexadecimal digits")
    return text.lower()


def _volume(text: str) -> str:
    if not re.fullmatch(r"[^:]+:/[^:]*(:ro|:rw)?", _one_line(text)):
        raise ValueError("must be SOURCE:/PATH/IN/CONTAINER, with :ro at the end to make it read-only")
    return text


def _flag_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", text):
        raise ValueError("an engine's flag is written without its leading dashes")
    return text


def _flag_value(value: object) -> object:
    if not isinstance(value, str | int | float) or (isinstance(value, int | float) and not abs(value) < 2**63):
        raise ValueError("must be text, a number, true or false")
    return _no_nul(value) if isinstance(value, str) else value


def _variable_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        raise ValueError("an environment variable's name holds letters, digits and `_` only")
    return text


def _variable_value(value: object) -> object:
    if isinstance(value, bool | float):
        raise ValueError("must be text: put it in quotes")
    return str(value) if isinstance(value, int) and abs(value) < 2**63 else value


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _bool(value: object) -> object:
    flags = {"true": True, "false": False}  # as text, they come from the environment
    value = flags.get(value) if isinstance(value, str) else value
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _list(value: object) -> object:
    if not isinstance(value, list | tuple):
        raise ValueError("must be a list")
    return value


def _gpus(value: object) -> int | tuple[str, ...]:
    if isinstance(value, list | tuple):
        return _gpu_ids(value)
    try:
        count = -1 if isinstance(value, bool | float) else int(str(value))
    except ValueError:
        count = -1
    if not 0 <= count <= 64:
        raise ValueError(_GPUS_RULE)
    return count


def _gpu_ids(value: list[object] | tuple[object, ...]) -> tuple[str, ...]:
    ids = tuple(str(gpu) for gpu in value if isinstance(gpu, str | int) and not isinstance(gpu, bool))
    usable = all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9:/_-]{0,99}", gpu) for gpu in ids)
    if not ids or not usable or len(ids) < len(value) or len(set(ids)) < len(ids):
        raise ValueError(_GPUS_RULE)
    return ids


def _stop_texts(value: object) -> object:
    return [value] if isinstance(value, str) else _list(value)


def _plain_json(value: dict[str, Any]) -> dict[str, Any]:
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (ValueError, TypeError):
        raise ValueError("must hold only text, finite numbers, true, false, null, lists and mappings") from None
    return dict(json.loads(text))


_DURATION_SCHEMA = {"format": "duration"}  # `catalog_schema` puts the definition of this name in its place
_SIZE_SCHEMA = {"format": "size"}
_GPUS_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": 64},
        {"type": "array", "items": {"type": ["integer", "string"]}, "minItems": 1, "uniqueItems": True},
    ]
}
_FLAG_VALUE_SCHEMA = {"type": ["string", "number", "boolean"]}
_VARIABLE_VALUE_SCHEMA = {"type": ["string", "integer"]}
_STOP_SCHEMA = {"type": ["string", "array"], "items": {"type": "string", "minLength": 1}, "minLength": 1}

Seconds = Annotated[float, BeforeValidator(parse_seconds), WithJsonSchema(_DURATION_SCHEMA)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), WithJsonSchema(_SIZE_SCHEMA)]
Line = Annotated[str, AfterValidator(_one_line)]
Word = Annotated[str, AfterValidator(_one_word)]
_NUMBER = BeforeValidator(_number)
Flag = Annotated[bool, BeforeValidator(_bool)]
FlagName = Annotated[str, AfterValidator(_flag_name)]
FlagValue = Annotated[str | int | float | bool, BeforeValidator(_flag_value), WithJsonSchema(_FLAG_VALUE_SCHEMA)]
VariableName = Annotated[str, AfterValidator(_variable_name)]
VariableValue = Annotated[
    str, BeforeValidator(_variable_value), AfterValidator(_no_nul), WithJsonSchema(_VARIABLE_VALUE_SCHEMA)
]
StopText = Annotated[str, Field(min_length=1)]


class RequestParameters(TypedDict, total=False):
    """Request parameters by their documented names, each in its documented range."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[misc]

    max_new_tokens: Annotated[int, Field(ge=1, le=10_000_000, description="Longest answer in tokens."), _NUMBER]
    max_tokens: Annotated[int, Field(ge=1, le=10_000_000, description="The same as max_new_tokens."), _NUMBER]
    temperature: Annotated[float, Field(ge=0, le=2, description="0 to 2; 0 is greedy."), _NUMBER]
    top_p: Annotated[float, Field(gt=0, le=1, description="Nucleus sampling, above 0 to 1; 1 is off."), _NUMBER]
    top_k: Annotated[int, Field(ge=1, le=10_000_000, description="Sample from the k likeliest tokens."), _NUMBER]
    stop: Annotated[
        list[StopText],
        BeforeValidator(_stop_texts),
        WithJsonSchema(_STOP_SCHEMA),
        Field(description="Texts that end the answer."),
    ]
    stop_on_newline: Annotated[Flag, Field(description="End the answer at the first line end.")]
    seed: Annotated[int, Field(ge=0, le=2**64 - 1, description="Makes sampling repeatable."), _NUMBER]
    repetition_penalty: Annotated[float, Field(gt=0, le=100, description="Above 0; 1 is off."), _NUMBER]
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, description="-2 to 2; 0 is off."), _NUMBER]
    presence_penalty: Annotated[float, Field(ge=-2, le=2, description="-2 to 2; 0 is off."), _NUMBER]
    top_tokens: Annotated[
        int, Field(ge=0, le=50, description="How many likely tokens to report at each position, 0 to 50."), _NUMBER
    ]
    return_full_text: Annotated[Flag, Field(description="Put the prompt before the answer.")]


def _one_length(parameters: RequestParameters) -> RequestParameters:
    if "max_new_tokens" in parameters and "max_tokens" in parameters:
        raise ValueError("has max_new_tokens and max_tokens, which mean the same: keep one")
    return parameters


Parameters = Annotated[RequestParameters, AfterValidator(_one_length)]

# ---- one model ------------------------------------------------------------------------------------------------------


class ModelSpec(BaseModel):
    """What one entry of models.yaml says, with defaults applied. Seconds and bytes are plain numbers here.

    The file's keys are the attributes' names without a unit (`start_timeout` for `start_timeout_s`).
    The text under each attribute is also what editors show for the key.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
        validate_by_alias=True,
        validate_by_name=True,
    )

    id: Annotated[str, AfterValidator(_id)]
    """Names the model in requests, addresses and containers."""
    name: Line = Field(default_factory=lambda known: known["id"])
    """Display name. Default: the id."""
    hf_name: Word | None = None
    """Name on the Hugging Face hub. Engine tgi loads it; requests may name the model by it."""
    revision: Word | None = None
    """Commit or branch on the hub. Default: the hub's default branch."""
    engine: EngineName = "tgi"
    """Which server answers: tgi, llamacpp, or openai for any server that speaks OpenAI's API."""
    runtime: RuntimeName = Field(default_factory=lambda known: _RUNTIME_OF[known["engine"]])
    """Where it runs: docker (a container), process (a child of the gateway) or external (it already runs at `url`).
    Default: docker for tgi, process for llamacpp, external for openai."""
    url: Annotated[Word, AfterValidator(_url)] | None = None
    """Address of a server that already runs; runtime external only."""
    api_key: Annotated[SecretStr, Field(min_length=1)] | None = None
    """Key that the server at `url` asks for. Write it as ${VARIABLE}."""
    image: Word | None = None
    """Container image. Default: the engine's own."""
    pull_policy: PullPolicy = "missing"
    """When the image is pulled: missing (only if it is not there), always, or never."""
    args: Mapping[FlagName, FlagValue] = Field(default_factory=dict)
    """Flags of the engine, without dashes: {max-input-tokens: 2048}."""
    env: Mapping[VariableName, VariableValue] = Field(default_factory=dict, repr=False)
    """Extra environment of the server. Default: none."""
    volumes: Annotated[tuple[Annotated[str, AfterValidator(_volume)], ...], BeforeValidator(_list)] = ()
    """What a container sees of this machine: [/data/models:/data:ro]."""
    shm_size_bytes: Bytes | None = Field(default=None, validation_alias="shm_size")
    """Shared memory of a container, which several GPUs use to talk to each other. Default: the runtime's own."""
    weights: Path | None = None
    """The weights file: a path relative to this file, or package:NAME/FILE inside an installed Python package."""
    weights_source: Annotated[str, AfterValidator(_written_weights)] | None = None
    """`weights` as written. It is set, and `weights` is None, while the package that it names is not installed."""
    weights_sha256: Annotated[str, AfterValidator(_sha256)] | None = None
    """SHA-256 of the weights file, 64 hexadecimal digits; checked once per file. Default: not checked."""
    gpus: Annotated[int | tuple[str, ...], BeforeValidator(_gpus), WithJsonSchema(_GPUS_SCHEMA)] = Field(
        default_factory=lambda known: 1 if known["engine"] == "tgi" else 0
    )
    """How many GPUs, or a list of device ids; 0 is none. Default: 1 for tgi, 0 otherwise."""
    gpu_memory_bytes: Bytes | None = Field(default=None, validation_alias="gpu_memory")
    """Memory it takes on each of its GPUs. Default: all of it."""
    memory_bytes: Bytes | None = Field(default=None, validation_alias="memory")
    """Limit of its memory on the host. Default: none."""
    start_timeout_s: Seconds = Field(default=1200.0, validation_alias="start_timeout")
    """Hard cap of a start. Default: 20m."""
    stall_timeout_s: Seconds = Field(default=180.0, validation_alias="stall_timeout")
    """Ends a start that shows no progress for so long. Default: 3m."""
    generation_timeout_s: Seconds = Field(default=60.0, validation_alias="generation_timeout")
    """Longest answer, or longest pause between two events of a stream; waiting for a start does not count.
    Default: 60s."""
    queue_timeout_s: Seconds = Field(default=300.0, validation_alias="queue_timeout")
    """Longest wait for a free slot of a running model. Default: 5m."""
    drain_timeout_s: Seconds = Field(default=60.0, validation_alias="drain_timeout")
    """How long a model that is to stop may finish its requests. Default: 60s."""
    stop_grace_s: Seconds = Field(
        default_factory=lambda known: _STOP_GRACE_S_OF[known["engine"]], validation_alias="stop_grace"
    )
    """Time between asking the server to leave and killing it. Default: 10s; 95s for tgi."""
    idle_timeout_s: Annotated[
        float | None,
        BeforeValidator(_seconds_or_never),
        WithJsonSchema({"anyOf": [_DURATION_SCHEMA, {"const": "never"}]}),
    ] = Field(default=900.0, validation_alias="idle_timeout")
    """A model without requests for so long is stopped; never keeps it. Default: 15m."""
    abandon_after_s: Seconds = Field(default=60.0, validation_alias="abandon_after")
    """A start that nobody waits for any more is called off after so long. Default: 60s."""
    health_interval_s: Seconds = Field(default=10.0, validation_alias="health_interval")
    """Time between two health checks of a running server. Default: 10s."""
    health_failures: Annotated[int, Field(ge=1, le=1000), _NUMBER] = 3
    """Missed checks in a row that make it unhealthy. Default: 3."""
    unhealthy_timeout_s: Seconds = Field(default=60.0, validation_alias="unhealthy_timeout")
    """An unhealthy server is removed after so long. Default: 60s."""
    max_concurrency: Annotated[int, Field(ge=1, le=100_000), _NUMBER] = Field(
        default_factory=lambda known: _SLOTS_OF[known["engine"]]
    )
    """Requests that the server works on at once. Default: 4 for llamacpp, 128 for tgi, 64 for openai."""
    max_queue: Annotated[int, Field(ge=0, le=1_000_000), _NUMBER] = 256
    """Requests that may wait for a slot; more are refused. Default: 256."""
    aliases: Annotated[tuple[Line, ...], BeforeValidator(_list)] = ()
    """Other names that requests may use; slashes are fine in request bodies."""
    preload: Flag = False
    """Start it with the gateway. Default: false."""
    pinned: Flag = False
    """Never stop it for being idle or to make room. Default: false."""
    replicas: Annotated[int, Field(ge=1, le=64), _NUMBER] = 1
    """How many servers share its requests. Default: 1."""
    parameters: Parameters = Field(default_factory=RequestParameters)
    """Request parameters used when the caller gives none."""
    overrides: Parameters = Field(default_factory=RequestParameters)
    """Request parameters forced on every call."""
    context_tokens: Annotated[int, Field(ge=1, le=100_000_000), _NUMBER] | None = None
    """Tokens of prompt and answer together. Default: what the server says."""
    chat_template: Annotated[str, Field(min_length=1), AfterValidator(_no_nul)] | None = None
    """Jinja template that makes a prompt of chat messages. Default: the model's own."""
    metadata: Annotated[dict[str, Any], AfterValidator(_plain_json)] = Field(default_factory=dict)
    """Facts for /info: {step: 2920, val_loss: 0.2627}."""

    @model_validator(mode="before")
    @classmethod
    def _locate_weights(cls, data: Any, info: ValidationInfo) -> Any:
        written = data.get("weights") if isinstance(data, dict) else None
        if not isinstance(written, str | Path) or "weights_source" in data:
            return data
        folder = (info.context or {}).get("folder", Path())
        return {**data, "weights": _weights_path(str(written), folder), "weights_source": str(written)}

    @model_validator(mode="after")
    def _fits_together(self) -> ModelSpec:
        contradictions = [f"{key}: {rule}" for key, rule in _contradictions(self.model_dump(include=_TOGETHER))]
        if contradictions:
            raise ValueError("; ".join(contradictions))
        return self


_TOGETHER = {"engine", "runtime", "url", "hf_name", "weights_source"}


def _weights_path(written: str, folder: Path) -> Path | None:
    found = _PACKAGE.fullmatch(written)
    if found is None:
        return None if written.startswith("package:") else (folder / written).absolute()
    package = _package_folder(found[1])
    return package / found[2] if package else None


def _package_folder(name: str) -> Path | None:
    try:
        package = find_spec(name)  # of a top-level name: nothing is imported
    except (ImportError, ValueError):
        return None
    folders = package.submodule_search_locations if package else None
    return Path(next(iter(folders))).absolute() if folders else None


def _contradictions(said: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, rule) for the keys that do not fit together. Takes values as written, right or wrong."""
    engine = said.get("engine", "tgi")
    runtime = said.get("runtime") or (_RUNTIME_OF.get(engine) if isinstance(engine, str) else None)
    if engine == "tgi" and said.get("hf_name") is None:
        yield "hf_name", "is missing: engine tgi loads the model by it"
    if engine == "llamacpp" and said.get("weights_source") is None:
        yield "weights", "is missing: engine llamacpp loads a GGUF file"
    if engine == "llamacpp" and runtime in ("docker", "external"):
        yield "runtime", "must be process: engine llamacpp runs as a child of the gateway"
    if runtime == "external" and said.get("url") is None:
        yield "url", "is missing: runtime external needs the address of the server that already runs"
    if runtime in ("docker", "process") and said.get("url") is not None:
        yield "url", f"is for runtime external only, and this model's runtime is {runtime}"


def deferred(spec: ModelSpec) -> list[str]:
    """Return, in words, what `spec` asks for that this version reads but cannot do yet."""
    missing = []
    if spec.engine != "llamacpp":
        missing.append(f"engine {spec.engine} comes with a later version: this one runs llamacpp")
    if spec.runtime != "process":
        missing.append(f"runtime {spec.runtime} comes with a later version: this one runs models as processes")
    if spec.replicas > 1:
        missing.append(f"replicas: {spec.replicas} comes with a later version: this one runs one server per model")
    return missing


# ---- all models -----------------------------------------------------------------------------------------------------


class Catalog(BaseModel):
    """All models by id, in the file's order."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    path: Path
    default_model: str | None = None
    models: Mapping[str, ModelSpec]

    @model_validator(mode="after")
    def _is_consistent(self) -> Catalog:
        wrong = [f"{section}: {rule}" for section, rule in _clashes(self.models)]
        if self.default_model is not None and self.default_model not in self.models:
            near = did_you_mean(self.default_model, self.models)
            wrong.append(f"default_model: there is no model {_shown(self.default_model)}{near}")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def resolve(self, name: str) -> ModelSpec:
        """Return the model of this id, alias, hf_name or weights path (as written).

        Raises:
            UnknownModel: there is none; names the near ones.
        """
        try:
            return self.models[self._names[name]]
        except KeyError:
            raise self._unknown(name) from None

    def by_id(self, id: str) -> ModelSpec:  # noqa: A002 - what the contract calls it
        """Return the model of this id, or of this alias without slashes: what an address may hold.

        Raises:
            UnknownModel: there is none; names the near ones.
        """
        spec = self.models.get(self._names.get(id, ""))
        if spec is None or id not in (spec.id, *spec.aliases) or "/" in id:
            raise self._unknown(id)
        return spec

    @cached_property
    def _names(self) -> dict[str, str]:
        claims = _claims(self.models)
        return {name: next(iter(_claimants(by_id))) for name, by_id in claims.items()}

    def _unknown(self, name: str) -> UnknownModel:
        near = dict.fromkeys(self._names[close] for close in _near(name, self._names))
        hint = f" Near: {', '.join(near)}." if near else ""
        return UnknownModel(f"No model is called '{_shown(name)}'.{hint} GET /models lists them all.")


_CHOSEN = {"id", "aliases"}  # names that somebody chose for the model; hf_name and weights come with it


def _claims(models: Mapping[str, ModelSpec]) -> dict[str, dict[str, set[str]]]:
    """Return each name with the ids that claim it, and by which of their keys."""
    claims: dict[str, dict[str, set[str]]] = {}
    for spec in models.values():
        given = [("hf_name", spec.hf_name), ("weights", spec.weights_source)]
        for key, name in [("id", spec.id), *(("aliases", alias) for alias in spec.aliases), *given]:
            if name is not None:
                claims.setdefault(name, {}).setdefault(spec.id, set()).add(key)
    return claims


def _claimants(by_id: Mapping[str, set[str]]) -> list[str]:
    """Return the ids that a name may mean. One whose own hf_name or weights it is has it for itself by choosing it."""
    chosen = [claimant for claimant, keys in by_id.items() if keys & _CHOSEN]
    settled = len(chosen) == 1 and by_id[chosen[0]] - _CHOSEN
    return chosen if settled else list(by_id)


def _clashes(models: Mapping[str, ModelSpec]) -> Iterator[tuple[str, str]]:
    """Yield (section, rule) for the names that models contend for."""
    for name, by_id in _claims(models).items():
        if len(_claimants(by_id)) > 1:
            yield "models", _ambiguous(name, by_id)
    for spec in models.values():
        for clash in sorted({f"{spec.id}-{n}" for n in range(1, spec.replicas)} & models.keys()):
            yield spec.id, f"replicas: one of its containers would have the name of the model {clash}: rename one"


def _ambiguous(name: str, by_id: Mapping[str, set[str]]) -> str:
    holders = ", ".join(f"{model} ({' and '.join(sorted(keys))})" for model, keys in by_id.items())
    fix = "remove it from all but one"
    if not any(keys & _CHOSEN for keys in by_id.values()):
        fix = "list it under the `aliases` of the one that shall answer to it"
    return f"the name {_shown(name)} means more than one model: {holders}; {fix}"


def _unknown_key(key: object, known: Iterable[object]) -> str:
    return f"unknown key{did_you_mean(key, known)}"


def did_you_mean(name: object, known: Iterable[object], likeness: float = 0.6) -> str:
    """Return `; did you mean ...?` with the known name most like `name` (1 is the same), or nothing."""
    near = _near(name, known, likeness)
    return f"; did you mean {_shown(near[0])}?" if near else ""


def _near(name: object, known: Iterable[object], likeness: float = 0.6) -> list[str]:
    names = [other for other in known if isinstance(other, str) and len(other) <= 100]
    return difflib.get_close_matches(name[:100], names, n=3, cutoff=likeness) if isinstance(name, str) else []


def _shown(name: object, longest: int = 100) -> str:
    """Return a name from outside, short and harmless to a terminal."""
    if not isinstance(name, str):
        return f"<{type(name).__name__}>" if isinstance(name, int) and abs(name) > 2**63 else str(name)
    short = name if len(name) <= longest else name[:longest] + "..."
    return short if short.isprintable() else ascii(short)


# ---- the file: YAML into plain values -------------------------------------------------------------------------------

_LARGEST_FILE_BYTES = 2**20
_MOST_VALUES = 100_000
_DEEPEST = 50
_CORE_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


class _Loader(yaml.SafeLoader):
    """YAML's plain core: text, numbers, true and false, null, lists and mappings. A date stays text."""

    yaml_constructors: ClassVar[Any] = {
        tag: build for tag, build in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _CORE_TAGS
    }
    yaml_implicit_resolvers = {  # noqa: RUF012 - as the base class declares it
        first: [(tag, looks) for tag, looks in resolvers if tag in _CORE_TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()
        except (ValueError, ArithmeticError, LookupError):  # such as `!!int x`, a number of 5,000 digits, "\\ud800"
            raise yaml.MarkedYAMLError(problem="a value cannot be read", problem_mark=node.start_mark) from None
        return value


@dataclass
class _Nodes:
    """A walk over a YAML document before its values are made: finds what would be lost or would grow without bound."""

    repeated: list[str] = field(default_factory=list)
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)

    def measure(self, node: yaml.Node) -> tuple[int, int]:
        """Return how many values a node stands for with its aliases written out, and how deeply they nest.

        Raises:
            MarkedYAMLError: it contains itself, or either number is too large.
        """
        if id(node) not in self.sizes:
            self.sizes[id(node)] = (_MOST_VALUES + 1, 1)  # what an alias to a node still being measured counts
            self.sizes[id(node)] = self._sum(node)
        return self.sizes[id(node)]

    def _sum(self, node: yaml.Node) -> tuple[int, int]:
        measured = [self.measure(child) for child in self._children(node)]
        size = 1 + sum(size for size, _ in measured)
        depth = 1 + max((depth for _, depth in measured), default=0)
        if size > _MOST_VALUES or depth > _DEEPEST:
            problem = f"more than {_MOST_VALUES} values (with aliases written out), or nested more than {_DEEPEST} deep"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return size, depth

    def _children(self, node: yaml.Node) -> list[yaml.Node]:
        if isinstance(node, yaml.MappingNode):
            self._find_repeated([key for key, _ in node.value])
            return [child for pair in node.value for child in pair]
        return node.value if isinstance(node, yaml.SequenceNode) else []

    def _find_repeated(self, keys: list[yaml.Node]) -> None:
        first: dict[str, int] = {}
        for key in keys:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and first.setdefault(key.value, line) != line:
                self.repeated.append(f"line {line}: the key {_shown(key.value)} is already on line {first[key.value]}")


def _read_text(path: Path) -> str:
    """Return the file's text, or raise ValueError in words."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE_BYTES + 1)
        if len(content) > _LARGEST_FILE_BYTES:
            raise ValueError(f"is larger than {_LARGEST_FILE_BYTES} bytes")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        hint = "name another with --catalog or GATEWAY_CATALOG"
        raise ValueError(f"there is no such file ({_shown(str(path.absolute()), 4096)}); {hint}") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start})") from None


def _parse(text: str) -> tuple[object, list[str]]:
    """Return a YAML text's plain value and a complaint for each repeated key, or raise ValueError in words."""
    nodes = _Nodes()
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None, []
        nodes.measure(root)
        return loader.construct_document(root), nodes.repeated
    except yaml.YAMLError as error:
        raise ValueError(_yaml_fault(error, text)) from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _yaml_fault(error: yaml.YAMLError, text: str) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        return f"line {text.count(chr(10), 0, error.position) + 1}: a character that YAML does not allow"
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "not YAML"
    # What the parser quotes may be part of a secret (`api_key: *abc`); single characters and its own <words> may stay.
    problem = re.sub(r"'[^']*'|\"[^\"]*\"", lambda quoted: _harmless(quoted[0]), problem)
    return f"line {mark.line + 1}: {problem}" if mark else problem


def _harmless(quoted: str) -> str:
    return quoted if len(quoted) <= 3 or quoted[1] in "<\\" else "..."


# ---- the file: ${VARIABLE} ------------------------------------------------------------------------------------------

_REFERENCE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\})?")


def _interpolate(text: str, environ: Mapping[str, str]) -> str:
    """Return `text` with ${NAME} and ${NAME:-default} replaced and $${ unescaped.

    Raises:
        ValueError: a variable without default is not set, or a `${` begins no reference.
    """
    return _REFERENCE.sub(lambda found: _referenced(found, environ), text)


def _referenced(found: re.Match[str], environ: Mapping[str, str]) -> str:
    if found[0] == "$${":
        return "${"
    if found[1] is None:
        raise ValueError("`${` must begin ${NAME} or ${NAME:-default}; write $${ for the characters themselves")
    value = environ.get(found[1])
    if value is None and found[2] is None:
        raise ValueError(
            f"the variable {_shown(found[1])} is not set: set it, or write ${{{_shown(found[1])}:-default}}"
        )
    return _utf8(found[1], value or found[2] or "")


def _utf8(name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the variable {_shown(name)} is not UTF-8 text") from None
    return value


# ---- the file: the catalog ------------------------------------------------------------------------------------------


def load_catalog(path: Path, environ: Mapping[str, str]) -> Catalog:
    """Return the catalog that the file holds, with `${VARIABLES}` taken from `environ`.

    Raises:
        CatalogError: with a complaint for everything that is wrong with the file.
    """
    reading = _Reading(path, environ)
    catalog = reading.catalog()
    if catalog is None:
        raise CatalogError(reading.complaints())
    return catalog


def faults(error: ValidationError) -> Iterator[tuple[str, str]]:
    """Yield (key, rule) for every key that pydantic found wrong by itself, in our words and without its value.

    A key inside a key is `env.NAME`.
    """
    for fault in error.errors(include_input=False, include_url=False):
        place = ".".join(_shown(step) for step in fault["loc"] if step != "[key]")
        if place and fault["type"] != "default_factory_not_called":
            yield "weights" if place == "weights_source" else place, _rule(fault)


_RULES = {
    "string_type": "must be text: put it in quotes",
    "path_type": "must be text: put it in quotes",
    "invalid_key": "every key in it must be text: put it in quotes",
    "dict_type": "must be a mapping of keys to values",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a whole number of fewer digits",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "bool_parsing": "must be true or false",
    "literal_error": "must be {expected}",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "value_error": "{error}",
}


def _rule(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "extra_forbidden":
        return _unknown_key(fault["loc"][-1], RequestParameters.__annotations__)
    return _RULES.get(fault["type"], "is not usable").format(**fault.get("ctx", {}))


_TOP_KEYS = ("default_model", "defaults", "models")
_MODEL_KEYS = tuple(
    str(about.validation_alias or attribute)
    for attribute, about in ModelSpec.model_fields.items()
    if attribute not in ("id", "weights_source")
)


@dataclass
class _Reading:
    """One reading of one file. It collects every fault as (section, key, rule) and stops at none."""

    path: Path
    environ: Mapping[str, str]
    found: list[tuple[str, str, str]] = field(default_factory=list)

    def complaints(self) -> list[str]:
        """Return a line for each fault: file, section (a model, mostly), key, rule."""
        return [": ".join([_shown(str(self.path), 4096), *filter(None, fault)]) for fault in self.found]

    def catalog(self) -> Catalog | None:
        """Return the catalog, or None if there is any fault."""
        document = self._document()
        if document is None:
            return None
        top = self._known("", document, _TOP_KEYS)
        default_model = self._default_model(top)
        defaults = self._entry("defaults", top.get("defaults", {}))
        models = self._models(top.get("models"), defaults, self._right(defaults))
        self.found += [(section, "", rule) for section, rule in _clashes(models)]
        return None if self.found else Catalog(path=self.path, default_model=default_model, models=models)

    def _document(self) -> dict[Any, Any] | None:
        try:
            document, repeated = _parse(_read_text(self.path))
            self.found += [("", "", rule) for rule in repeated]
            if document is None:
                raise ValueError("is empty: write `models:` and at least one model under it")
            if not isinstance(document, dict):
                raise ValueError("must be a mapping of keys to values")
        except ValueError as error:
            self.found.append(("", "", str(error)))
            return None
        return document

    def _known(self, section: str, written: object, known: Sequence[str]) -> dict[str, Any]:
        if not isinstance(written, dict):
            self.found.append((section, "", "must be a mapping of keys to values"))
            return {}
        self.found += [(section, _shown(key), _unknown_key(key, known)) for key in written if key not in known]
        return {key: value for key, value in written.items() if key in known}

    def _default_model(self, top: Mapping[str, Any]) -> str | None:
        if "default_model" not in top:
            return None
        name, models = self._filled("default_model", "", top["default_model"]), top.get("models")
        if not isinstance(name, str):
            self.found.append(("default_model", "", "must be the id of a model"))
            return None
        if isinstance(models, dict) and name not in models:
            written = _shown(top["default_model"])  # not what its ${VARIABLE} holds
            self._add("default_model", [("", f"there is no model {written}{did_you_mean(name, models)}")])
        return name

    def _entry(self, section: str, written: object) -> dict[str, Any]:
        """Return the model keys of one section, ${VARIABLES} replaced; the faulty ones are among them."""
        values = self._known(section, written, _MODEL_KEYS)
        for key in [key for key, value in values.items() if value is None]:
            self.found.append((section, key, "has no value: give it one, or remove the line"))
        return {key: self._filled(section, key, value) for key, value in values.items()}

    def _filled(self, section: str, place: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._filled(section, f"{place}.{_shown(key)}", item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._filled(section, f"{place}.{position}", item) for position, item in enumerate(value)]
        try:
            return _interpolate(value, self.environ) if isinstance(value, str) else value
        except ValueError as error:
            self.found.append((section, place, str(error)))
            return value

    def _right(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return the defaults that are right; complain of the others here, not once a model."""
        _, wrong = self._spec("defaults", defaults)
        self._add("defaults", wrong)
        faulty = {place.split(".")[0] for section, place, _ in self.found if section == "defaults"}
        return {key: value for key, value in defaults.items() if key not in faulty}

    def _models(self, written: object, defaults: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, ModelSpec]:
        if not isinstance(written, dict) or not written:
            self.found.append(("models", "", "must be a mapping of at least one model by its id"))
            return {}
        specs = [self._model(model, entry, defaults, right) for model, entry in written.items()]
        return {spec.id: spec for spec in specs if spec is not None}

    def _model(
        self, model: object, written: object, defaults: Mapping[str, Any], right: Mapping[str, Any]
    ) -> ModelSpec | None:
        section, usable = _shown(model), isinstance(model, str) and _ID.fullmatch(model)
        if not usable:
            self.found.append((section, "", _ID_RULE if isinstance(model, str) else "must be text: put it in quotes"))
        own = self._entry(section, written)
        if not isinstance(written, dict):
            return None
        spec, wrong = self._spec(section if usable else "an-id", {**right, **own})
        self._add(section, wrong)
        said = {**defaults, **own}
        self._add(section, list(_contradictions({**said, "weights_source": said.get("weights")})))
        return spec

    def _spec(self, model: str, values: Mapping[str, Any]) -> tuple[ModelSpec | None, list[tuple[str, str]]]:
        try:
            return ModelSpec.model_validate({"id": model, **values}, context={"folder": self.path.parent}), []
        except ValidationError as error:
            return None, list(faults(error))

    def _add(self, section: str, wrong: Sequence[tuple[str, str]]) -> None:
        """Add what is wrong, but for the places that have been complained of already: one fault, one complaint."""
        before = {(where, place) for where, place, _ in self.found}
        self.found += [(section, place, rule) for place, rule in wrong if (section, place) not in before]


# ---- its JSON Schema ------------------------------------------------------------------------------------------------


def catalog_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of models.yaml as a person writes it."""
    model = ModelSpec.model_json_schema()
    parameters = model["$defs"]["RequestParameters"]
    definitions = {
        "Model": _keys_schema({key: model["properties"][key] for key in _MODEL_KEYS}),
        "RequestParameters": _keys_schema(parameters["properties"]) | {"description": parameters["description"]},
        **_VALUE_SCHEMAS,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "models.yaml",
        **_keys_schema(_TOP_SCHEMAS),
        "required": ["models"],
        "$defs": definitions,
    }


_VALUE_SCHEMAS: dict[str, Any] = {
    "Duration": {
        "description": "90s, 15m, 2h, 500ms, or a number of seconds.",
        "anyOf": [
            {"type": "number", "exclusiveMinimum": 0, "maximum": _LONGEST_S},
            {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? ?(ms|s|m|h)?$"},
        ],
    },
    "Size": {
        "description": "14GiB, 512MiB, 2GB, or a number of bytes.",
        "anyOf": [
            {"type": "number", "minimum": 1, "maximum": _LARGEST_BYTES},
            {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)? ?(B|[kK]B|[MGT]B|[KMGT]iB)?$"},
        ],
    },
    "Variable": {"description": "${NAME} or ${NAME:-default}.", "type": "string", "pattern": r"\$\{"},
}
_NAMED_SCHEMAS = {"duration": {"$ref": "#/$defs/Duration"}, "size": {"$ref": "#/$defs/Size"}}
_TOP_SCHEMAS: dict[str, Any] = {
    "default_model": {"type": "string", "description": "Answers requests that name no model. Default: none."},
    "defaults": {"$ref": "#/$defs/Model", "description": "Any key of a model, for all of them; a model's own wins."},
    "models": {
        "type": "object",
        "description": "The models by id.",
        "minProperties": 1,
        "propertyNames": {"pattern": f"^{_ID.pattern}$"},
        "additionalProperties": {"$ref": "#/$defs/Model"},
    },
}


def _keys_schema(keys: Mapping[str, Any]) -> dict[str, Any]:
    properties = {key: _written_schema(schema) for key, schema in keys.items()}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _written_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return pydantic's schema of a key as editors need it: no null, named units, and ${VARIABLE} in every place."""
    about = {key: schema[key] for key in ("description", "default") if schema.get(key) is not None}
    about["description"] = " ".join(about["description"].split())
    kinds = list(_kinds({key: value for key, value in schema.items() if key not in (*about, "title", "default")}))
    if not any(_holds_any_text(kind) for kind in kinds):
        kinds.append({"$ref": "#/$defs/Variable"})
    return about | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds})


def _kinds(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if schema.get("format") in _NAMED_SCHEMAS:
        yield _NAMED_SCHEMAS[schema["format"]]
    elif "anyOf" in schema:
        for kind in schema["anyOf"]:
            yield from _kinds(kind)
    elif schema != {"type": "null"}:
        yield schema


def _holds_any_text(schema: Mapping[str, Any]) -> bool:
    mapping = schema.get("type") == "object" or schema.get("$ref") in ("#/$defs/Model", "#/$defs/RequestParameters")
    return mapping or ("string" in schema.get("type", ()) and "enum" not in schema)
