"""Two hundred callers at once: every one hears every token of its own, in order, none lost, none doubled."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests import numbered_server
from tests.end_to_end.addresses import ADDRESSES, STREAMS, Address, events_of, models_at
from tests.end_to_end.gateway import Gateway, serving
from tests.numbered_server import Numbers
from tests.runtimes.processes import until
from tests.scripted_server import scripted

CROWD = 200
TOKENS = 90
MODELS = ("by-tgi", "by-openai")
LIMITS = httpx.Limits(max_connections=None)


@asynccontextmanager
async def counting(folder: Path, script: Numbers) -> AsyncIterator[Gateway]:
    """Run a gateway before one server that counts, which it takes for two models of different engines."""
    async with scripted(script) as (_, port):
        url = f"http://127.0.0.1:{port}"
        rooms = {name: {**model, "max_concurrency": 2 * CROWD} for name, model in models_at(url).items()}
        loop = asyncio.get_running_loop()
        context = serving(folder, **rooms)
        gateway = await loop.run_in_executor(None, context.__enter__)
        try:
            yield gateway
        finally:
            await loop.run_in_executor(None, context.__exit__, None, None, None)


@dataclass(frozen=True)
class Asked:
    """What one of the crowd asks."""

    caller: int
    address: Address
    model: str

    async def answer(self, client: httpx.AsyncClient) -> str:
        """Return the body, read as it comes."""
        path = self.address.path.format(model=self.model)
        body = self.address.body(self.model, f"caller-{self.caller} counts", TOKENS)
        async with client.stream("POST", path, json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            return "".join([piece async for piece in answer.aiter_text()])


def crowd(addresses: tuple[Address, ...], models: tuple[str, ...], size: int) -> list[Asked]:
    ways = [(address, model) for address in addresses for model in models]
    return [Asked(caller, *ways[caller % len(ways)]) for caller in range(size)]


async def answers(gateway: Gateway, asked: list[Asked]) -> list[str]:
    async with httpx.AsyncClient(base_url=gateway.url, limits=LIMITS, timeout=100) as client:
        return await asyncio.gather(*(each.answer(client) for each in asked))


def test_two_hundred_streams_at_once_deliver_every_token_in_order(tmp_path: Path) -> None:
    script = Numbers(together=CROWD)

    async def scene() -> None:
        asked = crowd(STREAMS, MODELS, CROWD)
        async with counting(tmp_path, script) as gateway:
            heard = await answers(gateway, asked)
        for each, body in zip(asked, heard, strict=True):
            assert each.address.text_of(body) == numbered_server.text(each.caller, TOKENS), each
            assert [each.address.final(event) for event in events_of(body)].count(True) == 1, each

    asyncio.run(scene())

    assert script.at_once == CROWD


def test_a_crowd_at_every_address_is_answered_with_what_is_its_own(tmp_path: Path) -> None:
    async def scene() -> None:
        asked = crowd(ADDRESSES, ("by-tgi",), 5 * len(ADDRESSES))
        async with counting(tmp_path, Numbers()) as gateway:
            heard = await answers(gateway, asked)
        for each, body in zip(asked, heard, strict=True):
            assert each.address.text_of(body) == numbered_server.text(each.caller, TOKENS), each

    asyncio.run(scene())


PADDING = "x" * 8000
MANY = 2500
"""So many padded tokens are more than all buffers on the way hold: some 20 MB against 4 to 6 for each of three."""
STEADY_TURNS = 50


async def rests(script: Numbers, callers: range) -> None:
    """Return when nothing more was said to these for a while: what is on the way to them is full, or all was said."""
    before, turns = [-1], 0
    while turns < STEADY_TURNS:
        now = [script.said[caller] for caller in callers]
        before, turns = now, turns + 1 if now == before else 0
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("address", STREAMS, ids=lambda address: address.name)
def test_who_reads_slowly_holds_up_its_own_engine_and_nobody_else(tmp_path: Path, address: Address) -> None:
    slow, quick = range(2), range(2, 12)
    script = Numbers(PADDING)
    narrow = httpx.AsyncHTTPTransport(limits=LIMITS, socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)])

    async def scene() -> None:
        async with (
            counting(tmp_path, script) as gateway,
            httpx.AsyncClient(base_url=gateway.url, transport=narrow, timeout=100) as client,
        ):
            path = address.path.format(model="by-tgi")
            bodies = [address.body("by-tgi", f"caller-{caller} counts", MANY) for caller in slow]
            sent = [client.build_request("POST", path, json=body) for body in bodies]
            waiting = [await client.send(each, stream=True) for each in sent]
            await until(lambda: all(script.said[caller] for caller in slow))
            asked = [Asked(caller, address, "by-tgi") for caller in quick]
            heard = await answers(gateway, asked)
            for each, body in zip(asked, heard, strict=True):
                assert address.text_of(body) == numbered_server.text(each.caller, TOKENS, PADDING)

            await rests(script, slow)
            assert max(script.said[caller] for caller in slow) < MANY
            for caller, answer in zip(slow, waiting, strict=True):
                body = (await answer.aread()).decode()
                assert address.text_of(body) == numbered_server.text(caller, MANY, PADDING)

    asyncio.run(scene())
