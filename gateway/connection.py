"""A caller's connection as the server has it: uvicorn's own, which tells the application at once when it is lost."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.departure import Departure


class CallersConnection(HttpToolsProtocol):
    """Puts its `Departure` into the state of each of its requests."""

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any], *more: Any, **named: Any) -> None:
        self.departure = Departure()
        super().__init__(config, server_state, {**app_state, Departure.KEY: self.departure}, *more, **named)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.departure.comes()
