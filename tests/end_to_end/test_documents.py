"""The examples of the README and of the API reference work as written, but for the address and the models' names."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.settings import Settings
from tests.end_to_end.gateway import EMBEDDED, Gateway, serving

pytestmark = pytest.mark.embedded

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    gpt2 = {**EMBEDDED, "hf_name": "gpt2", "aliases": [EMBEDDED["weights"]]}
    models: dict[str, Any] = {"smollm2-135m": EMBEDDED, "gpt-2": gpt2}
    with serving(tmp_path_factory.mktemp("models"), **models) as running:
        yield running


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def examples() -> list[str]:
    """Return the README's commands that talk to a running gateway; tests/test_compose.py has those of Compose."""
    commands = [block for block in blocks("bash") if "docker compose" not in block]
    return [block for block in commands if "curl" in block or ".venv/bin/gateway" in block]


def test_the_readme_has_examples_to_test() -> None:
    assert len(examples()) == 3
    assert len(blocks("python")) == 1


@pytest.mark.parametrize("example", examples())
def test_a_command_of_the_readme_works(gateway: Gateway, example: str) -> None:
    command = example.replace("http://127.0.0.1:8000", gateway.url).replace(
        ".venv/bin/gateway", f"{sys.executable} -m gateway"
    )
    done = subprocess.run(
        ["bash", "-ec", command],
        env={**os.environ, "GATEWAY_URL": gateway.url},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "error_code" not in done.stdout
    assert done.stdout.strip()


def test_the_python_of_the_readme_works(gateway: Gateway) -> None:
    [program] = blocks("python")
    program = program.replace("http://127.0.0.1:8000", gateway.url)

    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_the_quickstart_answers_and_ends() -> None:
    done = subprocess.run(
        ["scripts/quickstart", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )

    assert done.returncode == 0, done.stderr
    assert "The capital of France is Paris" in done.stdout


def test_the_quickstart_refuses_what_it_does_not_know() -> None:
    done = subprocess.run(
        ["scripts/quickstart", "--chek"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 2
    assert "usage" in done.stderr


def test_the_readme_names_every_environment_variable() -> None:
    names = {f"GATEWAY_{name.upper()}" for name in Settings.model_fields} - {
        "GATEWAY_MAX_BODY_BYTES",
        "GATEWAY_HF_TOKEN",
    }

    assert {name for name in {*names, "GATEWAY_MAX_BODY", "HF_TOKEN"} if f"`{name}`" not in README} == set()


def test_the_api_references_python_example(gateway: Gateway) -> None:
    async def generate() -> Any:
        async with httpx.AsyncClient(timeout=60) as client:
            response = await client.post(
                f"{gateway.url}/generate", json={"model_id": "gpt-2", "prompt": "What is AI?", "max_new_tokens": 100}
            )
            return response.json()

    answer = asyncio.run(generate())

    assert answer["model_id"] == "gpt-2"
    assert answer["generated_text"].startswith("What is AI?")


def test_the_api_references_curl_examples(gateway: Gateway) -> None:
    body = '{\n    "model_id": "gpt-2",\n    "prompt": "Hello world",\n    "max_new_tokens": 50\n  }'
    listed = subprocess.run(["curl", "-s", f"{gateway.url}/models"], capture_output=True, timeout=60, check=True)
    generated = subprocess.run(
        ["curl", "-s", "-X", "POST", f"{gateway.url}/generate", "-H", "Content-Type: application/json", "-d", body],
        capture_output=True,
        timeout=60,
        check=True,
    )

    first = json.loads(listed.stdout)["models"][1]
    assert {"id", "name", "hf_name", "running"} <= first.keys()
    assert (first["id"], first["hf_name"]) == ("gpt-2", "gpt2")
    assert json.loads(generated.stdout)["generated_text"].startswith("Hello world")


@pytest.mark.parametrize("model_id", ["gpt-2"])
def test_the_api_references_start_and_stop(gateway: Gateway, model_id: str) -> None:
    started = gateway.post(f"/models/{model_id}/start")
    again = gateway.post(f"/models/{model_id}/start")
    stopped = gateway.post(f"/models/{model_id}/stop")
    stopped_again = gateway.post(f"/models/{model_id}/stop")

    assert started.json().keys() == {"message", "port", "container_name"}
    assert again.json()["port"] == started.json()["port"]
    assert stopped.json() == {"message": f"Container for {model_id} stopped"}
    assert (stopped_again.status_code, stopped_again.json()["error_code"]) == (404, "MODEL_NOT_RUNNING")
