"""Engine `tgi`: Hugging Face's Text Generation Inference, run as a container that serves one model. Pure.

What its server does in ways of its own, and is mended here:
- A call without `parameters`, or without `do_sample` in them, samples or not as it pleases; so both are always sent.
- It refuses temperature 0 and top_p 1, and takes a top_p or top_k as a wish to sample whatever `do_sample` says.
- It finds stop texts only where a token ends, and leaves them in the answer. So it is not told of them: the decoder
  (`tgi_answers.py`) finds them, ends the answer, and the caller closes the connection, which frees its place.
- It rounds a length up to whole blocks of 1,024 tokens; so the decoder counts.
- Its log-probabilities are those after penalties, temperature and filters.
- Its chats are OpenAI's in part only: `tgi_requests.py` says what is sent instead, `tgi_answers.py` what is heard.
- Its image's entrypoint takes arguments apart at white space and expands `*`; what holds such goes by environment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import SecretStr

from gateway.catalog import ModelSpec
from gateway.catalog_values import volume_parts
from gateway.devices import Share
from gateway.engines import tgi_answers, tgi_diagnoses, tgi_requests
from gateway.engines.base import Api, Call, Decoder, Diagnosis
from gateway.engines.keys import authorization
from gateway.engines.protocol import written
from gateway.engines.tgi_memory import WIGGLE, memory_fraction
from gateway.errors import GatewayError, StartFailed, Unsupported
from gateway.generation import GenerationRequest, PromptToken
from gateway.runtimes.base import Container, Exit, Launch, Mount, Progress

DEFAULT_IMAGE = "ghcr.io/huggingface/text-generation-inference:3.3.5"
CONTAINER_PORT = 8080
"""Where it listens inside. Above 1023, so that it needs no capability; its own default is 80."""
CACHE_VOLUME = "tgi-hub-cache"
CACHE_TARGET = "/data"
"""Where TGI's images keep what they download (HF_HOME)."""
SHM_BYTES = 2**30
NO_GRAMMARS = "disable-grammar-support"
FRACTION = "cuda-memory-fraction"
WIGGLE_VARIABLE = "TGI_WIGGLE_ROOM"

TOKEN_VARIABLES = ("HF_API_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Where TGI looks for a token; the first that is set counts."""
TOKEN_FILE_VARIABLE = "HF_TOKEN_PATH"  # noqa: S105 - the name of a variable


class Tgi:
    name: ClassVar[str] = "tgi"
    health_path: ClassVar[str] = "/health"
    default_slots: ClassVar[int] = 128
    speaks: ClassVar[Api | None] = "tgi"

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

    def placed(self, launch: Launch, shares: Sequence[Share]) -> Launch:
        if not shares:
            return launch
        usual = _wiggle(launch.env)
        fraction, wiggle = memory_fraction(launch.model, shares, usual)
        env = launch.env if wiggle == usual else {**launch.env, WIGGLE_VARIABLE: str(wiggle)}
        return replace(launch, command=(*launch.command, f"--{FRACTION}", str(fraction)), env=env)

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

    def check(self, spec: ModelSpec, request: GenerationRequest) -> None:
        tgi_requests.check(request)
        if (request.grammar or request.calls_tools) and _has_no_grammars(spec):
            raise Unsupported(
                "This model runs without tools and grammars (args: {disable-grammar-support: true} in models.yaml). "
                "Leave out tools and response_format."
            )

    def call(self, spec: ModelSpec, request: GenerationRequest, secret: str) -> Call:  # noqa: ARG002 - see `launch`
        if request.chat is not None:
            return _post("/v1/chat/completions", tgi_requests.chat_completion(request, request.chat), spec)
        return _post("/generate_stream", tgi_requests.generation(request), spec)

    def decoder(self, request: GenerationRequest) -> Decoder:
        return tgi_answers.StreamDecoder(request) if request.chat is None else tgi_answers.chat_decoder(request)

    def refusal(self, status: int, body: bytes) -> GatewayError:
        return tgi_answers.refusal(status, body)

    def tokenize(self, spec: ModelSpec, request: GenerationRequest, secret: str) -> Call:  # noqa: ARG002 - see `launch`
        path = "/tokenize" if request.chat is None else "/chat_tokenize"
        return _post(path, tgi_requests.tokenization(request), spec)

    def tokens(self, request: GenerationRequest, body: bytes) -> tuple[PromptToken, ...]:
        return tgi_answers.prompt_tokens(request, body)

    def forward(self, spec: ModelSpec, call: Call, secret: str) -> Call:  # noqa: ARG002 - see `launch`
        path = call.path.partition("?")[0]
        names_model = path.startswith("/v1/") or path == "/invocations"
        body = tgi_requests.with_served_model(call.body) if names_model else call.body
        return Call(call.path, body, {**_kind_of_body(call.headers), **authorization(spec)}, call.method)


# ---- calls ----


def _post(path: str, body: Mapping[str, Any], spec: ModelSpec) -> Call:
    return Call(path, written(body), {"Content-Type": "application/json", **authorization(spec)})


def _kind_of_body(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() == "content-type"}


def _has_no_grammars(spec: ModelSpec) -> bool:
    return any(value is True for name, value in spec.args.items() if name.replace("_", "-") == NO_GRAMMARS)


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
    _refuse_own_fraction(spec, theirs)
    return {
        "model-id": spec.hf_name,
        "revision": spec.revision,
        "num-shard": _gpu_count(spec),  # left out, it would depend on the image's version
        "port": CONTAINER_PORT,
        "json-output": True,
        "usage-stats": "off",
        "max-top-n-tokens": tgi_requests.MOST_TOP_TOKENS,
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


def _refuse_own_fraction(spec: ModelSpec, flags: Mapping[str, Any]) -> None:
    """A fraction that is right for one start is wrong for the next, and would void what others have reserved."""
    for key, name, names in (("args", FRACTION, flags), ("env", _variable(FRACTION), spec.env)):
        if spec.gpu_memory_bytes and name in names:
            cause = f"{key} of {spec.id} sets {name}, but `gpu_memory` does this, anew for every start"
            raise _unusable(cause, f"Remove {name} from `{key}`, or (for whole GPUs) `gpu_memory`")


def _wiggle(env: Mapping[str, str]) -> float:
    """Return the wiggle room that the model's `env` asks for; TGI's own where it would not take that."""
    try:
        said = float(env.get(WIGGLE_VARIABLE, WIGGLE))
    except ValueError:
        return WIGGLE
    return said if 0 < said < 1 else WIGGLE


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


def _mounts(spec: ModelSpec) -> tuple[Mount, ...]:
    """Return what the container sees of the machine: what the catalog says, and a cache for what is downloaded."""
    mounts = tuple(Mount(*volume_parts(volume)) for volume in spec.volumes)
    if any(mount.target == CACHE_TARGET for mount in mounts):
        return mounts
    return (*mounts, Mount(CACHE_VOLUME, CACHE_TARGET))


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
