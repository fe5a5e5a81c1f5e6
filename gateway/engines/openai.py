"""Engine `openai`: any server with OpenAI's API, here or at a provider, that others run (runtime `external`). Pure.

A prompt is asked for by `POST /v1/completions`, into which it goes as it is, as with all other engines; a chat by
`POST /v1/chat/completions`. What differs from other engines:
- OpenAI's API has no top_k and no repetition_penalty. Other servers have, by names of their own, and some of them take
  what a call leaves out from the model's files: `args: {server: vllm}` says which server it is (`SERVERS`).
- It reports log-probabilities at temperature 1, whatever the request's, and OpenAI itself no more than five of them,
  or twenty in chats. A server that refuses to is not asked to, with `args: {logprobs: false}`.
- A stop text is told to the server, as a provider bills whatever it makes after it, and looked for here as well: some
  servers leave it in, and OpenAI takes no more than four. Where it has to be told to the caller (`keep_stop`), it is
  looked for here alone, as most servers remove it.
- What a provider counts is what counts: the usage is always asked for.
- Callers of OpenAI's API are put through to it as they are (`forward`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar
from urllib.parse import urlsplit

from gateway.catalog import ModelSpec
from gateway.devices import Share
from gateway.engines import openai_answers, openai_calls
from gateway.engines.base import Api, Call, Decoder, Diagnosis
from gateway.engines.keys import authorization, key_refused
from gateway.engines.openai_calls import SERVERS, Server
from gateway.engines.protocol import written
from gateway.errors import GatewayError, InvalidRequest, StartFailed, Unsupported
from gateway.generation import GenerationRequest, PromptToken, Regex
from gateway.runtimes.base import Exit, Launch, Progress


class OpenAi:
    name: ClassVar[str] = "openai"
    health_path: ClassVar[str] = "/models"
    default_slots: ClassVar[int] = 64
    speaks: ClassVar[Api | None] = "openai"

    def launch(self, spec: ModelSpec, name: str, secret: str) -> Launch:  # noqa: ARG002 - its key is the catalog's
        return Launch(name=name, url=_base_url(spec.url or ""), model=spec.id)

    def placed(self, launch: Launch, shares: Sequence[Share]) -> Launch:  # noqa: ARG002 - it runs nothing
        return launch

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
        if missing := openai_calls.missing(server, request):
            raise Unsupported(
                f"OpenAI's API has no {' and no '.join(missing)}. Leave it out; or, if the server of {spec.id} is one "
                f"of {', '.join(_others())}, say so in models.yaml: args: {{server: {_others()[0]}}}."
            )
        if not openai_calls.can_bind(server, request):
            raise Unsupported(_cannot_bind(request))
        if request.chat is None and request.max_new_tokens is None and openai_calls.room(server, spec, request) == 0:
            raise Unsupported(
                "This model's server must be told how many tokens to generate, and how many fit is not known. Give "
                "max_new_tokens, or the model's context_tokens in models.yaml."
            )
        _check_top_tokens(server, spec, request)

    def call(self, spec: ModelSpec, request: GenerationRequest, secret: str) -> Call:  # noqa: ARG002 - see `launch`
        path = "/completions" if request.chat is None else "/chat/completions"
        asked = openai_calls.body_of(_server(spec), spec, request, reports=_reports_logprobs(spec))
        return _post(path, written({"model": model_name(spec), **asked}), spec)

    def decoder(self, request: GenerationRequest) -> Decoder:
        if request.chat is None:
            return openai_answers.CompletionDecoder(request)
        return openai_answers.chat_decoder(request)

    def refusal(self, status: int, body: bytes) -> GatewayError:
        return openai_answers.refusal(status, body)

    def tokenize(self, spec: ModelSpec, request: GenerationRequest, secret: str) -> Call:  # noqa: ARG002 - the seam's
        raise _no_tokens()

    def tokens(self, request: GenerationRequest, body: bytes) -> tuple[PromptToken, ...]:  # noqa: ARG002 - the seam's
        raise _no_tokens()

    def forward(self, spec: ModelSpec, call: Call, secret: str) -> Call:  # noqa: ARG002 - see `launch`
        """Return the call with the model by its server's name; nothing else in its body changes.

        Raises:
            InvalidRequest: the body is not JSON.
        """
        path, name = call.path.removeprefix("/v1"), model_name(spec)
        if call.method == "GET":
            return Call(path, headers=authorization(spec), method="GET", fresh=_is_fresh(spec))
        return _post(path, _with_model(call.body, name), spec)


# ---- where it is, and what it is ----


def _others() -> list[str]:
    return [name for name in SERVERS if name != "openai"]


def _server(spec: ModelSpec) -> Server:
    return SERVERS[str(spec.args.get("server", "openai"))]


def model_name(spec: ModelSpec) -> str:
    """Return what the server calls the model."""
    return str(spec.args.get("model") or spec.hf_name or spec.id)


def _reports_logprobs(spec: ModelSpec) -> bool:
    return spec.args.get("logprobs") is not False


def _base_url(url: str) -> str:
    """Return what stands before `/models` and `/completions`: an address without a path gets `/v1`."""
    return url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"


def _never_ready(error: GatewayError) -> StartFailed:
    cause, _, fix = error.detail.partition(". ")
    return StartFailed(error.detail, cause=cause, fix=fix)


# ---- asking ----


def _post(path: str, body: bytes, spec: ModelSpec) -> Call:
    return Call(path, body, {"Content-Type": "application/json", **authorization(spec)}, fresh=_is_fresh(spec))


def _is_fresh(spec: ModelSpec) -> bool:
    return not _server(spec).keeps_connections


def _with_model(body: bytes, name: str) -> bytes:
    """Return a caller's body with this name of the model and no other; the very same bytes if it is so already.

    A server may go by the first of several, or by `Model`: it would serve another model on the catalog's key.
    """
    try:
        members: list[tuple[str, Any]] = []

        def note(found: list[tuple[str, Any]]) -> dict[str, Any]:
            members[:] = found  # the outermost object is the last one to be complete
            return dict(found)

        said = json.loads(body, object_pairs_hook=note)
        names = [member for member, _ in members if member.lower() == "model"]
        if not isinstance(said, dict) or (names == ["model"] and said["model"] == name):
            return body
        kept = {member: value for member, value in said.items() if member == "model" or member not in names}
        return json.dumps({**kept, "model": name}, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise InvalidRequest("The body is not valid JSON, or holds NaN or a number beyond all bounds.") from None


def _cannot_bind(request: GenerationRequest) -> str:
    if isinstance(request.grammar, Regex):
        return (
            "This model's server binds answers to no regular expression. Use a JSON schema; or, if the server is "
            "sglang, say so in models.yaml: args: {server: sglang}."
        )
    return (
        "This model's server completes prompts in no given form (grammar). Ask by a chat with response_format; or, if "
        f"the server is one of {', '.join(_others())}, say so in models.yaml: args: {{server: {_others()[0]}}}."
    )


def _check_top_tokens(server: Server, spec: ModelSpec, request: GenerationRequest) -> None:
    most = openai_calls.most_top_tokens(server, request)
    if most is not None and request.top_tokens > most:
        raise Unsupported(f"This model's server reports at most {most} top_tokens.")
    if request.top_tokens and not _reports_logprobs(spec):
        raise Unsupported("This model's server reports no top_tokens (args: {logprobs: false} in models.yaml).")
    if request.top_tokens and request.temperature not in (0, 1):
        raise Unsupported(
            f"This model's engine cannot report top_tokens at temperature {request.temperature:g}: its "
            "probabilities are always those of temperature 1. Use temperature 0 or 1."
        )


def _no_tokens() -> Unsupported:
    return Unsupported("This model's engine cannot tell the tokens of a text: OpenAI's API has no such address.")
