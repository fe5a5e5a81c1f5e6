"""`/inference` (documents/inference-api.md, contract section 4): what the model says alone, whole or as it comes.

Pure: a body in, a `GenerationRequest` out; events in, bytes out. The document says nothing of streams. Here each event
has a piece of the text, and the last one has the whole of it under the documented name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, Field

from gateway.bodies import MOST_TOKENS, Body, Prompt, StopTexts, as_json, request_of
from gateway.catalog import ModelSpec
from gateway.conversation import Messages, messages_of
from gateway.errors import GatewayError
from gateway.generation import (
    Chat,
    Finished,
    FinishReason,
    GenerationRequest,
    GenerationResult,
    Message,
    TokenEvent,
)

Mode = Literal["completion", "chat", "instruct"]


class Parameters(Body):
    """Optional parameters to control generation."""

    temperature: float = Field(0.7, ge=0, le=2, description="Sampling temperature; 0 is greedy")
    max_tokens: int = Field(200, ge=1, le=MOST_TOKENS, description="Most tokens to generate, up to the context")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus sampling; 1 is off")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="0 is off")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="0 is off")
    stop: StopTexts = Field(
        default=[], description="Texts that end the generation, left out of it; one may stand without a list"
    )


class InferenceBody(Body):
    """What `POST /inference` takes."""

    model: str | None = Field(None, description="Model to use: an id, alias or hub name; default: the default model")
    prompt: Prompt | None = Field(None, description="Text to continue; in mode instruct, what the model is told to do")
    parameters: Parameters = Field(default_factory=lambda: Parameters.model_validate({}))
    messages: Messages | None = Field(None, description="In place of a prompt: a conversation, to answer its last turn")
    mode: Mode | None = Field(
        None,
        description="completion continues the prompt; instruct answers it, by the model's chat template; chat (the "
        "default with messages) answers the messages",
    )
    stream: bool = Field(False, description="Answer piece by piece, as server-sent events")


class InferenceAnswer(BaseModel):
    """What `POST /inference` answers."""

    generated_text: str
    model: str
    tokens_generated: int
    finish_reason: FinishReason


def mode_of(body: InferenceBody) -> Mode:
    return body.mode or ("completion" if body.messages is None else "chat")


def chat_of(body: InferenceBody) -> Chat:
    """Return the conversation of modes `chat` and `instruct`: the latter's prompt is all that the user said."""
    return Chat(messages_of(body.messages) if body.messages else (Message("user", (body.prompt or "",)),))


def to_request(spec: ModelSpec, body: InferenceBody) -> GenerationRequest:
    """Return what is to be generated of a body that has what its mode takes."""
    parameters = body.parameters
    defaults = parameters.model_dump(include={"temperature", "top_p"})
    request = request_of(
        spec,
        body.prompt or "",
        defaults={**defaults, "max_new_tokens": parameters.max_tokens},
        said=parameters.model_dump(include=parameters.model_fields_set),
    )
    return request if mode_of(body) == "completion" else replace(request, prompt="", chat=chat_of(body))


class InferenceReply:
    """Writes one answer."""

    def __init__(self, spec: ModelSpec, *, stream: bool) -> None:
        self.stream = stream
        self._model = spec.id
        self._text: list[str] = []

    def whole(self, result: GenerationResult) -> bytes:
        return as_json(self._answer(result.text, result))

    def event(self, event: TokenEvent, *, last: bool = False) -> bytes:  # noqa: ARG002 - the end has an event of its own
        self._text.append(event.text)
        return _event({"text": event.text}) if event.text else b""

    def end(self, finished: Finished) -> bytes:
        rest = _event({"text": finished.text}) if finished.text else b""
        return rest + _event(self._answer("".join(self._text) + finished.text, finished))

    def failure(self, error: GatewayError) -> bytes:
        return _event({"detail": error.detail, "error_code": error.code})

    def _answer(self, text: str, end: Finished | GenerationResult) -> dict[str, Any]:
        counts = {"tokens_generated": end.tokens_generated, "finish_reason": end.reason}
        return {"generated_text": text, "model": self._model, **counts}


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + as_json(data) + b"\n\n"
