"""Servers that speak HTTP byte by byte, well or badly, over real sockets: each is named for what it does."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

Manner = Callable[["Peer"], Awaitable[None]]


def said(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    """Return an answer with a length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(*pieces: bytes, trailers: bytes = b"") -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n" + trailers + b"\r\n"


class Peer:
    """One connection, as its server has it."""

    def __init__(self, server: RawServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.server = server
        self.number = len(server.peers)
        """Which of the server's connections it is: 0 for the first."""
        self.heads: list[bytes] = []
        self.has_left = asyncio.Event()
        self.bodies: list[bytes] = []
        self._reader = reader
        self._writer = writer

    async def hear(self) -> None:
        """Wait for a whole request.

        Raises:
            EOFError: the caller has left.
        """
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?im)^content-length: (\d+)", head)
        self.bodies.append(await self._reader.readexactly(int(length[1]) if length else 0))
        self.heads.append(head)

    async def say(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def until_caller_leaves(self) -> None:
        while await self._reader.read(65536):
            pass

    async def end(self) -> None:
        self._writer.transport.abort()
        with suppress(OSError):
            await self._writer.wait_closed()


class RawServer:
    """Deals with each connection in a manner of its own, and remembers all of them."""

    def __init__(self, manner: Manner) -> None:
        self._manner = manner
        self.peers: list[Peer] = []
        self.url = ""
        self.port = 0

    @property
    def heads(self) -> list[bytes]:
        """All requests, in whatever connection they came."""
        return [head for peer in self.peers for head in peer.heads]

    async def meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(self, reader, writer)
        self.peers.append(peer)
        try:
            await self._manner(peer)
        except (EOFError, OSError):
            pass
        finally:
            await peer.end()
            peer.has_left.set()


@asynccontextmanager
async def serving(
    manner: Manner, host: str = "127.0.0.1", certificate: ssl.SSLContext | None = None
) -> AsyncIterator[RawServer]:
    """Run a server; at the end wait until it is through with all its callers."""
    server = RawServer(manner)
    listener = await asyncio.start_server(server.meet, host, 0, ssl=certificate)
    server.port = listener.sockets[0].getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    server.url = f"{'https' if certificate else 'http'}://{shown}:{server.port}"
    try:
        yield server
    finally:
        listener.close()
        async with asyncio.timeout(5):
            for peer in server.peers:
                await peer.has_left.wait()
            await listener.wait_closed()


class Says:
    """Answers every request with the same bytes, and keeps its connections."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def __call__(self, peer: Peer) -> None:
        while True:
            await peer.hear()
            await peer.say(self._data)


class SaysAndCloses:
    """Answers one request with these bytes, and closes."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def __call__(self, peer: Peer) -> None:
        await peer.hear()
        await peer.say(self._data)
        peer._writer.close()
        await peer.until_caller_leaves()


class SaysAndWaits:
    """Answers one request with these bytes, and then waits for its caller to leave."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def __call__(self, peer: Peer) -> None:
        await peer.hear()
        await peer.say(self._data)
        await peer.until_caller_leaves()


class SaysAndGoes:
    """Answers one request with these bytes and goes without a word, as a program that is killed."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.has_said_all = False

    async def __call__(self, peer: Peer) -> None:
        await peer.hear()
        await peer.say(self._data)
        self.has_said_all = True


class SaysByteByByte:
    """Answers every request one byte at a time, with a round of the loop between them."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def __call__(self, peer: Peer) -> None:
        while True:
            await peer.hear()
            for number in range(len(self._data)):
                await peer.say(self._data[number : number + 1])
                await asyncio.sleep(0)


async def closes_at_once(peer: Peer) -> None:
    """Take a connection and close it, whatever is said."""


async def closes_unanswered(peer: Peer) -> None:
    """Hear a request, and close."""
    await peer.hear()


async def is_silent(peer: Peer) -> None:
    """Hear everything, and say nothing."""
    await peer.until_caller_leaves()


class Echoes:
    """Answers with the body that it was sent."""

    async def __call__(self, peer: Peer) -> None:
        while True:
            await peer.hear()
            await peer.say(said(peer.bodies[-1]))


class ClosesWhileIdle:
    """Answers each connection's first request, keeps it, and closes it when told."""

    def __init__(self) -> None:
        self.now = asyncio.Event()

    async def __call__(self, peer: Peer) -> None:
        await peer.hear()
        await peer.say(said(b"ok"))
        await self.now.wait()


class ClosesAtTheSecond:
    """Answers the first request, and closes the connection when it hears the second: the race that a client loses."""

    async def __call__(self, peer: Peer) -> None:
        await peer.hear()
        await peer.say(said(b"ok"))
        await peer.hear()


class SpeaksUnasked:
    """Answers the first request, and says something more when told."""

    def __init__(self) -> None:
        self.now = asyncio.Event()

    async def __call__(self, peer: Peer) -> None:
        await peer.hear()
        await peer.say(said(b"ok"))
        await self.now.wait()
        await peer.say(said(b"and another thing"))
        await peer.until_caller_leaves()


class RefusesBeforeItHasHeardAll:
    """Reads the head alone, refuses, and reads the rest only after it was told to."""

    def __init__(self) -> None:
        self.now = asyncio.Event()
        self.heard_bytes = 0

    async def __call__(self, peer: Peer) -> None:
        peer.heads.append(await peer._reader.readuntil(b"\r\n\r\n"))
        await peer.say(said(b"too large", status="413 Too Large"))
        await self.now.wait()
        while data := await peer._reader.read(65536):
            self.heard_bytes += len(data)


class SpeaksFasterThanItIsHeard:
    """Sends an endless body, and counts how much of it went out."""

    def __init__(self) -> None:
        self.sent_bytes = 0

    async def __call__(self, peer: Peer) -> None:
        await peer.hear()
        await peer.say(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            await peer.say(b"x" * 65536)
            self.sent_bytes += 65536


class HearsSlowly:
    """Reads a body only after it was told to, and answers with its length."""

    def __init__(self) -> None:
        self.now = asyncio.Event()

    async def __call__(self, peer: Peer) -> None:
        await self.now.wait()
        await peer.hear()
        await peer.say(said(b"%d" % len(peer.bodies[-1])))
