"""Engine `openai`: any server with OpenAI's API, here or at a provider, that others run (runtime `external`). Pure.

It is asked by `POST /v1/completions`: a prompt goes in as it is, which all other engines do as well. What differs:
- OpenAI's API has no top_k and no repetition_penalty. Other servers have, by names of their own, and some of them take
  what a call leaves out from the model's files: `args: {server: vllm}` says which server it is (`SERVERS`).
- It reports log-probabilities at temperature 1, whatever the request's, and OpenAI itself no more than five of them.
  A server that refuses to is not asked to, with `args: {logprobs: false}`.
- A stop text is told to the server, as a provider bills whatever it makes after it, and looked for here as well: some
  servers leave it in, and OpenAI takes no more than four.
- What a provider counts is what counts: the usage is always asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

from gateway.catalog import ModelSpec
from gateway.engines import openai_answers
from gateway.engines.base import Call, Decoder, Diagnosis
from gateway.engines.keys import authorization, key_refused
from gateway.errors import GatewayError, StartFailed, Unsupported
from gateway.generation import GenerationRequest
from gateway.runtimes.base import Exit, Launch, Progress

KNOWN_ARGS = ("model", "server", "logprobs")


class OpenAi:
    name: ClassVar[str] = "openai"
    health_path: ClassVar[str] = "/models"
    default_slots: ClassVar[int] = 64

    def launch(self, spec: ModelSpec, name: str, secret: str) -> Launch:  # noqa: ARG002 - its key is the catalog's
        if spec.runtime != "external":
            cause = f"engine openai reaches servers that already run, and the runtime of {spec.id} is {spec.runtime}"
            raise _unusable(cause, "Write `runtime: external` and the server's `url`")
        for flag in spec.args.keys() - set(KNOWN_ARGS):
            cause = f"args of {spec.id} has {flag}, and nothing is started that could take it"
            raise _unusable(cause, f"Remove it: engine openai takes {', '.join(KNOWN_ARGS)} in args")
        _server(spec)
        return Launch(name=name, url=_base_url(spec.url or ""), model=spec.id)

    def download(self, spec: ModelSpec, name: str) -> Launch | None:  # noqa: ARG002 - it is where the server is
        return None

    def is_ready(self, status: int, body: bytes) -> bool:  # noqa: ARG002 - what it lists is not our affair
        if status in (401, 403):
            raise _never_ready(key_refused(status))
        if 300 <= status < 400:
            raise _never_ready(openai_answers.moved(status))
        return self.is_alive(status, b"")

    def is_alive(self, status: int, body: bytes) -> bool:  # noqa: ARG002 - the seam's
        """A server that does not say that it fails works: not every one lists its models, or to everybody."""
        return status < 500

    def progress(self, line: str) -> Progress | None:  # noqa: ARG002 - its output is elsewhere
        return None

    def diagnose(self, end: Exit) -> Diagnosis:
        return Diagnosis(f"it ended ({end.reason})", "Read its log where it runs.")

    def check(self, spec: ModelSpec, request: GenerationRequest) -> None:
        server = _server(spec)
        if missing := _missing(server, request):
            raise Unsupported(
                f"OpenAI's API has no {' and no '.join(missing)}. Leave it out; or, if the server of {spec.id} is one "
                f"of {', '.join(_others())}, say so in models.yaml: args: {{server: {_others()[0]}}}."
            )
        if server.most_top_tokens is not None and request.top_tokens > server.most_top_tokens:
            raise Unsupported(f"This model's server reports at most {server.most_top_tokens} top_tokens.")
        if request.top_tokens and not _reports_logprobs(spec):
            raise Unsupported("This model's server reports no top_tokens (args: {logprobs: false} in models.yaml).")
        if request.top_tokens and request.temperature not in (0, 1):
            raise Unsupported(
                f"This model's engine cannot report top_tokens at temperature {request.temperature:g}: its "
                "probabilities are always those of temperature 1. Use temperature 0 or 1."
            )

    def call(self, spec: ModelSpec, request: GenerationRequest, secret: str) -> Call:  # noqa: ARG002 - see `launch`
        body = {
            "model": model_name(spec),
            "prompt": request.prompt,
            **_parameters(_server(spec), request),
            **(_reporting(request) if _reports_logprobs(spec) else {}),
            **_STREAM,
        }
        headers = {"Content-Type": "application/json", **authorization(spec)}
        return Call("/completions", json.dumps(body).encode(), headers)

    def decoder(self, request: GenerationRequest) -> Decoder:
        return openai_answers.CompletionDecoder(request)

    def refusal(self, status: int, body: bytes) -> GatewayError:
        return openai_answers.refusal(status, body)


# ---- where it is, and what it is ----


@dataclass(frozen=True, slots=True)
class _Server:
    """What a kind of server takes beyond OpenAI's API, by the names that it has for it."""

    top_k: str | None = None
    repetition_penalty: str | None = None
    most_top_tokens: int | None = None
    """How many it reports; None if that is its own affair to say."""
    most_stops: int | None = None
    """How many stop texts it is told; None for all."""
    off: Mapping[str, Any] | None = None
    """Every parameter at the value that does nothing, where one that is left out may do something."""


_OFF = {"top_p": 1.0, "min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
_LIKE_VLLM = _Server("top_k", "repetition_penalty", off={**_OFF, "top_k": -1, "repetition_penalty": 1.0})
SERVERS: Mapping[str, _Server] = {
    "openai": _Server(most_top_tokens=5, most_stops=4),
    "vllm": _LIKE_VLLM,
    "sglang": _LIKE_VLLM,
    # It loses what may become a stop text if the answer then ends at its length, so it is told of none.
    "llama.cpp": _Server("top_k", "repeat_penalty", most_stops=0, off={**_OFF, "top_k": 0, "repeat_penalty": 1.0}),
}
"""What `args: {server: ...}` may say. The first is also right for whatever speaks OpenAI's API and nothing more."""


def _others() -> list[str]:
    return [name for name in SERVERS if name != "openai"]


def _server(spec: ModelSpec) -> _Server:
    name = str(spec.args.get("server", "openai"))
    if name not in SERVERS:
        cause = f"args of {spec.id} names the server {name}, which engine openai does not know"
        raise _unusable(cause, f"Write one of {', '.join(SERVERS)} as `server` in args")
    return SERVERS[name]


def model_name(spec: ModelSpec) -> str:
    """Return what the server calls the model."""
    return str(spec.args.get("model") or spec.hf_name or spec.id)


def _reports_logprobs(spec: ModelSpec) -> bool:
    return spec.args.get("logprobs") is not False


def _base_url(url: str) -> str:
    """Return what stands before `/models` and `/completions`: an address without a path gets `/v1`."""
    return url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"


def _unusable(cause: str, fix: str) -> StartFailed:
    fix = f"{fix}, in models.yaml."
    return StartFailed(f"{cause[0].upper()}{cause[1:]}. {fix}", cause=cause, fix=fix)


def _never_ready(error: GatewayError) -> StartFailed:
    cause, _, fix = error.detail.partition(". ")
    return StartFailed(error.detail, cause=cause, fix=fix)


# ---- asking ----

_STREAM = {"stream": True, "stream_options": {"include_usage": True}}


def _parameters(server: _Server, request: GenerationRequest) -> dict[str, Any]:
    """Return all that decides which tokens come."""
    return {
        "max_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        **(server.off or {}),
        **_sampling(server, request),
        **_penalties(server, request),
        **_stops(server, request),
    }


def _sampling(server: _Server, request: GenerationRequest) -> dict[str, Any]:
    if request.temperature == 0:
        return {}  # some servers take a top_p or a seed as a wish to sample
    wanted = {
        "top_p": request.top_p if request.top_p < 1 else None,
        server.top_k or "": request.top_k,
        "seed": request.seed,
    }
    return {name: value for name, value in wanted.items() if value is not None}


def _penalties(server: _Server, request: GenerationRequest) -> dict[str, float]:
    penalties = {
        server.repetition_penalty or "": (request.repetition_penalty, 1.0),
        "frequency_penalty": (request.frequency_penalty, 0.0),
        "presence_penalty": (request.presence_penalty, 0.0),
    }
    return {name: value for name, (value, off) in penalties.items() if value != off}


def _stops(server: _Server, request: GenerationRequest) -> dict[str, list[str]]:
    told = [text for text in request.stop if text][: server.most_stops]
    return {"stop": told} if told else {}


def _reporting(request: GenerationRequest) -> dict[str, int]:
    """Return how many tokens to report of: what is reported for one is reported for the token taken."""
    return {"logprobs": max(request.top_tokens, 1)} if request.top_tokens or request.logprobs else {}


def _missing(server: _Server, request: GenerationRequest) -> list[str]:
    """Return the parameters in use that this server does not have."""
    missing = {
        "top_k": server.top_k is None and request.top_k is not None and request.temperature > 0,
        "repetition_penalty": server.repetition_penalty is None and request.repetition_penalty != 1,
    }
    return [name for name, is_missing in missing.items() if is_missing]
