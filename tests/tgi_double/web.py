"""As much of HTTP/1.1 as TGI's router speaks, and no more: bounded bodies, keep-alive, chunked streams.

A caller who leaves cancels the work on his request at once, as in TGI; an order to stop lets it finish.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from http import HTTPStatus

HEAD_LIMIT_BYTES = 64 * 1024
KEEP_ALIVE = b":\n\n"
CORS = {
    "vary": "origin, access-control-request-method, access-control-request-headers",
    "access-control-allow-origin": "*",
}


class Cut(Exception):
    """Breaks the connection in the middle of an answer."""


class BodyTooLarge(Exception):
    pass


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


@dataclass(frozen=True)
class Response:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stream:
    """An answer of server-sent events. A comment keeps it alive while there is nothing to say."""

    frames: AsyncGenerator[bytes, None]
    headers: Mapping[str, str]
    keep_alive_s: float


TOO_LARGE = Response(
    413, b"Failed to buffer the request body: length limit exceeded", {"content-type": "text/plain; charset=utf-8"}
)

App = Callable[[Request], Awaitable[Response | Stream]]


class Server:
    """Serves `app`. In TGI's order: `start()`, then `stop()`, which closes the listener before all else."""

    def __init__(self, app: App, body_limit: int) -> None:
        self.app = app
        self.body_limit = body_limit
        self.stopping = False
        self.connections: set[Connection] = set()
        self._listener: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            OSError: the address is taken or is not ours.
        """
        self._listener = await asyncio.get_running_loop().create_server(lambda: Connection(self), host, port)

    async def stop(self, grace_s: float) -> None:
        """Take no new connection, and return when every request was answered or the time is over."""
        self.stopping = True
        if self._listener:
            self._listener.close()
        for connection in self.connections:
            connection.end_if_idle()
        tasks = [connection.task for connection in self.connections]
        if tasks:
            await asyncio.wait(tasks, timeout=grace_s)
        for connection in list(self.connections):
            connection.transport.abort()


class Connection(asyncio.Protocol):
    """One connection: requests one after the other."""

    transport: asyncio.Transport
    task: asyncio.Task[None]

    def __init__(self, server: Server) -> None:
        self._server = server
        self._reader = asyncio.StreamReader(limit=HEAD_LIMIT_BYTES)
        self._writable = asyncio.Event()
        self._writable.set()
        self._busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.task = asyncio.get_running_loop().create_task(self._converse())
        self._server.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._reader.feed_data(data)

    def eof_received(self) -> None:
        self.task.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self.task.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def end_if_idle(self) -> None:
        if not self._busy:
            self.task.cancel()

    async def _converse(self) -> None:
        try:
            while await self._answer_one() and not self._server.stopping:
                pass
        except Cut:
            self.transport.abort()
        finally:
            self._server.connections.discard(self)
            self.transport.close()

    async def _answer_one(self) -> bool:
        """Answer one request; say whether the connection goes on."""
        try:
            request = await self._request()
        except BodyTooLarge:
            await self._send(TOO_LARGE, close=True)
            return False
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            return False  # no HTTP, or half a request: hyper hangs up, too
        close = request.headers.get("connection", "").lower() == "close"
        answer = await self._server.app(request)
        close = close or self._server.stopping
        await (self._send(answer, close) if isinstance(answer, Response) else self._stream(answer, close))
        self._busy = False
        return not close

    async def _request(self) -> Request:
        head = await self._reader.readuntil(b"\r\n\r\n")
        self._busy = True
        first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
        method, target, _version = first.split(" ")
        pairs = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        if headers.get("expect", "").lower() == "100-continue":
            await self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return Request(method, target.partition("?")[0], headers, await self._body(headers))

    async def _body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            size = int(headers.get("content-length", "0"))
            if size > self._server.body_limit:
                raise BodyTooLarge
            return await self._reader.readexactly(size)
        body = b""
        while size := int((await self._reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            body += (await self._reader.readexactly(size + 2))[:-2]
            if len(body) > self._server.body_limit:
                raise BodyTooLarge
        await self._reader.readuntil(b"\r\n")
        return body

    async def _send(self, response: Response, close: bool) -> None:
        headers = {**response.headers, **CORS, "content-length": str(len(response.body))}
        await self._write(_head(response.status, headers, close) + response.body)

    async def _stream(self, stream: Stream, close: bool) -> None:
        events = {"content-type": "text/event-stream", "cache-control": "no-cache", "transfer-encoding": "chunked"}
        await self._write(_head(200, {**events, **stream.headers, **CORS}, close))
        async with aclosing(stream.frames), aclosing(_kept_alive(stream.frames, stream.keep_alive_s)) as frames:
            async for frame in frames:
                await self._write(b"%x\r\n%b\r\n" % (len(frame), frame))
        await self._write(b"0\r\n\r\n")

    async def _write(self, data: bytes) -> None:
        await self._writable.wait()
        self.transport.write(data)


async def _kept_alive(frames: AsyncGenerator[bytes, None], interval_s: float) -> AsyncGenerator[bytes, None]:
    """Yield the frames, and a comment whenever none has come for so long."""
    while True:
        following = asyncio.ensure_future(anext(frames, None))
        try:
            while not (await asyncio.wait({following}, timeout=interval_s))[0]:
                yield KEEP_ALIVE
        finally:
            if following.cancel():
                await asyncio.wait({following})
        if (frame := following.result()) is None:
            return
        yield frame


def _head(status: int, headers: Mapping[str, str], close: bool) -> bytes:
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, *(["connection: close"] if close else []), "", ""]).encode("latin-1")
