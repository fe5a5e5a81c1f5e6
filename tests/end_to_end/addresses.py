"""Every address at which a caller has text made, one row each, for what must hold at all of them."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
DONE = "[DONE]"
SEVERAL = 3
CUT_AT_ONCE = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Address:
    """One way to ask, and what of its answers is of interest here."""

    name: str
    path: str
    """`{model}` stands for the model's id."""
    body: Callable[[str, str, int], Json]
    """Of model, prompt and the number of tokens."""
    text: Callable[[Json], str]
    """Of the whole answer or, where it streams, of one event: "" for one that has no piece of the text."""
    streams: bool = False
    code: Callable[[Json], str] = lambda event: str(event["error_code"])
    """The code in an event that tells of a failure."""
    final: Callable[[Json], bool] = lambda _event: False
    """Whether an event is a good stream's last one."""
    asks: int = 1
    """How many requests the engine gets for one of the caller's."""
    counted: int = 1
    """How often TGI counts each of them: those of its `/v1` twice (router/src/server.rs)."""

    def request(self, model: str, prompt: str, tokens: int, **headers: str) -> bytes:
        """Return the HTTP request as bytes."""
        body = json.dumps(self.body(model, prompt, tokens)).encode()
        said = {"Host": "x", "Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        lines = [f"POST {self.path.format(model=model)} HTTP/1.1", *(f"{k}: {v}" for k, v in said.items()), "", ""]
        return "\r\n".join(lines).encode() + body

    def text_of(self, body: str) -> str:
        """Return the text in an answer's body."""
        return "".join(map(self.text, events_of(body))) if self.streams else self.text(json.loads(body))


def events_of(body: str) -> list[Json]:
    """Return the data of a stream's events, without comments and OpenAI's end."""
    data = [line.removeprefix("data:").strip() for line in body.split("\n") if line.startswith("data:")]
    return [json.loads(each) for each in data if each != DONE]


def native(model: str, prompt: str, tokens: int) -> Json:
    return {"model_id": model, "prompt": prompt, "max_new_tokens": tokens, "temperature": 0, "return_full_text": False}


def inference(model: str, prompt: str, tokens: int) -> Json:
    return {"model": model, "prompt": prompt, "parameters": {"max_tokens": tokens, "temperature": 0}}


def autotrain(model: str, prompt: str, tokens: int) -> Json:
    prompts = [prompt] * SEVERAL
    return {"model_path": model, "prompts": prompts, "max_new_tokens": tokens, "do_sample": False}


def llm_service(_model: str, prompt: str, tokens: int) -> Json:
    return {"prompt": prompt, "max_tokens": min(tokens, 100), "temperature": 0, "top_k": 2}


def api_server(_model: str, prompt: str, tokens: int) -> Json:
    return {"prompt": prompt, "max_tokens": min(tokens, 2048), "temperature": 0}


def streamed(body: Callable[[str, str, int], Json]) -> Callable[[str, str, int], Json]:
    return lambda model, prompt, tokens: {**body(model, prompt, tokens), "stream": True}


def same_for_all(outputs: list[str]) -> str:
    assert set(outputs) == {outputs[0]}
    return outputs[0]


def completions(model: str, prompt: str, tokens: int) -> Json:
    return {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}


def choice_of(event: Json) -> Json:
    return dict(event["choices"][0]) if event.get("choices") else {}


def openai_piece(event: Json) -> str:
    return str(choice_of(event).get("text") or choice_of(event).get("delta", {}).get("content") or "")


def openai_last(event: Json) -> bool:
    return choice_of(event).get("finish_reason") is not None


def openai_code(body: Json) -> str:
    return str(body["error"]["code"])


def chat(model: str, prompt: str, tokens: int) -> Json:
    """Ask for more of what the assistant has said: `prompt`."""
    said = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": prompt}]
    return {"model": model, "messages": said, "max_tokens": tokens, "temperature": 0}


def inference_chat(model: str, prompt: str, tokens: int) -> Json:
    said = chat(model, prompt, tokens)
    return {"model": model, "messages": said["messages"], "parameters": {"max_tokens": tokens, "temperature": 0}}


def tgi(_model: str, prompt: str, tokens: int) -> Json:
    return {"inputs": prompt, "parameters": {"max_new_tokens": tokens, "do_sample": False}}


def native_piece(event: Json) -> str:
    return str(event["token"]["text"])


def native_last(event: Mapping[str, Any]) -> bool:
    return event.get("generated_text") is not None


ADDRESSES = (
    Address("generate", "/generate", native, lambda answer: str(answer["generated_text"])),
    Address("generate, streamed", "/generate", streamed(native), native_piece, streams=True, final=native_last),
    Address("generate_stream", "/generate_stream", native, native_piece, streams=True, final=native_last),
    Address("inference", "/inference", inference, lambda answer: str(answer["generated_text"])),
    Address(
        "inference, streamed",
        "/inference",
        streamed(inference),
        lambda event: str(event.get("text", "")),
        streams=True,
        final=native_last,
    ),
    Address(
        "autotrain",
        "/api/llm/inference",
        autotrain,
        lambda answer: same_for_all(answer["outputs"]),
        asks=SEVERAL,
    ),
    Address(
        "llm-service",
        "/models/{model}/llm-service/generate",
        llm_service,
        lambda answer: str(answer["generated_text"]),
    ),
    Address(
        "api-server",
        "/models/{model}/api-server/generate",
        api_server,
        lambda answer: str(answer["generated_text"])[len(answer["prompt"]) :],
    ),
    Address("completions", "/v1/completions", completions, lambda a: str(choice_of(a)["text"]), code=openai_code),
    Address(
        "completions, streamed",
        "/v1/completions",
        streamed(completions),
        openai_piece,
        streams=True,
        code=openai_code,
        final=openai_last,
    ),
)
"""A new address is one more row."""
CHATS = (
    Address("chat", "/v1/chat/completions", chat, openai_piece, code=openai_code, counted=2),
    Address(
        "chat, streamed",
        "/v1/chat/completions",
        streamed(chat),
        openai_piece,
        streams=True,
        code=openai_code,
        final=openai_last,
        counted=2,
    ),
    Address("inference, chat", "/inference", inference_chat, lambda a: str(a["generated_text"]), counted=2),
)
"""Those whose text depends on the model's chat template."""
TGI = "/models/{model}/tgi"
PUT_THROUGH = (
    Address("tgi", f"{TGI}/generate", tgi, lambda answer: str(answer["generated_text"])),
    Address("tgi, streamed", f"{TGI}/generate_stream", tgi, native_piece, streams=True, final=native_last),
    Address(
        "tgi's chat, streamed", f"{TGI}/v1/chat/completions", streamed(chat), openai_piece, streams=True, counted=2
    ),
)
"""Those that are put through to TGI as they are."""
EVERY = (*ADDRESSES, *CHATS, *PUT_THROUGH)
STREAMS = tuple(each for each in ADDRESSES if each.streams)


def models_at(url: str) -> dict[str, Json]:
    """Return two models of the same server, by either engine that may reach one that runs already."""
    return {
        "by-tgi": {"engine": "tgi", "hf_name": "x", "runtime": "external", "url": url},
        "by-openai": {"engine": "openai", "url": url, "args": {"logprobs": False}},
    }


class Caller:
    """A caller on a connection of its own, that asks once and leaves as it likes."""

    def __init__(self, port: int, request: bytes) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.heard = b""
        self.say(request)

    def say(self, data: bytes) -> None:
        self._socket.sendall(data)

    def hear(self, words: bytes) -> None:
        """Return when these words have come."""
        while words not in self.heard:
            came = self._socket.recv(65536)
            assert came, self.heard
            self.heard += came

    def hear_all(self) -> None:
        """Return when the connection was closed at the other end."""
        while came := self._socket.recv(65536):
            self.heard += came

    def close(self) -> None:
        """Leave as everybody does."""
        self._socket.close()

    def reset(self) -> None:
        """Leave as one whose machine has lost its memory of the connection."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CUT_AT_ONCE)
        self._socket.close()

    def say_no_more(self) -> None:
        """Close only the half of the connection by which the caller speaks."""
        self._socket.shutdown(socket.SHUT_WR)
