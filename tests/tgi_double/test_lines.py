from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.tgi_double.log import Log
from tests.tgi_double.process import Double

PHASES = [
    "Args {",
    "Using attention",
    "Starting check and download process for org/toy",
    "Download: [1/2] -- ETA: 0:00:00",
    "Download: [2/2] -- ETA: 0",
    "Successfully downloaded weights for org/toy",
    "Starting shard",
    "Waiting for shard to be ready...",
    "Shard ready in ",
    "Starting Webserver",
    "Warming up model",
    "Setting max batch total tokens to",
    "Connected",
]


def positions(lines: list[str]) -> list[int]:
    return [next(number for number, line in enumerate(lines) if words in line) for words in PHASES]


def ask(double: Double) -> None:
    httpx.post(f"{double.url}/generate", json={"inputs": "say good", "parameters": {"seed": 1}}).raise_for_status()


def test_text_lines_tell_the_phases_in_order_and_each_request() -> None:
    with Double("--model-id", "org/toy", shard_s=0.1, download_s=0.1, warmup_s=0.1) as double:
        ask(double)
        success = double.wait_for_line("GenerateParameters")
    assert positions(double.log) == sorted(positions(double.log))
    shard = double.wait_for_line("Starting shard")
    assert shard.endswith("  INFO shard-manager: text_generation_launcher: Starting shard rank=0")
    warm = double.wait_for_line("Warming up")
    assert warm.endswith("  INFO text_generation_router_v3: backends/v3/src/lib.rs:125: Warming up model")
    assert " INFO generate{parameters=GenerateParameters { " in success
    assert 'seed="None"}: text_generation_router::server: router/src/server.rs:' in success
    assert "say good" not in "".join(double.log)


def test_json_lines_have_two_shapes_one_for_the_launcher_and_one_for_the_router() -> None:
    with Double("--model-id", "org/toy", "--num-shard", "2", "--json-output", shard_s=0.1) as double:
        ask(double)
        double.wait_for_line("GenerateParameters")
    lines: list[dict[str, Any]] = [json.loads(line) for line in double.log]
    messages = [line.get("message") or line["fields"]["message"] for line in lines]
    assert positions(messages) == sorted(positions(messages))
    launcher = [line for line in lines if line["target"] == "text_generation_launcher"]
    router = [line for line in lines if line["target"] != "text_generation_launcher"]
    assert all(set(line) <= {"timestamp", "level", "fields", "target", "span", "spans"} for line in launcher)
    assert all({"timestamp", "level", "message", "target", "filename", "line_number"} <= set(line) for line in router)
    ready = [line["span"] for line in launcher if line["fields"]["message"].startswith("Shard ready in")]
    assert ready == [{"rank": 0, "name": "shard-manager"}, {"rank": 1, "name": "shard-manager"}]
    assert "Sharding model on 2 processes" in messages
    assert lines[messages.index("Success")]["span"]["name"] == "generate"


def test_files_that_are_there_are_not_downloaded() -> None:
    with Double("--model-id", "org/toy", cached=True) as double:
        double.wait_for_line("Connected")
    assert any("Files are already present on the host. Skipping download." in line for line in double.log)
    assert not any("Download:" in line for line in double.log)


def test_text_is_coloured_without_a_terminal_and_the_routers_switch_is_the_wrong_way_round(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = ("text_generation_router::server", "router/src/server.rs", 1)
    switches: list[dict[str, str]] = [{}, {"NO_COLOR": "1"}, {"LOG_COLORIZE": "1"}]
    for variables in switches:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            log = Log(as_json=False)
        log.launcher("words")
        log.router("words", place)
    colored = ["\x1b[" in line for line in capsys.readouterr().out.splitlines()]
    assert colored == [True, True, False, True, True, False]


def test_a_silent_one_says_nothing_and_serves() -> None:
    with Double(silent=True) as double:
        ask(double)
        assert double.stop() == 0
    assert double.log == []
