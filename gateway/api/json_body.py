"""Reading a body as JSON, with words for whoever sent something else."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from gateway.api.headers import header
from gateway.errors import InvalidRequest

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRequest(Request):
    """A request whose body is JSON in UTF-8 and nothing else."""

    async def body(self) -> bytes:
        """Return the body, which mostly comes in one piece: then this is that piece.

        Raises:
            ClientDisconnect: the caller left before it had come.
        """
        if not hasattr(self, "_body"):
            message = await self.receive()
            pieces = [message.get("body", b"")]
            while message.get("more_body", False):
                message = await self.receive()
                pieces.append(message.get("body", b""))
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            self._body = b"".join(pieces)
        return self._body

    async def json(self) -> Any:
        """Return the body's value.

        Raises:
            InvalidRequest: it is not JSON in UTF-8; says what it is instead.
        """
        refuse_compressed(self)
        return json_in(await self.body())


def json_in(sent: bytes) -> Any:
    """Return the value that a body holds.

    Raises:
        InvalidRequest: it is not JSON in UTF-8; says what it is instead.
    """
    try:
        return from_json(sent, cache_strings="keys")
    except ValueError:  # it may still be some: half a surrogate pair, or nested deeper
        return _json_in(sent)


def _json_in(sent: bytes) -> Any:
    try:
        return json.loads(sent.decode())
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body is not UTF-8 (byte {error.start}); JSON is sent in UTF-8.") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error.msg} at character {error.pos}.") from None
    except RecursionError:
        raise InvalidRequest("The body is nested too deeply.") from None
    except ValueError:
        raise InvalidRequest("The body holds a number that is too long.") from None


def refuse_compressed(request: Request) -> None:
    """Raise InvalidRequest for a body that has to be decompressed."""
    if encoding := header(request.scope, b"content-encoding"):
        raise InvalidRequest(f"Content-Encoding {encoding[:20]!r} is not supported; send the body as it is.")


def is_json(content_type: str) -> bool:
    """Say whether a body of this type is JSON, as FastAPI judges it."""
    if content_type == "application/json":
        return True
    message = Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    return message.get_content_maintype() == "application" and (subtype == "json" or subtype.endswith("+json"))


class JsonRoute(APIRoute):
    """A route whose body is read by `JsonRequest`."""

    def answering(self, handle: Handler) -> Handler:
        """Return what answers the route's requests, by `handle` where the body has to be read and checked here."""
        return handle

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return self.answering(handle_json)
