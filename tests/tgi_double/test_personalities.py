from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.tgi_double.process import COLORS, Double, answers, run

LONG = {"inputs": "go round and", "parameters": {"max_new_tokens": 1000}}
SHORT = {"inputs": "say good", "parameters": {"max_new_tokens": 2}}

FAILED_STARTS = [
    ("gated", "Cannot access gated repo", "DownloadError"),
    ("not-granted", "you are not in the authorized list", "DownloadError"),
    ("bad-token", "Invalid credentials in Authorization header", "DownloadError"),
    ("no-repository", "RepositoryNotFoundError: 401 Client Error", "DownloadError"),
    ("network", "Temporary failure in name resolution", "DownloadError"),
    ("disk-full", "No space left on device", "DownloadError"),
    ("download-killed", "Download process was signaled to shutdown with signal 9", "DownloadError"),
    ("oom-load", "OutOfMemoryError: CUDA out of memory", "ShardCannotStart"),
    ("no-gpu", "Found no NVIDIA driver", "ShardCannotStart"),
    ("no-flash-attention", "requires Flash Attention enabled models", "ShardCannotStart"),
    ("quantization", "quantize 'exl2' is not supported", "ShardCannotStart"),
    ("model-type", "ValueError: Unsupported model type toy", "ShardCannotStart"),
    ("remote-code", "trust_remote_code=True", "ShardCannotStart"),
    ("one-gpu-per-process", "AssertionError: Each process is one gpu", "ShardCannotStart"),
    ("shard-killed", "Shard process was signaled to shutdown with signal 9", "ShardCannotStart"),
    ("illegal-instruction", "Shard process was signaled to shutdown with signal 4", "ShardCannotStart"),
    ("oom-warmup", "Error: Backend(Warmup(Generation(", "WebserverFailed"),
    ("oom-warmup-prefill", "You need to decrease `--max-batch-prefill-tokens`", "WebserverFailed"),
    ("limits", "Error: ArgumentValidation(", "WebserverFailed"),
    ("tokenizer", 'Tokenizer("Unable to load tokenizer.")', "WebserverFailed"),
    ("port-taken", "Failed to bind to 0.0.0.0:3000: Address already in use (os error 98)", "WebserverFailed"),
    ("too-few-gpus", "", 'NotEnoughCUDADevices("`sharded` is true but only found 2 CUDA devices")'),
]


def read_all(url: str, body: dict[str, Any]) -> tuple[bytes, Exception | None]:
    """Return what came of a stream, and how it broke if it did."""
    came = b""
    try:
        with httpx.stream("POST", f"{url}/generate_stream", json=body, timeout=20) as answer:
            for chunk in answer.iter_raw():
                came += chunk
    except httpx.TransportError as error:
        return came, error
    return came, None


@contextmanager
def opened(url: str, body: dict[str, Any]) -> Iterator[Iterator[bytes]]:
    """Hold a stream open after its first bytes."""
    with httpx.stream("POST", f"{url}/generate_stream", json=body, timeout=20) as answer:
        chunks = answer.iter_raw()
        next(chunks)
        yield chunks


def wait_for_metric(double: Double, line: str) -> None:
    deadline = time.monotonic() + 20
    while line not in httpx.get(f"{double.url}/metrics").text.splitlines():
        assert time.monotonic() < deadline, f"{line} never came to hold"
        time.sleep(0.01)


@pytest.mark.parametrize(("name", "words", "variant"), FAILED_STARTS)
def test_a_start_fails_in_tgis_words_with_its_variant_and_status_1(name: str, words: str, variant: str) -> None:
    ended = run("--model-id", "org/toy", fails=name, env={"NVIDIA_VISIBLE_DEVICES": "0,1"})
    assert ended.returncode == 1
    assert words in COLORS.sub("", ended.stdout)
    assert ended.stderr == f"Error: {variant}\n"


def test_the_lines_of_a_failure_are_json_but_for_the_last_words() -> None:
    for name in ("gated", "oom-load"):
        ended = run("--model-id", "org/toy", "--json-output", fails=name)
        errors = [line for line in map(json.loads, ended.stdout.splitlines()) if line["level"] == "ERROR"]
        assert "Traceback" in errors[0]["fields"]["message"]
    router = run("--json-output", fails="oom-warmup").stdout.splitlines()
    assert next(line for line in router if not line.startswith("{")).startswith("Error: Backend(")


def test_one_killed_by_the_host_says_nothing_more() -> None:
    ended = run(fails="killed")
    assert ended.returncode == -signal.SIGKILL
    assert "Error" not in ended.stdout + ended.stderr


def test_a_port_that_is_taken_ends_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        ended = run("--hostname", "127.0.0.1", "--port", str(other.getsockname()[1]))
    assert ended.returncode == 1
    assert "Failed to bind to 127.0.0.1" in ended.stdout


def test_nothing_listens_while_it_loads() -> None:
    with Double(endless=True, waits=False) as double:
        double.wait_for_line("Starting shard")
        assert not answers(double.port)


def test_each_phase_takes_its_time() -> None:
    phases: list[tuple[dict[str, Any], str, str]] = [
        ({"download_s": 60}, "Download file", "Downloaded"),
        ({"shard_s": 60}, "Starting shard", "Shard ready"),
        ({"warmup_s": 60}, "Warming up model", "Connected"),
    ]
    for slow, reached, before in phases:
        with Double(waits=False, **slow) as double:
            double.wait_for_line(reached)
        assert not any(before in line for line in double.log)


def test_memory_that_ends_fails_all_in_flight_and_then_the_server() -> None:
    with Double(token_s=0.05, oom_after_tokens=20) as double:
        with opened(double.url, LONG) as first, opened(double.url, LONG) as second:
            ends = [b"".join(chunks).split(b"\n\n")[-2] for chunks in (first, second)]
        assert double.wait() == 1
    for end in ends:
        error = json.loads(end.removeprefix(b"data: "))
        assert error["error_type"] == "generation"
        assert error["error"].startswith("Request failed during generation: ")
    assert double.log[-1] == "Error: ShardFailed"
    assert any(line.endswith("Shard 0 crashed") for line in double.log)


def test_memory_that_ends_is_a_424_for_a_caller_without_a_stream() -> None:
    with Double(oom_after_tokens=2) as double:
        answer = httpx.post(f"{double.url}/generate", json=LONG)
        assert (answer.status_code, answer.json()["error_type"]) == (424, "generation")
        assert double.wait() == 1


def test_one_that_dies_in_mid_stream_cuts_it_and_is_gone() -> None:
    with Double(dies_after_tokens=3) as double:
        came, broken = read_all(double.url, LONG)
        assert double.wait() == -signal.SIGKILL
    assert came.count(b"data: ") <= 3
    assert broken is not None


def test_a_connection_cut_in_mid_stream_is_all_that_happens() -> None:
    with Double(cuts_after_tokens=3) as double:
        came, broken = read_all(double.url, LONG)
        assert came.count(b"data: ") <= 3
        assert isinstance(broken, httpx.RemoteProtocolError | httpx.ReadError)
        assert httpx.post(f"{double.url}/generate", json=SHORT).status_code == 200


def test_a_hanging_generation_is_kept_alive_and_ends_when_its_caller_leaves() -> None:
    with Double("--max-concurrent-requests", "1", hangs_after_tokens=2, keep_alive_s=0.02) as double:
        with opened(double.url, LONG) as chunks:
            came = b""
            while b"\n\n:\n\n" not in came:
                came += next(chunks)
            overloaded = httpx.post(f"{double.url}/generate", json=SHORT)
            assert overloaded.status_code == 429
        wait_for_metric(double, "tgi_batch_current_size 0")
        assert httpx.post(f"{double.url}/generate", json=SHORT).status_code == 200


def test_it_tells_when_callers_leave_if_it_is_to_and_of_nobody_who_was_answered() -> None:
    for tells in (True, False):
        with Double(hangs_after_tokens=3, tells_aborts=tells) as double:
            httpx.post(f"{double.url}/generate", json=SHORT, timeout=20)
            before_s = time.monotonic()
            with opened(double.url, LONG):
                pass
            wait_for_metric(double, 'tgi_request_failure{err="dropped"} 1')
            double.stop()
        assert len(double.aborted_at) == tells
        assert all(before_s <= at_s <= time.monotonic() for at_s in double.aborted_at)


def test_one_above_its_limit_is_overloaded_and_several_prompts_count_as_several() -> None:
    with Double("--max-concurrent-requests", "1") as double:
        answer = httpx.post(f"{double.url}/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 1})
        assert answer.status_code == 429
        assert answer.json() == {"error": "Model is overloaded", "error_type": "overloaded"}
        best_of = {"inputs": "The", "parameters": {"best_of": 2, "do_sample": True}}
        assert httpx.post(f"{double.url}/generate", json=best_of).status_code == 429
        assert httpx.post(f"{double.url}/generate", json=SHORT).status_code == 200


def test_an_overloaded_one_refuses_at_once_in_streams_too() -> None:
    with Double(overloaded=True) as double:
        assert httpx.post(f"{double.url}/generate", json=SHORT).status_code == 429
        assert read_all(double.url, SHORT)[0] == b'data: {"error":"Model is overloaded","error_type":"overloaded"}\n\n'
        assert httpx.get(f"{double.url}/health").status_code == 200


def test_one_that_speaks_garbage_is_no_tgi_but_looks_healthy() -> None:
    with Double(garbage=True) as double:
        assert httpx.post(f"{double.url}/generate", json=SHORT).headers["content-type"] == "text/html"
        assert httpx.get(f"{double.url}/health").status_code == 200


def test_a_hanging_health_check_answers_again_when_it_recovers() -> None:
    with Double(health_hangs_after_s=0, health_recovers_after_s=0.5) as double:
        assert httpx.get(f"{double.url}/health", timeout=20).status_code == 200
        assert httpx.post(f"{double.url}/generate", json=SHORT).status_code == 200
    with Double(health_hangs_after_s=0) as double, pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{double.url}/health", timeout=0.1)


def test_an_unhealthy_one_says_503_in_json() -> None:
    with Double(health_fails_after_s=0) as double:
        answer = httpx.get(f"{double.url}/health")
    assert (answer.status_code, answer.json()) == (503, {"error": "unhealthy", "error_type": "healthcheck"})


def test_one_asked_to_stop_finishes_what_it_has_and_takes_no_more() -> None:
    with Double(token_s=0.005) as double:
        body = {"inputs": "go round and", "parameters": {"max_new_tokens": 40}}
        with opened(double.url, body) as chunks:
            double.terminate()
            double.wait_for_line("signal received, starting graceful shutdown")
            while answers(double.port):
                time.sleep(0.001)
            rest = b"".join(chunks)
        assert double.wait() == 0
    assert b'"generated_text":" round' in rest
    words = ["Terminating webserver", "webserver terminated", "Shutting down shards", "shard terminated"]
    places = [next(number for number, line in enumerate(double.log) if each in line) for each in words]
    assert places == sorted(places)


def test_what_does_not_finish_in_time_is_cut() -> None:
    with Double("--graceful-termination-timeout", "0", hangs_after_tokens=1) as double:
        with opened(double.url, LONG) as chunks:
            double.terminate()
            with pytest.raises(httpx.TransportError):
                list(chunks)
        assert double.wait() == 0


@pytest.mark.parametrize(
    ("slow", "reached", "said"),
    [
        ({"download_s": 60}, "Download file", "download terminated"),
        ({"shard_s": 60}, "Starting shard", "shard terminated"),
        ({"warmup_s": 60}, "Warming up model", "webserver terminated"),
    ],
)
def test_one_asked_to_stop_while_it_loads_ends_with_0(slow: dict[str, Any], reached: str, said: str) -> None:
    with Double(waits=False, **slow) as double:
        double.wait_for_line(reached)
        assert double.stop() == 0
    assert any(said in line for line in double.log)


def test_one_that_ignores_sigterm_serves_on() -> None:
    with Double(ignores_sigterm=True) as double:
        double.terminate()
        assert httpx.post(f"{double.url}/generate", json=SHORT).status_code == 200
        assert double.process.poll() is None


def test_one_that_is_slow_to_stop_does_not_listen_meanwhile() -> None:
    with Double(stop_s=60) as double:
        double.terminate()
        double.wait_for_line("starting graceful shutdown")
        while answers(double.port):
            time.sleep(0.001)
        assert double.process.poll() is None


def test_many_callers_are_served_at_once() -> None:
    with Double(token_s=0.01) as double:
        statuses: list[int] = []

        def call() -> None:
            statuses.append(httpx.post(f"{double.url}/generate", json=SHORT, timeout=20).status_code)

        callers = [threading.Thread(target=call) for _ in range(20)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert statuses == [200] * 20
