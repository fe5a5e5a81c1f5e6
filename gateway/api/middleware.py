"""What happens to every request, whatever it is for: an id, a line in the log, a place to wait in. Plain ASGI."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from random import getrandbits

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api import problems
from gateway.api.headers import header
from gateway.errors import GatewayError
from gateway.outcome import note
from gateway.waiting import Room, Standing

log = logging.getLogger("gateway.access")

LINGER_S = 2.0
"""How long what is left of a refused request is still taken."""
UNANSWERED = "unanswered"
_ID = re.compile(r"[\x21-\x7e]{1,128}")

Ended = Callable[[Scope, int | None, float], None]
"""Hears that a request has ended: with which status, None if it got no answer, and after how many seconds."""


def request_id_of(scope: Scope) -> str:
    """Return the id that `RequestLog` gave this request."""
    return str(scope["state"]["request_id"])


def in_words(send: Send) -> Send:
    """Return what sends a lifespan's messages, and has the server say in words why the application cannot start."""

    async def send_words(message: Message) -> None:
        error = sys.exc_info()[1]
        if message["type"] == "lifespan.startup.failed" and isinstance(error, GatewayError):
            message = {**message, "message": error.detail}
        await send(message)

    return send_words


class RequestLog:
    """Gives each request an id (the caller's own if it sent a fit one), and tells how it ended: the log, and `ended`.

    Where the connection is to be closed with the answer, it takes the rest of the request for a moment and throws it
    away: what is closed with something unread is reset, and a reset may overtake the answer. A proxy then says 502.
    """

    def __init__(self, app: ASGIApp, ended: Ended = lambda *_: None) -> None:
        self._app = app
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = header(scope, b"x-request-id")
        request_id = sent if _ID.fullmatch(sent) else f"{getrandbits(128):032x}"
        scope.setdefault("state", {})["request_id"] = request_id
        exchange = _Exchange(request_id, receive, send)
        began_at = time.perf_counter()
        try:
            await self._app(scope, receive, exchange.send)
        except Exception as error:
            log.exception("the gateway itself failed, request %s", request_id)
            note(scope, GatewayError.code)
            if exchange.status is not None:
                raise  # too late for an answer: the server cuts the connection
            await problems.our_fault(error, scope)(scope, receive, exchange.send)
        finally:
            took_s = time.perf_counter() - began_at
            self._ended(scope, exchange.status, took_s)
            if log.isEnabledFor(logging.INFO):
                log.handle(AccessLine(_facts(scope, exchange.status, took_s)))


class _Exchange:
    """What goes back to one caller."""

    def __init__(self, request_id: str, receive: Receive, send: Send) -> None:
        self.status: int | None = None
        self._tag = (b"x-request-id", request_id.encode())
        self._receive = receive
        self._send = send
        self._closes = False

    def send(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._closes = (b"connection", b"close") in message["headers"]
            message = {**message, "headers": [*message["headers"], self._tag]}
        elif self._closes and not message.get("more_body", False):
            return self._linger(message)
        return self._send(message)

    async def _linger(self, last: Message) -> None:
        await self._send({**last, "more_body": True})
        await _discard(self._receive)
        await self._send({**last, "body": b""})


async def _discard(receive: Receive) -> None:
    """Take what comes of a request's body, up to its end or the bound."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (await receive()).get("more_body", False):
                pass


def _facts(scope: Scope, status: int | None, took_s: float) -> dict[str, object]:
    """Return what the log says of a request, field by field: key and model if it named some that are known."""
    state = scope["state"]
    facts = {
        "method": scope["method"],
        "path": scope["path"],
        "status": UNANSWERED if status is None else status,
        "took_ms": round(took_s * 1000, 1),
        "request_id": state["request_id"],
    }
    for name in ("key", "model"):
        if name in state:
            facts[name] = state[name]
    return facts


class AccessLine(logging.LogRecord):
    """The line of one request. Nobody looks for where in the code it comes from: that would take as long as all else.

    `facts` is what it says, field by field.
    """

    def __init__(self, facts: dict[str, object]) -> None:
        # what any record has and is the same in all of these is copied, and not asked for again
        self.__dict__.update(_ANY_LINE)
        self.created = time.time()
        self.msecs = self.created % 1 * 1000
        self.relativeCreated += (self.created - _ANY_LINE["created"]) * 1000
        self.msg = _words(facts)
        self.facts = facts


_ANY_LINE = logging.LogRecord(log.name, logging.INFO, __file__, 0, "", None, None).__dict__


def _words(facts: Mapping[str, object]) -> str:
    """Return the words of a line for people."""
    # the path as it came may hold anything: !r keeps one request on one line
    words = f"{facts['method']} {facts['path']!r} {facts['status']} {facts['took_ms']} ms {facts['request_id']}"
    return words + "".join([f" {name} {facts[name]}" for name in ("key", "model") if name in facts])


class Waiting:
    """Has all requests wait for their models in one room, where nobody is asked for a key."""

    def __init__(self, app: ASGIApp, room: Room) -> None:
        self._app = app
        self._room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with Standing(room=self._room):
            await self._app(scope, receive, send)


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
