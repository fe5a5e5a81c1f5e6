"""The relay's client: HTTP/1.1 to model servers, over aiohttp."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from io import BytesIO

import aiohttp

from gateway.engines.base import Call
from gateway.relay import Broken, ConnectFailed

CONNECT_S = 5.0
LONGEST_RETRY_S = 3600
LARGE_BYTES = 64 * 1024


class AiohttpAnswer:
    """A server's answer as it comes."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        self.retry_after_s = _seconds(response.headers.get("Retry-After", ""))

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, OSError) as error:
            raise Broken(type(error).__name__) from error


class AiohttpClient:
    """Makes a connection for each request, and sets no time-out but that of connecting: the relay bounds the rest.

    A kept connection may be closed by the server in the moment in which the next request is on its way (llama.cpp's
    does so under load, seen as one lost request in a hundred); and then nobody knows whether it was read. One of its
    own costs a request some 0.1 ms on loopback.
    """

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def send(self, base_url: str, call: Call, headers: Mapping[str, str]) -> AsyncIterator[AiohttpAnswer]:
        try:
            response = await self._opened().request(
                call.method,
                base_url + call.path,
                data=_payload(call.body),
                headers={**headers, **call.headers},
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise ConnectFailed(type(error).__name__) from error
        except (aiohttp.ClientError, OSError) as error:
            raise Broken(type(error).__name__) from error
        try:
            yield AiohttpAnswer(response)
        finally:
            response.close()

    async def aclose(self) -> None:
        if self._session:
            await self._session.close()

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
            # A compressed stream would come in lumps. The environment's proxies are not used: with them aiohttp would
            # read ~/.netrc too, and send what it finds there.
            headers = {"Accept-Encoding": "identity"}
            self._session = aiohttp.ClientSession(
                connector=connector,
                timeout=timeout,
                headers=headers,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
            )
        return self._session


def _payload(body: bytes) -> bytes | BytesIO | None:
    """Return a body as aiohttp wants it: one that is large goes out in pieces."""
    return BytesIO(body) if len(body) > LARGE_BYTES else body or None


def _seconds(words: str) -> float | None:
    """Return the seconds of a `Retry-After`, within reason; one that names a date is not read."""
    return float(min(int(words), LONGEST_RETRY_S)) if words.isascii() and words.isdigit() else None
