"""models.yaml is edited under load, in every way there is, and who streams never notices."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.catalog_file import read_catalog
from gateway.errors import CatalogError
from gateway.serving import catalog_with
from tests import numbered_server
from tests.end_to_end.addresses import STREAMS, Address, Json, models_at
from tests.end_to_end.gateway import EMBEDDED, Gateway, serving
from tests.end_to_end.test_answers import refusal
from tests.end_to_end.test_external import text_of
from tests.numbered_server import CALLER, EVENTS
from tests.runtimes.processes import runs, until, wait_until
from tests.scripted_server import HEAD, Conversation, refused, scripted
from tests.tgi_double.process import Double, free_port

ENOUGH_TOKENS = 20
PACE_S = 0.005


class GoesOn:
    """A script that counts for each caller until it is told that it is enough."""

    def __init__(self) -> None:
        self.said: Counter[int] = Counter()
        self.enough = asyncio.Event()

    async def __call__(self, conversation: Conversation) -> None:
        found = CALLER.search(conversation.body)
        path = conversation.head.split(b" ", 2)[1].decode()
        assert found, conversation.body
        caller = int(found[1])
        await conversation.say(HEAD)
        last = False
        while not last:
            last = self.enough.is_set()
            number = self.said[caller] = self.said[caller] + 1
            said = EVENTS[path](numbered_server.token(caller, number), number, last, 0)
            await conversation.say(b"data: " + json.dumps(said).encode() + b"\n\n")
            await asyncio.sleep(PACE_S)
        await conversation.say(b"data: [DONE]\n\n")


class Says:
    """A script that answers each request with one word, told to go on where it must wait."""

    def __init__(self, word: str) -> None:
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.asked = 0
        self._word = word

    async def __call__(self, conversation: Conversation) -> None:
        self.asked += 1
        path = conversation.head.split(b" ", 2)[1].decode()
        await self.go_on.wait()
        said = EVENTS[path](self._word, 1, True, 0)
        await conversation.say(HEAD + b"data: " + json.dumps(said).encode() + b"\n\ndata: [DONE]\n\n")


class Catalog:
    """The file that a gateway watches, as somebody who edits it sees it."""

    def __init__(self, folder: Path, **models: Json) -> None:
        self.path = folder / "models.yaml"
        self.models = models
        self.default = next(iter(models))

    def save(self, *, without: str = "", **models: Json) -> None:
        """Put a new file in the place of the one before."""
        self.models = {name: entry for name, entry in {**self.models, **models}.items() if name != without}
        new = self.path.with_name("new")
        new.write_text(json.dumps({"default_model": self.default, "models": self.models}))
        new.rename(self.path)

    def spoil(self) -> None:
        """Save over it what no gateway can use, for two reasons."""
        self.path.write_text(json.dumps({"colour": "red", "models": {**self.models, "x": {"engine": "openai"}}}))


def answering(url: str, **keys: Any) -> Json:
    return {"engine": "openai", "url": url, **keys}


@contextmanager
def opened(folder: Path, catalog: Catalog) -> Iterator[Gateway]:
    with serving(folder, **catalog.models) as gateway:
        yield gateway


def said_by(gateway: Gateway, model: str) -> str:
    """Return what a model says, or the code of its refusal."""
    answer = gateway.post("/generate", {"model_id": model, "prompt": "caller-0", "return_full_text": False})
    return str(answer.json().get("generated_text") or answer.json()["error_code"])


def catalog_events(gateway: Gateway) -> Iterator[Json]:
    """Yield the events of the catalog so far, and from now on."""
    with httpx.stream("GET", f"{gateway.url}/events", headers={"last-event-id": "0"}, timeout=20) as answer:
        lines = answer.iter_lines()
        for line in lines:
            if line == "event: catalog":
                yield json.loads(next(lines).removeprefix("data: "))


async def become(condition: Callable[[], object]) -> None:
    """Return when something holds that has to be asked for over HTTP."""
    await asyncio.to_thread(wait_until, condition)


async def heard(gateway: Gateway, address: Address, model: str, caller: int) -> str:
    """Return the text of a stream, read as it comes."""
    body = address.body(model, f"caller-{caller} counts", 2000)
    async with (
        httpx.AsyncClient(base_url=gateway.url, timeout=60) as client,
        client.stream("POST", address.path.format(model=model), json=body) as answer,
    ):
        assert answer.status_code == 200, await answer.aread()
        return address.text_of("".join([piece async for piece in answer.aiter_text()]))


async def edit_in_every_way(gateway: Gateway, catalog: Catalog, first: str, second: str, script: Says) -> None:
    """Add, change, remove, spoil and mend; each time wait until it is seen to hold."""

    def status() -> list[str] | None:
        return gateway.get("/status").json()["catalog_error"]  # type: ignore[no-any-return]

    assert await asyncio.to_thread(said_by, gateway, "new") == "MODEL_NOT_FOUND"

    catalog.save(new=answering(first, aliases=["renewed"]))
    await become(lambda: said_by(gateway, "renewed") == "first")
    assert (await asyncio.to_thread(gateway.get, "/models/new/llm-service/docs")).status_code == 200

    script.go_on.clear()
    before = asyncio.create_task(asyncio.to_thread(said_by, gateway, "new"))
    await until(lambda: script.asked == 2)
    catalog.default = "new"
    catalog.save(new=answering(second, aliases=["newest"]))
    await become(lambda: gateway.model("new")["state"] == "draining")
    script.go_on.set()
    assert await before == "first"  # on the server that it had
    await become(lambda: said_by(gateway, "newest") == "second")
    assert await asyncio.to_thread(said_by, gateway, "renewed") == "MODEL_NOT_FOUND"
    assert (await asyncio.to_thread(gateway.get, "/health")).json()["checkpoint"] == "new"

    for name in ("by-tgi", "by-openai"):  # what concerns the gateway alone, of models that stream
        catalog.models[name] = {**catalog.models[name], "max_queue": 77, "idle_timeout": "1h"}
    catalog.spoil()
    await become(lambda: status() is not None)
    complaints = await asyncio.to_thread(status) or []
    assert any("colour" in each for each in complaints)
    assert any("x: url" in each for each in complaints)
    assert await asyncio.to_thread(said_by, gateway, "newest") == "second"

    catalog.default = "by-tgi"
    catalog.save(without="new")
    await become(lambda: status() is None)
    answer = await asyncio.to_thread(gateway.post, "/generate", {"model_id": "new", "prompt": "caller-0"})
    refusal(answer, 404, "MODEL_NOT_FOUND")
    assert (await asyncio.to_thread(gateway.get, "/models/new/llm-service/docs")).status_code == 404


def test_who_streams_never_notices_that_the_catalog_changes(tmp_path: Path) -> None:
    async def scene() -> None:
        script, first, second = GoesOn(), Says("first"), Says("second")
        async with scripted(script) as (_, port), scripted(first) as (_, one), scripted(second) as (_, two):
            catalog = Catalog(tmp_path, **models_at(f"http://127.0.0.1:{port}"))
            with ExitStack() as stack:
                gateway = await asyncio.to_thread(stack.enter_context, opened(tmp_path, catalog))
                asked = [(address, model) for address in STREAMS for model in catalog.models]
                streams = [
                    asyncio.create_task(heard(gateway, address, model, caller))
                    for caller, (address, model) in enumerate(asked)
                ]
                await until(
                    lambda: sum(script.said[caller] > ENOUGH_TOKENS for caller in range(len(asked))) == len(asked)
                )

                await edit_in_every_way(gateway, catalog, f"http://127.0.0.1:{one}", f"http://127.0.0.1:{two}", first)

                assert not any(stream.done() for stream in streams)
                seen = Counter(script.said)
                await until(lambda: all(script.said[caller] > seen[caller] + ENOUGH_TOKENS for caller in seen))
                script.enough.set()
                for caller, text in enumerate(await asyncio.gather(*streams)):
                    assert text == numbered_server.text(caller, script.said[caller]), asked[caller][0].name
                events = await asyncio.to_thread(lambda: [next(found) for found in [catalog_events(gateway)] * 4])
                await asyncio.to_thread(stack.close)
        assert [(event["added"], event["changed"], event["removed"]) for event in events] == [
            (["new"], [], []),
            ([], ["new"], []),
            ([], [], []),
            ([], ["by-tgi", "by-openai"], ["new"]),
        ]
        assert [event["catalog_error"] is None for event in events] == [True, True, False, True]

    asyncio.run(scene())


@asynccontextmanager
async def never_ready() -> AsyncIterator[Json]:
    """Run a server that loads for ever; yield the entry of a model that it is to serve."""
    async with scripted(Says("never")) as (server, port):
        server.well = refused(503, "it loads")
        url = f"http://127.0.0.1:{port}"
        yield {"engine": "tgi", "hf_name": "never-ready", "runtime": "external", "url": url}


def test_who_waits_gets_what_the_changed_entry_asks_for_if_it_can_have_that(tmp_path: Path) -> None:
    """A model gets another engine while callers wait for it."""
    ask = {"inputs": "caller-0", "parameters": {"max_new_tokens": 5}}

    async def scene() -> None:
        async with never_ready() as loading, scripted(Says("here")) as (_, port):
            catalog = Catalog(tmp_path, m=loading)
            with ExitStack() as stack:
                gateway = await asyncio.to_thread(stack.enter_context, opened(tmp_path, catalog))
                translated = asyncio.create_task(asyncio.to_thread(said_by, gateway, "m"))
                put_through = asyncio.create_task(asyncio.to_thread(gateway.post, "/models/m/tgi/generate", ask))
                await become(lambda: gateway.model()["queued"] == 2)

                catalog.save(m=answering(f"http://127.0.0.1:{port}"))

                assert await translated == "here"
                answer = await put_through
                assert answer.status_code == 503, answer.text
                assert "has another engine now" in answer.json()["error"]
                again = await asyncio.to_thread(gateway.post, "/models/m/tgi/generate", ask)
                assert again.json()["generated_text"] == "here"
                await asyncio.to_thread(stack.close)

    asyncio.run(scene())


def test_a_model_is_removed_while_a_request_waits_for_it(tmp_path: Path) -> None:
    async def scene() -> None:
        async with never_ready() as loading:
            catalog = Catalog(tmp_path, other=answering("http://127.0.0.1:9"), gone=loading)
            with ExitStack() as stack:
                gateway = await asyncio.to_thread(stack.enter_context, opened(tmp_path, catalog))
                ask = {"prompt": "a", "model_id": "gone"}
                waiting = asyncio.create_task(asyncio.to_thread(gateway.post, "/generate", ask))
                await become(lambda: gateway.model("gone")["queued"] == 1)
                catalog.save(without="gone")
                assert "no longer in the catalog" in refusal(await waiting, 404, "MODEL_NOT_FOUND")
                await asyncio.to_thread(stack.close)

    asyncio.run(scene())


def test_a_model_that_cannot_start_is_mended_in_the_file(tmp_path: Path) -> None:
    keys = {"engine": "tgi", "hf_name": "x", "runtime": "external"}
    with Double() as double:
        catalog = Catalog(tmp_path, m={**keys, "url": f"http://127.0.0.1:{free_port()}"})
        with opened(tmp_path, catalog) as gateway:
            for _ in range(2):
                refusal(gateway.post("/generate", {"prompt": "a"}), 503, "START_FAILED")
            catalog.save(m={**keys, "url": double.url})
            wait_until(lambda: gateway.post("/generate", {"prompt": "a"}).status_code == 200)


@pytest.mark.embedded
def test_processes_come_and_go_with_their_entries_beside_one_that_generates(tmp_path: Path) -> None:
    ask = {"model_id": "m", "prompt": "Once upon a time", "max_new_tokens": 250, "temperature": 0}
    alone = {**EMBEDDED, "hf_name": "another"}
    catalog = Catalog(tmp_path, m={**EMBEDDED, "aliases": [str(EMBEDDED["hf_name"]), str(EMBEDDED["weights"])]})
    with opened(tmp_path, catalog) as gateway:
        undisturbed = text_of(gateway, **ask)
        (own,) = gateway.children()

        async def scene() -> None:
            disturbed = asyncio.create_task(asyncio.to_thread(text_of, gateway, **ask))
            await become(lambda: gateway.model()["in_flight"] == 1)
            catalog.save(second={**alone, "preload": True})
            await become(lambda: "ready" in gateway.get("/models/second").text)
            (second,) = set(gateway.children()) - {own}
            catalog.save(second={**alone, "preload": True, "context_tokens": 1024})
            await become(lambda: not runs(second))
            await become(lambda: gateway.model("second")["state"] == "ready")
            (third,) = set(gateway.children()) - {own}
            catalog.save(without="second")
            await become(lambda: not runs(third))
            assert await disturbed == undisturbed

        asyncio.run(scene())
        assert gateway.children() == [own]


def test_the_checkpoint_that_serve_was_given_stays_the_default(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path, a=answering("http://h"), b=answering("http://h"))
    catalog.save()
    assert catalog_with(catalog.path, {}, "b").default_model == "b"
    catalog.save(c=answering("http://h"))
    assert catalog_with(catalog.path, {}, "b", read_catalog(catalog.path)).default_model == "b"
    catalog.save(without="b")
    with pytest.raises(CatalogError, match="--checkpoint: there is no model 'b'"):
        catalog_with(catalog.path, {}, "b")


def test_a_pipe_in_place_of_the_catalog_is_told_of_and_the_gateway_ends_when_asked(tmp_path: Path) -> None:
    idle = {"engine": "openai", "runtime": "external", "url": "http://127.0.0.1:9"}
    with serving(tmp_path, m=idle) as gateway:
        (tmp_path / "models.yaml").unlink()
        os.mkfifo(tmp_path / "models.yaml")
        wait_until(lambda: any("no regular file" in line for line in list(gateway.log)))
        assert gateway.get("/models/m").status_code == 200
