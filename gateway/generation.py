"""The words of generation, the same for every dialect and every engine. Values only.

A dialect makes a `GenerationRequest` of a caller's body; an engine turns it into its own HTTP
call, and its own answer into `TokenEvent`s that end with one `Finished`; a dialect renders those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

FinishReason = Literal["length", "stop", "eos", "tool_calls"]
"""`length`: max_new_tokens or the context was reached; `stop`: a stop text; `eos`: the model ended by itself;
`tool_calls`: it ended with calls of tools, which only a chat with tools does."""

# ---- what is asked for ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Image:
    """A picture in a message. `url` may be a `data:` URL that holds it."""

    url: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants called. `arguments` is JSON as the model wrote it: it may not be valid."""

    id: str
    name: str
    arguments: str = field(repr=False)


Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: tuple[str | Image, ...] = field(default=(), repr=False)
    """Its parts in their order; none where there are only `tool_calls`."""
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    """What an assistant's turn called."""
    tool_call_id: str | None = None
    """Which call a tool's turn answers."""

    @property
    def text(self) -> str:
        """The text parts, put together."""
        return "".join(part for part in self.content if isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters` is the JSON Schema of its arguments; None: it takes none."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation to continue with an assistant's turn; if the last turn is the assistant's, with more of it."""

    messages: tuple[Message, ...]
    """At least one."""
    tools: tuple[Tool, ...] = ()
    tool_choice: Literal["auto", "none", "required"] = "auto"
    """Whether the model may, must not or must call a tool."""
    tool_name: str | None = None
    """The one tool that must be called, with tool_choice `required`."""
    parallel_tool_calls: bool | None = None
    """Whether one answer may call several; None leaves it to the engine."""


@dataclass(frozen=True, slots=True)
class JsonObject:
    """Any JSON object."""


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """JSON that fits a schema."""

    schema: Mapping[str, Any]
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Regex:
    """Text that fits a regular expression as a whole."""

    pattern: str


Grammar = JsonObject | JsonSchema | Regex
"""What form the whole answer must have."""


@dataclass(slots=True)
class GenerationRequest:
    """What is to be generated. Every sampling value is explicit: an engine's own defaults are never ours.

    Nobody changes one. (As the other values that every request makes, it is not frozen: each of its fields would be set
    by a call.)
    """

    prompt: str = field(repr=False)
    """Text to continue; empty with `chat`."""
    max_new_tokens: int | None
    """At least 1; None: as many as the context has room for."""
    temperature: float
    """0 to 2; 0 is greedy."""
    top_p: float = 1.0
    """Above 0, at most 1; 1 is off."""
    top_k: int | None = None
    """At least 1; None is off."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation and are cut from the answer."""
    seed: int | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    top_tokens: int = 0
    """How many of the likeliest tokens to report at each position, with probabilities; 0 to 50."""
    logprobs: bool = False
    """Whether to report how likely each generated token was."""
    chat: Chat | None = None
    """A conversation to continue in place of a prompt, by the model's chat template."""
    grammar: Grammar | None = None
    count_prompt: bool = False
    """Whether the prompt's length in tokens must be told, even where the gateway ends the answer itself."""
    keep_stop: bool = False
    """Whether the stop text that ended the answer must be told (`Finished.stop`)."""
    defaults: frozenset[str] = frozenset()
    """Parameters that nobody asked for, set by a document's defaults: an engine that has none of them leaves them out.
    """

    @property
    def calls_tools(self) -> bool:
        """Whether the answer may be calls of tools."""
        return self.chat is not None and bool(self.chat.tools) and self.chat.tool_choice != "none"


# ---- what comes back ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class TokenChance:
    """One candidate at one position.

    The probability is softmax(logits / T) over the whole vocabulary, before any filter; T = 0 reads as 1.
    """

    id: int
    text: str
    probability: float
    logprob: float


@dataclass(frozen=True, slots=True)
class ToolCallPiece:
    """A part of a call of a tool. The first one of each `index` has its id and name; the arguments add up."""

    index: int
    """Which of the answer's calls, from 0."""
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class TokenEvent(NamedTuple):
    """One generated token; or several, where the server does not tell them apart.

    `text` is what it adds to the answer. It may be empty: part of a character, part of a tool call, special, or held
    back as a possible stop text. (There is one for every token: a tuple is made in a third of a dataclass's time.)
    """

    id: int | None
    text: str
    logprob: float | None = None
    top: tuple[TokenChance, ...] = ()
    token: str | None = None
    """The token's own text, whatever was held back; None where the server does not tell."""
    special: bool = False
    """Whether it is one of the model's own marks, which are no text: its end, say."""
    tool_calls: tuple[ToolCallPiece, ...] = ()


@dataclass(slots=True)
class Finished:
    """The end of a generation. `text` is what was still held back and belongs to the answer after all."""

    reason: FinishReason
    tokens_generated: int
    """The engine's own count."""
    prompt_tokens: int
    """0 where nobody tells."""
    text: str = ""
    stop: str = ""
    """The stop text that ended the answer, where the gateway found it."""
    generation_s: float = 0.0
    """How long the server worked on it, without start and queue; measured by the relay."""

    def timed(self, generation_s: float) -> Finished:
        """Return the same end with how long the server worked on it."""
        return Finished(self.reason, self.tokens_generated, self.prompt_tokens, self.text, self.stop, generation_s)


@dataclass(slots=True)
class GenerationResult:
    """A whole answer: the continuation without the prompt and without the stop text that ended it."""

    text: str
    tokens: tuple[TokenEvent, ...]
    reason: FinishReason
    tokens_generated: int
    prompt_tokens: int
    generation_s: float = 0.0
    stop: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptToken:
    """One token of a prompt. `start` and `stop` say where its text stands there, in bytes of UTF-8."""

    id: int
    text: str
    start: int
    stop: int


def collect(events: Iterable[TokenEvent], finished: Finished) -> GenerationResult:
    """Return the whole answer that the events of a finished generation add up to."""
    tokens = tuple(events)
    pieces = [piece for token in tokens for piece in token.tool_calls]
    return GenerationResult(
        text="".join([token.text for token in tokens]) + finished.text,
        tokens=tokens,
        reason=finished.reason,
        tokens_generated=finished.tokens_generated,
        prompt_tokens=finished.prompt_tokens,
        generation_s=finished.generation_s,
        stop=finished.stop,
        tool_calls=_joined(pieces) if pieces else (),
    )


def _joined(pieces: Iterable[ToolCallPiece]) -> tuple[ToolCall, ...]:
    """Return the calls that these parts add up to, in their order."""
    calls: dict[int, ToolCall] = {}
    for piece in pieces:
        before = calls.get(piece.index, ToolCall("", "", ""))
        calls[piece.index] = ToolCall(
            id=before.id or piece.id or "",
            name=before.name or piece.name or "",
            arguments=before.arguments + piece.arguments,
        )
    return tuple(calls[index] for index in sorted(calls))
