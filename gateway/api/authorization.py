"""Who may do what: each request shows a key (contract section 7), which has rights and limits. Plain ASGI."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api import problems
from gateway.api.headers import route_path
from gateway.api.rights import right_for
from gateway.errors import Forbidden, RateLimited, Unauthorized
from gateway.keys import Key, Right, by_hash, holder_of
from gateway.waiting import Room, Standing

MINUTE_S = 60.0
REFUSED = {"www-authenticate": "Bearer", "connection": "close"}
SLOT_S = 1.0
"""When to ask again where the key's requests under way are too many: nobody knows when one of them ends."""
_BEARER = re.compile(r"bearer +([\x21-\x7e]{1,512}) *", re.IGNORECASE)


class Allowance:
    """What one key may still do of what it is limited to. `clock` counts seconds; `room` is where its requests wait."""

    def __init__(self, key: Key, clock: Callable[[], float], room: Room | None = None) -> None:
        self.key = key
        self._room = room
        self._clock = clock
        self._under_way = 0
        self._began_at: deque[float] = deque()

    def admit(self) -> Standing:
        """Return what counts a request that begins now, but while it waits for a cold model: that costs nobody.

        Only who comes is refused. So after a cold start more may be at work for a while than the key allows.

        Raises:
            RateLimited: it would be one too many; it was not counted.
        """
        most = self.key.max_concurrency
        if most is not None and self._under_way >= most:
            words = f"The key {self.key.name} may have {most} requests under way; ask again when one has ended."
            raise RateLimited(words, retry_after_s=SLOT_S)
        if self.key.requests_per_minute is not None:
            self._begin(self.key.requests_per_minute, self._clock())
        return Standing(self._count, self._room)

    def _count(self, change: int) -> None:
        self._under_way += change

    def _begin(self, most: int, now: float) -> None:
        """Note that a request begins: at most so many do within any minute."""
        began_at = self._began_at
        while began_at and began_at[0] <= now - MINUTE_S:
            began_at.popleft()
        if len(began_at) >= most:
            words = f"The key {self.key.name} may make {most} requests a minute; Retry-After says when the next one."
            raise RateLimited(words, retry_after_s=began_at[0] + MINUTE_S - now)
        began_at.append(now)


class Authorization:
    """Asks every request for its key, but at the addresses that are open to all.

    It must see the path that the router sees. A request counts for its key until the application is done with it: for a
    generation whose caller leaves, that is at once. Its wait for a cold model does not count (`Allowance.admit`).
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[Key],
        room: Room | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take what it needs. All requests wait for their models in `room`."""
        self._app = app
        self._keys = by_hash(keys)
        self._allowances = {key.name: Allowance(key, clock, room) for key in keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        right = right_for(route_path(scope)) if scope["type"] == "http" else None
        if right is None:
            await self._app(scope, receive, send)
            return
        try:
            key = self._key(scope, right)
            standing = self._allowances[key.name].admit()
        except Unauthorized as error:  # the body of a stranger is not read
            await problems.render(error, scope, REFUSED)(scope, receive, send)
        except (Forbidden, RateLimited) as error:
            await problems.render(error, scope)(scope, receive, send)
        else:
            with standing:
                await self._app(scope, receive, send)

    def _key(self, scope: Scope, right: Right) -> Key:
        """Return the key that the request shows.

        Raises:
            Unauthorized: it shows none that is known.
            Forbidden: that one lacks the right.
        """
        sent = [str(value, "latin-1") for name, value in scope["headers"] if name == b"authorization"]
        token = _BEARER.fullmatch(sent[0]) if len(sent) == 1 else None
        key = holder_of(token[1].encode(), self._keys) if token else None
        if key is None:
            what = "This key is not known here" if token else "This gateway asks for a key"
            raise Unauthorized(f"{what}: send `Authorization: Bearer KEY`, with one that `gateway keys add` has made.")
        scope["state"]["key"] = key.name  # for the log
        if right not in key.rights:
            raise Forbidden(f"The key {key.name} lacks the right `{right}`, which this address needs.")
        return key
