"""A gateway whose models keep a caller in whatever phase of its request it is to leave in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from tests.end_to_end.addresses import Address, Caller, Json
from tests.end_to_end.gateway import Gateway, serving
from tests.runtimes.processes import wait_until
from tests.tgi_double.process import Double

Phase = Literal["queued", "loading", "before the first token", "amid the answer", "while tokens flow"]
ENDLESS = "go round and"
"""The double's model goes on from here for as long as it may."""
TOKENS = 1000
DOUBLES: dict[Phase, Json] = {
    "queued": {"hangs_after_tokens": 0},
    "loading": {"health_fails_after_s": 0},
    "before the first token": {"hangs_after_tokens": 0},
    "amid the answer": {"hangs_after_tokens": 3},
    "while tokens flow": {"token_s": 0.01},
}
AT_THE_ENGINE: tuple[Phase, ...] = ("before the first token", "amid the answer", "while tokens flow")
BEFORE_IT: tuple[Phase, ...] = ("queued", "loading")
PLACE_HOLDER = Address("place", "/generate", lambda m, p, t: {"model_id": m, "prompt": p, "max_new_tokens": t}, str)


@dataclass
class Scene:
    """The gateway, with one model for each phase, and each model's server."""

    gateway: Gateway
    doubles: dict[Phase, Double]
    client: httpx.Client

    def begun(self, phase: Phase) -> int:
        """Return how many requests the server of this phase has been sent so far."""
        return self._count(phase, "tgi_request_count")

    def aborted(self, phase: Phase) -> int:
        """Return how many of them it saw leave."""
        return self._count(phase, 'tgi_request_failure{err="dropped"}')

    def _count(self, phase: Phase, name: str) -> int:
        page = self.client.get(f"{self.doubles[phase].url}/metrics").text
        found = re.search(rf"^{re.escape(name)} (\d+)$", page, re.MULTILINE)
        return int(found[1]) if found else 0

    def in_flight(self, phase: Phase) -> int:
        return int(self.model(phase)["in_flight"])

    def queued(self, phase: Phase) -> int:
        return int(self.model(phase)["queued"])

    def model(self, phase: Phase) -> Json:
        """Return what the gateway says of the model of this phase."""
        return dict(self.client.get(f"{self.gateway.url}/models/{id_of(phase)}").json())

    def ask(self, phase: Phase, address: Address) -> Caller:
        return Caller(self.gateway.port, address.request(id_of(phase), ENDLESS, TOKENS))

    def caller(self, phase: Phase, address: Address) -> Caller:
        """Return a caller of this address as soon as its request is in this phase."""
        begun = self.begun(phase)
        caller = self.ask(phase, address)
        if phase in BEFORE_IT:
            wait_until(lambda: self.queued(phase))
        else:
            wait_until(lambda: self.begun(phase) == begun + address.asks * address.counted)
            if address.streams and phase != "before the first token":
                caller.hear(b"data:")
        return caller

    @contextmanager
    def place_taken(self) -> Iterator[None]:
        """Keep the only place of the model whose callers are to queue."""
        begun = self.begun("queued")
        with_place = self.ask("queued", PLACE_HOLDER)
        try:
            wait_until(lambda: self.begun("queued") == begun + 1)
            assert self.in_flight("queued") == 1
            yield
            assert self.in_flight("queued") == 1
        finally:
            with_place.close()
            wait_until(lambda: self.in_flight("queued") == 0)


def id_of(phase: Phase) -> str:
    return phase.replace(" ", "-")


@contextmanager
def scene(folder: Path) -> Iterator[Scene]:
    """Run the gateway and its models' servers, each of which waits at its phase for the caller to leave."""
    with ExitStack() as stack:
        flags = ("--max-top-n-tokens", "50")
        doubles = {
            phase: stack.enter_context(Double(*flags, tells_aborts=True, **mood)) for phase, mood in DOUBLES.items()
        }
        models: dict[str, Json] = {
            id_of(phase): {"engine": "tgi", "hf_name": id_of(phase), "runtime": "external", "url": each.url}
            for phase, each in doubles.items()
        }
        models["queued"]["max_concurrency"] = 1
        gateway = stack.enter_context(serving(folder, **models))
        yield Scene(gateway, doubles, stack.enter_context(httpx.Client()))
