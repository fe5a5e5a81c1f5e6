"""What happened, in order: moves of models, progress of their starts, changes of the catalog; the last 1,000."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

KEPT = 1000


@dataclass(frozen=True, slots=True)
class Entry:
    """One event. `id` increases by one; `kind` is `state`, `progress` or `catalog`."""

    id: int
    kind: str
    data: Mapping[str, Any]


class Journal:
    """A bounded memory of events that any number of readers follow, each at its own pace.

    A reader holds no queue: one that is slow misses what has left the memory, and costs nothing.
    """

    def __init__(self, wall_clock: Callable[[], float], hear: Callable[[Entry], None] = lambda _: None) -> None:
        """Take a clock that counts seconds since 1970, and who hears each entry as it is written."""
        self._entries: deque[Entry] = deque(maxlen=KEPT)
        self._ids = count(1)
        self._wall_clock = wall_clock
        self._hear = hear
        self._news: set[asyncio.Future[None]] = set()
        self._closed = False

    def now(self) -> float:
        """Return the wall-clock time, in seconds since 1970."""
        return self._wall_clock()

    @property
    def last_id(self) -> int:
        return self._entries[-1].id if self._entries else 0

    def write(self, kind: str, **data: Any) -> None:
        """Remember an event and wake every reader."""
        entry = Entry(next(self._ids), kind, data)
        self._entries.append(entry)
        self._hear(entry)
        self._wake()

    def close(self) -> None:
        """End every reader once it has read what there is."""
        self._closed = True
        self._wake()

    async def follow(self, after_id: int) -> AsyncIterator[Entry]:
        """Yield the remembered events with an id above `after_id`, then new ones as they come, until `close`."""
        while True:
            for entry in [entry for entry in self._entries if entry.id > after_id]:
                after_id = entry.id
                yield entry
            if self._closed:
                return
            await self._next(after_id)

    async def _next(self, after_id: int) -> None:
        if self.last_id > after_id or self._closed:
            return
        news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._news.add(news)
        try:
            await news
        finally:
            self._news.discard(news)

    def _wake(self) -> None:
        for news in self._news:
            if not news.done():
                news.set_result(None)
