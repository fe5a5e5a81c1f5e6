"""What llama.cpp's server says while it starts, and when it fails: the cause of it, and what to do. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

from gateway.engines.base import Diagnosis
from gateway.runtimes.base import Exit, Progress

EVIDENCE_LINES = 8

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
        r"chat template parsing error|failed to initialize chat template",
        "llama.cpp cannot use the chat template",
        "Correct chat_template of this model in models.yaml, or set one there in place of the model's own.",
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


def progress(line: str) -> Progress | None:
    """Return the progress that a line of the server's output tells of, if it does."""
    phases = (phase for words, phase in PHASES.items() if words in line)
    return next((Progress(phase) for phase in phases), None)


def diagnose(end: Exit) -> Diagnosis:
    """Return why the server ended, from its exit and its last lines."""
    said = "\n".join(end.last_lines)
    for symptom in SYMPTOMS:
        if found := re.search(symptom.pattern, said):
            evidence = _evidence(end.last_lines, symptom.pattern)
            return Diagnosis(symptom.cause.format(*found.groups()), symptom.fix, evidence)
    cause, fix = _silent_end(end)
    return Diagnosis(cause, fix, _evidence(end.last_lines, "embedded server: "))


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
