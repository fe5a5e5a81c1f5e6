"""Watches containers: the engine's events say when to look, and looking says what is true.

An event is only a hint that something may have changed, so one that comes twice or late does no harm, and one that
was missed while nobody listened is made up for by looking again after every new subscription. A silent engine ends
nothing: it is asked until it answers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from gateway.errors import RuntimeUnavailable
from gateway.runtimes.docker.containers import OWNER, Seen, look
from gateway.runtimes.docker.engine import Engine

log = logging.getLogger(__name__)

EVENTS = ("die", "oom", "destroy", "pause", "unpause")
AGAIN_S = (0.1, 0.5)
"""How long to wait, at random between the two, before a silent engine is asked again."""
LOOK_S = 30.0
"""How often a container is looked at without any event: the engine drops events that it cannot deliver."""


@dataclass(eq=False, slots=True)
class News:
    """What one watcher of one container was told."""

    fresh: asyncio.Event = field(default_factory=asyncio.Event)
    out_of_memory: bool = False
    engine_went: bool = False
    """Whether the engine went away, and came back, while the container was watched."""


@dataclass(frozen=True, slots=True)
class End:
    """How a container was seen to have ended. `last` is None if it is gone."""

    last: Seen | None
    restarted: bool = False
    """Somebody else started it again: what ran before has ended."""
    out_of_memory: bool = False
    engine_went: bool = False


class Watch:
    """One subscription to the engine's events, for everybody who watches a container of this owner."""

    def __init__(self, engine: Engine, owner: str) -> None:
        self._engine = engine
        self._owner = owner
        self._watchers: dict[str, set[News]] = {}
        self._task: asyncio.Task[None] | None = None
        self._listens = False
        self._went = False
        """Whether the events were ever lost."""

    async def until_ended(self, seen: Seen, hear: Callable[[Seen], None] | None = None) -> End:
        """Return when the container that was `seen` is known to have ended; `hear` is told how it looks till then.

        Waits as long as it runs, and also while the engine is silent.
        """
        with self._news_of(seen.id) as news:
            while True:
                news.fresh.clear()
                now = await self._known(seen.id, news)
                restarted = now is not None and now.started_at != seen.started_at
                if now is None or not now.runs or restarted:
                    return End(now, restarted, news.out_of_memory, news.engine_went)
                if hear:
                    hear(now)
                await _wait(news.fresh, LOOK_S)

    async def aclose(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])

    @contextmanager
    def _news_of(self, container_id: str) -> Iterator[News]:
        self._task = self._task or asyncio.create_task(self._follow(), name=f"events of {self._owner}")
        watchers, news = self._watchers.setdefault(container_id, set()), News()
        watchers.add(news)
        try:
            yield news
        finally:
            watchers.discard(news)
            if not watchers and self._watchers.get(container_id) is watchers:
                del self._watchers[container_id]

    async def _known(self, container_id: str, news: News) -> Seen | None:
        """Look at a container until the engine says what it is."""
        while True:
            try:
                return await look(self._engine, container_id, patiently=False)
            except RuntimeUnavailable:
                news.engine_went = True
            await _a_moment()

    async def _follow(self) -> None:
        """Subscribe, for ever; and let everybody look after each time."""
        while True:
            try:
                await self._hear_all()
                self._lost("it ended them")
            except RuntimeUnavailable as error:
                self._lost(str(error))
            except (ValueError, KeyError, TypeError) as error:
                self._lost(f"it sent one that is none: {error!r}")
            await _a_moment()

    def _lost(self, why: str) -> None:
        """Say once that the events are gone, not each time that they are asked for in vain."""
        if self._listens or not self._went:
            log.warning("The Docker Engine's events are lost (%s); they are asked for until it answers.", why)
        self._listens, self._went = False, True

    async def _hear_all(self) -> None:
        # The engine's answer begins a moment before it listens: `since` has it repeat what happened in between.
        since = str(int(time.time()) - 1)
        filters = json.dumps({"type": ["container"], "label": [f"{OWNER}={self._owner}"], "event": list(EVENTS)})
        async with self._engine.stream("GET", "/events", {"since": since, "filters": filters}) as lines:
            for container_id in list(self._watchers):
                self._tell(container_id, engine_went=self._went)
            self._listens = True
            async for line in lines:
                event = json.loads(line)
                self._tell(event["Actor"]["ID"], out_of_memory=event["Action"] == "oom")

    def _tell(self, container_id: str, *, out_of_memory: bool = False, engine_went: bool = False) -> None:
        for news in self._watchers.get(container_id, ()):
            news.out_of_memory |= out_of_memory
            news.engine_went |= engine_went
            news.fresh.set()


async def _wait(event: asyncio.Event, bound_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(bound_s):
            await event.wait()


async def _a_moment() -> None:
    await asyncio.sleep(random.uniform(*AGAIN_S))
