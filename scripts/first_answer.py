"""What `scripts/quickstart` runs once everything is installed: serve, ask one question, show the answer."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from gateway.client import GatewayRefused, GatewayUnreachable, InferenceClient

ROOT = Path(__file__).parent.parent
QUESTION = "The capital of France is"
ANSWER_S = 100.0
EXIT_S = 30.0

NEXT = """
The gateway serves at {url} until you press Ctrl-C. Try next, in another terminal:

  curl -X POST {url}/generate -H 'Content-Type: application/json' -d '{{"prompt": "Once upon a time"}}'
  .venv/bin/gateway generate smollm2-135m 'Once upon a time' --stream{option}
  .venv/bin/gateway models{option}
  {url}/docs in a browser; models.yaml for models of your own
"""


def main(check: bool) -> int:
    with tempfile.TemporaryFile("w+") as log:
        status = quickstart(check, log)
        if check and status:
            log.seek(0)
            sys.stderr.write(log.read())
    return status


def quickstart(check: bool, log: IO[str]) -> int:
    """Return the status. A check keeps the gateway's log, to be shown if it fails; else it goes to the terminal."""
    gateway = subprocess.Popen(
        command(check),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=log if check else None,
        text=True,
    )
    try:
        url = address(gateway)
        if url is None or not answers(url):
            return 1
        if check:
            return 0
        option = "" if url.endswith(":8000") else f" --url {url}"
        print(NEXT.format(url=url, option=option), flush=True)
        return gateway.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        end(gateway)


def command(check: bool) -> list[str]:
    """Return how to serve. A check takes any free port, so that it runs beside a gateway that serves already."""
    return [sys.executable, "-m", "gateway", "serve", *(["--port", "0"] if check else [])]


def environment() -> dict[str, str]:
    """Return the environment, but with the shipped catalog."""
    return {**os.environ, "GATEWAY_CATALOG": str(ROOT / "models.yaml")}


def address(gateway: subprocess.Popen[str]) -> str | None:
    """Return the URL that the gateway prints when it serves; None if it ends instead, having said why."""
    assert gateway.stdout is not None
    for line in gateway.stdout:
        if found := re.search(r"https?://[^\s/]+", line):
            return found[0]
    print("GATEWAY_PORT=8001 scripts/quickstart would serve at another port.", file=sys.stderr)
    return None


def answers(url: str) -> bool:
    """Ask the question, show the answer, and say whether there was one."""
    print(f"Question: {QUESTION}", flush=True)
    began = time.monotonic()
    try:
        with InferenceClient(url, timeout_s=ANSWER_S) as client:
            text = client.generate(QUESTION, max_new_tokens=12, temperature=0)["generated_text"]
    except (GatewayRefused, GatewayUnreachable) as error:
        print(f"No answer: {error}", file=sys.stderr)
        return False
    print(f"Answer:   {text}\n({time.monotonic() - began:.1f} s, the start of the model included)", flush=True)
    return bool(text.removeprefix(QUESTION).strip())


def end(gateway: subprocess.Popen[str]) -> None:
    """End the gateway as Ctrl-C does; the model's process goes with it even if it has to be killed."""
    gateway.send_signal(signal.SIGTERM)
    try:
        gateway.wait(EXIT_S)
    except subprocess.TimeoutExpired:
        gateway.kill()
        gateway.wait()
    if gateway.stdout:
        gateway.stdout.close()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    sys.exit(main(check="--check" in sys.argv[1:]))
