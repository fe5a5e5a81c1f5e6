"""The two OpenAI-like routes as TGI has them, quirks included (tgi.md 1.2 and 1.3)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any

from . import tools
from .answers import DONE, answer, event, number, openai_error, stream_headers, times
from .generation import Generation, Step, Token
from .native import Body, token_list
from .service import Answer, Service
from .validation import ABSENT_PARAMETERS, Refused
from .web import Response, Stream

VERSION = "3.3.6-dev0"
FINGERPRINT = f"{VERSION}-native"
PLAIN_REASONS = {"eos_token": "stop", "length": "length", "stop_sequence": "stop_sequence"}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def templated(service: Service, body: Body) -> str:
    """Return the conversation as one prompt; a last message of the assistant is continued.

    Raises:
        Refused: the model has no chat template.
    """
    if service.personality.no_template:
        raise Refused("Template error: template not found", "template_error")
    *earlier, last = [f"{message['role']}: {message['content']}" for message in body["messages"]] or [""]
    last += tools.shown(body) if tools.chosen(body) else ""
    ends_open = bool(body["messages"]) and body["messages"][-1]["role"] == "assistant"
    return "\n".join([*earlier, last] if ends_open else [*earlier, last, "assistant:"])


def _sampling(body: Body) -> dict[str, Any]:
    """Return the parameters that both routes share: 0 means greedy, anything else means sampling."""
    greedy = body["temperature"] == 0.0
    return {
        **ABSENT_PARAMETERS,
        "do_sample": not greedy,
        "temperature": None if greedy else body["temperature"],
        "top_p": body["top_p"],
        "frequency_penalty": body["frequency_penalty"],
        "max_new_tokens": body["max_tokens"],
        "stop": body["stop"] or [],
        "seed": body["seed"],
        "details": True,
    }


def _chat_parameters(body: Body) -> dict[str, Any]:
    presence, model = body["presence_penalty"], body["model"]
    return {
        **_sampling(body),
        "repetition_penalty": None if presence is None else presence + 2.0,
        "top_n_tokens": body["top_logprobs"],
        "grammar": body["response_format"],
        "adapter_id": None if model == "tgi" else model,
    }


async def chat(service: Service, body: Body) -> Response | Stream:
    service.metrics.count("tgi_request_count")  # once here and once below: TGI's own double count
    if body["response_format"] is not None and body["tools"] is not None:
        raise Refused("Tool error: Grammar and tools are mutually exclusive", "tool_error")
    prompt, parameters, name = templated(service, body), _chat_parameters(body), tools.chosen(body)
    characters = sum(len(message["content"]) for message in body["messages"])
    if name:
        parameters["grammar"] = tools.grammar(body, name)
    if body["stream"]:
        frames = _chat_frames(service, body, prompt, parameters)
        return Stream(frames, stream_headers(characters), service.personality.keep_alive_s)
    whole = await service.generate(prompt, parameters, "chat_completions")
    message = await _message(service, body, whole.best.text)
    return answer(_chat_answer(service, body, whole, message), times(whole, characters))


async def _message(service: Service, body: Body, text: str) -> dict[str, Any]:
    """Return the message; where no tool is called, the text of a second answer (tgi.md 1.2)."""
    name = tools.chosen(body)
    if name and name != tools.NO_TOOL:
        return {"role": "assistant", "tool_calls": [tools.call_of(text)]}
    if name:
        tools.call_of(text)
        plain = _without_tools(body)
        again = await service.generate(templated(service, plain), _chat_parameters(plain), "chat_completions")
        text = again.best.text
    return {"role": "assistant", "content": text}


def _without_tools(body: Body) -> Body:
    return {**body, "tools": None}


def _chat_head(service: Service, body: Body, kind: str) -> dict[str, Any]:
    model = body["model"] if body["model"] not in (None, "tgi") else service.args.model_id
    return {"object": kind, "id": "", "created": int(time.time()), "model": model, "system_fingerprint": FINGERPRINT}


def _chat_answer(service: Service, body: Body, whole: Answer, message: Mapping[str, Any]) -> dict[str, Any]:
    best = whole.best
    choice = {
        "index": 0,
        "message": message,
        "logprobs": _logprobs(best.steps) if body["logprobs"] else None,
        "finish_reason": PLAIN_REASONS[best.finish_reason or ""],
    }
    head = _chat_head(service, body, "chat.completion")
    return {**head, "choices": [choice], "usage": usage(len(best.prompt), len(best.steps))}


async def _chat_frames(
    service: Service, body: Body, prompt: str, parameters: Mapping[str, Any]
) -> AsyncGenerator[bytes, None]:
    head = _chat_head(service, body, "chat.completion.chunk")
    call = tools.CallStream() if tools.chosen(body) else None
    try:
        async with aclosing(service.stream(prompt, parameters, "chat_completions")) as steps:
            async for generation, step in steps:
                choice = _chat_choice(generation, step, body, call)
                if call and call.name == tools.NO_TOOL:
                    break
                if choice:
                    yield event({**head, "choices": [choice], "usage": None})
        if call and call.name == tools.NO_TOOL:  # TGI starts from the beginning
            plain = _without_tools(body)
            again = _chat_frames(service, plain, templated(service, plain), _chat_parameters(plain))
            async with aclosing(again) as frames:
                async for frame in frames:
                    yield frame
            return
        if body["stream_options"]["include_usage"]:
            yield event({**head, "choices": [], "usage": usage(len(generation.prompt), len(generation.steps))})
    except Refused as refused:
        yield openai_error(refused)
    yield DONE


def _chat_choice(
    generation: Generation, step: Step, body: Body, call: tools.CallStream | None
) -> dict[str, Any] | None:
    """Return what a token adds to the answer; None where TGI sends nothing, not even the reason of the end."""
    reason = generation.finish_reason
    delta: dict[str, Any] = {"role": "assistant", "content": "" if step.token.special else step.token.text}
    if call and (piece := call.feed(step.token.text)) is None:
        return None
    if call and piece and not step.token.special:
        name, arguments = piece
        function = {"name": name, "arguments": arguments}
        part = {"index": 0, "id": tools.ID, "type": "function", "function": function}
        delta = {"role": "assistant", "tool_calls": [part]}
    return {
        "index": 0,
        "delta": delta,
        "logprobs": _logprobs([step]) if body["logprobs"] else None,
        "finish_reason": PLAIN_REASONS[reason] if reason else None,
    }


def _logprobs(steps: list[Step]) -> dict[str, Any]:
    def shown(one: Token) -> dict[str, Any]:
        return {"token": one.text, "logprob": number(one.logprob)}

    return {"content": [{**shown(step.token), "top_logprobs": [shown(one) for one in step.top]} for step in steps]}


async def chat_tokens(service: Service, body: Body) -> Response:
    text = templated(service, body)
    return answer({"tokenize_response": token_list(text), "templated_text": text})


async def completions(service: Service, body: Body) -> Response | Stream:
    service.metrics.count("tgi_request_count")
    prompts, most = body["prompt"], service.args.max_client_batch_size
    if body["suffix"] is not None:
        words = "Suffix is not supported and can be achieved by preprocessing the prompt."
        raise Refused(words, "suffix not supported")
    if len(prompts) > most:
        words = f"Number of prompts exceeds the maximum allowed batch size of {most}"
        raise Refused(words, "batch size exceeded")
    parameters = {**_sampling(body), "repetition_penalty": body["repetition_penalty"]}
    characters = sum(map(len, prompts))
    if body["stream"]:
        frames = _completion_frames(service, prompts, parameters)
        return Stream(frames, stream_headers(characters), service.personality.keep_alive_s)
    return await _completed(service, prompts, parameters, characters)


def _completion_head(service: Service) -> dict[str, Any]:
    created = int(time.time())
    head = {"object": "text_completion", "id": "", "created": created, "model": service.args.model_id}
    return {**head, "system_fingerprint": FINGERPRINT}


async def _completed(service: Service, prompts: list[str], parameters: Mapping[str, Any], characters: int) -> Response:
    """Answer all prompts at once; the choices are in the order in which they were done."""
    done: list[tuple[int, Answer]] = []

    async def complete(index: int) -> None:
        done.append((index, await service.generate(prompts[index], parameters, "completions")))

    await asyncio.gather(*map(complete, range(len(prompts))))
    choices = [
        {
            "index": index,
            "text": whole.best.text,
            "logprobs": None,
            "finish_reason": PLAIN_REASONS[whole.best.finish_reason or ""],
        }
        for index, whole in done
    ]
    spent = usage(*(sum(len(part) for part in parts) for parts in zip(*map(_parts, done), strict=True)))
    headers = _summed([times(whole, characters) for _, whole in done])
    return answer({**_completion_head(service), "choices": choices, "usage": spent}, headers)


def _parts(one: tuple[int, Answer]) -> tuple[Any, Any]:
    return one[1].best.prompt, one[1].best.steps


def _summed(all_headers: list[dict[str, str]]) -> dict[str, str]:
    """Return the headers of several prompts as TGI adds them up; it leaves `x-compute-time` out."""
    first = all_headers[0]
    kept = {name: first[name] for name in ("x-compute-type", "x-compute-characters")}
    names = [name for name in first if name not in kept and name != "x-compute-time"]
    return {**kept, **{name: str(sum(int(headers[name]) for headers in all_headers)) for name in names}}


async def _completion_frames(
    service: Service, prompts: list[str], parameters: Mapping[str, Any]
) -> AsyncGenerator[bytes, None]:
    """Yield the tokens of all prompts as they come; each prompt's last has its usage."""
    head = _completion_head(service)
    said: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()

    async def tell(index: int) -> None:
        try:
            async with aclosing(service.stream(prompts[index], parameters, "completions")) as steps:
                async for generation, step in steps:
                    said.put_nowait({**head, **_completion_chunk(index, generation, step)})
            said.put_nowait(None)
        except Exception as error:
            said.put_nowait(error)

    tellers = [asyncio.ensure_future(tell(index)) for index in range(len(prompts))]
    try:
        async for frame in _until_all_told(said, len(prompts)):
            yield event(frame)
    except Refused as refused:
        yield openai_error(refused)
    finally:
        for teller in tellers:
            teller.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.wait(tellers)
    yield DONE


async def _until_all_told(
    said: asyncio.Queue[dict[str, Any] | Exception | None], tellers: int
) -> AsyncGenerator[dict[str, Any], None]:
    while tellers:
        frame = await said.get()
        if isinstance(frame, Exception):
            raise frame
        if frame is None:
            tellers -= 1
        else:
            yield frame


def _completion_chunk(index: int, generation: Generation, step: Step) -> dict[str, Any]:
    """Return one chunk: no reason is `""` here, the reason is TGI's own word, and the end token's text is shown."""
    reason = generation.finish_reason
    last = reason is not None
    text = step.token.text if last or not step.token.special else ""
    choice = {"index": index, "text": text, "logprobs": None, "finish_reason": reason or ""}
    return {
        "choices": [choice],
        **({"usage": usage(len(generation.prompt), len(generation.steps))} if last else {}),
    }
