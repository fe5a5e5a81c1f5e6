"""What TGI is asked, and what it cannot do: a `GenerationRequest` as its two APIs have it. Pure.

A prompt goes to its own `/generate_stream`, a chat to its `/v1/chat/completions`, which is less than OpenAI's:
- It has no top_k and no repetition_penalty, and takes any presence_penalty, 0 too, as a strong repetition penalty.
- It refuses OpenAI's form of a response_format, and tools together with one.
- It loses an assistant's calls of tools beside a text, refuses a tool without parameters, and loses the definitions
  (`$defs`) that parameters name.
- A tool is called by a grammar of TGI's own. With tool_choice `auto` one of its tools is `no_tool`; if the model takes
  that, TGI starts again without tools. With `none` the tools are not even in the prompt.
- It calls one tool an answer, so whatever `parallel_tool_calls` says holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gateway.engines import chat as openai_chat
from gateway.errors import Unsupported
from gateway.generation import Chat, GenerationRequest, Grammar, JsonObject, Regex, Tool

SERVED_MODEL = "tgi"
"""What TGI calls the model that it serves. It takes any other name for that of an adapter."""
MOST_TOP_TOKENS = 50
LEAST_TEMPERATURE = 0.01
"""Below, its logits may overflow."""
TOP_P_IS_OFF = 0.9999
"""TGI computes in 32 bits, in which what is closer to 1 may be 1, and it refuses 1."""
NO_TOOL = "no_tool"
MOST_LEVELS = 100
"""How deep a schema may be: TGI reads no JSON of more than 128 levels."""
MOST_WRITTEN_OUT = 200_000
"""How many parts and characters the parameters of a tool may have once their definitions are written out, each where it
is named: a few lines can ask for billions."""

# ---- what it can do -------------------------------------------------------------------------------------------------


def check(request: GenerationRequest) -> None:
    """Return if TGI can do what is asked.

    Raises:
        Unsupported: it cannot; names the parameters and says what to do.
    """
    _check_sampling(request)
    if request.top_tokens:
        _check_top_tokens(request)
    if request.grammar is not None:
        _check_grammar(request.grammar, calls_tools=request.calls_tools)
    if request.chat is not None and request.calls_tools:
        _tools(request.chat)


def _check_sampling(request: GenerationRequest) -> None:
    if request.presence_penalty != 0:
        raise Unsupported(
            "This model's engine has no presence_penalty. Leave it out; repetition_penalty is the nearest it has, and "
            "not in chats."
        )
    if request.chat is None:
        return
    missing = {
        "top_k": request.temperature > 0 and request.top_k is not None,
        "repetition_penalty": request.repetition_penalty != 1,
    }
    if any(missing.values()):
        names = " and no ".join(name for name, is_missing in missing.items() if is_missing)
        raise Unsupported(f"This model's engine has no {names} in chats. Leave it out, or send a prompt.")


def _check_top_tokens(request: GenerationRequest) -> None:
    if request.top_tokens > MOST_TOP_TOKENS:
        raise Unsupported(f"This model's engine reports at most {MOST_TOP_TOKENS} top_tokens.")
    if reshaping := _reshaping(request):
        raise Unsupported(
            f"This model's engine cannot report top_tokens together with {', '.join(reshaping)}: its probabilities "
            "would not be those of the whole vocabulary. Leave these out."
        )


def _reshaping(request: GenerationRequest) -> list[str]:
    """Return the parameters in use that change the probabilities that TGI reports."""
    sampling = request.temperature > 0
    in_use = {
        f"a temperature below {LEAST_TEMPERATURE}": 0 < request.temperature < LEAST_TEMPERATURE,
        "top_p": sampling and request.top_p < TOP_P_IS_OFF,
        "top_k": sampling and request.top_k is not None,
        "repetition_penalty": request.repetition_penalty != 1,
        "frequency_penalty": request.frequency_penalty != 0,
        "a grammar": request.grammar is not None,
    }
    return [name for name, used in in_use.items() if used]


def _check_grammar(grammar: Grammar, *, calls_tools: bool) -> None:
    if calls_tools:
        raise Unsupported(
            "This model's engine cannot call tools and keep to a grammar in one answer. Leave out response_format, or "
            "set tool_choice to none."
        )
    if isinstance(grammar, JsonObject):
        raise Unsupported("This model's engine makes JSON by a schema only: give a json_schema.")
    if isinstance(grammar, Regex):
        return
    if not _is_shallow(grammar.schema):
        raise Unsupported("This model's engine cannot keep to this JSON schema: it is too deep. Make it simpler.")
    if "properties" not in grammar.schema:
        raise Unsupported(
            "This model's engine takes the JSON schema of an object only, with `properties` at its top. Put what you "
            "want into a property."
        )


# ---- a prompt -------------------------------------------------------------------------------------------------------


def generation(request: GenerationRequest) -> dict[str, Any]:
    """Return the body for `/generate_stream`."""
    return {"inputs": request.prompt, "parameters": _parameters(request)}


def _parameters(request: GenerationRequest) -> dict[str, Any]:
    """Return TGI's parameters, without those that are off: it refuses most values that say so."""
    said: dict[str, Any] = {} if request.max_new_tokens is None else {"max_new_tokens": request.max_new_tokens}
    said |= _sampling(request)
    if request.repetition_penalty != 1:
        said["repetition_penalty"] = request.repetition_penalty
    if request.frequency_penalty != 0:
        said["frequency_penalty"] = request.frequency_penalty
    if request.top_tokens:
        said["top_n_tokens"] = request.top_tokens
    if request.grammar is not None and (grammar := _grammar(request.grammar)):
        said["grammar"] = grammar
    said["details"] = True
    return said


def _sampling(request: GenerationRequest) -> dict[str, Any]:
    temperature = request.temperature
    if temperature == 0:
        return {"do_sample": False}  # and no top_p or top_k: with these it would sample
    said: dict[str, Any] = {"do_sample": True, "temperature": max(temperature, LEAST_TEMPERATURE)}
    if request.top_p < TOP_P_IS_OFF:
        said["top_p"] = request.top_p
    if request.top_k is not None:
        said["top_k"] = request.top_k
    if request.seed is not None:
        said["seed"] = request.seed
    return said


def _grammar(grammar: Grammar | None) -> dict[str, Any] | None:
    """Return a grammar as every TGI that has any takes it. Its newer form for schemas has a name, which it ignores."""
    if grammar is None or isinstance(grammar, JsonObject):
        return None
    if isinstance(grammar, Regex):
        return {"type": "regex", "value": grammar.pattern}
    return {"type": "json", "value": dict(grammar.schema)}


def _unless(value: float, off: float) -> float | None:
    return None if value == off else value


def _given(wanted: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in wanted.items() if value is not None}


# ---- a chat ---------------------------------------------------------------------------------------------------------


def chat_completion(request: GenerationRequest, chat: Chat) -> dict[str, Any]:
    """Return the body for `/v1/chat/completions`. It is told of no stop texts: see `tgi.py`."""
    wanted = {
        "model": SERVED_MODEL,
        **_conversation(request, chat),
        "max_tokens": request.max_new_tokens,
        **_chat_sampling(request),
        "frequency_penalty": _unless(request.frequency_penalty, 0.0),
        "logprobs": True if request.logprobs or request.top_tokens else None,
        "top_logprobs": _unless(request.top_tokens, 0),
        "response_format": _grammar(request.grammar),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return _given(wanted)


def _chat_sampling(request: GenerationRequest) -> dict[str, Any]:
    """Return the same as for a prompt: here a temperature of 0 is what says that nothing is drawn."""
    if request.temperature == 0:
        return {"temperature": 0.0}
    return {name: value for name, value in _sampling(request).items() if name not in ("do_sample", "top_k")}


def tokenization(request: GenerationRequest) -> dict[str, Any]:
    """Return the body for `/tokenize`; for a chat, for `/chat_tokenize`: all that decides what the prompt is."""
    if request.chat is None:
        return {"inputs": request.prompt}
    return {"model": SERVED_MODEL, **_conversation(request, request.chat)}


def _conversation(request: GenerationRequest, chat: Chat) -> dict[str, Any]:
    said: dict[str, Any] = {"messages": [_mended(message) for message in openai_chat.messages_of(chat)]}
    if request.calls_tools:
        said |= {"tools": _tools(chat), "tool_choice": openai_chat.tool_choice_of(chat)}
    return said


def _mended(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a turn with a text or with calls, not with both: TGI would lose the calls.

    It shows calls to the chat template as JSON, so beside a text they become JSON here.
    """
    content, calls = message.get("content"), message.get("tool_calls")
    if not calls or content is None:
        return dict(message)
    if not content:
        return {name: value for name, value in message.items() if name != "content"}
    shown = json.dumps(calls, ensure_ascii=False)
    both = f"{content}\n{shown}" if isinstance(content, str) else [*content, {"type": "text", "text": shown}]
    return {**{name: value for name, value in message.items() if name != "tool_calls"}, "content": both}


def _tools(chat: Chat) -> list[dict[str, Any]]:
    """Return the tools as JSON.

    Raises:
        Unsupported: TGI would take one for its own, or their parameters are too involved.
    """
    if any(tool.name == NO_TOOL for tool in chat.tools):
        raise Unsupported(f"This model's engine has a tool {NO_TOOL} of its own. Rename yours.")
    said = openai_chat.tools_of(chat)
    for function, tool in zip((each["function"] for each in said), chat.tools, strict=True):
        function["parameters"] = _arguments(tool)
    return said


def _arguments(tool: Tool) -> dict[str, Any]:
    if tool.parameters is None:
        return {"type": "object", "properties": {}}
    try:
        found = _Definitions(tool.parameters).written_out() if _is_shallow(tool.parameters) else None
    except _TooMuch:
        found = None
    if found is None or not _is_shallow(found):
        raise Unsupported(
            f"This model's engine cannot call the tool {tool.name}: its parameters contain themselves, or are too "
            "large or too deep. Make them simpler."
        )
    return found


def _is_shallow(schema: Any, levels: int = MOST_LEVELS) -> bool:
    parts = schema.values() if isinstance(schema, Mapping) else schema if isinstance(schema, list) else ()
    return levels > 0 and all(_is_shallow(part, levels - 1) for part in parts)


class _TooMuch(Exception):
    """A definition contains itself, or there is too much of them."""


class _Definitions:
    """Puts the definitions of a schema in the places that name them."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        self._known = {
            f"#/{room}/{name}": definition
            for room in ("$defs", "definitions")
            if isinstance(schema.get(room), Mapping)
            for name, definition in schema[room].items()
        }
        self._open: list[str] = []
        self._written = 0

    def written_out(self) -> dict[str, Any]:
        kept = {name: part for name, part in self._schema.items() if name not in ("$defs", "definitions")}
        return {name: self._part(part) for name, part in kept.items()} if self._known else kept

    def _part(self, part: Any) -> Any:
        self._written += 1 + (len(part) if isinstance(part, str) else 0)
        if self._written > MOST_WRITTEN_OUT:
            raise _TooMuch
        if isinstance(part, list):
            return [self._part(each) for each in part]
        return self._members(part) if isinstance(part, Mapping) else part

    def _members(self, part: Mapping[str, Any]) -> dict[str, Any]:
        reference = part.get("$ref")
        known = reference if isinstance(reference, str) and reference in self._known else None
        whole = {name: self._part(each) for name, each in part.items() if known is None or name != "$ref"}
        return whole if known is None else {**self._definition(known), **whole}

    def _definition(self, reference: str) -> dict[str, Any]:
        if reference in self._open:
            raise _TooMuch
        self._open.append(reference)
        try:
            found = self._part(self._known[reference])
            return found if isinstance(found, dict) else {}
        finally:
            self._open.pop()


# ---- a caller's own body --------------------------------------------------------------------------------------------

_SCANNER = json.JSONDecoder(parse_int=str, parse_float=str)


def with_served_model(body: bytes) -> bytes:
    """Return a JSON object with its `model` named as TGI names it, and every other byte as it was.

    What is no object, or not JSON at all, comes back as it is: TGI has its own words for it.
    """
    try:
        text = body.decode(errors="surrogateescape")  # bytes that are no text stay as they are
        names = [span for name, *span in _members(text) if name == "model"]
    except (ValueError, IndexError, RecursionError):
        return body
    for start, stop in reversed(names):
        if text[start] == '"':
            text = f'{text[:start]}"{SERVED_MODEL}"{text[stop:]}'
    return text.encode(errors="surrogateescape")


def _members(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each member of an object, and where its value begins and ends."""
    at = _behind(text, 0, "{")
    more = text[at] != "}"
    while more:
        name, at = _SCANNER.raw_decode(text, at)
        start = _behind(text, at, ":")
        _, stop = _SCANNER.raw_decode(text, start)
        yield str(name), start, stop
        at = _behind(text, stop, "")
        if more := text[at] != "}":
            at = _behind(text, at, ",")


def _behind(text: str, at: int, mark: str) -> int:
    """Return where the next thing begins after this mark, and after the space on either side of it.

    Raises:
        ValueError: something else is there.
    """
    found = re.compile(rf"[ \t\n\r]*{re.escape(mark)}[ \t\n\r]*").match(text, at)
    if not found:
        raise ValueError(f"no {mark} at {at}")
    return found.end()
