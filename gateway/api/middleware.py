"""What happens to every request, whatever it is for: an id, a line in the log, a bound on its body. Plain ASGI."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api import problems
from gateway.departure import interruptible
from gateway.errors import BodyTimeout, BodyTooLarge, GatewayError
from gateway.fleet.refusals import shutting_down
from gateway.waiting import Room

log = logging.getLogger("gateway.access")

BODY_S = 60.0
BODY_PIECE_S = 10.0
"""How long a body may take to come, as a whole and between two pieces of it."""
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
        sent = Headers(scope=scope).get("x-request-id", "")
        request_id = sent if _ID.fullmatch(sent) else uuid.uuid4().hex
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
            took_ms = (time.perf_counter() - began) * 1000
            # the path as it came may hold anything: %r keeps one request on one line
            words = "%s %r %s %.1f ms %s%s%s"
            key, model = (_named(scope, what) for what in ("key", "model"))
            facts = {"facts": _facts(scope, exchange.status, took_ms)}
            log.info(
                words, scope["method"], scope["path"], exchange.status, took_ms, request_id, key, model, extra=facts
            )


def _named(scope: Scope, what: str) -> str:
    """Return what the log says of the request's key or model: its name, if it named one that is known."""
    name = scope["state"].get(what)
    return f" {what} {name}" if name else ""


def _facts(scope: Scope, status: int | str, took_ms: float) -> dict[str, object]:
    """Return the same for machines: what a log in JSON says of a request, field by field."""
    known = {name: scope["state"][name] for name in ("request_id", "key", "model") if name in scope["state"]}
    return {"method": scope["method"], "path": scope["path"], "status": status, "took_ms": round(took_ms, 1), **known}


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
        self._request_id = request_id
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self._request_id
        await self._send(message)


class BodyLimit:
    """Refuses a body above `most_bytes`, before it is read if it says its length; and one that does not come."""

    def __init__(self, app: ASGIApp, most_bytes: int, closing: Callable[[], asyncio.Future[None]]) -> None:
        self._app = app
        self._most_bytes = most_bytes
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            said_bytes = int(Headers(scope=scope).get("content-length", "0"))
        except ValueError:
            said_bytes = 0
        if said_bytes > self._most_bytes:
            # the rest of the body is not read, so the connection cannot be used again
            await problems.render(self._too_large(), scope, {"connection": "close"})(scope, receive, send)
            return
        await self._app(scope, self._counting(receive), send)

    def _counting(self, receive: Receive) -> Receive:
        read_bytes, whole = 0, False
        deadline = asyncio.get_running_loop().time() + BODY_S

        async def counted() -> Message:
            nonlocal read_bytes, whole
            if whole:  # what is waited for now is the caller's departure, and that may take long
                return await receive()
            message = await self._soon(receive, deadline)
            whole = not message.get("more_body", False)
            read_bytes += len(message.get("body", b""))
            if read_bytes > self._most_bytes:
                raise self._too_large()
            return message

        return counted

    async def _soon(self, receive: Receive, deadline: float) -> Message:
        now = asyncio.get_running_loop().time()
        try:
            async with self._until_closing(), asyncio.timeout_at(min(deadline, now + BODY_PIECE_S)):
                return await receive()
        except TimeoutError:
            words = f"The body did not come: a piece may take {BODY_PIECE_S:g} s, and all of it {BODY_S:g} s."
            raise BodyTimeout(words) from None

    @asynccontextmanager
    async def _until_closing(self) -> AsyncIterator[None]:
        """Refuse what has not even come yet when the gateway shuts down: nobody waits for it."""
        async with interruptible() as interrupt:
            closing = self._closing()

            def refuse(_: object) -> None:
                interrupt.fire(shutting_down())

            closing.add_done_callback(refuse)
            try:
                yield
            finally:
                closing.remove_done_callback(refuse)

    def _too_large(self) -> GatewayError:
        words = f"The body is larger than {self._most_bytes:,} bytes; send less, or raise GATEWAY_MAX_BODY."
        return BodyTooLarge(words)


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
                closes = Headers(raw=message["headers"]).get("connection") == "close"
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
