"""A caller's connection as the server has it: uvicorn's own, with two things that it does not do itself.

It tells the application at once when it is lost, and it sends the head of an answer together with what follows it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gateway.departure import Departure

LARGE_BYTES = 64 * 1024
"""What is larger goes out behind the head, and is not copied."""


class CallersConnection(HttpToolsProtocol):
    """Puts its `Departure` into the state of each of its requests, and sees to it that it hears of it itself."""

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any], *more: Any, **named: Any) -> None:
        self.departure = Departure()
        self._running: RequestResponseCycle | None = None
        super().__init__(config, server_state, {**app_state, Departure.KEY: self.departure}, *more, **named)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Joining(transport, self.loop))

    def on_message_complete(self) -> None:
        """Go on reading, which is paused while much of a body is not taken: else nobody would hear of a departure."""
        super().on_message_complete()
        if not self.pipeline:  # the next requests wait until this one is answered
            self.flow.resume_reading()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        running = self._running
        if running is not None and not running.response_complete:  # uvicorn says so to the latest request only
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)
        self.departure.comes()


class Joining(asyncio.Transport):
    """A transport that sends the head of an answer together with what is written next, if that comes at once.

    uvicorn writes them one by one: that would be two system calls, and two packets that wake the caller twice.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""

    def write(self, data: Any) -> None:
        if self._head:
            if len(data) <= LARGE_BYTES:
                data, self._head = self._head + data, b""
            else:
                self._send_head()
        elif data.startswith(b"HTTP/1."):
            self._head = data
            self._loop.call_soon(self._send_head)
            return
        self._transport.write(data)

    def _send_head(self) -> None:
        head, self._head = self._head, b""
        if head and not self._transport.is_closing():
            self._transport.write(head)

    def close(self) -> None:
        self._send_head()
        self._transport.close()

    def abort(self) -> None:
        self._head = b""
        self._transport.abort()

    # all else is the transport's own

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size() + len(self._head)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)
