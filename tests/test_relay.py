"""One exchange over real sockets: a caller, the relay, and a server that does what each test tells it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from gateway.api import problems
from gateway.api.autotrain import autotrain_router
from gateway.api.generate import generate_router
from gateway.api.hot_routes import HotRoutes
from gateway.api.inference import inference_router
from gateway.api.llm_service import llm_service_router
from gateway.api.middleware import RequestLog
from gateway.api.openai import openai_router
from gateway.api.reports import Reports
from gateway.api.tgi import tgi_router
from gateway.catalog import Catalog
from gateway.connection import CallersConnection
from gateway.engines.base import Engine
from gateway.engines.llamacpp import LlamaCpp
from gateway.engines.openai import OpenAi
from gateway.engines.tgi import Tgi
from gateway.errors import StartFailed
from gateway.fleet.fleet import Fleet
from gateway.fleet.instance import Instance
from gateway.fleet.journal import Journal
from gateway.probe import HttpProbe
from gateway.runtimes.base import Exit, Found, Handle, Launch, Listener
from gateway.upstream import HttpClient
from tests.fleet.scenes import spec
from tests.scripted_server import HEAD, Conversation, Script, ScriptedServer, end, scripted, token

ASK = {"prompt": "Once", "max_new_tokens": 3}


class AtAnAddress:
    """A runtime whose servers run already, at ports that a test gives: the next start takes the next port."""

    name: ClassVar[str] = "process"
    outlives: ClassVar[bool] = False

    def __init__(self, *ports: int) -> None:
        self.ports = list(ports)
        self.ends: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()

    async def find(self) -> list[Found]:
        return []

    async def adopt(self, found: Found, listener: Listener) -> Handle:
        raise StartFailed("nothing is ever found")

    async def check(self, launch: Launch) -> None:
        pass

    async def start(self, launch: Launch, listener: Listener) -> Handle:
        port = self.ports.pop(0) if len(self.ports) > 1 else self.ports[0]
        self.ends = asyncio.get_running_loop().create_future()
        return Handle(launch.name, f"http://127.0.0.1:{port}", port, "a test's own")

    async def ended(self, handle: Handle) -> Exit:
        return await asyncio.shield(self.ends)

    async def stop(self, name: str, *, grace_s: float) -> None:
        pass

    async def logs(self, name: str, *, lines: int, follow: bool) -> AsyncIterator[str]:
        yield ""

    async def aclose(self) -> None:
        pass


class Stage:
    """A gateway before scripted servers."""

    def __init__(self, instance: Instance, server: ScriptedServer, runtime: AtAnAddress, url: str) -> None:
        self.instance = instance
        self.server = server
        self.runtime = runtime
        self.url = url

    async def post(self, address: str, body: object) -> httpx.Response:
        async with httpx.AsyncClient(timeout=20) as client:
            return await client.post(f"{self.url}{address}", json=body)

    async def ask(self, **fields: Any) -> httpx.Response:
        return await self.post("/generate", {**ASK, **fields})

    async def stream(self, **fields: Any) -> list[str]:
        answer = await self.ask(stream=True, **fields)
        return [line for line in answer.text.split("\n\n") if line]

    async def nothing_is_held(self) -> None:
        async with asyncio.timeout(5):
            while self.instance.status.in_flight or self.instance.status.queued:
                await asyncio.sleep(0.005)


@asynccontextmanager
async def stage(script: Script, *other_ports: int, **keys: Any) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        server, port = await stack.enter_async_context(scripted(script))
        runtime, client = AtAnAddress(*other_ports, port), HttpClient()
        model = spec(**keys)
        catalog = Catalog(path=Path("models.yaml"), default_model="m", models={"m": model})
        engines: dict[str, Engine] = {"llamacpp": LlamaCpp(), "openai": OpenAi(), "tgi": Tgi()}
        runtimes = {"process": runtime, "external": runtime}
        fleet = Fleet(catalog, engines, runtimes, HttpProbe(client), Journal(lambda: 0.0))
        app = FastAPI()
        problems.install(app)
        reports = Reports(fleet, "1", device="auto")
        routers = (
            generate_router(fleet, client),
            inference_router(fleet, client),
            autotrain_router(fleet, client),
            llm_service_router(fleet, client, reports),
            openai_router(fleet, client),
            tgi_router(fleet, client, reports),
        )
        for router in routers:
            app.include_router(router)
        app.add_middleware(HotRoutes, routes=[route for router in routers for route in router.routes])
        app.add_middleware(RequestLog)
        config = uvicorn.Config(app, http=CallersConnection, port=0, log_config=None, lifespan="off", access_log=False)
        serving = uvicorn.Server(config)
        task = asyncio.create_task(serving.serve())
        while not serving.started:
            await asyncio.sleep(0.005)
        url = f"http://127.0.0.1:{serving.servers[0].sockets[0].getsockname()[1]}"
        try:
            instance = fleet.get(model)
            assert isinstance(instance, Instance)
            yield Stage(instance, server, runtime, url)
        finally:
            await fleet.aclose()
            serving.should_exit = True
            await task
            await client.aclose()


async def two_tokens(conversation: Conversation) -> None:
    await conversation.say(HEAD + token(" upon") + token(" a", 2) + end(2))


def test_a_whole_answer() -> None:
    async def scene() -> None:
        async with stage(two_tokens) as on:
            answer = await on.ask()

            assert answer.json()["generated_text"] == "Once upon a"
            assert b"x-request-id: " + answer.headers["x-request-id"].encode() in on.server.requests[0].lower()
            await on.nothing_is_held()

    asyncio.run(scene())


def test_the_status_of_an_early_failure_is_not_lost_to_a_stream() -> None:
    async def refuse(conversation: Conversation) -> None:
        error = {"code": 400, "message": "too long", "type": "exceed_context_size_error"}
        body = json.dumps({"error": {**error, "n_prompt_tokens": 9, "n_ctx": 4}}).encode()
        await conversation.say(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    async def scene() -> None:
        async with stage(refuse) as on:
            answer = await on.ask(stream=True)

            assert (answer.status_code, answer.json()["error_code"]) == (400, "PROMPT_TOO_LONG")

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_breaks_off_before_its_first_token_is_502(stream: bool) -> None:
    async def break_off(conversation: Conversation) -> None:
        await conversation.say(HEAD)

    async def scene() -> None:
        async with stage(break_off) as on:
            answer = await on.ask(stream=stream)

            assert (answer.status_code, answer.json()["error_code"]) == (502, "UPSTREAM_FAILED")
            assert len(on.server.requests) == 1  # what was sent is not sent again
            await on.nothing_is_held()

    asyncio.run(scene())


def test_a_stream_that_breaks_off_ends_with_one_error_event_and_no_final_frame() -> None:
    async def break_off(conversation: Conversation) -> None:
        await conversation.say(HEAD + token(" upon"))

    async def scene() -> None:
        async with stage(break_off) as on:
            first, last = await on.stream()
            whole = await on.ask()

            assert json.loads(first[6:])["token"]["text"] == " upon"
            assert json.loads(last[6:])["error_code"] == "GENERATION_FAILED"
            assert (whole.status_code, whole.json()["error_code"]) == (500, "GENERATION_FAILED")

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
def test_a_silent_server_is_given_up_at_the_generation_timeout(stream: bool) -> None:
    async def say_nothing(conversation: Conversation) -> None:
        await asyncio.get_running_loop().create_future()

    async def scene() -> None:
        async with stage(say_nothing, generation_timeout="200ms") as on:
            answer = await on.ask(stream=stream)

            assert (answer.status_code, answer.json()["error_code"]) == (504, "GENERATION_TIMEOUT")
            await asyncio.wait_for(on.server.left.wait(), 5)
            await on.nothing_is_held()

    asyncio.run(scene())


def test_a_stream_may_last_longer_than_the_time_between_two_events() -> None:
    async def slowly(conversation: Conversation) -> None:
        await conversation.say(HEAD)
        for number in range(1, 7):
            await asyncio.sleep(0.1)
            await conversation.say(token("x", number))
        await conversation.say(end(6))

    async def scene() -> None:
        async with stage(slowly, generation_timeout="400ms") as on:
            frames = await on.stream(max_new_tokens=6)
            whole = await on.ask(max_new_tokens=6)

            assert json.loads(frames[-1][6:])["generated_text"] == "xxxxxx"
            assert whole.json()["error_code"] == "GENERATION_TIMEOUT"

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("said", [b"", HEAD, HEAD + token(" upon")])
def test_the_connection_to_the_server_is_closed_when_the_caller_leaves(stream: bool, said: bytes) -> None:
    heard = asyncio.Event()

    async def go_on(conversation: Conversation) -> None:
        await conversation.say(said)
        heard.set()
        await asyncio.get_running_loop().create_future()

    async def scene() -> None:
        async with stage(go_on) as on:
            asked = asyncio.create_task(on.ask(stream=stream))
            await asyncio.wait_for(heard.wait(), 5)
            asked.cancel()

            await asyncio.wait_for(on.server.left.wait(), 5)
            await on.nothing_is_held()

    asyncio.run(scene())


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_whose_body_is_large_is_heard_leaving_too(stream: bool) -> None:
    heard = asyncio.Event()

    async def be_silent(conversation: Conversation) -> None:
        await conversation.say(HEAD)
        heard.set()
        await asyncio.get_running_loop().create_future()

    async def scene() -> None:
        async with stage(be_silent) as on, asyncio.timeout(10):
            body = json.dumps({**ASK, "prompt": "once " * 40_000, "stream": stream}).encode()
            head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", int(on.url.rpartition(":")[2]))
            writer.write(f"{head}Content-Type: application/json\r\nExpect: 100-continue\r\n\r\n".encode())
            await reader.readuntil(b"\r\n\r\n")  # its body is waited for by now
            writer.write(body)
            await heard.wait()
            writer.close()

            await on.server.left.wait()
            await on.nothing_is_held()

    asyncio.run(scene())


def test_a_request_that_reached_nobody_is_sent_to_the_next_server() -> None:
    async def scene() -> None:
        async with AsyncExitStack() as first:
            _, port = await first.enter_async_context(scripted(two_tokens))
            async with stage(two_tokens, port) as on:
                await on.instance.start()
                await first.aclose()  # it has ended, and the gateway learns of it only a moment later
                asyncio.get_running_loop().call_later(0.03, on.runtime.ends.set_result, Exit(1, "exit status 1"))
                answer = await on.ask()

                assert answer.status_code == 200
                assert len(on.server.requests) == 1

    asyncio.run(scene())


def test_a_server_that_takes_no_connection_is_502() -> None:
    async def scene() -> None:
        async with AsyncExitStack() as first:
            _, port = await first.enter_async_context(scripted(two_tokens))
            async with stage(two_tokens, port) as on:
                await on.instance.start()
                await first.aclose()
                answer = await on.ask()

                assert (answer.status_code, answer.json()["error_code"]) == (502, "UPSTREAM_FAILED")
                assert on.server.requests == []

    asyncio.run(scene())


def test_a_forced_stop_ends_a_stream_with_words() -> None:
    heard = asyncio.Event()

    async def go_on(conversation: Conversation) -> None:
        await conversation.say(HEAD + token(" upon"))
        heard.set()
        await asyncio.get_running_loop().create_future()

    async def scene() -> None:
        async with stage(go_on) as on:
            frames = asyncio.create_task(on.stream())
            await asyncio.wait_for(heard.wait(), 5)
            await asyncio.sleep(0.05)
            await on.instance.stop(force=True)

            assert json.loads((await frames)[-1][6:])["error_code"] == "GENERATION_FAILED"

    asyncio.run(scene())
