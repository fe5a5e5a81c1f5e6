"""Watching models.yaml: a changed file is taken, or refused in words, while the gateway runs.

The file is looked at every second, and counts when two looks in a row found the same: so one that is half written,
or gone for the moment in which an editor or Kubernetes puts another in its place, is nothing to anybody. What is
compared is what it says: a rename, a symbolic link that leads elsewhere, or a clock that was set back change nothing.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypeVar

from gateway.aside import aside
from gateway.catalog import Catalog
from gateway.catalog_file import read_catalog
from gateway.catalog_values import shown
from gateway.errors import CatalogError

LOOK_EVERY_S = 1.0
PATIENCE_S = 20.0
"""How long it may take to read the file, or to make a catalog of it."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class Source(Protocol):
    """Where a catalog comes from. Both raise CatalogError, with everything that is wrong with it."""

    async def read(self) -> bytes:
        """Return what is there now."""

    async def load(self, content: bytes) -> Catalog:
        """Return the catalog that this says."""


class CatalogFile:
    """A file, read and parsed beside the event loop: a slow disk or a long catalog holds up no stream.

    One that hangs holds up nothing else either: it is told of after `patience_s`, and it is asked by one thread only.
    """

    def __init__(self, path: Path, load: Callable[[bytes], Catalog], *, patience_s: float = PATIENCE_S) -> None:
        self._path = path
        self._load = load
        self._patience_s = patience_s
        self._busy = threading.Lock()

    async def read(self) -> bytes:
        return await self._bounded(lambda: read_catalog(self._path))

    async def load(self, content: bytes) -> Catalog:
        return await self._bounded(lambda: self._load(content))

    async def _bounded(self, work: Callable[[], T]) -> T:
        """Return what `work` returns.

        Raises:
            CatalogError: the disk does not answer, or what `work` raises.
        """
        try:
            async with asyncio.timeout(self._patience_s):
                return await aside(lambda: self._alone(work), "catalog")
        except TimeoutError:
            raise self._silent() from None

    def _alone(self, work: Callable[[], T]) -> T:
        if not self._busy.acquire(blocking=False):
            raise self._silent()
        try:
            return work()
        finally:
            self._busy.release()

    def _silent(self) -> CatalogError:
        return CatalogError([f"{shown(str(self._path), 4096)}: cannot be read: the disk does not answer"])


Found = bytes | tuple[str, ...]
"""What a look found: what the file says, or why it cannot be read."""


class CatalogWatch:
    """Looks at a catalog again and again. `take` is called with each that can be used, `refuse` with why one cannot.

    The first one that is found is judged too, should the file have changed since the gateway read it.
    """

    def __init__(
        self,
        source: Source,
        take: Callable[[Catalog], None],
        refuse: Callable[[CatalogError], None],
        *,
        rest: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._source = source
        self._take = take
        self._refuse = refuse
        self._rest = rest

    async def run(self) -> None:
        """Watch until cancelled."""
        before: Found | None = None
        judged: Found | None = None
        while True:
            found = await self._look()
            if found == before and found != judged:
                judged = found
                await self._judge(found)
            before = found
            await self._rest(LOOK_EVERY_S)

    async def _look(self) -> Found:
        try:
            return await self._source.read()
        except CatalogError as error:
            return error.complaints

    async def _judge(self, found: Found) -> None:
        try:
            if isinstance(found, tuple):
                raise CatalogError(found)
            self._take(await self._source.load(found))
        except CatalogError as error:
            self._refuse(error)
        except Exception as error:  # a fault of ours must not be the end of the watch: the next change may work
            log.exception("the gateway itself failed over a changed catalog")
            words = (
                f"the gateway itself failed over this file ({type(error).__name__}; its log has more): change it again"
            )
            self._refuse(CatalogError([words]))
