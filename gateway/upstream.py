"""The relay's client: HTTP/1.1 to model servers, over connections that are kept for the next request."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager

from gateway.dialing import Address, address_of, connect
from gateway.engines.base import Call
from gateway.http11 import Answer, Connection, request_head
from gateway.relay import Broken, ConnectFailed

CONNECT_S = 5.0
IDLE_S = 1.0
"""How long a connection is kept: half of the shortest time that a common server waits by default (gunicorn: 2 s)."""
MOST_KEPT = 256
"""Connections to one address that wait for a request."""

Place = tuple[str, str, int]
"""Scheme, host and port."""


class HttpClient:
    """Sends requests over kept connections, and sets no time-out but that of connecting: the relay bounds the rest.

    A connection is kept if its answer was read to the end and the server does not say otherwise, and it is used again
    if until then the server has neither closed it nor said anything. It may still be closed by the server in the very
    moment in which the next request is on its way. Nobody knows then whether that was read, so it is `Broken` and not
    sent again; what keeps this from happening is that connections idle for a shorter time than any server bears. One
    server closes them all the same (llama.cpp's, under load, seen as one lost request in a hundred): calls to it are
    `fresh`, and have a connection of their own, which costs them some 0.1 ms on loopback.

    Follows no redirect, keeps no cookie, and uses neither the environment's proxies nor ~/.netrc.
    """

    def __init__(self, connect_s: float = CONNECT_S, idle_s: float = IDLE_S) -> None:
        self.idle_s = idle_s
        self.pool = Pool()
        self._connect_s = connect_s
        self._trusted: ssl.SSLContext | None = None

    def send(self, base_url: str, call: Call, headers: Mapping[str, str]) -> AbstractAsyncContextManager[Answer]:
        """Send `call`; leaving the context before the body was read to its end closes the connection at once.

        Raises:
            ConnectFailed, Broken: as `relay.Client` says.
            ValueError: the call is none that HTTP can carry; nothing was sent.
        """
        address = address_of(base_url)
        return _Exchange(
            self, address, call, request_head(call, address.prefix + call.path, address.host_header, headers)
        )

    async def aclose(self) -> None:
        """Close what is kept. Answers that are being read are their readers' to leave."""
        self.pool.close()
        await asyncio.sleep(0)  # a transport that was told to close does so in the loop's next round

    async def connect(self, address: Address) -> Connection:
        """Return a new connection.

        Raises:
            ConnectFailed: none could be made in time.
        """
        try:
            async with asyncio.timeout(self._connect_s):
                return await connect(address, self._trust() if address.scheme == "https" else None)
        except (OSError, UnicodeError) as error:  # a time-out is an OSError too, and what is wrong with TLS
            raise ConnectFailed(type(error).__name__) from error

    def _trust(self) -> ssl.SSLContext:
        """Return whom this machine trusts, as OpenSSL finds it: SSL_CERT_FILE, SSL_CERT_DIR, or its own store."""
        self._trusted = self._trusted or ssl.create_default_context()
        return self._trusted


class _Exchange:
    """One request and its answer, as a context: a class, because a generator would cost more than all that it does."""

    def __init__(self, client: HttpClient, address: Address, call: Call, head: bytes) -> None:
        self._client = client
        self._address = address
        self._place: Place = address.scheme, address.host, address.port
        self._call = call
        self._head = head
        self._connection: Connection | None = None

    async def __aenter__(self) -> Answer:
        kept = None if self._call.fresh else self._client.pool.take(self._place)
        connection = self._connection = kept or await self._client.connect(self._address)
        try:
            return await connection.ask(self._head, self._call.body)
        except BaseException as error:
            connection.leave(0.0)
            if isinstance(error, OSError):
                raise Broken(type(error).__name__) from error
            raise

    async def __aexit__(self, *_: object) -> None:
        """Keep the connection, if the answer was read to the end and it may be kept; else close it at once."""
        assert self._connection is not None
        if may_idle_s := self._connection.leave(0.0 if self._call.fresh else self._client.idle_s):
            self._client.pool.keep(self._place, self._connection, may_idle_s)


class Pool:
    """Connections that wait for their next request, by where they lead. The last one that came is the first to go."""

    def __init__(self) -> None:
        self._kept: dict[Place, list[Connection]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def take(self, place: Place) -> Connection | None:
        """Return a connection that can be used again, if there is one."""
        kept = self._kept.get(place)
        while kept:
            connection = kept.pop()
            if connection.loop.time() < connection.idle_until and connection.is_quiet:
                return connection
            connection.abort()
        return None

    def keep(self, place: Place, connection: Connection, idle_s: float) -> None:
        """Keep a connection for so long; the one that has waited longest makes room for it."""
        if self._is_closed:
            connection.abort()
            return
        connection.idle_until = connection.loop.time() + idle_s
        kept = self._kept.setdefault(place, [])
        kept.append(connection)
        if len(kept) > MOST_KEPT:
            kept.pop(0).abort()
        if self._timer is None:
            self._timer = connection.loop.call_later(idle_s, self._sweep)

    def close(self) -> None:
        """Close all, and keep none any more."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        for kept in self._kept.values():
            for connection in kept:
                connection.abort()
        self._kept.clear()

    def _sweep(self) -> None:
        """Close those that have waited for too long, and come back while there are others."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in (each for kept in self._kept.values() for each in kept if each.idle_until <= now):
            connection.abort()
        left = {place: [each for each in kept if now < each.idle_until] for place, kept in self._kept.items()}
        self._kept = {place: kept for place, kept in left.items() if kept}
        next_at = min((each.idle_until for kept in self._kept.values() for each in kept), default=None)
        self._timer = None if next_at is None else loop.call_at(next_at, self._sweep)
