"""A real gateway with keys: who is answered, and that no key is ever seen."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import httpx
import pytest

from gateway.keys import add_key
from tests.end_to_end.addresses import ADDRESSES, STREAMS, Address, Caller, models_at
from tests.end_to_end.gateway import Gateway, serving
from tests.numbered_server import Numbers
from tests.runtimes.processes import wait_until
from tests.scripted_server import WELL, Conversation, ScriptedServer, refused, scripted
from tests.tgi_double.process import Double

THEIRS, OURS, HUB = "sk-their-own-0123456789", "gw_our-own-0123456789", "hf_our-own-0123456789"
IDLE = {"engine": "openai", "runtime": "external", "url": "http://127.0.0.1:9"}


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_every_address_asks_for_a_key_and_none_is_ever_seen(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    alice = add_key(file, "alice", ["generate"])
    hasty = add_key(file, "hasty", ["generate"], requests_per_minute=1)
    operator = add_key(file, "operator", ["manage"])
    with serving(tmp_path, {"GATEWAY_API_KEYS_FILE": str(file)}, m=IDLE) as gateway:
        assert gateway.get("/health").status_code == gateway.get("/docs/").status_code == 200
        refused = [gateway.get("/models"), gateway.get("/models", **bearer("gw_wrong-key"))]
        assert [(each.status_code, each.headers["www-authenticate"]) for each in refused] == [(401, "Bearer")] * 2
        assert gateway.get("/models", **bearer(alice)).status_code == 200
        lacking = [gateway.post("/models/m/stop/", **bearer(alice)), gateway.get("/models", **bearer(operator))]
        assert [each.json()["error_code"] for each in lacking] == ["FORBIDDEN"] * 2
        assert gateway.post("/models/m/stop", **bearer(operator)).json()["error_code"] == "MODEL_NOT_RUNNING"
        assert gateway.get("/models", **bearer(hasty)).status_code == 200
        limited = gateway.get("/models", **bearer(hasty))
        assert (limited.status_code, limited.json()["error_code"]) == (429, "RATE_LIMITED")
        assert 1 <= int(limited.headers["retry-after"]) <= 60
        process = Path(f"/proc/{gateway.process.pid}")
        seen = (process / "cmdline").read_text() + (process / "environ").read_text()
        seen += "".join(each.text for each in [*refused, *lacking, limited])
    seen += "".join(gateway.log)

    assert " key alice\n" in seen
    assert not [token for token in (alice, hasty, operator, "gw_wrong-key") if token in seen]


# ---- who never sees one ----------------------------------------------------------------------------------------------


def test_no_engine_is_sent_the_callers_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    alice = add_key(file, "alice", ["generate"])

    def ask_everywhere(url: str) -> None:
        models = models_at(url)
        models["by-openai"]["api_key"] = THEIRS
        with serving(tmp_path, {"GATEWAY_API_KEYS_FILE": str(file)}, **models) as gateway:
            for model, addresses in (("by-tgi", ADDRESSES), ("by-openai", STREAMS)):
                for address in addresses:
                    body = address.body(model, "caller-1 counts", 3)
                    answer = gateway.post(address.path.format(model=model), body, **bearer(alice))
                    assert address.text_of(answer.text) == " 1.1 1.2 1.3", address

    async def scene() -> ScriptedServer:
        async with scripted(Numbers()) as (server, port):
            await asyncio.to_thread(ask_everywhere, f"http://127.0.0.1:{port}")
            return server

    server = asyncio.run(scene())
    heads = [*server.requests, *server.checks]
    assert len(server.requests) == sum(each.asks for each in ADDRESSES) + len(STREAMS)
    assert not [head for head in heads if alice.encode() in head]
    shown = [line for head in heads for line in head.split(b"\r\n") if line.lower().startswith(b"authorization:")]
    assert {line.partition(b":")[2].strip() for line in shown} == {f"Bearer {THEIRS}".encode()}


ODD_PATHS = ("/%0A%7B%22a%22:1%7D", "/%E2%80%A8", "/%FF%00%1b[31m", "/models/%22/generate", "/%F0%9F%99%82")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_log_answer_or_process_list_has_a_key(tmp_path: Path, log_format: str) -> None:
    file = tmp_path / "keys.jsonl"
    alice = add_key(file, "alice", ["generate"])
    environ = {
        "GATEWAY_API_KEYS_FILE": str(file),
        "GATEWAY_LOG_FORMAT": log_format,
        "GATEWAY_API_KEY": OURS,
        "HF_TOKEN": HUB,
    }
    wrong = "gw_wrong-key"
    with Double("--max-top-n-tokens", "50") as double:
        model = {"engine": "tgi", "hf_name": "x", "runtime": "external", "url": double.url}
        with serving(tmp_path, environ, m=model) as gateway:
            answers = [gateway.get(path, **bearer(token)) for path in ODD_PATHS for token in (alice, wrong)]
            answers += [gateway.get("/models", authorization=f"Basic {alice}")]
            for address in ADDRESSES:
                body = address.body("m", "say good", 2)
                answers += [gateway.post(address.path.format(model="m"), body, **bearer(t)) for t in (alice, wrong)]
            answers += [gateway.post("/generate", {"model_id": 7, "temperature": "hot"}, **bearer(alice))]
            processes = [gateway.process.pid, *gateway.children()]
            listed = "".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in processes)
        seen = [*double.log, *gateway.log, listed, *(answer.text + str(answer.headers) for answer in answers)]

    assert {answer.status_code for answer in answers} == {200, 401, 404, 422}
    assert not [each for each in seen for key in (alice, wrong, OURS, HUB) if key in each]


@pytest.mark.embedded
def test_a_server_that_the_gateway_starts_has_no_key_of_a_caller(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    alice = add_key(file, "alice", ["generate", "manage"])
    environ = {"GATEWAY_API_KEYS_FILE": str(file), "GATEWAY_API_KEY": OURS, "HF_TOKEN": HUB}
    with serving(tmp_path, environ) as gateway:
        assert gateway.post("/models/m/start", **bearer(alice)).status_code == 200
        [server] = gateway.children()
        seen = [Path(f"/proc/{server}/{what}").read_text() for what in ("cmdline", "environ")]

    assert seen[0]
    assert not [each for each in seen for key in (alice, OURS, HUB) if key in each]


def test_a_log_in_json_names_request_key_and_model_whatever_the_path(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    alice = add_key(file, "alice", ["generate"])
    environ = {"GATEWAY_API_KEYS_FILE": str(file), "GATEWAY_LOG_FORMAT": "json"}
    with Double("--max-top-n-tokens", "50") as double:
        model = {"engine": "tgi", "hf_name": "x", "runtime": "external", "url": double.url}
        with serving(tmp_path, environ, m=model) as gateway:
            for path in ODD_PATHS:
                gateway.get(path, **bearer(alice))
            ids = {address: f"id-{number}" for number, address in enumerate(ADDRESSES)}
            for address, request_id in ids.items():
                tagged = {**bearer(alice), "x-request-id": request_id}
                gateway.post(address.path.format(model="m"), address.body("m", "say good", 2), **tagged)
            gateway.get("/models")
    events = [json.loads(line) for line in gateway.log if not line.startswith("TGI Gateway serves")]
    requests = [event for event in events if event["logger"] == "gateway.access"]

    assert all({"time", "level", "logger", "message"} <= event.keys() for event in events)
    assert [event["path"] for event in requests[: len(ODD_PATHS)]] == [unquote(path) for path in ODD_PATHS]
    for address, event in zip(ids, requests[len(ODD_PATHS) :], strict=False):
        named = {name: event[name] for name in ("request_id", "key", "model", "status", "method")}
        known = {"request_id": ids[address], "key": "alice", "model": "m", "status": 200, "method": "POST"}
        assert named == known, address
    assert requests[-1]["status"] == 401
    assert not {"key", "model"} & requests[-1].keys()


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ADDRESSES, ids=lambda address: address.name)
@pytest.mark.parametrize("leave", [Caller.close, Caller.reset])
def test_who_leaves_gives_the_keys_slot_back(
    narrow: tuple[Gateway, str], address: Address, leave: Callable[[Caller], None]
) -> None:
    gateway, key = narrow
    shown = {"Authorization": f"Bearer {key}"}
    # the request in whose place this one comes may not have been let go of yet
    wait_until(lambda: gateway.get("/models/m", **shown).status_code == 200)
    caller = Caller(gateway.port, address.request("m", "go round and", 50, **shown))
    wait_until(lambda: gateway.get("/models/m", **shown).status_code == 429)
    if address.streams:
        caller.hear(b"data:")
    refused = gateway.post("/generate", {"prompt": "say good"}, **shown)
    assert (refused.status_code, refused.json()["error_code"]) == (429, "RATE_LIMITED")
    assert int(refused.headers["retry-after"]) >= 1
    leave(caller)

    wait_until(lambda: gateway.get("/models/m", **shown).status_code == 200)
    wait_until(lambda: gateway.get("/models/m", **shown).json().get("in_flight") == 0)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, str]]:
    """A gateway with a key that may have one request under way, before an engine that never comes to an end."""
    folder = tmp_path_factory.mktemp("narrow")
    key = add_key(folder / "keys.jsonl", "narrow", ["generate"], max_concurrency=1)
    with Double("--max-top-n-tokens", "50", hangs_after_tokens=3) as double:
        model = {"engine": "tgi", "hf_name": "x", "runtime": "external", "url": double.url}
        with serving(folder, {"GATEWAY_API_KEYS_FILE": str(folder / "keys.jsonl")}, m=model) as gateway:
            yield gateway, key


def test_a_cold_start_does_not_count_against_the_keys_limit_and_work_does(tmp_path: Path) -> None:
    file = tmp_path / "keys.jsonl"
    one, other = add_key(file, "one", ["generate"], max_concurrency=1), add_key(file, "other", ["generate"])

    def ask_everywhere(server: ScriptedServer, port: int, go_on: Callable[[], object]) -> list[str]:
        models = {"m": {"engine": "tgi", "hf_name": "x", "runtime": "external", "url": f"http://127.0.0.1:{port}"}}
        with (
            serving(tmp_path, {"GATEWAY_API_KEYS_FILE": str(file)}, **models) as gateway,
            ThreadPoolExecutor(len(ADDRESSES)) as callers,
        ):

            def ask(address: Address) -> httpx.Response:
                return gateway.post(address.path.format(model="m"), address.body("m", "caller-1 counts", 3), **shown)

            def until_there_are(calls: int, where: str) -> None:
                wait_until(lambda: gateway.get("/models/m", **bearer(other)).json()[where] == calls)

            shown, asked, waiting = bearer(one), 0, []
            for address in ADDRESSES:
                waiting.append(callers.submit(ask, address))
                asked += address.asks
                until_there_are(asked, "queued")
            assert gateway.get("/models/m", **shown).status_code == 200
            server.well = WELL
            until_there_are(asked, "in_flight")
            too_many = [ask(ADDRESSES[0]), gateway.get("/models/m", **shown)]
            assert [(each.status_code, each.json()["error_code"]) for each in too_many] == [(429, "RATE_LIMITED")] * 2
            go_on()
            answers = [address.text_of(each.result().text) for address, each in zip(ADDRESSES, waiting, strict=True)]
            wait_until(lambda: gateway.get("/models/m", **shown).status_code == 200)
            return answers

    async def scene() -> list[str]:
        may_go_on = asyncio.Event()
        numbers, loop = Numbers(), asyncio.get_running_loop()

        async def script(conversation: Conversation) -> None:
            await may_go_on.wait()
            await numbers(conversation)

        async with scripted(script) as (server, port):
            server.well = refused(503, "loading")
            go_on = partial(loop.call_soon_threadsafe, may_go_on.set)
            return await asyncio.to_thread(ask_everywhere, server, port, go_on)

    assert asyncio.run(scene()) == [" 1.1 1.2 1.3"] * len(ADDRESSES)


# ---- pages in a browser ----------------------------------------------------------------------------------------------


def test_a_page_may_read_why_it_was_refused_and_every_stream(tmp_path: Path) -> None:
    origin = "https://chat.example.org"
    file = tmp_path / "keys.jsonl"
    alice = add_key(file, "alice", ["generate"])
    hasty = add_key(file, "hasty", ["generate"], requests_per_minute=1)
    environ = {"GATEWAY_API_KEYS_FILE": str(file), "GATEWAY_CORS_ORIGINS": origin, "GATEWAY_MAX_BODY": "1000"}
    with Double("--max-top-n-tokens", "50") as double:
        model = {"engine": "tgi", "hf_name": "x", "runtime": "external", "url": double.url}
        with serving(tmp_path, environ, m=model) as gateway:

            def ask(path: str, body: object, **headers: str) -> httpx.Response:
                return gateway.post(path, body, origin=origin, **headers)

            said = [
                ask("/generate", {}),
                ask("/models/m/stop", {}, **bearer(alice)),
                ask("/nowhere", {}, **bearer(alice)),
                ask("/generate", {}, **bearer(alice)),
                ask("/generate", {"prompt": "x" * 2000}, **bearer(alice)),
                *(ask("/generate", {}, **bearer(hasty)) for _ in range(2)),
                *(ask(each.path, each.body("m", "say good", 2), **bearer(alice)) for each in STREAMS),
            ]

    assert [each.status_code for each in said[:7]] == [401, 403, 404, 422, 413, 422, 429]
    assert {each.status_code for each in said[7:]} == {200}
    assert {each.headers.get("access-control-allow-origin") for each in said} == {origin}
    assert {each.headers["access-control-expose-headers"] for each in said} == {"X-Request-ID, Retry-After"}


# ---- refused before the body was read --------------------------------------------------------------------------------

LARGE = 3_000_000


@pytest.mark.parametrize("length", [f"Content-Length: {LARGE}", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize(("known", "code"), [(True, b"BODY_TOO_LARGE"), (False, b"UNAUTHORIZED")])
def test_who_is_refused_amid_a_large_body_hears_why(tmp_path: Path, known: bool, code: bytes, length: str) -> None:
    alice = add_key(tmp_path / "keys.jsonl", "alice", ["generate"])
    shown = f"Bearer {alice if known else 'gw_wrong-key'}"
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: {shown}\r\n{length}\r\n\r\n".encode()
    body = b"x" * LARGE
    with serving(tmp_path, {"GATEWAY_API_KEYS_FILE": str(tmp_path / "keys.jsonl")}, m=IDLE) as gateway:
        caller = Caller(
            gateway.port, head + (b"%x\r\n%b\r\n0\r\n\r\n" % (LARGE, body) if "chunked" in length else body)
        )
        caller.hear_all()
        caller.close()

    assert code in caller.heard


def test_who_is_refused_and_never_sends_the_rest_does_not_hold_up_the_end(tmp_path: Path) -> None:
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {LARGE}\r\n\r\n{{".encode()
    with serving(tmp_path, m=IDLE) as gateway:
        caller = Caller(gateway.port, head)
        caller.hear(b"BODY_TOO_LARGE")
        caller.hear_all()
        caller.close()
