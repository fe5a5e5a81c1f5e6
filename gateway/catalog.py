"""What models.yaml says, as frozen values: `ModelSpec` for an entry, `Catalog` for the file.

`gateway.catalog_values` has the kinds of value, and `gateway.catalog_file` reads the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from typing_extensions import TypedDict  # pydantic reads the standard one from Python 3.12 on only

from gateway.catalog_values import (
    NOT_BOOL,
    Bool,
    Bytes,
    FlagName,
    FlagValue,
    GpuBytes,
    Gpus,
    Id,
    Line,
    PlainJson,
    Seconds,
    SecondsOrNever,
    Secret,
    Sha256,
    Template,
    Texts,
    Url,
    VariableName,
    VariableValue,
    Volumes,
    WeightsSource,
    Word,
    did_you_mean,
    nearest,
    shown,
    weights_path,
)
from gateway.errors import UnknownModel

EngineName = Literal["tgi", "llamacpp", "openai"]
RuntimeName = Literal["docker", "process", "external"]
PullPolicy = Literal["missing", "always", "never"]

OPENAI_ARGS = ("model", "server", "logprobs")
"""What `args` of engine openai may have: nothing is started that could take more."""
OPENAI_SERVERS = ("openai", "vllm", "sglang", "llama.cpp")
"""What `server` in them may be."""

_RUNTIME_OF: dict[str, RuntimeName] = {"tgi": "docker", "llamacpp": "process", "openai": "external"}
_SLOTS_OF = {"tgi": 128, "llamacpp": 4, "openai": 64}
_STOP_GRACE_S_OF = {"tgi": 95.0, "llamacpp": 10.0, "openai": 10.0}  # TGI itself lets requests finish for 90 s

# ---- request parameters ---------------------------------------------------------------------------------------------


class RequestParameters(TypedDict, total=False):
    """Request parameters by their documented names, each in its documented range."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[misc]

    max_new_tokens: Annotated[int, Field(ge=1, le=10_000_000, description="Longest answer in tokens."), NOT_BOOL]
    max_tokens: Annotated[int, Field(ge=1, le=10_000_000, description="The same as max_new_tokens."), NOT_BOOL]
    temperature: Annotated[float, Field(ge=0, le=2, description="0 to 2; 0 is greedy."), NOT_BOOL]
    top_p: Annotated[float, Field(gt=0, le=1, description="Nucleus sampling, above 0 to 1; 1 is off."), NOT_BOOL]
    top_k: Annotated[int, Field(ge=1, le=10_000_000, description="Sample from the k likeliest tokens."), NOT_BOOL]
    stop: Annotated[Texts, Field(description="Texts that end the answer.")]
    stop_on_newline: Annotated[Bool, Field(description="End the answer at the first line end.")]
    seed: Annotated[int, Field(ge=0, le=2**64 - 1, description="Makes sampling repeatable."), NOT_BOOL]
    repetition_penalty: Annotated[float, Field(gt=0, le=100, description="Above 0; 1 is off."), NOT_BOOL]
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, description="-2 to 2; 0 is off."), NOT_BOOL]
    presence_penalty: Annotated[float, Field(ge=-2, le=2, description="-2 to 2; 0 is off."), NOT_BOOL]
    top_tokens: Annotated[
        int, Field(ge=0, le=50, description="How many likely tokens to report at each position, 0 to 50."), NOT_BOOL
    ]
    return_full_text: Annotated[Bool, Field(description="Put the prompt before the answer.")]


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

    id: Id
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
    url: Url | None = None
    """Address of a server that already runs; runtime external only."""
    api_key: Annotated[Secret, Field(min_length=1)] | None = None
    """Key that the server at `url` asks for. Write it as ${VARIABLE}."""
    image: Word | None = None
    """Container image. Default: the engine's own."""
    pull_policy: PullPolicy = "missing"
    """When the image is pulled: missing (only if it is not there), always, or never."""
    args: Mapping[FlagName, FlagValue] = Field(default_factory=dict)
    """Flags of the engine, without dashes: {max-input-tokens: 2048}."""
    env: Mapping[VariableName, VariableValue] = Field(default_factory=dict, repr=False)
    """Extra environment of the server. Default: none."""
    volumes: Volumes = ()
    """What a container sees of this machine: [/data/models:/data:ro]."""
    shm_size_bytes: Bytes | None = Field(default=None, validation_alias="shm_size")
    """Shared memory of a container, which several GPUs use to talk to each other. Default: the runtime's own."""
    weights: Path | None = None
    """The weights file: a path relative to this file, or package:NAME/FILE inside an installed Python package."""
    weights_source: WeightsSource | None = None
    """`weights` as written. It is set, and `weights` is None, while the package that it names is not installed."""
    weights_sha256: Sha256 | None = None
    """SHA-256 of the weights file, 64 hexadecimal digits; checked once per file. Default: not checked."""
    gpus: Gpus = Field(default_factory=lambda known: int((known["engine"], known["runtime"]) == ("tgi", "docker")))
    """How many GPUs, or a list of device ids: 0 is none, also in quotes, and ["0"] is GPU 0.
    Default: 1 for tgi in a container, 0 otherwise."""
    gpu_memory_bytes: GpuBytes | None = Field(default=None, validation_alias="gpu_memory")
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
    idle_timeout_s: SecondsOrNever = Field(default=900.0, validation_alias="idle_timeout")
    """A model without requests for so long is stopped; never keeps it. Default: 15m."""
    abandon_after_s: Seconds = Field(default=60.0, validation_alias="abandon_after")
    """A start that nobody waits for any more is called off after so long. Default: 60s."""
    health_interval_s: Seconds = Field(default=10.0, validation_alias="health_interval")
    """Time between two health checks of a running server. Default: 10s."""
    health_failures: Annotated[int, Field(ge=1, le=1000), NOT_BOOL] = 3
    """Missed checks in a row that make it unhealthy. Default: 3."""
    unhealthy_timeout_s: Seconds = Field(default=60.0, validation_alias="unhealthy_timeout")
    """An unhealthy server is removed after so long. Default: 60s."""
    max_concurrency: Annotated[int, Field(ge=1, le=100_000), NOT_BOOL] = Field(
        default_factory=lambda known: _SLOTS_OF[known["engine"]]
    )
    """Requests that the server works on at once. Default: 4 for llamacpp, 128 for tgi, 64 for openai."""
    max_queue: Annotated[int, Field(ge=0, le=1_000_000), NOT_BOOL] = 256
    """Requests that may wait for a slot; more are refused. Default: 256."""
    aliases: tuple[Line, ...] = ()
    """Other names that requests may use; slashes are fine in request bodies."""
    preload: Bool = False
    """Start it with the gateway. Default: false."""
    pinned: Bool = False
    """Never stop it for being idle or to make room. Default: false."""
    replicas: Annotated[int, Field(ge=1, le=64), NOT_BOOL] = 1
    """How many servers share its requests. Default: 1."""
    parameters: Parameters = Field(default_factory=RequestParameters)
    """Request parameters used when the caller gives none."""
    overrides: Parameters = Field(default_factory=RequestParameters)
    """Request parameters forced on every call."""
    context_tokens: Annotated[int, Field(ge=1, le=100_000_000), NOT_BOOL] | None = None
    """Tokens of prompt and answer together. Default: what the server says."""
    chat_template: Template | None = None
    """Jinja template that makes a prompt of chat messages; engine llamacpp only. Default: the model's own."""
    metadata: PlainJson = Field(default_factory=dict)
    """Facts for /info: {step: 2920, val_loss: 0.2627}."""

    @model_validator(mode="before")
    @classmethod
    def _locate_weights(cls, data: Any, info: ValidationInfo) -> Any:
        written = data.get("weights") if isinstance(data, dict) else None
        if not isinstance(written, str | Path) or "weights_source" in data:
            return data
        folder = (info.context or {}).get("folder", Path())
        return {**data, "weights": weights_path(str(written), folder), "weights_source": str(written)}

    @model_validator(mode="after")
    def _fits_together(self) -> ModelSpec:
        wrong = [f"{key}: {rule}" for key, rule in contradictions(dict(self))]
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


MODEL_KEYS = tuple(
    str(about.validation_alias or attribute)
    for attribute, about in ModelSpec.model_fields.items()
    if attribute not in ("id", "weights_source")
)
"""The keys of an entry, as the file has them."""


def contradictions(said: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, rule) for the keys that do not fit together. Takes values as written, right or wrong."""
    engine = said.get("engine", "tgi")
    runtime = said.get("runtime") or (_RUNTIME_OF.get(engine) if isinstance(engine, str) else None)
    if engine == "tgi" and said.get("hf_name") is None:
        yield "hf_name", "is missing: engine tgi loads the model by it"
    if engine == "llamacpp" and said.get("weights_source") is None:
        yield "weights", "is missing: engine llamacpp loads a GGUF file"
    if engine == "tgi" and runtime == "process":
        yield "runtime", "must be docker (or external): engine tgi runs in a container"
    if engine == "llamacpp" and runtime in ("docker", "external"):
        yield "runtime", "must be process: engine llamacpp runs as a child of the gateway"
    if engine == "openai":
        yield from _of_openai(runtime, said.get("args"))
    yield from _of_address(runtime, said)
    template = said.get("chat_template")
    if template is not None and isinstance(engine, str) and engine in _TEMPLATE_OF:
        yield "chat_template", _TEMPLATE_OF[engine]
    elif isinstance(template, str) and template and "{{" not in template and "{%" not in template:
        yield "chat_template", "must be the text of a Jinja template, with {{ or {% in it: paste it, not a name or file"
    yield from _beyond_the_context(said)


def _of_address(runtime: object, said: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what is wrong about the one address of a server that others run."""
    url, replicas = said.get("url"), said.get("replicas")
    if runtime == "external" and url is None:
        yield "url", "is missing: runtime external needs the address of the server that already runs"
    if runtime == "external" and isinstance(replicas, int) and replicas > 1:
        yield "replicas", "must be 1 with runtime external: its `url` is one server; add a model for each other one"
    if runtime in ("docker", "process") and url is not None:
        yield "url", f"is for runtime external only, and this model's runtime is {runtime}"


def _of_openai(runtime: object, args: object) -> Iterator[tuple[str, str]]:
    """Yield what does not fit to a server that others run."""
    if runtime in ("docker", "process"):
        yield "runtime", "must be external: engine openai reaches a server that already runs, at `url`"
    said = args if isinstance(args, Mapping) else {}
    for flag in said:
        if flag not in OPENAI_ARGS:
            known = ", ".join(OPENAI_ARGS)
            yield f"args.{shown(flag)}", f"engine openai takes {known} in args{did_you_mean(flag, OPENAI_ARGS)}"
    if said.get("server", "openai") not in OPENAI_SERVERS:
        yield "args.server", f"must be one of {', '.join(OPENAI_SERVERS)}"


_TEMPLATE_OF = {
    "tgi": "is for engine llamacpp only: give TGI a file, by `volumes` and args: {tokenizer-config-path: ...}",
    "openai": "is for engine llamacpp only: give it to the server that runs at `url`",
}
"""Why this engine takes no `chat_template`, and what to do instead."""


def _beyond_the_context(said: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    context = said.get("context_tokens")
    for section in ("parameters", "overrides"):
        asked = said.get(section)
        for key in ("max_new_tokens", "max_tokens"):
            most = asked.get(key) if isinstance(asked, Mapping) else None
            if isinstance(most, int) and isinstance(context, int) and most > context:
                yield section, f"{key} must be at most context_tokens, which is {context}"


def deferred(spec: ModelSpec) -> list[str]:
    """Return, in words, what `spec` asks for that this version reads but cannot do yet."""
    return [f"{key.removesuffix('_bytes')} has no effect on a model that {where}" for key, where in _idle(spec)]


def _idle(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """Yield the keys that change nothing for a model of this engine and runtime, and why."""
    if spec.engine == "llamacpp":
        keys, where = _NOT_FOR_PROCESSES, "runs as a process"
    elif spec.runtime == "external":
        keys, where = {**_NOT_FOR_OTHERS, **({"args": {}} if spec.engine == "tgi" else {})}, "already runs elsewhere"
    else:
        return
    yield from ((key, where) for key, idle in keys.items() if getattr(spec, key) != idle)


_NOT_FOR_PROCESSES: Mapping[str, object] = {
    "image": None,
    "pull_policy": "missing",
    "volumes": (),
    "shm_size_bytes": None,
    "memory_bytes": None,
}
_NOT_FOR_OTHERS: Mapping[str, object] = {
    **_NOT_FOR_PROCESSES,
    "gpus": 0,
    "gpu_memory_bytes": None,
    "env": {},
    "weights_source": None,
}


# ---- all models -----------------------------------------------------------------------------------------------------


class Catalog(BaseModel):
    """All models by id, in the file's order."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    path: Path
    default_model: str | None = None
    models: Mapping[str, ModelSpec]

    @model_validator(mode="after")
    def _is_consistent(self) -> Catalog:
        wrong = [f"{section}: {rule}" for section, rule in clashes(self.models)]
        if self.default_model is not None and self.default_model not in self.models:
            near = did_you_mean(self.default_model, self.models)
            wrong.append(f"default_model: there is no model {shown(self.default_model)}{near}")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def resolve(self, name: str) -> ModelSpec:
        """Return the model of this id, alias, hf_name or weights path (as written).

        Raises:
            UnknownModel: there is none; names the near ones.
        """
        try:
            return self.models[self._ids[name]]
        except KeyError:
            raise self._unknown(name) from None

    def by_id(self, id: str) -> ModelSpec:  # noqa: A002 - what the contract calls it
        """Return the model of this id, or of this alias without slashes: what an address may hold.

        Raises:
            UnknownModel: there is none; names the near ones.
        """
        spec = self.resolve(id)
        if id not in (spec.id, *spec.aliases) or "/" in id:
            raise self._unknown(id)
        return spec

    @cached_property
    def _ids(self) -> dict[str, str]:
        """Every name, with the id of the model that it means."""
        return {name: _owners(claims)[0] for name, claims in _claims(self.models).items()}

    def _unknown(self, name: str) -> UnknownModel:
        near = dict.fromkeys(self._ids[close] for close in nearest(name, self._ids))
        hint = f" Near: {', '.join(near)}." if near else ""
        return UnknownModel(f"No model is called '{shown(name)}'.{hint} GET /models lists them all.")


# ---- whom a name means ----------------------------------------------------------------------------------------------

Claims = dict[str, set[str]]
"""The ids of the models that claim one name, each with the keys by which it does."""
_CHOSEN = {"id", "aliases"}  # these keys are chosen for the gateway; an hf_name or weights file comes with the model


def _claims(models: Mapping[str, ModelSpec]) -> dict[str, Claims]:
    found: dict[str, Claims] = {}
    for spec in models.values():
        for key, name in _names_of(spec):
            found.setdefault(name, {}).setdefault(spec.id, set()).add(key)
    return found


def _names_of(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    yield "id", spec.id
    yield from (("aliases", alias) for alias in spec.aliases)
    if spec.hf_name is not None:
        yield "hf_name", spec.hf_name
    if spec.weights_source is not None:
        yield "weights", spec.weights_source


def _owners(claims: Claims) -> list[str]:
    """Return the ids that a name may mean.

    Models may share an hf_name or a weights file: it means the one that also has it as its id or alias.
    """
    choosers = [model for model, keys in claims.items() if keys & _CHOSEN]
    if len(choosers) == 1 and claims[choosers[0]] - _CHOSEN:
        return choosers
    return list(claims)


def clashes(models: Mapping[str, ModelSpec]) -> Iterator[tuple[str, str]]:
    """Yield (section, rule) for the names that models contend for; a section is a model or `models`."""
    for name, claims in _claims(models).items():
        if len(_owners(claims)) > 1:
            yield "models", _ambiguous(name, claims)
    for spec in models.values():
        for clash in sorted({f"{spec.id}-{n}" for n in range(1, spec.replicas)} & models.keys()):
            yield spec.id, f"replicas: one of its containers would have the name of the model {clash}: rename one"


def _ambiguous(name: str, claims: Claims) -> str:
    holders = ", ".join(f"{model} ({' and '.join(sorted(keys))})" for model, keys in claims.items())
    fix = "remove it from all but one"
    if not any(keys & _CHOSEN for keys in claims.values()):
        fix = "list it under the `aliases` of the one that shall answer to it"
    return f"the name {shown(name)} means more than one model: {holders}; {fix}"
