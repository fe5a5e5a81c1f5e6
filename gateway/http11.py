"""HTTP/1.1 as a client speaks it: how a request is written, how an answer is read, and the connection that does both.

Knows nothing of addresses, and of no other request than the one that it is used for (`gateway.upstream` keeps and
reuses). Whatever a server does wrong ends as `Broken`, in words that name the kind of fault and repeat nothing of it.
"""

from __future__ import annotations

import asyncio
import re
import select
from collections.abc import Mapping
from functools import cached_property, lru_cache
from itertools import chain
from typing import cast

import httptools

from gateway.engines.base import Call
from gateway.relay import Broken, ConnectFailed

LARGE_BYTES = 64 * 1024
"""A body up to here goes out in one piece with its head; a larger one in pieces of this size, and is not copied."""
MOST_BUFFERED_BYTES = 256 * 1024
"""Of an answer's body: nothing more is read from the server before this was taken."""
MOST_HEAD_BYTES = 64 * 1024
"""Of an answer's head, of its trailers, of a chunk's extensions: of whatever comes in a row and is no body."""
LONGEST_RETRY_S = 3600

_ALWAYS = "Accept: */*\r\nAccept-Encoding: identity\r\nUser-Agent: tgi-gateway"
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_TARGET = re.compile(r"/[\x21-\x7e]*")
_OURS = frozenset({"host", "content-length", "transfer-encoding", "connection", "accept-encoding"})
"""Headers that say how a message is framed and how it is to be answered: these are not a call's to say."""
_KEEP_ALIVE = re.compile(r"\b(timeout|max)\s*=\s*(\d{1,9})\b", re.ASCII | re.IGNORECASE)


# ---- writing ----


def request_head(call: Call, target: str, host: str, headers: Mapping[str, str]) -> bytes:
    """Return the head of the request for `call`, whose own headers come last and win.

    `target` is the whole path, `host` what belongs into the header `Host`. A compressed answer is not asked for: a
    compressed stream would come in lumps.

    Raises:
        ValueError: it would not be one request: a line end in a header or in the path, say.
    """
    if not _TARGET.fullmatch(target):
        raise ValueError("the path of a call is no path")
    head = f"{call.method} {target} HTTP/1.1\r\nHost: {host}\r\n{_ALWAYS}"
    for name, value in {**headers, **call.headers}.items():
        if not _is_a_calls(name) or _CONTROLS.search(value):
            raise ValueError("a call has a header that cannot be sent")
        head += f"\r\n{name}: {value}"
    if call.body or call.method != "GET":
        head += f"\r\nContent-Length: {len(call.body)}"
    if call.fresh:
        head += "\r\nConnection: close"
    return f"{head}\r\n\r\n".encode("utf-8", "surrogateescape")


@lru_cache(maxsize=256)  # of names alone: a value may be a key
def _is_a_calls(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and name.lower() not in _OURS


# ---- reading ----


class Reading:
    """One answer as its bytes come, however they are cut. Pure; the parser calls its methods that begin with `on_`."""

    def __init__(self) -> None:
        self.status = 0
        self.has_head = False
        self.is_complete = False
        self.fault = ""
        """Why there will be no more of it."""
        self.is_over = False
        """Whether nothing more will come of it: it is complete, or has a fault."""
        self.keeps = False
        """Whether the connection may carry another request after this answer."""
        self.pieces: list[bytes] = []
        """What has come of the body and was not taken yet."""
        self.waiting_bytes = 0
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._said: list[tuple[bytes, bytes]] = []
        """The headers as they came."""
        self._interim_headers = 0
        """How many of these are not the answer's own."""
        self._names = b""
        """Of the headers, in lower case, each between line ends."""
        self._no_body_bytes = 0
        self._is_interim = False

    @property
    def headers(self) -> Mapping[str, str]:
        """By their names in lower case; decoded each time."""
        return {
            name.decode("latin-1").lower(): value.strip().decode("utf-8", "surrogateescape")
            for name, value in self._said
        }

    def header(self, name: bytes) -> bytes | None:
        """Return the header of this name, which is in lower case, as it came; None if there is none."""
        at = self._names.rfind(b"\n%b\n" % name)
        return None if at < 0 else self._said[self._names.count(b"\n", 0, at)][1]

    def feed(self, data: bytes) -> None:
        """Take what came."""
        if self.is_over or self._parser is None:
            self._fail("it said more than its answer")
            return
        self._no_body_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail("it changed to another protocol")
        except httptools.HttpParserError:
            self._fail("its answer is not HTTP")
        if self._no_body_bytes > MOST_HEAD_BYTES and not self.is_complete:
            self._fail("its answer has a head, or what follows a body, that is too large")

    def end(self, *, well: bool = True) -> None:
        """Say that the connection has ended; `well`: in the way in which an answer without a length ends."""
        self.keeps = False
        if self.is_over:
            return
        if well and self.has_head and not self._has_end:
            self.is_complete = self.is_over = True
        elif self.has_head:
            self._fail("it closed the connection before the end of its answer")
        else:
            self._fail("it closed the connection and did not answer")

    def take(self) -> bytes:
        """Return what has come of the body."""
        piece = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        self.pieces = []
        self.waiting_bytes = 0
        return piece

    def let_go(self) -> None:
        """Be read no further: the answer was left, or is complete."""
        if not self.is_over:
            self._fail("the answer was left")
        self._parser = None  # which holds this object in turn

    def on_message_begin(self) -> None:
        if self.is_complete:
            raise ValueError("surplus")  # reported by the parser as an error of its own

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.has_head:  # else it is a trailer
            self._said.append((name, value))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            self._is_interim, self._interim_headers = True, len(self._said)
            return
        if self._no_body_bytes > MOST_HEAD_BYTES and sum(map(len, chain(*self._said))) > MOST_HEAD_BYTES:
            self._refuse("its answer has a head that is too large")
        del self._said[: self._interim_headers]
        self._names = b"\n".join([b"", *[name for name, _ in self._said], b""]).lower()
        encoding = self.header(b"transfer-encoding")
        if encoding is not None and encoding.strip().lower() != b"chunked":
            self._refuse("its answer has a transfer encoding that was not asked for")
        self.status, self.has_head = status, True
        self.keeps = self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self.pieces.append(body)
        self.waiting_bytes += len(body)
        self._no_body_bytes = 0

    def on_message_complete(self) -> None:
        if self._is_interim:
            self._is_interim = False
        else:
            self.is_complete = self.is_over = True

    @property
    def _has_end(self) -> bool:
        """Whether the answer says where it ends; one that does not ends with the connection."""
        names = (b"transfer-encoding", b"content-length")
        return self.status in (204, 304) or any(self.header(name) is not None for name in names)

    def _refuse(self, words: str) -> None:
        self._fail(words)
        raise ValueError(words)  # the parser goes no further

    def _fail(self, words: str) -> None:
        self.keeps = False
        if not self.is_over:
            self.fault, self.is_over = words, True


def idle_s(headers: Mapping[str, str], uses: int, most_s: float) -> float:
    """Return how long a connection may idle after an answer with these headers, its `uses`-th; 0: not at all.

    What a server announces in `Keep-Alive` counts, whether its `max` is what it began with (cpp-httplib) or what is
    left (Apache); of its `timeout` the last half is left alone, because its clock and ours do not begin together.
    """
    said = {name.lower(): int(number) for name, number in _KEEP_ALIVE.findall(headers.get("keep-alive", ""))}
    if uses >= said.get("max", uses + 1):
        return 0.0
    return min(most_s, said.get("timeout", 2 * most_s) / 2)


class Answer:
    """A server's answer as it comes: its head, and its body in the pieces in which it arrives."""

    def __init__(self, reading: Reading, connection: Connection) -> None:
        self._reading = reading
        self._connection = connection
        self.status = reading.status

    @cached_property
    def headers(self) -> Mapping[str, str]:
        """By their names in lower case. Decoded once somebody looks: at most answers nobody does."""
        return self._reading.headers

    @property
    def retry_after_s(self) -> float | None:
        """The seconds of a `Retry-After`, within reason; one that names a date is not read."""
        words = self.headers.get("retry-after", "")
        if not (words.isascii() and words.isdigit()):
            return None
        return float(min(int(words[:9]), LONGEST_RETRY_S))

    async def more(self) -> bytes:
        """Return what has come of the body since the last time, which is waited for; b"" at its end, however often.

        Raises:
            Broken: it ended too early, or what came is not HTTP.
        """
        reading = self._reading
        while not reading.waiting_bytes:
            if reading.is_complete:
                return b""
            if reading.fault:
                raise Broken(reading.fault)
            await self._connection.something()
        piece = reading.take()
        self._connection.read_on()
        return piece


# ---- the connection ----


class Connection(asyncio.Protocol):
    """One connection to a server. It carries one request at a time, and remembers nothing of it afterwards."""

    loop: asyncio.AbstractEventLoop
    """The one in which it was made."""
    _transport: asyncio.Transport

    def __init__(self) -> None:
        self.uses = 0
        self.idle_until = 0.0
        self._reading: Reading | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._poll: select.poll | None = None
        self._may_write = True
        self._may_read = True

    async def ask(self, head: bytes, body: bytes) -> Answer:
        """Send a request and return the answer once its head is here.

        A server that answers before it has heard all of a body is not told the rest.

        Raises:
            ConnectFailed: the server had closed the connection before anything was sent.
            Broken: there is no answer. If the connection was used before, nobody knows whether the request was read.
        """
        if self._transport.is_closing():
            raise ConnectFailed("it closes connections at once")
        reading = self._reading = Reading()
        self.uses += 1
        if len(body) <= LARGE_BYTES:
            self._transport.write(head + body)
        else:
            await self._write_large(head, body, reading)
        while not reading.has_head:
            if reading.is_over:
                raise Broken(reading.fault)
            await self.something()
        return Answer(reading, self)

    def something(self) -> asyncio.Future[None]:
        """Return what is done once something happens: once it comes, ends, or has gone out. One alone waits for it."""
        self._waiter = self.loop.create_future()
        return self._waiter

    def read_on(self) -> None:
        """Say that what had come was taken."""
        if not self._may_read:
            self._may_read = True
            self._transport.resume_reading()

    def leave(self, most_idle_s: float) -> float:
        """End the exchange; return for how long the connection may idle, 0 if it is closed, at once and for good."""
        reading, self._reading = self._reading, None
        may_idle_s = 0.0
        if reading is not None:
            if reading.is_complete and reading.keeps:
                limits = reading.header(b"keep-alive")
                may_idle_s = most_idle_s if limits is None else idle_s(reading.headers, self.uses, most_idle_s)
            reading.let_go()
        if not may_idle_s:
            self.abort()
            return 0.0
        self.read_on()
        return may_idle_s

    @property
    def is_quiet(self) -> bool:
        """Whether a kept connection is as it was left: not closed, and nothing has come.

        The socket is asked itself, because what it has may not have been read yet.
        """
        if self._transport.is_closing():
            return False
        if self._poll is None:  # a socket keeps its number for as long as its transport is not closing
            self._poll = select.poll()
            self._poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not self._poll.poll(0)

    def abort(self) -> None:
        """Close the connection, whatever it is about."""
        self._transport.abort()

    async def _write_large(self, head: bytes, body: bytes, reading: Reading) -> None:
        self._transport.write(head)
        view = memoryview(body)
        for start in range(0, len(body), LARGE_BYTES):
            while not self._may_write and not reading.has_head and not reading.is_over:
                await self.something()
            if reading.has_head or reading.is_over:
                reading.keeps = False
                return
            self._transport.write(view[start : start + LARGE_BYTES])

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self._waiter = None

    # what the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.loop = asyncio.get_running_loop()
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        reading = self._reading
        if reading is None:  # nothing was asked
            self.abort()
            return
        reading.feed(data)
        if reading.waiting_bytes > MOST_BUFFERED_BYTES and self._may_read:
            self._may_read = False
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        """Let the transport close: a server that says no more has said everything."""
        self._has_ended(well=True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_ended(well=exc is None)

    def _has_ended(self, *, well: bool) -> None:
        if self._reading is not None:
            self._reading.end(well=well)
        self._wake()

    def pause_writing(self) -> None:
        self._may_write = False

    def resume_writing(self) -> None:
        self._may_write = True
        self._wake()
