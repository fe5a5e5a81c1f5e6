"""A gateway with the embedded model, seen from outside: starts, crowds, leavers, and its own end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.gateway import EMBEDDED, Gateway, catalog, serving
from tests.runtimes.processes import runs, wait_until

pytestmark = pytest.mark.embedded


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with serving(tmp_path_factory.mktemp("gateway")) as running:
        yield running


def test_a_hundred_cold_callers_start_one_process_and_all_get_text(tmp_path: Path) -> None:
    with serving(tmp_path) as gateway:
        limits = httpx.Limits(max_connections=None)
        with httpx.Client(base_url=gateway.url, timeout=100, limits=limits) as client, ThreadPoolExecutor(100) as crowd:

            def ask(number: int) -> httpx.Response:
                return client.post("/generate", json={"prompt": f"{number} is a number that", "max_new_tokens": 20})

            answers = list(crowd.map(ask, range(100)))

        assert [answer.status_code for answer in answers] == [200] * 100
        for number, answer in enumerate(answers):
            text = answer.json()["generated_text"]
            assert text.startswith(f"{number} is a number that")
            assert len(text) > len(f"{number} is a number that")
            assert 1 <= answer.json()["tokens_generated"] <= 20
        assert gateway.moves().count("starting") == 1
        assert len(gateway.children()) == 1
        assert gateway.model()["in_flight"] == gateway.model()["queued"] == 0


def send(gateway: Gateway, *, stream: bool, tokens: int = 1500) -> socket.socket:
    """Send a generation request over a socket of our own, to leave whenever we like."""
    body = json.dumps({"prompt": "Count: 1, 2, 3,", "max_new_tokens": tokens, "temperature": 0.9, "stream": stream})
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", gateway.port))
    connection.sendall((head + body).encode())
    return connection


def nothing_is_held(gateway: Gateway) -> bool:
    model = gateway.model()
    return bool(model["in_flight"] == 0 and model["queued"] == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_while_the_model_loads_leaves_nothing(tmp_path: Path, stream: bool) -> None:
    with serving(tmp_path) as gateway:
        caller = send(gateway, stream=stream)
        wait_until(lambda: gateway.model()["queued"] == 1)
        caller.close()

        wait_until(lambda: nothing_is_held(gateway))


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_while_queued_leaves_nothing(tmp_path: Path, stream: bool) -> None:
    with serving(tmp_path, m={**EMBEDDED, "max_concurrency": 1}) as gateway:
        gateway.post("/models/m/start")
        busy = send(gateway, stream=True)
        wait_until(lambda: gateway.model()["in_flight"] == 1)
        queued = send(gateway, stream=stream)
        wait_until(lambda: gateway.model()["queued"] == 1)
        queued.close()

        wait_until(lambda: gateway.model()["queued"] == 0)
        assert gateway.model()["in_flight"] == 1
        busy.close()
        wait_until(lambda: nothing_is_held(gateway))
        wait_until(lambda: gateway.slots_busy() == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_before_the_first_token_or_amid_the_answer_frees_lease_and_slot(
    gateway: Gateway, stream: bool
) -> None:
    gateway.post("/models/m/start")
    before_the_first_token = send(gateway, stream=stream)
    before_the_first_token.close()
    wait_until(lambda: nothing_is_held(gateway) and gateway.slots_busy() == 0)

    caller = send(gateway, stream=stream)
    wait_until(lambda: gateway.slots_busy() == 1)
    if stream:
        assert caller.recv(100).startswith(b"HTTP/1.1 200")
    caller.close()

    wait_until(lambda: nothing_is_held(gateway))
    wait_until(lambda: gateway.slots_busy() == 0)


def test_a_stream_has_one_event_a_token_and_ends_with_the_whole_text(gateway: Gateway) -> None:
    body = {"prompt": "The capital of France is", "max_new_tokens": 8, "temperature": 0}
    whole = gateway.post("/generate", {**body, "return_full_text": False}).json()

    with httpx.stream("POST", f"{gateway.url}/generate_stream", json=body, timeout=60) as answer:
        frames = [json.loads(line[5:]) for line in answer.iter_lines() if line.startswith("data:")]
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-accel-buffering"] == "no"

    assert [frame["index"] for frame in frames] == list(range(1, 9))
    assert "".join(frame["token"]["text"] for frame in frames) == whole["generated_text"]
    assert [frame["generated_text"] for frame in frames] == [None] * 7 + [whole["generated_text"]]
    assert frames[-1]["details"]["finish_reason"] == "length"


def test_a_stop_drains_and_the_next_request_starts_the_model_again(gateway: Gateway) -> None:
    started = gateway.post("/models/m/start").json()
    assert started["container_name"] == "tgi-m"
    assert started["port"] == gateway.model()["port"]

    assert gateway.post("/models/m/stop").json() == {"message": "Container for m stopped"}
    assert gateway.model()["state"] == "stopped"
    assert gateway.children() == []
    assert gateway.post("/generate", {"prompt": "Hello", "max_new_tokens": 2}).status_code == 200
    assert "listening on" in gateway.get("/models/m/logs").text


def test_sigterm_finishes_what_runs_although_an_event_stream_is_open(tmp_path: Path) -> None:
    gateway = Gateway(catalog(tmp_path, m=EMBEDDED))
    try:
        gateway.post("/models/m/start")
        servers = gateway.children()
        heard: list[str] = []
        answers: list[httpx.Response] = []

        def listen() -> None:
            from_the_first = {"last-event-id": "0"}
            with httpx.stream("GET", f"{gateway.url}/events", headers=from_the_first, timeout=60) as events:
                heard.extend(events.iter_lines())

        def ask() -> None:
            answers.append(gateway.post("/generate", {"prompt": "Once", "max_new_tokens": 100}))

        threads = [threading.Thread(target=listen), threading.Thread(target=ask)]
        for thread in threads:
            thread.start()
        wait_until(lambda: heard)
        wait_until(lambda: gateway.model()["in_flight"] == 1)
    finally:
        status = gateway.end(signal.SIGTERM)
    for thread in threads:
        thread.join(30)

    assert status == 0
    assert [answer.status_code for answer in answers] == [200]
    assert any('"to":"draining"' in line for line in heard)
    assert not any(runs(pid) for pid in servers)


def test_sigterm_cuts_what_outlasts_the_drain_limit(tmp_path: Path) -> None:
    gateway = Gateway(catalog(tmp_path, m={**EMBEDDED, "drain_timeout": "500ms"}))
    try:
        gateway.post("/models/m/start")
        servers = gateway.children()
        endless = send(gateway, stream=True)
        wait_until(lambda: gateway.model()["in_flight"] == 1)
    finally:
        status = gateway.end(signal.SIGTERM)
    received = b""
    while chunk := endless.recv(65536):
        received += chunk
    endless.close()

    assert status == 0
    assert b"GENERATION_FAILED" in received
    assert not any(runs(pid) for pid in servers)


@pytest.mark.parametrize("when", ["serving", "loading"])
def test_kill_9_of_the_gateway_leaves_no_process(tmp_path: Path, when: str) -> None:
    gateway = Gateway(catalog(tmp_path, m=EMBEDDED))
    try:
        if when == "serving":
            gateway.post("/models/m/start")
        else:
            gateway.post("/models/m/start?wait=false")
            wait_until(gateway.children)
        servers = gateway.children()
    finally:
        status = gateway.end(signal.SIGKILL)

    assert status == -signal.SIGKILL
    assert len(servers) == 1
    wait_until(lambda: not any(runs(pid) for pid in servers))


def test_a_server_that_is_killed_is_noticed_and_the_next_request_heals_it(gateway: Gateway) -> None:
    gateway.post("/models/m/start")
    [server] = gateway.children()
    os.kill(server, signal.SIGKILL)

    wait_until(lambda: gateway.model()["state"] == "failed")
    error = gateway.model()["last_error"]
    assert "SIGKILL" in error["detail"]
    assert gateway.post("/generate", {"prompt": "Hello", "max_new_tokens": 2}).status_code == 200


def events_after(gateway: Gateway, last_event_id: int, wanted: int) -> list[dict[str, Any]]:
    headers = {"last-event-id": str(last_event_id)}
    found: list[dict[str, Any]] = []
    with httpx.stream("GET", f"{gateway.url}/events", headers=headers, timeout=20) as events:
        for line in events.iter_lines():
            if line.startswith("id: "):
                found.append({"id": int(line[4:])})
            elif line.startswith("event: "):
                found[-1]["event"] = line[7:]
            elif line.startswith("data: "):
                found[-1].update(json.loads(line[6:]))
                if len(found) == wanted:
                    return found
    return found


def test_events_are_numbered_and_replayed(gateway: Gateway) -> None:
    gateway.post("/models/m/start")

    first = events_after(gateway, 0, wanted=3)
    again = events_after(gateway, first[0]["id"], wanted=2)

    assert first[0]["event"] == "state"
    assert first[0].keys() >= {"model", "from", "to", "at", "reason"}
    assert [event["id"] for event in first] == [1, 2, 3]
    assert again == first[1:]


def test_half_a_body_does_not_hold_up_the_end(tmp_path: Path) -> None:
    gateway = Gateway(catalog(tmp_path, m=EMBEDDED))
    half = socket.create_connection(("127.0.0.1", gateway.port))
    try:
        head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        half.sendall(head + b"{")
        gateway.get("/health")
    finally:
        status = gateway.end(signal.SIGTERM)
    answer = half.recv(65536)
    half.close()

    assert status == 0
    assert b"SHUTTING_DOWN" in answer
    assert "timeout graceful shutdown exceeded" not in "".join(gateway.log)
    assert "Traceback" not in "".join(gateway.log)


def test_a_caller_who_does_not_read_does_not_hold_up_the_end(tmp_path: Path) -> None:
    gateway = Gateway(catalog(tmp_path, m={**EMBEDDED, "drain_timeout": "500ms"}))
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.connect(("127.0.0.1", gateway.port))
    try:
        requests = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 400
        deaf.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while sent := deaf.send(requests):
                requests = requests[sent:] or b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 1000
        gateway.get("/health")
    finally:
        status = gateway.end(signal.SIGTERM)
    deaf.close()

    assert status == 0
    assert "timeout graceful shutdown exceeded" not in "".join(gateway.log)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 0), (signal.SIGINT, 128 + signal.SIGINT)])
def test_who_asks_twice_for_the_end_gets_it_with_words_for_those_who_are_cut(
    tmp_path: Path, number: int, expected: int
) -> None:
    gateway = Gateway(catalog(tmp_path, m=EMBEDDED))
    try:
        gateway.post("/models/m/start")
        servers = gateway.children()
        endless = send(gateway, stream=True)
        wait_until(lambda: gateway.model()["in_flight"] == 1)
        gateway.process.send_signal(number)
        wait_until(lambda: "draining" in gateway.moves())
    finally:
        status = gateway.end(number)
    received = b""
    while chunk := endless.recv(65536):
        received += chunk
    endless.close()

    assert status == expected
    assert b"GENERATION_FAILED" in received
    wait_until(lambda: not any(runs(pid) for pid in servers))
