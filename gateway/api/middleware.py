"""What happens to every request, whatever it is for: an id, a line in the log, a bound on its body. Plain ASGI."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api import problems
from gateway.api.headers import header
from gateway.departure import Interrupt, interruptible
from gateway.errors import BodyTimeout, BodyTooLarge, GatewayError
from gateway.fleet.refusals import shutting_down
from gateway.waiting import Room

log = logging.getLogger("gateway.access")

BODY_S = 60.0
BODY_PIECE_S = 10.0
"""How long a body may take to come, as a whole and between two pieces of it."""
LOOK_S = 1.0
"""How often that is looked after."""
LINGER_S = 2.0
"""How long what is left of a refused request is still taken."""
UNANSWERED = "unanswered"
_ID = re.compile(r"[\x21-\x7e]{1,128}")


def request_id_of(scope: Scope) -> str:
    """Return the id that `RequestLog` gave this request."""
    return str(scope["state"]["request_id"])


class PlainRefusal:
    """Has the server say in words, without a traceback, why the application refuses to start."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_words(message: Message) -> None:
            error = sys.exc_info()[1]
            if message["type"] == "lifespan.startup.failed" and isinstance(error, GatewayError):
                message = {**message, "message": error.detail}
            await send(message)

        await self._app(scope, receive, send_words if scope["type"] == "lifespan" else send)


class RequestLog:
    """Gives each request an id (the caller's own if it sent a fit one) and logs how it ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = header(scope, b"x-request-id")
        request_id = sent if _ID.fullmatch(sent) else secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        exchange = _Exchange(request_id, send)
        began = time.perf_counter()
        try:
            await self._app(scope, receive, exchange.send)
        except Exception as error:
            log.exception("the gateway itself failed, request %s", request_id)
            if exchange.status != UNANSWERED:
                raise  # too late for an answer: the server cuts the connection
            await problems.our_fault(error, scope)(scope, receive, exchange.send)
        finally:
            if log.isEnabledFor(logging.INFO):
                _tell(_facts(scope, exchange.status, (time.perf_counter() - began) * 1000))


def _facts(scope: Scope, status: int | str, took_ms: float) -> dict[str, object]:
    """Return what the log says of a request, field by field: key and model if it named some that are known."""
    known = {name: scope["state"][name] for name in ("request_id", "key", "model") if name in scope["state"]}
    return {"method": scope["method"], "path": scope["path"], "status": status, "took_ms": round(took_ms, 1), **known}


def _tell(facts: Mapping[str, object]) -> None:
    """Write the line of a request. Where it is written from does not matter, so nobody has to look for that."""
    line = logging.LogRecord(log.name, logging.INFO, __file__, 0, _words(facts), (facts,), None)
    line.facts = facts
    log.handle(line)


def _words(facts: Mapping[str, object]) -> str:
    """Return the words of a line for people, in which the facts are still to be put."""
    # the path as it came may hold anything: %r keeps one request on one line
    words = "%(method)s %(path)r %(status)s %(took_ms).1f ms %(request_id)s"
    return words + "".join(f" {name} %({name})s" for name in ("key", "model") if name in facts)


class Waiting:
    """Has all requests wait for their models in one room."""

    def __init__(self, app: ASGIApp, room: Room) -> None:
        self._app = app
        self._room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._room.given():
            await self._app(scope, receive, send)


class _Exchange:
    def __init__(self, request_id: str, send: Send) -> None:
        self.status: int | str = UNANSWERED
        self._tag = (b"x-request-id", request_id.encode())
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], self._tag]}
        await self._send(message)


class BodyLimit:
    """Refuses a body above `most_bytes`, before it is read if it says its length; and one that does not come."""

    def __init__(self, app: ASGIApp, most_bytes: int, closing: Callable[[], asyncio.Future[None]]) -> None:
        self._app = app
        self._most_bytes = most_bytes
        self._pieces = _Pieces(closing)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            said_bytes = int(header(scope, b"content-length") or 0)
        except ValueError:
            said_bytes = 0
        if said_bytes > self._most_bytes:
            # the rest of the body is not read, so the connection cannot be used again
            await problems.render(_too_large(self._most_bytes), scope, {"connection": "close"})(scope, receive, send)
            return
        await self._app(scope, _Body(receive, self._most_bytes, self._pieces).receive, send)


class _Body:
    """One request's body as it comes."""

    def __init__(self, receive: Receive, most_bytes: int, pieces: _Pieces) -> None:
        self._receive = receive
        self._most_bytes = most_bytes
        self._pieces = pieces
        self._due_at = asyncio.get_running_loop().time() + BODY_S
        self._read_bytes = 0
        self._is_whole = False

    async def receive(self) -> Message:
        """Return the next message of the server.

        Raises:
            BodyTooLarge, BodyTimeout, GatewayError: as `BodyLimit` says.
        """
        if self._is_whole:  # what is waited for now is the caller's departure, and that may take long
            return await self._receive()
        message = await self._pieces.next(self._receive, self._due_at)
        self._is_whole = not message.get("more_body", False)
        self._read_bytes += len(message.get("body", b""))
        if self._read_bytes > self._most_bytes:
            raise _too_large(self._most_bytes)
        return message


class _Pieces:
    """Waits for pieces of bodies: not for ever, and not beyond the gateway's end.

    Nearly all of them are there already, so one timer looks after all that are waited for.
    """

    def __init__(self, closing: Callable[[], asyncio.Future[None]]) -> None:
        self._closing = closing
        self._due_at: dict[Interrupt, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def next(self, receive: Receive, due_at: float) -> Message:
        """Return what `receive` returns.

        Raises:
            BodyTimeout: it has not come at that time, or within the time that a piece may take.
            GatewayError: the gateway shuts down, and it has not even come.
        """
        async with interruptible() as interrupt:
            self._look_after(interrupt, due_at)
            try:
                return await receive()
            finally:
                del self._due_at[interrupt]

    def _look_after(self, interrupt: Interrupt, due_at: float) -> None:
        loop = asyncio.get_running_loop()
        self._due_at[interrupt] = min(due_at, loop.time() + BODY_PIECE_S)
        if self._closing().done():
            loop.call_soon(self._refuse)
        elif self._timer is None:
            self._closing().add_done_callback(self._refuse)
            self._timer = loop.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        """Give up what is overdue; look again as long as anything is waited for."""
        loop = asyncio.get_running_loop()
        words = f"The body did not come: a piece may take {BODY_PIECE_S:g} s, and all of it {BODY_S:g} s."
        for interrupt, due_at in self._due_at.items():
            if due_at <= loop.time():
                interrupt.fire(BodyTimeout(words))
        self._timer = loop.call_later(LOOK_S, self._look) if self._due_at else None
        if self._timer is None:
            self._closing().remove_done_callback(self._refuse)

    def _refuse(self, _: object = None) -> None:
        for interrupt in self._due_at:
            interrupt.fire(shutting_down())


def _too_large(most_bytes: int) -> GatewayError:
    return BodyTooLarge(f"The body is larger than {most_bytes:,} bytes; send less, or raise GATEWAY_MAX_BODY.")


class Lingering:
    """Takes the rest of a request whose connection is to be closed with the answer, for a moment, and throws it away.

    What is closed with something unread is reset, and a reset may overtake the answer: a proxy then says 502 instead.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        closes = False

        async def send_and_linger(message: Message) -> None:
            nonlocal closes
            if message["type"] == "http.response.start":
                closes = (b"connection", b"close") in message["headers"]
            elif closes and message["type"] == "http.response.body" and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await _discard(receive)
                message = {**message, "body": b""}
            await send(message)

        await self._app(scope, receive, send_and_linger if scope["type"] == "http" else send)


async def _discard(receive: Receive) -> None:
    """Take what comes of a request's body, up to its end or the bound."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (await receive()).get("more_body", False):
                pass


class PlainPaths:
    """Serves every address with and without a trailing slash."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/" and scope["path"].endswith("/"):
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        await self._app(scope, receive, send)


class LoopbackOnly:
    """Answers nobody who came in by another address than loopback, whatever the server was bound to."""

    def __init__(self, app: ASGIApp, refusal: Callable[[], GatewayError]) -> None:
        self._app = app
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_loopback(scope.get("server")):
            await problems.render(self._refusal(), scope, {"connection": "close"})(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _is_loopback(server: tuple[str, int | None] | None) -> bool:
    if server is None or server[1] is None:  # a Unix socket
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(server[0]).is_loopback
    return False
