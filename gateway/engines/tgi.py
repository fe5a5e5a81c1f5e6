"""Engine `tgi`: Hugging Face's Text Generation Inference, run as a container that serves one model. Pure.

What its server does in ways of its own, and is mended here:
- A call without `parameters`, or without `do_sample` in them, samples or not as it pleases; so both are always sent.
- It refuses temperature 0 and top_p 1, and takes a top_p or top_k as a wish to sample whatever `do_sample` says.
- It finds stop texts only where a token ends, and leaves them in the answer. So it is not told of them: the decoder
  (`tgi_answers.py`) finds them, ends the answer, and the caller closes the connection, which frees its place.
- It rounds a length up to whole blocks of 1,024 tokens; so the decoder counts.
- Its log-probabilities are those after penalties, temperature and filters.
- Its image's entrypoint takes arguments apart at white space and expands `*`; what holds such goes by environment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import SecretStr

from gateway.catalog import ModelSpec
from gateway.engines import tgi_answers, tgi_diagnoses
from gateway.engines.base import Call, Decoder, Diagnosis
from gateway.engines.keys import authorization
from gateway.errors import GatewayError, StartFailed, Unsupported
from gateway.generation import GenerationRequest
from gateway.runtimes.base import Container, Exit, Launch, Mount, Progress

DEFAULT_IMAGE = "ghcr.io/huggingface/text-generation-inference:3.3.5"
CONTAINER_PORT = 8080
"""Where it listens inside. Above 1023, so that it needs no capability; its own default is 80."""
CACHE_VOLUME = "tgi-hub-cache"
CACHE_TARGET = "/data"
"""Where TGI's images keep what they download (HF_HOME)."""
SHM_BYTES = 2**30
MOST_TOP_TOKENS = 50
LEAST_TEMPERATURE = 0.01
"""Below, its logits may overflow."""
TOP_P_IS_OFF = 0.9999
"""TGI computes in 32 bits, in which what is closer to 1 may be 1, and it refuses 1."""

TOKEN_VARIABLES = ("HF_API_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Where TGI looks for a token; the first that is set counts."""
TOKEN_FILE_VARIABLE = "HF_TOKEN_PATH"  # noqa: S105 - the name of a variable


class Tgi:
    name: ClassVar[str] = "tgi"
    health_path: ClassVar[str] = "/health"
    default_slots: ClassVar[int] = 128

    def __init__(self, hf_token: SecretStr | str | None = None) -> None:
        """`hf_token` is the gateway's own; a model's `env` may name another."""
        self._hf_token = hf_token.get_secret_value() if isinstance(hf_token, SecretStr) else hf_token or ""

    def launch(self, spec: ModelSpec, name: str, secret: str) -> Launch:  # noqa: ARG002 - see below
        # No key is given to TGI: it would print it in clear when it starts and show it on its command line, and leave
        # health, metrics and information open all the same. The container is published on loopback only.
        if spec.runtime == "external":
            return Launch(name=name, url=spec.url, model=spec.id)
        command, from_flags = _command(_flags(spec))
        return Launch(
            name=name,
            command=command,
            env={**_environment(spec), **from_flags},
            container=self._container(spec, port=CONTAINER_PORT),
            model=spec.id,
        )

    def download(self, spec: ModelSpec, name: str) -> Launch | None:
        """Return what fetches the model, without its LoRA adapters: those come with the first start."""
        if spec.runtime == "external":
            return None
        return Launch(
            name=name,
            command=tuple(_download_command(spec)),
            env={"HF_HUB_DISABLE_PROGRESS_BARS": "1", **_environment(spec)},
            container=self._container(spec, port=None),
            model=spec.id,
        )

    def _container(self, spec: ModelSpec, *, port: int | None) -> Container:
        return Container(
            image=spec.image or DEFAULT_IMAGE,
            pull_policy=spec.pull_policy,
            entrypoint=() if port else ("text-generation-server",),
            port=port,
            mounts=_mounts(spec),
            secrets=self._secrets(spec),
            shm_bytes=spec.shm_size_bytes or SHM_BYTES,
            memory_bytes=spec.memory_bytes,
        )

    def _secrets(self, spec: ModelSpec) -> dict[str, str]:
        """Return the hub's token as a file: in the environment, everybody who may inspect containers could read it."""
        if TOKEN_FILE_VARIABLE in spec.env:
            return {}
        token = next((spec.env[name] for name in TOKEN_VARIABLES if name in spec.env), self._hf_token).strip()
        return {TOKEN_FILE_VARIABLE: token} if token else {}

    def is_ready(self, status: int, body: bytes) -> bool:  # noqa: ARG002 - nothing listens while it loads
        return status == 200

    def is_alive(self, status: int, body: bytes) -> bool:  # noqa: ARG002 - 503 is its word for a shard that fails
        return status in (200, 429)

    def progress(self, line: str) -> Progress | None:
        message = tgi_diagnoses.message_of(line)
        for pattern, phase in PHASES:
            if found := pattern.search(message):
                return _progress(phase, found)
        return None

    def diagnose(self, end: Exit) -> Diagnosis:
        return tgi_diagnoses.diagnose(end)

    def check(self, spec: ModelSpec, request: GenerationRequest) -> None:  # noqa: ARG002 - the same for all
        if request.presence_penalty != 0:
            raise Unsupported(
                "This model's engine has no presence_penalty. Leave it out; repetition_penalty is the nearest it has."
            )
        if request.top_tokens > MOST_TOP_TOKENS:
            raise Unsupported(f"This model's engine reports at most {MOST_TOP_TOKENS} top_tokens.")
        if request.top_tokens and (reshaping := _reshaping(request)):
            raise Unsupported(
                f"This model's engine cannot report top_tokens together with {', '.join(reshaping)}: its probabilities "
                "would not be those of the whole vocabulary. Leave these out."
            )

    def call(self, spec: ModelSpec, request: GenerationRequest, secret: str) -> Call:  # noqa: ARG002 - see `launch`
        headers = {"Content-Type": "application/json", **authorization(spec)}
        body = {"inputs": request.prompt, "parameters": _parameters(request)}
        return Call("/generate_stream", json.dumps(body).encode(), headers)

    def decoder(self, request: GenerationRequest) -> Decoder:
        return tgi_answers.StreamDecoder(request)

    def refusal(self, status: int, body: bytes) -> GatewayError:
        return tgi_answers.refusal(status, body)


# ---- flags and environment ----

Flags = Mapping[str, str | int | float | bool | None]

NOT_IN_ARGS: Mapping[str, str] = {
    "model-id": "`hf_name` names the model",
    "revision": "the key `revision` does this",
    "num-shard": "the number of `gpus` does this",
    "port": "the gateway chooses the port",
    "hostname": "the gateway has to reach the server",
    "json-output": "the gateway reads the log as JSON",
    "api-key": "the server answers the gateway only, which has no key for it, and TGI would print this one in its log",
}
"""Flags that are not the catalog's to set, and why."""
_SPOKEN_FLAGS: Mapping[str, tuple[str, str]] = {"usage-stats": ("off", "on"), "sharded": ("false", "true")}
"""Flags that take a word for what YAML reads as false and true."""
_SPLIT_OR_EXPANDED = re.compile(r"[\s*?\[\]\\]|^$")
"""What the shell of the image's entrypoint would take apart, expand or drop."""


def _flags(spec: ModelSpec) -> Flags:
    """Return every flag by its name: ours, and in their place those of the catalog's `args`."""
    theirs = {name.replace("_", "-"): value for name, value in sorted(spec.args.items())}
    _refuse_reserved(spec, "args", theirs)
    return {
        "model-id": spec.hf_name,
        "revision": spec.revision,
        "num-shard": _gpu_count(spec),  # left out, it would depend on the image's version
        "port": CONTAINER_PORT,
        "json-output": True,
        "usage-stats": "off",
        "max-top-n-tokens": MOST_TOP_TOKENS,
        # Twice, as TGI frees the place of a caller who left at its next step only, and all may leave at once.
        "max-concurrent-requests": 2 * spec.max_concurrency,
        "max-total-tokens": spec.context_tokens,
        **theirs,
    }


def _gpu_count(spec: ModelSpec) -> int:
    """Return among how many processes the model is split; without a GPU, one."""
    return max(1, spec.gpus if isinstance(spec.gpus, int) else len(spec.gpus))


def _command(flags: Flags) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the arguments of the image, and the environment of those that its entrypoint would spoil."""
    words: list[str] = []
    env: dict[str, str] = {}
    for name, value in flags.items():
        said = _said(name, value)
        if said is None:
            continue
        if _SPLIT_OR_EXPANDED.search(said) and value is not True:
            env[_variable(name)] = said
        else:
            words += [f"--{name}", said] if said else [f"--{name}"]
    return tuple(words), env


def _said(name: str, value: str | float | bool | None) -> str | None:
    """Return the word behind a flag: nothing for a flag that stands alone, None for one that is left out."""
    if isinstance(value, bool) and name in _SPOKEN_FLAGS:
        return _SPOKEN_FLAGS[name][value]
    if value is None or value is False:
        return None
    return "" if value is True else str(value)


def _variable(flag: str) -> str:
    """Return the environment variable by which TGI takes a flag too."""
    return flag.replace("-", "_").upper()


def _environment(spec: ModelSpec) -> dict[str, str]:
    """Return the catalog's `env` without tokens."""
    _refuse_reserved(spec, "env", spec.env)
    return {name: value for name, value in sorted(spec.env.items()) if name not in TOKEN_VARIABLES}


def _refuse_reserved(spec: ModelSpec, key: str, names: Mapping[str, Any]) -> None:
    for flag, reason in NOT_IN_ARGS.items():
        name = flag if key == "args" else _variable(flag)
        if name in names:
            raise _unusable(f"{key} of {spec.id} sets {name}, but {reason}", f"Remove {name} from `{key}`")


def _unusable(cause: str, fix: str) -> StartFailed:
    fix = f"{fix} of this model in models.yaml."
    return StartFailed(f"{cause}. {fix}", cause=cause, fix=fix)


def _download_command(spec: ModelSpec) -> Iterator[str]:
    yield from ("download-weights", str(spec.hf_name), "--json-output")
    if spec.revision:
        yield from ("--revision", spec.revision)
    if _flags(spec).get("trust-remote-code"):
        yield "--trust-remote-code"


# ---- mounts ----

_VOLUME = re.compile(r"(?P<source>[^:]+):(?P<target>/[^:]*?)(?::(?P<mode>ro|rw))?")
_VOLUME_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]+")


def _mounts(spec: ModelSpec) -> tuple[Mount, ...]:
    """Return what the container sees of the machine: what the catalog says, and a cache for what is downloaded."""
    mounts = tuple(_mount(spec, volume) for volume in spec.volumes)
    if any(mount.target == CACHE_TARGET for mount in mounts):
        return mounts
    return (*mounts, Mount(CACHE_VOLUME, CACHE_TARGET))


def _mount(spec: ModelSpec, volume: str) -> Mount:
    found = _VOLUME.fullmatch(volume)
    if not found or not (found["source"].startswith("/") or _VOLUME_NAME.fullmatch(found["source"])):
        cause = f"the volume {volume} of {spec.id} is neither an absolute path nor the name of a volume"
        raise _unusable(cause, "Write /AN/ABSOLUTE/PATH:/PATH/IN/CONTAINER, or NAME:/PATH/IN/CONTAINER, in `volumes`")
    target = found["target"].rstrip("/") or "/"
    return Mount(found["source"], target, read_only=found["mode"] == "ro")


# ---- how it comes up ----


def _said_first(words: str) -> re.Pattern[str]:
    """Return what finds a message: alone, as in JSON, or behind its origin, as in text."""
    return re.compile(rf"(?:^|: )(?:{words})")


PHASES = tuple(
    (_said_first(words), phase)
    for words, phase in (
        (r"Download: \[(?P<done>\d{1,9})/(?P<total>\d{1,9})\]", "downloading"),
        (r"Convert: \[(?P<done>\d{1,9})/(?P<total>\d{1,9})\]", "converting"),
        (r"Starting check and download process for ", "downloading"),
        (r"Starting shard\b|Waiting for shard to be ready|Shard ready in |Server started at unix:", "loading"),
        (r"Warming up (?:model|TunableOp)|KV-cache blocks: |Cuda Graphs are (?:enabled|disabled)", "warming up"),
        (
            r"Starting Webserver|Setting max batch total tokens to |Using the Hugging Face API|Serving revision ",
            "starting",
        ),
        (r"Connected$", "ready"),
    )
)


def _progress(phase: str, found: re.Match[str]) -> Progress:
    counts = found.groupdict()
    if not counts:
        return Progress(phase)
    return Progress(phase, float(counts["done"]), float(counts["total"]), "files")


# ---- asking ----


def _parameters(request: GenerationRequest) -> dict[str, Any]:
    """Return TGI's parameters, without those that are off: it refuses most values that say so."""
    penalties = {
        "repetition_penalty": (request.repetition_penalty, 1.0),
        "frequency_penalty": (request.frequency_penalty, 0.0),
    }
    return {
        "max_new_tokens": request.max_new_tokens,
        **_sampling(request),
        **{name: value for name, (value, off) in penalties.items() if value != off},
        **({"top_n_tokens": request.top_tokens} if request.top_tokens else {}),
        "details": True,
    }


def _sampling(request: GenerationRequest) -> dict[str, Any]:
    if request.temperature == 0:
        return {"do_sample": False}  # and no top_p or top_k: with these it would sample
    wanted = {
        "temperature": max(request.temperature, LEAST_TEMPERATURE),
        "top_p": request.top_p if request.top_p < TOP_P_IS_OFF else None,
        "top_k": request.top_k,
        "seed": request.seed,
    }
    return {"do_sample": True, **{name: value for name, value in wanted.items() if value is not None}}


def _reshaping(request: GenerationRequest) -> list[str]:
    """Return the parameters in use that change the probabilities that TGI reports."""
    sampling = request.temperature > 0
    in_use = {
        f"a temperature below {LEAST_TEMPERATURE}": 0 < request.temperature < LEAST_TEMPERATURE,
        "top_p": sampling and request.top_p < TOP_P_IS_OFF,
        "top_k": sampling and request.top_k is not None,
        "repetition_penalty": request.repetition_penalty != 1,
        "frequency_penalty": request.frequency_penalty != 0,
    }
    return [name for name, used in in_use.items() if used]
