"""What TGI's output says: its log lines as plain words, and the cause and the fix of every end that is known. Pure.

With `--json-output` three kinds of JSON come in one stream (the launcher's, the router's, and that of a program of
TGI's that runs by itself), and between them plain words: usage errors, panics, and the launcher's last `Error: ...`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from gateway.engines.base import Diagnosis
from gateway.runtimes.base import Exit

EVIDENCE_LINES = 8
EVIDENCE_CHARACTERS = 300

LAST_LINES = 2000
LINE_CHARACTERS = 2000
"""What stands further behind in one line is not looked at."""

Stage = Literal["starting", "warming up", "serving"]

# ---- log lines ------------------------------------------------------------------------------------------------------

_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_BOX = " \t╭╮╰╯│─"
_MESSAGE_OF_CUT_LINE = re.compile(r'"message": ?"(.*)', re.DOTALL)
_SECRETS = re.compile(
    r"(?P<before>\bBearer )\S+|\bhf_(?:[a-z]+_)?[A-Za-z0-9.\-]{16,}|\bapi_org_\w{16,}|(?<=://)[^/\s@]+(?=@)"
)


def message_of(line: str) -> str:
    """Return what a line of output says, without colours, and of a JSON record only the message (of several lines)."""
    plain = _COLOURS.sub("", line).strip()
    if not plain.startswith("{"):
        return plain
    try:
        return _message_in(json.loads(plain)) or plain
    except (ValueError, RecursionError):
        return _message_of_cut(plain)


def _message_in(record: Any) -> str:
    for place in (record, _item(record, "fields"), _item(record, "record")):
        if isinstance(message := _item(place, "message"), str):
            return _COLOURS.sub("", message).strip()
    return ""


def _item(place: Any, key: str) -> Any:
    return place.get(key) if isinstance(place, dict) else None


def _message_of_cut(line: str) -> str:
    """Return the message of a record that is no JSON any more, as it was too long to be kept whole."""
    found = _MESSAGE_OF_CUT_LINE.search(line)
    return found[1].replace("\\n", "\n").replace('\\"', '"') if found else line


def redacted(text: str) -> str:
    """Return the text without the tokens and passwords that a log may quote."""
    return _SECRETS.sub(lambda found: f"{found['before'] or ''}***", text)


def _spoken(lines: Sequence[str]) -> list[str]:
    """Return every line that the messages consist of, but not those of TGI's arguments, which hold keys."""
    messages = (message_of(line) for line in lines)
    said = (line for message in messages if not message.startswith("Args {") for line in message.splitlines())
    return [line[:LINE_CHARACTERS] for line in (line.strip(_BOX) for line in said) if line][-LAST_LINES:]


# ---- known ends -----------------------------------------------------------------------------------------------------


class Symptom(NamedTuple):
    """What a server that fails says, the cause of it, and what to do; {0} is the text of the pattern's group.

    A space in the pattern is any white space: Python's boxed tracebacks break their lines anywhere.
    """

    pattern: str
    cause: str
    fix: str
    stage: Stage | None = None
    """Only in this stage of its life."""


_LOG_IN = "set HF_TOKEN of the gateway, or in `env` of this model in models.yaml, to a token of that account"
_LESS_MEMORY = (
    "Give the model more or larger `gpus`, lower context_tokens, set args: {quantize: ...}, or take a smaller model; "
    "see with nvidia-smi that nothing else uses the GPU."
)
_LESS_AT_ONCE = (
    "Lower args: {max-batch-prefill-tokens: ...} (try 2048) or context_tokens in models.yaml, or give the model more "
    "`gpus`."
)
_MORE_HOST_MEMORY = (
    "Raise or remove `memory` of this model in models.yaml, stop something else on the machine, or take a smaller "
    "model."
)
_ANOTHER_MODEL = "Take a model that TGI supports, or a newer `image` in models.yaml."
_ANOTHER_QUANTIZATION = (
    "Correct args: {quantize: ...} in models.yaml: leave it out for a model that is quantised already, and use eetq, "
    "fp8 or bitsandbytes-nf4 for one that is not."
)
_DOWNLOAD_AGAIN = (
    "Delete the model's directory below hub/ in the cache volume (tgi-hub-cache, or what `volumes` mounts at /data) "
    "and start it again, which downloads it anew."
)
_CHECK_GPU = "Check the GPU with nvidia-smi and the kernel's log with dmesg; start the model again."
_READ_THE_LOG = "Read its last lines with `gateway logs`."

SYMPTOMS = (
    # -- the hub --
    Symptom(
        r"Invalid credentials in Authorization header|[Ii]nvalid (?:user|access) token|[Tt]oken (?:is|has) expired"
        r"|InvalidHeader\b|[Ii]llegal header value",
        "the Hugging Face hub refuses the token",
        "Make a token at huggingface.co/settings/tokens and set it as HF_TOKEN of the gateway, or in `env` of this "
        "model in models.yaml.",
    ),
    Symptom(
        r"public gated repositories",
        "the token lacks the right to read gated repositories",
        "Allow the token to read public gated repositories at huggingface.co/settings/tokens.",
    ),
    Symptom(
        r"model (\S+) is (?:restricted|gated)\. You must",
        "the model {0} is gated, and the hub was asked without a token",
        f"Accept its licence at huggingface.co/{{0}}, then {_LOG_IN}.",
    ),
    Symptom(
        r"(?:Access to|request to access) model (\S+) (?:is|has been) (?:restricted|awaiting|rejected)",
        "the model {0} is gated, and the token's account may not read it",
        "Accept its licence or ask for access at huggingface.co/{0} with the account of the token (HF_TOKEN).",
    ),
    Symptom(
        r"GatedRepoError|Cannot access gated repo",
        "the model is gated",
        f"Accept its licence on its page at huggingface.co, then {_LOG_IN}.",
    ),
    Symptom(
        r"RevisionNotFoundError|Revision Not Found|Invalid rev id",
        "the model has no such revision",
        "Correct `revision` of this model in models.yaml (a branch, a tag or a commit), or leave it out.",
    ),
    Symptom(
        r"Repository Not Found for url: https?://[^/\s]+/(?:api/models/)?([\w.-]+/[\w.-]*\w)",
        "the hub has no repository {0}, or none that this token may read",
        "Correct `hf_name` (or lora-adapters in `args`) in models.yaml; for a private repository set HF_TOKEN.",
    ),
    Symptom(
        r"RepositoryNotFoundError|is not a local folder and is not a valid model identifier",
        "the hub has no such repository, or none that this token may read",
        "Correct `hf_name` of this model in models.yaml; for a private repository set HF_TOKEN.",
    ),
    Symptom(
        r"HFValidationError|Repo id must",
        "`hf_name` is neither a name on the hub nor a directory in the container",
        "Write `hf_name` as owner/name, or mount the directory with `volumes` and give its path inside the container.",
    ),
    Symptom(
        r"/dev/shm|shared memory segment|Bus error|Shard process was signaled to shutdown with signal 7\b",  # noqa: S108
        "the container's shared memory is too small for its GPUs to talk to each other",
        "Raise `shm_size` of this model in models.yaml (8GiB, say), or set env: {NCCL_SHM_DISABLE: 1}.",
    ),
    Symptom(
        r"No space left on device|Disk quota exceeded|[Nn]ot enough free disk space",
        "the disk is full",
        "Make room where the cache volume lies (tgi-hub-cache, or what `volumes` mounts at /data): docker system df.",
    ),
    Symptom(
        r"(?:Read-only file system|Permission denied): '(/[^'\n]*)'",
        "{0} in the container cannot be written",
        "Correct `volumes` of this model in models.yaml (no :ro at /data), or the directory's owner on the machine.",
    ),
    Symptom(
        r"CERTIFICATE_VERIFY_FAILED|SSLError|certificate verify failed",
        "the container does not trust the certificate that the hub's address presents",
        "If a proxy signs it, mount its CA bundle with `volumes` and name it in env: {REQUESTS_CA_BUNDLE: ...}.",
    ),
    Symptom(
        r"OfflineModeIsEnabled|offline mode is enabled|outgoing traffic has been disabled",
        "the model is not in the cache, and HF_HUB_OFFLINE forbids to download it",
        "Remove HF_HUB_OFFLINE from `env` of this model until it is downloaded.",
    ),
    Symptom(
        r"429 Client Error|Too Many Requests|(?:hit|exceeded) (?:the|your) rate limit",
        "the hub refuses so many downloads",
        "Wait some minutes and start the model again; with HF_TOKEN set, the hub allows more.",
    ),
    Symptom(
        r"\b(5\d\d) Server Error",
        "the hub fails (status {0})",
        "Look at status.huggingface.co and start the model again later; what was downloaded is kept.",
    ),
    Symptom(
        r"NameResolutionError|name resolution|Failed to resolve|Max retries exceeded|Network is unreachable"
        r"|Connect(?:ion)?Timeout|ReadTimeout|Read timed out|ProxyError|couldn't connect to 'http"
        r"|Connection(?:Reset)?Error|RemoteDisconnected|ChunkedEncodingError|IncompleteRead|dns error"
        r"|check your (?:internet )?connection",
        "the container cannot reach the Hugging Face hub",
        "Check the network and DNS of the machine and its containers; behind a proxy set env: {HTTPS_PROXY: ...}, "
        "with a mirror env: {HF_ENDPOINT: ...}.",
    ),
    Symptom(
        r"while downloading using `?hf_transfer",
        "the download broke off, and hf_transfer does not say why",
        "Check disk and network; with env: {HF_HUB_ENABLE_HF_TRANSFER: 0} the download is slower and says what is "
        "wrong.",
    ),
    Symptom(
        r"Download process was signaled to shutdown with signal (\d+)",
        "the download was killed by signal {0}, most often because the machine's memory ran out",
        _MORE_HOST_MEMORY,
    ),
    Symptom(
        r"\b(40[13]) Client Error",
        "the hub refuses access (status {0})",
        "Set HF_TOKEN of the gateway, or in `env` of this model in models.yaml, to a token that may read the model.",
    ),
    # -- the files --
    Symptom(
        r"No \.\w+ weights found for model ([\w./-]*\w)",
        "the repository {0} has no weights that TGI can load (safetensors)",
        "Take a repository with .safetensors files; GGUF files run with engine llamacpp.",
    ),
    Symptom(
        r"No local weights found in (\S+)|No such file or directory: '(?:\S*/)?config\.json'",
        "the directory of the model has no weights that TGI can load (config.json and .safetensors files)",
        "Correct `hf_name` and `volumes` of this model in models.yaml: the path is that inside the container.",
    ),
    Symptom(
        r"Safetensors conversion is disabled",
        "the model has only pickled weights (.bin), which TGI converts on demand only",
        "Take a `revision` with safetensors, or, if you trust the model's author, set args: {trust-remote-code: true}.",
    ),
    Symptom(
        r"in convert_files?\b|UnpicklingError|PytorchStreamReader",
        "its pickled weights (.bin) could not be converted to safetensors",
        "Take a repository or `revision` with .safetensors files.",
    ),
    Symptom(
        r"SafetensorError|HeaderTooLarge|InvalidHeaderDeserialization|MetadataIncompleteBuffer|HeaderTooSmall",
        "a weights file is truncated or damaged",
        _DOWNLOAD_AGAIN,
    ),
    Symptom(
        r"trust_remote_code=True|contains custom code which must be executed",
        "the model brings Python code of its own, which TGI runs on demand only",
        "If you trust the model's author, set args: {trust-remote-code: true} and pin `revision` to a commit.",
    ),
    Symptom(
        r"(?:Invalid LoRA adapter format: |Adapter '|adapter_config\.json' at ')([^\s'\"]+)",
        "the LoRA adapter {0} cannot be used with this model",
        "Correct args: {lora-adapters: ...} in models.yaml: owner/name, owner/name@revision, or name=/path, separated "
        "by commas.",
    ),
    # -- what the model needs --
    Symptom(
        r"invalid value '([^'\n]*)' for '--quantize",
        "TGI knows no quantisation {0}",
        _ANOTHER_QUANTIZATION,
    ),
    Symptom(
        r"Cannot load `?([\w-]+)`? weight|weight (?:\S+\.)(qweight|qzeros|scales|weight_scale) does not exist",
        "the weights are not quantised in the way that `quantize` says",
        _ANOTHER_QUANTIZATION,
    ),
    Symptom(
        r"(?m:^)([^\n]*(?:(?:Unknown|Unsupported) quantization"
        r"|[Qq]uantization[^\n]* not (?:supported|implemented|available)"
        r"|do not seem to have \w+ installed|CUDA capability [\d.]+ or later)[^\n]*)",
        "this quantisation cannot be used here: {0}",
        _ANOTHER_QUANTIZATION,
    ),
    Symptom(
        r"weight (\S+) does not exist",
        "the weights lack {0}: they do not fit the model's config.json, or another quantisation",
        _ANOTHER_QUANTIZATION,
    ),
    Symptom(
        r"(?:Unsupported model type|has model type) [`'\"]?([\w.-]+)",
        "this version of TGI does not know models of type {0}",
        _ANOTHER_MODEL,
    ),
    Symptom(
        r"sharded is not supported for|must be divisible by `?num_shards|not divisible by (?:tp|world)_size",
        "the model cannot be split over that many GPUs",
        "Set `gpus` of this model in models.yaml to a number that divides its attention heads, or to 1.",
    ),
    # -- the GPUs --
    Symptom(
        r"NVIDIA driver on your system is too old|CUDA driver version is insufficient"
        r"|forward compatibility was attempted",
        "the NVIDIA driver of the machine is too old for this image",
        "Update the driver (TGI 3 needs CUDA 12.2 or later: nvidia-smi shows it), or take an older `image`.",
    ),
    Symptom(
        r"no kernel image is available",
        "this image has no code for this kind of GPU",
        "Take another `image` in models.yaml, or a GPU of compute capability 8.0 or later.",
    ),
    Symptom(
        r"system not yet initialized|system has unsupported display driver|[Ee]rror 80[123]\b",
        "the GPUs are not ready: driver and fabric manager do not fit or do not run",
        "Start nvidia-fabricmanager in the driver's version (machines with NVSwitch), or restart the machine.",
    ),
    Symptom(
        r"Found no NVIDIA driver|No CUDA GPUs are available|no CUDA-capable device|not compiled with CUDA enabled",
        "the container sees no GPU",
        "Check with nvidia-smi that the machine does, install the NVIDIA Container Toolkit, and set `gpus` of this "
        "model in models.yaml.",
    ),
    Symptom(
        r"only found (\d+) CUDA devices|Each process is one gpu|invalid device ordinal",
        "the container sees fewer GPUs than the model is to be split over",
        "Set `gpus` of this model in models.yaml to GPUs that the machine has: nvidia-smi -L lists them.",
    ),
    Symptom(
        r"requires? Flash Attention|FlashAttention only supports",
        "the model needs kernels (Flash Attention) that this GPU cannot run",
        "Take a GPU of compute capability 8.0 or later (Ampere), or another model.",
    ),
    # -- memory --
    Symptom(
        r"Not enough memory to handle (\d+) prefill tokens",
        "there is not enough GPU memory to read {0} tokens of prompts at once",
        _LESS_AT_ONCE,
    ),
    Symptom(
        r"NotEnoughMemory\((\d+)\)|Not enough memory to handle `?max_total_tokens=(\d+)",
        "there is not enough GPU memory left for a single request of full length",
        "Lower context_tokens of this model in models.yaml, or give it more `gpus`.",
    ),
    Symptom(
        r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|would exceed allowed memory|HIP out of memory",
        "the GPU's memory ran out while it served",
        "Lower args: {max-batch-prefill-tokens: ...} or context_tokens in models.yaml, or leave room with args: "
        "{cuda-memory-fraction: 0.9}; see with nvidia-smi that nothing else uses the GPU.",
        "serving",
    ),
    Symptom(
        r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|would exceed allowed memory|HIP out of memory",
        "the GPU's memory ran out while the model warmed up",
        _LESS_AT_ONCE,
        "warming up",
    ),
    Symptom(
        r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|would exceed allowed memory|HIP out of memory",
        "the model does not fit into the GPU's memory",
        _LESS_MEMORY,
    ),
    Symptom(
        r"Shard process was signaled to shutdown with signal 9\b|DefaultCPUAllocator: can't allocate|\bMemoryError\b",
        "the machine's memory (or the container's share of it) ran out while the model loaded",
        _MORE_HOST_MEMORY,
        "starting",
    ),
    Symptom(
        r"Shard process was signaled to shutdown with signal 9\b",
        "a part of the server was killed from outside, most often because the machine's memory ran out",
        _MORE_HOST_MEMORY,
    ),
    # -- crashes --
    Symptom(
        r"Shard process was signaled to shutdown with signal 4\b",
        "TGI uses an instruction that this machine's processor lacks",
        "Run it on a processor with AVX2 (in a virtual machine: pass the host's through), or use engine llamacpp.",
    ),
    Symptom(
        r"Shard process was signaled to shutdown with signal (\d+)",
        "a part of the server crashed with signal {0}",
        "Start the model again; if it crashes again, take another `image` in models.yaml.",
    ),
    Symptom(
        r"CUDA error: ([^\n]+)",
        "the GPU failed while it served: {0}",
        _CHECK_GPU,
        "serving",
    ),
    Symptom(
        r"(?:CUDA|HIP) error: ([^\n]+)",
        "the GPU failed while the model started: {0}",
        _CHECK_GPU,
    ),
    Symptom(
        r"NCCL error|ncclSystemError|ncclInternalError|ncclUnhandledCudaError|ProcessGroupNCCL",
        "the model's GPUs cannot talk to each other (NCCL)",
        "Raise `shm_size` of this model in models.yaml; if that does not help, set env: {NCCL_P2P_DISABLE: 1}.",
    ),
    # -- flags --
    Symptom(
        r"unexpected argument '(-[^'\n]*)'|No such option: (-[\w-]+)",
        "TGI knows no flag {0}",
        "Correct `args` of this model in models.yaml; docker run --rm IMAGE --help lists them.",
    ),
    Symptom(
        r"error: invalid value '[^'\n]*' for '(--[\w-]+)",
        "the flag {0} cannot have this value",
        "Correct `args` or `env` of this model in models.yaml; the lines say what it may be.",
    ),
    Symptom(
        r"(?m:^)error: ([^\n]+)",
        "TGI does not understand its flags: {0}",
        "Correct `args` of this model in models.yaml.",
    ),
    Symptom(
        r"ArgumentValidation\(\"([^\n]*)\"\)",
        "its limits do not go together: {0}",
        "Correct context_tokens and `args` of this model in models.yaml.",
    ),
    # -- the web server --
    Symptom(
        r"failed to build prometheus recorder|FailedToCreateHTTPListener",
        "its metrics port was taken by another program",
        "Set args: {prometheus-port: ...} of this model to another one (it matters in the host's network only).",
    ),
    Symptom(
        r"Failed to bind to|Address already in use",
        "its port was taken by another program",
        "Start the model again; in the host's network, stop the other program.",
    ),
    Symptom(
        r"Failed to import python tokenizer|Unable to load tokenizer|Could not load tokenizer|Tokenizer\(\"",
        "the model's tokenizer cannot be loaded",
        "Take a repository with tokenizer.json, or name another with args: {tokenizer-config-path: ...}; if it has "
        "code of its own, args: {trust-remote-code: true}.",
    ),
    Symptom(
        r"text-generation-\w+ not found in PATH",
        "the image is not a complete image of TGI",
        "Correct `image` of this model in models.yaml, or leave it out.",
    ),
    Symptom(
        r"Could not import Flash Attention enabled models",
        "the container sees no GPU that TGI can use",
        "Check with nvidia-smi, install the NVIDIA Container Toolkit, and set `gpus` of this model in models.yaml; "
        "without a GPU use engine llamacpp.",
    ),
    # -- none of these --
    Symptom(r"Shard (\d+) crashed", "a part of the server (shard {0}) crashed while it served", _READ_THE_LOG),
    Symptom(r"Error: ShardCannotStart|Shard (\d+) failed to start", "the model cannot be loaded", _READ_THE_LOG),
    Symptom(r"Download encountered an error|Error: DownloadError", "the model cannot be downloaded", _READ_THE_LOG),
    Symptom(r"Webserver Crashed|panicked at", "TGI's web server crashed", _READ_THE_LOG),
)

# ---- finding the cause ----------------------------------------------------------------------------------------------

_PASSED = re.compile(
    r"Successfully downloaded weights|Files are already present|(?:^|: )Starting Webserver|(?:^|: )Connected$"
)
"""What went wrong before one of these was overcome: a download that was tried again, say."""
_SERVING = re.compile(r"(?:^|: )Connected$|Method (?:Prefill|Decode|FilterBatch) encountered|Shard \d+ crashed")
_WARMING_UP = re.compile(r"Method Warmup encountered|(?:^|: )Starting Webserver|Warming up model|Backend\(Warmup")
_TELLING = re.compile(r"^(?:[A-Za-z_]\w*\.)*\w*(?:Error|Exception)\b.*:|^error: |panicked at|\bERROR\b")
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*(\w+(?:Error|Exception): \S.*)")


def diagnose(end: Exit) -> Diagnosis:
    """Return why a server of TGI's ended, from its exit and its last lines."""
    lines = _spoken(end.last_lines)
    if told := _from_outside(end):
        return Diagnosis(*told, _evidence(lines, ()))
    for among in (_after_the_last_success(lines), lines):
        if found := _first_symptom(among, _stage(lines)):
            return _diagnosis(among, *found)
    cause, fix = _silent_end(end)
    return Diagnosis(_with_last_exception(cause, lines), fix, _evidence(lines, ()))


def _from_outside(end: Exit) -> tuple[str, str] | None:
    """Return cause and fix if somebody else ended it: what it said does not matter then."""
    if "out of memory" in end.reason:
        return "the container reached the limit of its memory, and the kernel killed it", _MORE_HOST_MEMORY
    if "by the gateway" in end.reason:
        return "the gateway itself ended it", "Start the model again."
    if "somebody else" in end.reason:
        fix = "Start the model again, and find out who does such here (docker rm, docker restart, docker system prune)."
        return f"its container was {end.reason}", fix
    if end.code == 137 or "SIGKILL" in end.reason:
        fix = f"If nobody ran docker kill, its memory ran out. {_MORE_HOST_MEMORY}"
        return "it was killed from outside (SIGKILL): by docker kill, or as the machine's memory ran out", fix
    if end.code in (0, 143) or "SIGTERM" in end.reason:
        fix = "Start the model again; stop models with `gateway stop`, not with docker stop."
        return "it was asked to stop from outside (docker stop, say)", fix
    return None


def _after_the_last_success(lines: Sequence[str]) -> Sequence[str]:
    last = max((number for number, line in enumerate(lines) if _PASSED.search(line)), default=-1)
    return lines[last + 1 :]


def _stage(lines: Sequence[str]) -> Stage:
    if any(_SERVING.search(line) for line in lines):
        return "serving"
    return "warming up" if any(_WARMING_UP.search(line) for line in lines) else "starting"


def _first_symptom(lines: Sequence[str], stage: Stage) -> tuple[Symptom, re.Match[str]] | None:
    said = "\n".join(lines)
    for symptom in SYMPTOMS:
        if symptom.stage in (None, stage) and (match := re.search(symptom.pattern.replace(" ", r"\s+"), said)):
            return symptom, match
    return None


def _diagnosis(lines: Sequence[str], symptom: Symptom, match: re.Match[str]) -> Diagnosis:
    first, last = (match.string.count("\n", 0, place) for place in match.span())
    word = _short(next(filter(None, match.groups()), "")).strip(" .")
    cause = symptom.cause.replace("{0}", word)
    if symptom.fix is _READ_THE_LOG:
        cause = _with_last_exception(cause, lines)
    return Diagnosis(cause, symptom.fix.replace("{0}", word), _evidence(lines, range(first, last + 1)))


def _with_last_exception(cause: str, lines: Sequence[str]) -> str:
    exceptions = [found[1] for line in lines if (found := _EXCEPTION.match(line))]
    return f"{cause} ({_short(exceptions[-1])})" if exceptions else cause


def _silent_end(end: Exit) -> tuple[str, str]:
    """Return cause and fix for a server that said nothing that is known here."""
    if end.code == 139 or "SIGSEGV" in end.reason:
        return "it crashed (segmentation fault)", "Start the model again; if it crashes again, take another `image`."
    if end.code in (126, 127):
        fix = "Correct `image` of this model in models.yaml, or leave it out."
        return "the image has no program of TGI's to run", fix
    return f"it ended without a known reason ({end.reason})", _READ_THE_LOG


def _evidence(lines: Sequence[str], matched: Sequence[int]) -> tuple[str, ...]:
    """Return the lines that match, and besides the last that tell of an error; or else the last ones."""
    telling = [number for number, line in enumerate(lines) if _TELLING.search(line) and number not in matched]
    places = [*matched[:EVIDENCE_LINES], *reversed(telling)][:EVIDENCE_LINES]
    shown = [lines[place] for place in sorted(places)] or lines[-EVIDENCE_LINES:]
    return tuple(dict.fromkeys(map(_short, shown)))


def _short(line: str) -> str:
    line = redacted(line)
    return line if len(line) <= EVIDENCE_CHARACTERS else f"{line[:EVIDENCE_CHARACTERS]}..."
