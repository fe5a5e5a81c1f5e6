"""Those who call, against servers with bad manners; and what is measured from outside, against a real gateway.

How long anything takes is not asserted: only that a wait which was surely there is not left out.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.bench import cold, relay
from tests.bench.answers import CHAT, COMPLETION, TGI_STREAM
from tests.bench.callers import Target, ask, at_fixed_rate, read_streams
from tests.bench.machine import CannotMeasure, cores, running, until_up
from tests.bench.rivals import GENERATE, KINDS, Place, direct
from tests.bench.upstream import upstream
from tests.runtimes.processes import runs, wait_until
from tests.tgi_double.process import answers, free_port

needs_nginx = pytest.mark.skipif(not shutil.which("nginx"), reason="there is no nginx on this machine")
needs_wrk = pytest.mark.skipif(not shutil.which("wrk"), reason="there is no wrk on this machine")

Manners = Callable[[BaseHTTPRequestHandler, int], None]


@contextmanager
def server(manners: Manners) -> Iterator[int]:
    """Run a server that answers each request, given with its number, by its manners; yield its port."""
    lock, came = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body go out in one piece

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            with lock:
                came[0] += 1
            manners(self, came[0])

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

    with Quiet(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield listener.server_port
        finally:
            listener.shutdown()
            thread.join()


def answer(to: BaseHTTPRequestHandler, status: int = 200) -> None:
    to.send_response(status)
    to.send_header("content-length", "2")
    to.end_headers()
    to.wfile.write(b"ok")


def test_a_stall_shows_in_every_request_that_it_held_up() -> None:
    def stall_once(to: BaseHTTPRequestHandler, number: int) -> None:
        time.sleep(0.5 if number == 5 else 0)
        answer(to)

    with server(stall_once) as port:
        found = at_fixed_rate(Target(port, "/"), connections=1, rate_per_s=100, seconds=1)

    assert len(found.took_ms) == 100
    assert found.failed == 0
    assert sum(took_ms > 100 for took_ms in found.took_ms) >= 35  # a closed loop would have seen one


def test_an_error_and_a_connection_that_breaks_count_as_failed() -> None:
    def unsteady(to: BaseHTTPRequestHandler, number: int) -> None:
        if number == 3:
            to.close_connection = True
            return
        answer(to, status=500 if number == 2 else 200)

    with server(unsteady) as port:
        found = at_fixed_rate(Target(port, "/"), connections=2, rate_per_s=50, seconds=0.2)

    assert (len(found.took_ms), found.failed) == (10, 2)


def test_who_answers_with_an_error_is_not_measured() -> None:
    with server(lambda to, _: answer(to, status=404)) as port, pytest.raises(CannotMeasure, match="/x is answered so"):
        ask(Target(port, "/x"))


def test_nobody_there_is_no_answer() -> None:
    with pytest.raises(CannotMeasure, match="/x is not answered"):
        ask(Target(free_port(), "/x"))


def test_a_program_that_ends_at_once_is_not_waited_for(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", "print('no such flag')"]
    with running(command, log, cores().others) as process, pytest.raises(CannotMeasure, match="it ended: no such flag"):
        until_up("it", lambda: False, process, log, 20)


def test_a_program_that_never_is_up_is_waited_for_within_a_bound_and_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", "import time; time.sleep(1000)"]
    with running(command, log, cores().others) as process, pytest.raises(CannotMeasure, match="not up within"):
        until_up("it", lambda: False, process, log, 0.1)

    assert not runs(process.pid)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TGI_STREAM, b'{"inputs": "x", "parameters": {"max_new_tokens": 5}}'),
        (COMPLETION, b'{"max_tokens": 5}'),
        (CHAT, b'{"max_tokens": 5}'),
    ],
)
def test_every_token_of_every_stream_is_read(path: str, body: bytes, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "paced.log"
    command = [sys.executable, "-m", "tests.bench.paced_server", str(port), "100"]
    with running(command, log, cores().others) as process:
        wait_until(lambda: answers(port) or process.poll() is not None)
        read = read_streams(Target(port, path, body), 3, 1.0, warm_up_s=0.0, spread_s=0.01)
        late = ask(Target(port, "/late", method="GET"))

    assert (read.tokens, read.ended, len(read.late_ms)) == (15, 3, 15)
    assert all(late_ms > 0 for late_ms in read.late_ms)
    assert b"late_p99_ms" in late


@needs_nginx
def test_the_upstream_answers_every_kind_of_request_as_it_is_asked(tmp_path: Path) -> None:
    on = cores()
    with upstream(tmp_path, 3, on.others) as behind, direct(Place(tmp_path, behind, on.tested)) as nobody:
        assert nobody.pids == []
        for address in (GENERATE, CHAT):
            whole, streamed, paced = (ask(nobody.target(address, kind, 3)) for kind in KINDS)
            assert b" word0 word1 word2" in whole
            assert b"data: " not in whole
            assert streamed.count(b"data: {") == 3
            assert paced.count(b"data: {") == 3


@needs_nginx
@needs_wrk
def test_the_gateway_is_measured_beside_nobody_in_every_kind_of_answer() -> None:
    plan = relay.Plan(
        runs=1, seconds=1, contestants=("direct", "gateway"), addresses=(GENERATE,), connections=(1, 2), streams=(2,)
    )

    measured = relay.measure(plan, cores(), lambda _: None)

    assert measured.missing == {}
    results = measured.results
    assert results.contestants == ["direct", "gateway"]
    measured_in = [(case.kind, case.connections) for case in results.cases]
    assert measured_in == [("whole", 1), ("whole", 2), ("streamed", 1), ("streamed", 2), ("paced", 2)]
    for case in results.cases:
        calm = results.median("direct", case, "calm_p50_ms")
        assert (calm is not None) is (case.connections == 1)
        assert results.median("gateway", case, "failed") == 0
        assert (results.median("gateway", case, "rss_mib") or 0) > 0
        assert results.median("direct", case, "rss_mib") is None


def test_a_cold_start_is_seen_at_the_server() -> None:
    found = cold.measure(2, cores(), lambda _: None)

    assert len(found) == 2
    assert all(each.to_start_ms > 0 and each.to_request_ms > 0 for each in found)
