"""Runtime `external`: a server that already runs, here or at a provider. Nothing is started, and nothing is stopped.

The gateway has no say in its life and sees no end of it: such a server is reached or it is not, and is never dead.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import ClassVar
from urllib.parse import urlsplit

from gateway.errors import StartFailed
from gateway.runtimes.base import Exit, Found, Handle, Launch, Listener

CONNECT_S = 5.0
PORTS = {"http": 80, "https": 443}


class ExternalRuntime:
    """Reaches servers that others run."""

    name: ClassVar[str] = "external"
    outlives: ClassVar[bool] = False
    """They do go on, but there is nothing to be found: the catalog says where each one is."""

    def __init__(self, connect_s: float = CONNECT_S) -> None:
        """`connect_s` is how long a server may take to accept a connection."""
        self._connect_s = connect_s
        self._trusted: ssl.SSLContext | None = None

    async def find(self) -> list[Found]:
        return []

    async def adopt(self, found: Found, listener: Listener) -> Handle:  # noqa: ARG002 - the seam's
        raise StartFailed(f"{found.name} is not the gateway's: nothing of this runtime is ever found.")

    async def check(self, launch: Launch) -> None:
        """There is nothing to be seen from here."""

    async def start(self, launch: Launch, listener: Listener) -> Handle:  # noqa: ARG002 - it says nothing
        """Return where the server is, once something there takes a connection; it need not serve yet.

        Raises:
            StartFailed: nothing answers there, or not with a certificate that this machine trusts.
        """
        if launch.url is None:
            raise _failed(f"{launch.name} has no address", "Give the model a `url` in models.yaml.")
        port = await self._reach(launch.url)
        return Handle(launch.name, launch.url, port, launch.url)

    async def ended(self, handle: Handle) -> Exit:  # noqa: ARG002 - the seam's
        """Wait for ever: that a server elsewhere does not answer does not mean that it ended."""
        never: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        return await never

    async def stop(self, name: str, *, grace_s: float) -> None:
        """Let go of the server: the gateway has made nothing that could be removed."""

    async def logs(self, name: str, *, lines: int, follow: bool) -> AsyncIterator[str]:  # noqa: ARG002 - the seam's
        yield "This server was not started by the gateway: its output is where it runs."

    async def aclose(self) -> None:
        """There is nothing to let go of: no connection is kept."""

    async def _reach(self, url: str) -> int:
        """Make one connection, end it, and return the port."""
        address = urlsplit(url)
        port = address.port or PORTS[address.scheme]
        trusted = self._certificates() if address.scheme == "https" else None
        try:
            async with asyncio.timeout(self._connect_s):
                _, writer = await asyncio.open_connection(address.hostname, port, ssl=trusted)
        except ssl.SSLCertVerificationError as error:
            raise _not_trusted(url, error.verify_message) from None
        except (OSError, UnicodeError) as error:  # a time-out is an OSError too
            raise self._unreachable(url, error) from None
        writer.transport.abort()  # nothing was said, so there is no good-bye to wait for
        with suppress(OSError):
            await writer.wait_closed()
        return port

    def _unreachable(self, url: str, error: Exception) -> StartFailed:
        why = f"no answer within {self._connect_s:g} s" if isinstance(error, TimeoutError) else _words(error)
        return _failed(f"no server is reached at {url} ({why})", "Start it there, or correct `url` in models.yaml.")

    def _certificates(self) -> ssl.SSLContext:
        """Return whom this machine trusts, as OpenSSL finds it: SSL_CERT_FILE, SSL_CERT_DIR, or its own store."""
        self._trusted = self._trusted or ssl.create_default_context()
        return self._trusted


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


def _not_trusted(url: str, why: str) -> StartFailed:
    fix = "Correct `url` in models.yaml, or name the file of the authority that signed it with SSL_CERT_FILE."
    return _failed(f"the certificate of {url} is not trusted ({why})", fix)


def _failed(cause: str, fix: str) -> StartFailed:
    return StartFailed(f"{cause[0].upper()}{cause[1:]}. {fix}", cause=cause, fix=fix)
