from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import httpx
import pytest

from tests.tgi_double import launcher
from tests.tgi_double.failures import FAILURES
from tests.tgi_double.personality import Personality
from tests.tgi_double.process import Double, run


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu-memory", "1"], "error: unexpected argument '--gpu-memory' found"),
        (["stray"], "error: unexpected argument 'stray' found"),
        (["--port", "high"], "error: invalid value 'high' for '--port <PORT>': invalid digit found in string"),
        (["--port"], "error: a value is required for '--port <PORT>' but none was supplied"),
        (["--quantize", "int3"], "error: invalid value 'int3' for '--quantize <QUANTIZE>'\n  [possible values: awq,"),
    ],
)
def test_a_bad_command_line_is_told_in_claps_words_with_status_2(flags: list[str], words: str) -> None:
    ended = run(*flags)
    assert ended.returncode == 2
    assert ended.stderr.startswith(words)
    assert "For more information, try '--help'." in ended.stderr
    assert ended.stdout == ""


def test_a_misspelt_personality_is_an_error_and_not_a_healthy_server() -> None:
    assert run(tokens_s=1).returncode == 2
    assert "DOUBLE_TOKEN_S" in run(tokens_s=1).stderr
    assert "gated" in run(fails="everything").stderr
    assert "is no number" in run(token_s="slow").stderr


def test_every_variable_and_every_failure_is_in_the_table_at_the_top() -> None:
    table = launcher.__doc__ or ""
    assert set(re.findall(r"DOUBLE_\w+", table)) == {f"DOUBLE_{each.name.upper()}" for each in fields(Personality)}
    assert set(FAILURES) <= set(re.findall(r"[\w-]+", table))


def test_flags_may_be_variables_and_the_command_line_wins() -> None:
    env = {"MODEL_ID": "org/variable", "MAX_TOP_N_TOKENS": "7", "PORT": "1", "HOSTNAME": "f00d"}
    with Double("--max-client-batch-size=9", "--hostname", "127.0.0.1", env=env) as double:
        info = httpx.get(f"{double.url}/info").json()
    assert (info["model_id"], info["max_client_batch_size"]) == ("org/variable", 9)


def test_a_forgotten_model_is_bloom(double: Double) -> None:
    with Double() as forgotten:
        assert httpx.get(f"{forgotten.url}/info").json()["model_id"] == "bigscience/bloom-560m"


def test_it_takes_every_flag_that_a_launch_has() -> None:
    flags = (
        "--model-id a/b --num-shard 2 --json-output --usage-stats off --max-top-n-tokens 50 --revision abc "
        "--max-concurrent-requests 8 --max-total-tokens 2048 --quantize fp8 --dtype float16 --trust-remote-code"
    )
    with Double(*flags.split()) as double:
        info = httpx.get(f"{double.url}/info").json()
    assert (info["max_concurrent_requests"], info["max_total_tokens"], info["model_sha"]) == (8, 2048, "abc")


@pytest.mark.parametrize(
    ("flags", "variant"),
    [
        (["--max-input-tokens", "9", "--max-total-tokens", "9"], "ArgumentValidation("),
        (["--max-input-tokens", "9", "--max-input-length", "9"], "ArgumentValidation("),
        (["--validation-workers", "0"], "ArgumentValidation("),
        (["--sharded", "true", "--num-shard", "1"], "ArgumentValidation("),
    ],
)
def test_flags_that_do_not_go_together_end_it_with_1(flags: list[str], variant: str) -> None:
    ended = run(*flags)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"Error: {variant}")


def test_the_other_program_downloads_and_ends() -> None:
    ended = run("download-weights", "org/toy", "--revision", "main", files=3)
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[-1] == "Download: [3/3] -- ETA: 0"
    gated = run("download-weights", "org/toy", "--json-output", fails="gated")
    assert gated.returncode == 1
    assert "Cannot access gated repo for url https://huggingface.co/api/models/org/toy." in gated.stderr
    assert '"text": "Download file: ' in gated.stdout
    assert run("download-weights", "org/toy", fails="oom-load").returncode == 0


def test_what_was_downloaded_once_is_there_the_next_time(tmp_path: Path) -> None:
    env = {"HF_HOME": str(tmp_path)}
    assert "Downloaded" in run("download-weights", "org/toy", env=env).stdout
    again = run("download-weights", "org/toy", env=env).stdout
    assert again == "Files are already present on the host. Skipping download.\n"
    assert "Downloaded" in run("download-weights", "org/toy", "--revision", "other", env=env).stdout
    with Double("--model-id", "org/toy", env=env) as double:
        assert double.wait_for_line("already present")
