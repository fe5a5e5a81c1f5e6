"""`/v1`: OpenAI's API over every engine (contract section 4)."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError, WrapValidator
from starlette._utils import get_route_path
from starlette.responses import Response

from gateway.api.asking import Prefer, exchange, invalid, max_wait_s, model_of, within_context
from gateway.api.json_body import JsonRoute
from gateway.api.middleware import request_id_of
from gateway.api.problems import documented
from gateway.bodies import Body
from gateway.dialects import openai_chat, openai_completions
from gateway.dialects.openai import Addressed, Heading, SampledBody
from gateway.dialects.openai_chat import ChatChoices, ChatCompletion, ChatCompletionBody
from gateway.dialects.openai_completions import Completion, CompletionBody, CompletionChoices
from gateway.dialects.openai_put_through import Renaming
from gateway.engines.base import Call
from gateway.fleet.fleet import Fleet
from gateway.fleet.replicas import Served
from gateway.fleet.status import Status
from gateway.passage import Passage, PutThrough
from gateway.relay import Client, Relay

B = TypeVar("B", bound=Body)
UNREAD = WrapValidator(lambda said, _: said)
"""Leaves a body as it came: who reads it depends on the model. Its documentation stays that of its type."""

_DATA = {"type": "string", "description": "A chunk as JSON, and at last [DONE]"}
CHUNKS: dict[str, Any] = {
    "text/event-stream": {"itemSchema": {"type": "object", "properties": {"data": _DATA}, "required": ["data"]}}
}
"""How a stream stands in the OpenAPI document."""


class OpenAiModel(BaseModel):
    """One model of the catalog. `created` is 0: when it was made is not known."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    name: str
    aliases: list[str]
    hf_name: str | None
    engine: str
    state: str
    context_tokens: int | None


class OpenAiModels(BaseModel):
    object: Literal["list"]
    data: list[OpenAiModel]


def openai_router(fleet: Fleet, client: Client) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["openai"], route_class=JsonRoute)
    errors = documented(400, 404, 408, 413, 422, 500, 502, 503, 504)
    stream = {"content": CHUNKS, "description": "The answer; streamed, its pieces as they come"}

    async def answer(
        request: Request, said: Any, body_kind: type[B], prefer: str | None, translated: Callable[..., Response]
    ) -> Response:
        """Return the answer of the model that the body names, by one of the two ways there are."""
        asked = read(Addressed, said)
        spec = model_of(fleet.catalog, asked.model, "model")
        instance = fleet.get(spec)
        if speaks_openai(instance):
            _refuse_blank(said)
            return put_through(instance, client, request, await request.body(), asked, prefer)
        return translated(instance, client, request, read(body_kind, said), prefer)

    @router.post(
        "/chat/completions",
        summary="Answer a conversation",
        response_model=ChatCompletion,
        responses={**errors, 200: stream},
    )
    async def chat_completions(
        request: Request, body: Annotated[ChatCompletionBody, UNREAD], prefer: Prefer = None
    ) -> Any:
        """Answer a conversation as OpenAI's API does. Starts the model if it is not running, which may take minutes."""
        return await answer(request, body, ChatCompletionBody, prefer, chat)

    @router.post(
        "/completions", summary="Continue a prompt", response_model=Completion, responses={**errors, 200: stream}
    )
    async def completions(request: Request, body: Annotated[CompletionBody, UNREAD], prefer: Prefer = None) -> Any:
        """Continue one or several prompts as OpenAI's API does. Starts the model if it is not running."""
        return await answer(request, body, CompletionBody, prefer, completion)

    @router.get("/models", response_model=OpenAiModels, summary="List models")
    @router.head("/models", include_in_schema=False)
    async def models() -> Any:
        return {"object": "list", "data": [model_json(status, status.spec.id) for status in fleet.statuses()]}

    @router.get(
        "/models/{name:path}", response_model=OpenAiModel, summary="Show one model", responses=documented(404, 422)
    )
    async def model(name: str) -> Any:
        """Show the model of this id, alias or hub name, under the name asked for."""
        return model_json(fleet.status(fleet.catalog.resolve(name)), name)

    return router


# ---- answers, whose model is known ----


def chat(
    instance: Served,
    client: Client,
    request: Request,
    body: ChatCompletionBody,
    prefer: str | None,
    *,
    as_tgi: bool = False,
) -> Relay:
    """Return the answer to a conversation; `as_tgi` as TGI's own `/v1` gives it, with the stop text that ended it.

    Raises:
        RequestValidationError: more tokens are asked for than the model's context has.
        Unsupported: the engine cannot do what is asked.
    """
    _within_context(instance, body)
    wanted = openai_chat.to_requests(instance.spec, body, keep_stop=as_tgi)
    choices = ChatChoices(_heading("chatcmpl", instance, body, as_tgi=as_tgi), body, keep_stop=as_tgi)
    return Relay([exchange(instance, each, client, request, prefer) for each in wanted], choices)


def completion(
    instance: Served,
    client: Client,
    request: Request,
    body: CompletionBody,
    prefer: str | None,
    *,
    as_tgi: bool = False,
) -> Relay:
    """Return the continuations of the prompts; else as `chat`. TGI has no default length: it fills the context."""
    _within_context(instance, body)
    default = None if as_tgi else openai_completions.DEFAULT_NEW_TOKENS
    wanted = openai_completions.to_requests(instance.spec, body, default_new_tokens=default, keep_stop=as_tgi)
    choices = CompletionChoices(_heading("cmpl", instance, body, as_tgi=as_tgi), body, keep_stop=as_tgi)
    return Relay([exchange(instance, each, client, request, prefer) for each in wanted], choices)


def _within_context(instance: Served, body: SampledBody) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        within_context(instance.spec, getattr(body, field), field)


def _heading(kind: str, instance: Served, body: SampledBody, *, as_tgi: bool) -> Heading:
    name = body.model or instance.spec.id
    fingerprint = f"tgi-gateway-{instance.spec.engine}" if as_tgi else None
    return Heading(f"{kind}-{secrets.token_hex(12)}", int(time.time()), name, fingerprint)


# ---- answers that are put through ----


def speaks_openai(instance: Served) -> bool:
    """Say whether callers of the model may be put through: its server conforms, and nothing is to be added."""
    spec = instance.spec
    return instance.engine.speaks == "openai" and not spec.parameters and not spec.overrides


def _refuse_blank(said: Any) -> None:
    """Return if no prompt is blank: a provider would make something up, and bill it.

    Raises:
        RequestValidationError: one is; the caller gets EMPTY_PROMPT.
    """
    prompt = said.get("prompt")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if any(isinstance(each, str) and not each.strip() for each in prompts):
        raise invalid("write what the model shall continue", "empty_prompt", "prompt")


def put_through(
    instance: Served, client: Client, request: Request, sent: bytes, asked: Addressed, prefer: str | None
) -> PutThrough:
    """Return the server's own answer to what the caller sent, but for the model's name."""
    call = Call(get_route_path(request.scope), sent, {"Content-Type": "application/json"})
    passage = Passage(
        instance,
        call,
        client,
        Renaming(asked.model or instance.spec.id),
        streamed=asked.stream,
        request_id=request_id_of(request.scope),
        max_wait_s=max_wait_s(prefer),
    )
    return PutThrough(passage)


# ---- reading and showing ----


def read(kind: type[B], said: Any) -> B:
    """Return a body of this kind.

    Raises:
        RequestValidationError: it is none; says where.
    """
    try:
        return kind.model_validate(said)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        written = [{**each, "loc": ("body", *_as_written(each["loc"], said))} for each in found]
        raise RequestValidationError(written) from None


def _as_written(loc: Sequence[int | str], said: Any) -> Sequence[int | str]:
    """Return where it is in what the caller wrote, who may give a text where there is a list of them."""
    for depth, step in enumerate(loc):
        if isinstance(said, str):
            return loc[:depth]
        known = said if isinstance(said, dict) else dict(enumerate(said if isinstance(said, list) else ()))
        said = known.get(step)
    return loc


def model_json(status: Status, name: str) -> dict[str, Any]:
    """Return what `/v1/models` says of a model that was asked for by this name."""
    spec = status.spec
    owner, slash, _ = (spec.hf_name or "").partition("/")
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": owner if slash else "tgi-gateway",
        "name": spec.name,
        "aliases": [*spec.aliases],
        "hf_name": spec.hf_name,
        "engine": spec.engine,
        "state": status.state.value,
        "context_tokens": spec.context_tokens,
    }
