"""A model server that does what a test tells it, over real sockets, and remembers when its callers leave."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

WELL = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def token(text: str, number: int = 1) -> bytes:
    event = {"content": text, "tokens": [number], "stop": False, "tokens_predicted": number, "tokens_evaluated": 3}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def end(tokens: int, kind: str = "limit") -> bytes:
    event = {"content": "", "stop": True, "stop_type": kind, "tokens_predicted": tokens, "tokens_evaluated": 3}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


class Conversation:
    """One request, and what the server says to it."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes, body: bytes = b""
    ) -> None:
        self.head = head
        self.body = body
        self._reader = reader
        self._writer = writer

    async def say(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def until_caller_leaves(self) -> None:
        while await self._reader.read(1024):
            pass


def refused(status: int, words: str, *headers: str) -> bytes:
    """Return a refusal in OpenAI's shape."""
    body = json.dumps({"error": {"message": words}})
    head = (f"HTTP/1.1 {status} Refused", f"Content-Length: {len(body)}", "Connection: close", *headers)
    return ("\r\n".join(head) + "\r\n\r\n" + body).encode()


Script = Callable[[Conversation], Awaitable[None]]


class ScriptedServer:
    """Plays its script for each POST; `left` is set when a caller has gone before the script was over.

    `well` is what each GET, a health check, is answered.
    """

    def __init__(self, script: Script) -> None:
        self._script = script
        self.requests: list[bytes] = []
        self.checks: list[bytes] = []
        self.well = WELL
        self.left = asyncio.Event()

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET"):
                self.checks.append(head)
                writer.write(self.well)
                return
            self.requests.append(head)
            length = next(
                int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-l")
            )
            body = await reader.readexactly(length)
            await self._play(Conversation(reader, writer, head, body))
        except asyncio.IncompleteReadError as error:
            if error.partial:  # else it only wanted to know whether somebody listens
                self.left.set()
        except ConnectionError:
            self.left.set()
        finally:
            writer.close()

    async def _play(self, conversation: Conversation) -> None:
        script = asyncio.ensure_future(self._script(conversation))
        leaving = asyncio.ensure_future(conversation.until_caller_leaves())
        await asyncio.wait([script, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not script.done():
            self.left.set()
            script.cancel()
        leaving.cancel()
        await asyncio.wait([script, leaving])
        if not script.cancelled():
            script.result()


@asynccontextmanager
async def scripted(
    script: Script, certificate: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[ScriptedServer, int]]:
    """Run a server with this script; yield it and its port."""
    server = ScriptedServer(script)
    listener = await asyncio.start_server(server.converse, "127.0.0.1", 0, ssl=certificate)
    async with listener:
        yield server, listener.sockets[0].getsockname()[1]
