"""What servers with OpenAI's API are asked: a prompt to complete or a chat, and how they differ in it. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from gateway.catalog import ModelSpec
from gateway.engines.chat import messages_of, response_format_of, tool_choice_of, tools_of
from gateway.generation import Chat, GenerationRequest, JsonObject, JsonSchema, Regex

Json = JsonObject | JsonSchema


@dataclass(frozen=True, slots=True)
class Server:
    """What a kind of server takes beyond OpenAI's API, by the names that it has for it."""

    top_k: str | None = None
    repetition_penalty: str | None = None
    regex: str | None = None
    most_top_tokens: int | None = None
    """How many it reports; None if that is its own affair to say."""
    most_top_tokens_in_chats: int | None = None
    most_stops: int | None = None
    """How many stop texts it is told; None for all."""
    off: Mapping[str, Any] | None = None
    """Every parameter at the value that does nothing, where one that is left out may do something."""
    form: Callable[[Json], dict[str, Any]] | None = None
    """What asks for JSON where a prompt is completed; chats have `response_format` everywhere."""
    continued: Mapping[str, Any] | None = None
    """What lets it go on with an assistant's last turn, if it would begin a new one."""
    chooses_by_name: bool = True
    """Whether it can be told which tool must be called; else it is told of no other."""
    fills_the_context: bool = False
    """Whether it goes on as long as there is room, if no length is told; else the default is OpenAI's: 16 tokens."""
    keeps_connections: bool = True
    """Whether it leaves one open that it said it would; else each call has its own (`Call.fresh`)."""


def _schema_of(grammar: Json) -> dict[str, Any]:
    return {"type": "object"} if isinstance(grammar, JsonObject) else dict(grammar.schema)


def _response_format(grammar: Json) -> dict[str, Any]:
    """Return OpenAI's way to ask for JSON. Only `strict` binds the answer; what cannot be bound so is then refused."""
    said = response_format_of(grammar)
    if "json_schema" in said:
        said["json_schema"]["strict"] = True
    return {"response_format": said}


_OFF = {"top_p": 1.0, "min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
_LIKE_VLLM: dict[str, Any] = {
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "off": {**_OFF, "top_k": -1, "repetition_penalty": 1.0},
}
SERVERS: Mapping[str, Server] = {
    "openai": Server(most_top_tokens=5, most_top_tokens_in_chats=20, most_stops=4),
    # Its name for a regular expression has changed between versions, and it passes over names that it does not know.
    "vllm": Server(
        **_LIKE_VLLM,
        form=_response_format,
        continued={"continue_final_message": True, "add_generation_prompt": False},
    ),
    "sglang": Server(
        **_LIKE_VLLM,
        regex="regex",
        form=lambda grammar: {"json_schema": json.dumps(_schema_of(grammar))},
        continued={"continue_final_message": True},
    ),
    # It loses what may become a stop text if the answer then ends at its length, so it is told of none. A choice that
    # is not a word is none to it.
    "llama.cpp": Server(
        "top_k",
        "repeat_penalty",
        most_stops=0,
        off={**_OFF, "top_k": 0, "repeat_penalty": 1.0},
        form=lambda grammar: {"json_schema": _schema_of(grammar)},
        chooses_by_name=False,
        fills_the_context=True,
        keeps_connections=False,
    ),
}
"""What `args: {server: ...}` may say. The first is also right for whatever speaks OpenAI's API and nothing more."""


def body_of(server: Server, spec: ModelSpec, request: GenerationRequest, *, reports: bool) -> dict[str, Any]:
    """Return what asks for `request`, but the model's name. `reports`: whether log-probabilities may be asked for."""
    chat = request.chat
    return {
        **({"prompt": request.prompt} if chat is None else _conversation(server, chat)),
        **_length(server, spec, request),
        "temperature": request.temperature,
        **(server.off or {}),
        **_sampling(server, request),
        **_penalties(server, request),
        **_stops(server, request),
        **_form(server, request),
        **(_reporting(request) if reports else {}),
        "stream": True,
        "stream_options": {"include_usage": True},
    }


# ---- what is spoken of ----


def _conversation(server: Server, chat: Chat) -> dict[str, Any]:
    last = chat.messages[-1]
    continues = last.role == "assistant" and not last.tool_calls
    return {"messages": messages_of(chat), **_tools(server, chat), **((server.continued or {}) if continues else {})}


def _tools(server: Server, chat: Chat) -> dict[str, Any]:
    """Return the tools and their choice; OpenAI refuses a choice among none."""
    if not chat.tools:
        return {}
    choice = tool_choice_of(chat) if server.chooses_by_name else chat.tool_choice
    parallel = {} if chat.parallel_tool_calls is None else {"parallel_tool_calls": chat.parallel_tool_calls}
    return {"tools": tools_of(chat, chosen_only=not server.chooses_by_name), "tool_choice": choice, **parallel}


def _form(server: Server, request: GenerationRequest) -> dict[str, Any]:
    if request.grammar is None:
        return {}
    if isinstance(request.grammar, Regex):
        return {server.regex: request.grammar.pattern} if server.regex else {}
    form = server.form if request.chat is None else _response_format
    return form(request.grammar) if form else {}


# ---- how long ----

_OPENAIS_OWN = ("openai.com", "openai.azure.com")
NOT_OF_THE_PROMPT_TOKENS = 8
"""How many tokens a server may add to a prompt's own: its begin, say."""


def _length(server: Server, spec: ModelSpec, request: GenerationRequest) -> dict[str, int]:
    """Return how many tokens are asked for, if that has to be told.

    OpenAI's newer models take `max_completion_tokens` only, in chats, and its older ones take it too. Others may not
    know it (TGI and llama.cpp had it late) and then go on without end; so it is for OpenAI's own addresses: as a kind
    of server, `openai` stands for all that are not known.
    """
    if request.chat is not None:
        name = "max_completion_tokens" if _is_openais_own(spec) else "max_tokens"
        return {} if request.max_new_tokens is None else {name: request.max_new_tokens}
    most = room(server, spec, request) if request.max_new_tokens is None else request.max_new_tokens
    return {} if most is None else {"max_tokens": most}


def room(server: Server, spec: ModelSpec, request: GenerationRequest) -> int | None:
    """Return how many tokens surely fit after a prompt; None: the server fills the context by itself.

    No token is less than a byte of text, so a prompt has no more tokens than bytes. 0 also where nothing is known.
    """
    if server.fills_the_context:
        return None
    taken = len(request.prompt.encode(errors="surrogatepass")) + NOT_OF_THE_PROMPT_TOKENS
    return max((spec.context_tokens or 0) - taken, 0)


def _is_openais_own(spec: ModelSpec) -> bool:
    host = urlsplit(spec.url or "").hostname or ""
    return any(host == own or host.endswith(f".{own}") for own in _OPENAIS_OWN)


# ---- how ----


def _sampling(server: Server, request: GenerationRequest) -> dict[str, Any]:
    if request.temperature == 0:
        return {}  # some servers take a top_p or a seed as a wish to sample
    said: dict[str, Any] = {"top_p": request.top_p} if request.top_p < 1 else {}
    if server.top_k and request.top_k is not None:
        said[server.top_k] = request.top_k
    if request.seed is not None:
        said["seed"] = request.seed
    return said


def _penalties(server: Server, request: GenerationRequest) -> dict[str, float]:
    said = {} if request.repetition_penalty == 1 else {server.repetition_penalty or "": request.repetition_penalty}
    if request.frequency_penalty != 0:
        said["frequency_penalty"] = request.frequency_penalty
    if request.presence_penalty != 0:
        said["presence_penalty"] = request.presence_penalty
    return said


def _stops(server: Server, request: GenerationRequest) -> dict[str, list[str]]:
    # a server that is told of a stop text removes it, and few say which one it was
    if request.keep_stop or not request.stop:
        return {}
    told = [text for text in request.stop if text][: server.most_stops]
    return {"stop": told} if told else {}


def _reporting(request: GenerationRequest) -> dict[str, Any]:
    """Return how many tokens to report of. For a prompt, what is reported for one is reported for the token taken."""
    if not (request.top_tokens or request.logprobs):
        return {}
    if request.chat is None:
        return {"logprobs": max(request.top_tokens, 1)}
    return {"logprobs": True, **({"top_logprobs": request.top_tokens} if request.top_tokens else {})}


# ---- what cannot be asked ----


def missing(server: Server, request: GenerationRequest) -> list[str]:
    """Return the parameters in use that this server does not have."""
    without = {
        "top_k": server.top_k is None and request.top_k is not None and request.temperature > 0,
        "repetition_penalty": server.repetition_penalty is None and request.repetition_penalty != 1,
    }
    return [name for name, is_missing in without.items() if is_missing and name not in request.defaults]


def can_bind(server: Server, request: GenerationRequest) -> bool:
    """Say whether this server can be told what form the answer must have."""
    if isinstance(request.grammar, Regex):
        return server.regex is not None
    return request.grammar is None or request.chat is not None or server.form is not None


def most_top_tokens(server: Server, request: GenerationRequest) -> int | None:
    """Return how many of the likeliest tokens it reports; None if it says that itself."""
    return server.most_top_tokens if request.chat is None else server.most_top_tokens_in_chats
