"""Where a base URL leads, and how a connection to it is made."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from ipaddress import ip_address
from itertools import chain, zip_longest
from urllib.parse import quote, urlsplit

from gateway.http11 import Connection

HEAD_START_S = 0.25
"""What the next of a host's addresses waits for the one before (RFC 8305, section 5)."""
PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[0-9A-Za-z._:%-]+")

Attempt = Callable[[], Coroutine[None, None, Connection]]


@dataclass(frozen=True, slots=True)
class Address:
    """A server's address, as a base URL says it."""

    scheme: str
    host: str
    port: int
    host_header: str
    """The host as the header `Host` has it: with the port, unless it is the usual one."""
    prefix: str
    """The path before every path; empty, or with a slash at its beginning and none at its end."""
    is_literal: bool
    """Whether the host is an IP address and no name."""


@lru_cache(maxsize=1024)
def address_of(base_url: str) -> Address:
    """Return the address.

    Raises:
        ValueError: it is none.
    """
    url = urlsplit(base_url)
    name = url.hostname or ""
    is_literal = _is_literal(name)
    host = name if is_literal or name.isascii() else name.encode("idna").decode("ascii")
    if url.scheme not in PORTS or not _HOST.fullmatch(host):
        raise ValueError("the address of a server is no http address")
    port = url.port or PORTS[url.scheme]
    shown = f"[{host.partition('%')[0]}]" if ":" in host else host
    host_header = shown if port == PORTS[url.scheme] else f"{shown}:{port}"
    prefix = quote(url.path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
    return Address(url.scheme, host, port, host_header, prefix, is_literal)


def _is_literal(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


async def connect(address: Address, trusted: ssl.SSLContext | None) -> Connection:
    """Return a new connection, over TLS if `trusted` says whom to trust: of a name's addresses, the first made.

    Raises:
        OSError, UnicodeError: there is none.
    """
    loop = asyncio.get_running_loop()
    if address.is_literal:
        return await _connect(address, address.host, trusted)
    found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    hosts = alternating([(family, str(at[0])) for family, _, _, _, at in found])
    return await first_of([partial(_connect, address, host, trusted) for host in hosts])


async def _connect(address: Address, host: str, trusted: ssl.SSLContext | None) -> Connection:
    loop, server_name = asyncio.get_running_loop(), address.host if trusted else None
    _, connection = await loop.create_connection(
        Connection, host, address.port, ssl=trusted, server_hostname=server_name
    )
    return connection


def alternating(found: Sequence[tuple[int, str]]) -> list[str]:
    """Return the hosts without doubles: the families by turns, and each in the resolver's order."""
    families = list(dict.fromkeys(family for family, _ in found))
    by_family = [[host for of, host in found if of == family] for family in families]
    return list(dict.fromkeys(host for host in chain(*zip_longest(*by_family)) if host is not None))


async def first_of(attempts: Sequence[Attempt]) -> Connection:
    """Return the first connection that is made, each attempt with a head start over the next; no other one is left.

    Raises:
        OSError: the last one's, if none is made.
    """
    if len(attempts) == 1:
        return await attempts[0]()
    race = _Race()
    try:
        for number, attempt in enumerate(attempts, 1):
            race.add(attempt)
            if won := await race.won(HEAD_START_S if number < len(attempts) else None):
                return won
    finally:
        race.call_off()
    raise race.error or OSError("the name has no address")


class _Race:
    """Attempts that run at the same time."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Connection]] = set()
        self.error: Exception | None = None

    def add(self, attempt: Attempt) -> None:
        self._running.add(asyncio.create_task(attempt(), name="connect"))

    async def won(self, within_s: float | None) -> Connection | None:
        """Return a connection; None if the time is up, if one failed and another may begin, or if all failed."""
        while self._running:
            done, _ = await asyncio.wait(self._running, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                self._running.discard(task)
                if won := self._outcome(task):
                    return won
            if within_s is not None:
                return None
        return None

    def call_off(self) -> None:
        """Let none of the others come to anything. Does not wait: to be cancelled here could lose the winner."""
        for task in self._running:
            task.cancel()
            task.add_done_callback(_close_late)

    def _outcome(self, task: asyncio.Task[Connection]) -> Connection | None:
        if task.cancelled():
            return None
        error = task.exception()
        if isinstance(error, Exception):
            self.error = error
        return None if error else task.result()


def _close_late(task: asyncio.Task[Connection]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().abort()
