"""README's nginx, run as it is written, but for its ports and the place of its certificate."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import ssl
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from gateway.keys import add_key
from tests.end_to_end.addresses import STREAMS, Address, events_of, models_at
from tests.end_to_end.gateway import serving
from tests.numbered_server import Numbers, asked_for, text, tgi, token
from tests.runtimes.processes import wait_until
from tests.scripted_server import HEAD, Conversation, Script, ScriptedServer, scripted
from tests.tgi_double.process import answers, free_port
from tests.tls import certificate_in

README = Path(__file__).parent.parent.parent / "README.md"
SHELL = """\
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{server}
}}
"""
ASK = {"model_id": "by-tgi", "prompt": "caller-1 counts", "max_new_tokens": 5, "temperature": 0}
Scene = Callable[[httpx.AsyncClient, ScriptedServer], Awaitable[None]]

needs_nginx = pytest.mark.skipif(not shutil.which("nginx"), reason="there is no nginx on this machine")


def snippet() -> str:
    [block] = re.findall(r"^```nginx\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    return str(block)


@contextmanager
def nginx(folder: Path, gateway_port: int) -> Iterator[str]:
    """Run nginx as README has it before the gateway at this port; yield its address. Its certificate is `folder`'s."""
    port, certificate = free_port(), certificate_in(folder)
    server = snippet().replace("listen 443 ssl", f"listen 127.0.0.1:{port} ssl")
    server = re.sub(r"/etc/ssl/\S+\.(pem|key);", f"{certificate};", server)
    server = server.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{gateway_port}")
    config = folder / "nginx.conf"
    config.write_text(SHELL.format(folder=folder, server=server))
    process = subprocess.Popen(["nginx", "-p", str(folder), "-c", str(config)], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers(port) or process.poll() is not None)
        assert process.poll() is None, (folder / "error.log").read_text()
        yield f"https://127.0.0.1:{port}/llm"
    finally:
        process.terminate()
        process.wait(20)


def play(folder: Path, script: Script, scene: Scene, **environ: str) -> None:
    """Play a scene of a client that knows nginx only, and of the engine's server behind the gateway behind it."""

    @contextmanager
    def house(url: str) -> Iterator[str]:
        with (
            serving(folder, {"GATEWAY_ROOT_PATH": "/llm", **environ}, **models_at(url)) as gateway,
            nginx(folder, gateway.port) as address,
        ):
            yield address

    async def all_of_it() -> None:
        async with scripted(script) as (server, port):
            running = house(f"http://127.0.0.1:{port}")
            address = await asyncio.to_thread(running.__enter__)
            try:
                trusted = ssl.create_default_context(cafile=folder / "certificate.pem")
                async with httpx.AsyncClient(base_url=address, verify=trusted, timeout=20) as client:
                    await scene(client, server)
            finally:
                await asyncio.to_thread(running.__exit__, None, None, None)

    asyncio.run(all_of_it())


def test_the_readme_has_what_server_sent_events_need_of_nginx() -> None:
    said = {line.split("#")[0].strip() for line in snippet().splitlines()}

    assert {"proxy_buffering off;", "proxy_http_version 1.1;", "proxy_read_timeout 30m;", "gzip off;"} <= said
    assert snippet().count("{") == snippet().count("}") == 2


@needs_nginx
@pytest.mark.parametrize("address", STREAMS, ids=lambda address: address.name)
def test_every_token_is_through_before_the_next_one_is_made(tmp_path: Path, address: Address) -> None:
    heard = asyncio.Semaphore(1)

    async def one_at_a_time(conversation: Conversation) -> None:
        tokens, top = asked_for(json.loads(conversation.body))
        await conversation.say(HEAD)
        for number in range(1, tokens + 1):
            await heard.acquire()
            said = tgi(token(1, number), number, number == tokens, top)
            await conversation.say(b"data: " + json.dumps(said).encode() + b"\n\n")

    async def scene(client: httpx.AsyncClient, _: ScriptedServer) -> None:
        body = address.body("by-tgi", "caller-1 counts", 5)
        pieces = []
        async with client.stream("POST", address.path, json=body) as answer:
            assert answer.status_code == 200
            lines = answer.aiter_lines()
            async for line in lines:
                pieces += [piece for event in events_of(line) if (piece := address.text(event))]
                if events_of(line):
                    heard.release()
        assert "".join(pieces) == text(1, 5)

    play(tmp_path, one_at_a_time, scene)


@needs_nginx
@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_nginx_leaves_the_engine(tmp_path: Path, stream: bool) -> None:
    begun = asyncio.Event()

    async def hang(conversation: Conversation) -> None:
        said = b"data: " + json.dumps(tgi(" a", 1, False, 0)).encode() + b"\n\n"
        await conversation.say(HEAD + said)
        begun.set()
        await asyncio.Event().wait()

    async def scene(client: httpx.AsyncClient, server: ScriptedServer) -> None:
        asking = asyncio.create_task(client.post("/generate", json={**ASK, "stream": stream}))
        async with asyncio.timeout(20):
            await begun.wait()
            asking.cancel()
            await server.left.wait()

    play(tmp_path, hang, scene)


@needs_nginx
def test_keys_ids_pages_and_limits_are_the_gateways_own(tmp_path: Path) -> None:
    alice = add_key(tmp_path / "keys.jsonl", "alice", ["generate"])

    async def scene(client: httpx.AsyncClient, server: ScriptedServer) -> None:
        stranger = await client.post("/generate", json={"prompt": "x" * 1_900_000})
        assert stranger.json()["error_code"] == "UNAUTHORIZED"
        pages = [(await client.get(page)).text for page in ("/docs", "/models/by-tgi/llm-service/docs")]
        for page, document in zip(
            pages, ("/llm/openapi.json", "/llm/models/by-tgi/llm-service/openapi.json"), strict=True
        ):
            assert document in page
            assert (await client.get(document.removeprefix("/llm"))).status_code == 200

        client.headers.update({"authorization": f"Bearer {alice}", "x-request-id": "mine"})
        answer = await client.post("/generate/", json={**ASK, "return_full_text": False})
        assert (answer.json()["generated_text"], answer.headers["x-request-id"]) == (text(1, 5), "mine")
        assert b"x-request-id: mine" in server.requests[0].lower()
        too_large = await client.post("/generate", json={"prompt": "x" * 2_020_000})
        assert too_large.json()["error_code"] == "BODY_TOO_LARGE"

    play(tmp_path, Numbers(), scene, GATEWAY_API_KEYS_FILE=str(tmp_path / "keys.jsonl"))
