"""TGI's own routes: `/generate`, `/generate_stream`, `POST /`, `/tokenize`, `/vertex` (tgi.md 1.1 and 1.3)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from .answers import answer, event, native_error, sequence, stream_headers, times, token
from .generation import Generation, Step
from .model import tokenize
from .service import Service
from .validation import ABSENT_PARAMETERS, Refused
from .web import Response, Stream

Body = Mapping[str, Any]


async def generate(service: Service, body: Body) -> Response:
    value, headers = await _whole(service, body)
    return answer(value, headers)


async def compatible(service: Service, body: Body) -> Response | Stream:
    """Answer `POST /`: a list of one, and the prompt before the text unless told otherwise."""
    wants_prompt = body["parameters"]["return_full_text"] is not False
    full = {**body, "parameters": {**body["parameters"], "return_full_text": wants_prompt}}
    if body["stream"]:
        return await generate_stream(service, full)
    value, headers = await _whole(service, full)
    return answer([value], headers)


async def generate_stream(service: Service, body: Body) -> Stream:
    headers = stream_headers(len(body["inputs"]))
    return Stream(_frames(service, body), headers, service.personality.keep_alive_s)


async def _whole(service: Service, body: Body) -> tuple[dict[str, Any], dict[str, str]]:
    inputs, parameters = body["inputs"], body["parameters"]
    whole = await service.generate(inputs, parameters)
    value: dict[str, Any] = {"generated_text": _full(body) + whole.best.text}
    if parameters["details"] or parameters["decoder_input_details"]:
        # without that flag of the server, TGI leaves it empty and does not say why
        prefill = parameters["decoder_input_details"] and service.args.enable_prefill_logprobs
        value["details"] = sequence(whole.best, prefill=prefill)
        if whole.others:
            rest = [{"generated_text": _full(body) + each.text, **sequence(each)} for each in whole.others]
            value["details"]["best_of_sequences"] = rest
    return value, times(whole, len(inputs))


async def _frames(service: Service, body: Body) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(service.stream(body["inputs"], body["parameters"])) as steps:
            async for generation, step in steps:
                yield event(_frame(generation, step, body))
    except Refused as refused:
        yield native_error(refused)


def _frame(generation: Generation, step: Step, body: Body) -> dict[str, Any]:
    frame: dict[str, Any] = {"index": len(generation.steps), "token": token(step.token)}
    if step.top:
        frame["top_tokens"] = [token(one) for one in step.top]
    last = generation.finish_reason is not None
    frame["generated_text"] = _full(body) + generation.text if last else None
    frame["details"] = _last_details(generation) if last and body["parameters"]["details"] else None
    return frame


def _last_details(generation: Generation) -> dict[str, Any]:
    return {
        "finish_reason": generation.finish_reason,
        "generated_tokens": len(generation.steps),
        "seed": generation.reported_seed,
        "input_length": len(generation.prompt),
    }


def _full(body: Body) -> str:
    return str(body["inputs"]) if body["parameters"]["return_full_text"] else ""


async def tokens(service: Service, body: Body) -> Response:
    return answer(token_list(body["inputs"]))


def token_list(text: str) -> list[dict[str, Any]]:
    """Return the tokens of a text with their places in its bytes."""
    data = text.encode(errors="replace")
    return [
        {
            "id": piece.id,
            "text": data[piece.start : piece.stop].decode(errors="replace"),
            "start": piece.start,
            "stop": piece.stop,
        }
        for piece in tokenize(text)
    ]


async def vertex(service: Service, body: Body) -> Response:
    """Answer Vertex AI: sampled, with two of the parameters, and any failure is a 500."""
    if not body["instances"]:
        raise Refused("Input validation error: empty list of instances", "Input validation error")
    predictions = []
    for instance in body["instances"]:
        kept = {name: instance["parameters"][name] for name in ("max_new_tokens", "seed")}
        try:
            whole = await service.generate(instance["inputs"], {**ABSENT_PARAMETERS, **kept}, "vertex")
        except Refused as refused:
            raise Refused(refused.words, "Incomplete generation", 500) from None
        predictions.append(whole.best.text)
    return answer({"predictions": predictions})
