"""How large a request's body may be, and how long it may take to come. Plain ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic, TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api import problems
from gateway.api.headers import header
from gateway.departure import Interrupt, interruptible
from gateway.errors import BodyTimeout, BodyTooLarge, GatewayError
from gateway.fleet.refusals import shutting_down

BODY_S = 60.0
BODY_PIECE_S = 10.0
"""How long a body may take to come, as a whole and between two pieces of it."""
LOOK_S = 1.0
"""How often that is looked after."""


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
        self._due_at: float | None = None
        self._read_bytes = 0
        self._is_whole = False

    async def receive(self) -> Message:
        """Return the next message of the server.

        Raises:
            BodyTooLarge, BodyTimeout, GatewayError: as `BodyLimit` says.
        """
        if self._is_whole:  # what is waited for now is the caller's departure, and that may take long
            return await self._receive()
        message = await at_once_or(self._receive(), self._in_time)
        self._is_whole = not message.get("more_body", False)
        self._read_bytes += len(message.get("body", b""))
        if self._read_bytes > self._most_bytes:
            raise _too_large(self._most_bytes)
        return message

    def _in_time(self) -> AbstractContextManager[None]:
        self._due_at = self._due_at or asyncio.get_running_loop().time() + BODY_S
        return self._pieces.awaited(self._due_at)


class _Pieces:
    """Bounds the wait for pieces of bodies, by one timer for all: not for ever, and not beyond the gateway's end."""

    def __init__(self, closing: Callable[[], asyncio.Future[None]]) -> None:
        self._closing = closing
        self._due_at: dict[Interrupt, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def awaited(self, due_at: float) -> Iterator[None]:
        """Have what is inside wait for a piece.

        Raises:
            BodyTimeout: it has not come at that time, or within the time that a piece may take.
            GatewayError: the gateway shuts down, and it has not even come.
        """
        with interruptible() as interrupt:
            self._look_after(interrupt, due_at)
            try:
                yield
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


# ---- what need not be waited for, mostly ----

T = TypeVar("T")


class at_once_or(Awaitable[T], Generic[T]):  # noqa: N801 - reads as what it does
    """Await `what`; only if that has to wait, it does so within the context that `waiting` makes."""

    def __init__(self, what: Awaitable[T], waiting: Callable[[], AbstractContextManager[None]]) -> None:
        self._what = what
        self._waiting = waiting

    def __await__(self) -> Generator[Any, Any, T]:
        steps = self._what.__await__()
        try:
            waits_for = next(steps)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        with self._waiting():
            return (yield from _go_on(steps, waits_for))


def _go_on(steps: Generator[Any, Any, T], waits_for: Any) -> Generator[Any, Any, T]:
    """Go on with what has come to a first wait; whatever ends that wait goes on into it."""
    while True:
        try:
            try:
                came = yield waits_for
            except BaseException as error:
                waits_for = steps.throw(error)
            else:
                waits_for = steps.send(came)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
