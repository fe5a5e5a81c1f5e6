"""The contestants: nobody, nginx, LiteLLM and this gateway, each one process tree on the core of its own.

What one has to do is what it would do in earnest: nginx writes its access log and knows no keys; LiteLLM asks for its
key, writes its access log, and is asked at `/v1/completions` for what is `/generate` elsewhere, the nearest that it
has, and at a pass-through endpoint for TGI's own address. The gateway asks for keys with limits, keeps metrics and
writes its access log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.keys import MOST, add_key
from tests.bench.answers import CHAT, COMPLETION, PROMPT, TGI_STREAM
from tests.bench.arithmetic import Kind
from tests.bench.callers import Target, ask
from tests.bench.machine import PYTHON, CannotMeasure, running, tree, until_up
from tests.bench.upstream import UP_S, Upstream, nginx
from tests.tgi_double.process import answers, free_port

GENERATE = "/generate"
TGI = "/models/{id}/tgi"
ADDRESSES = (GENERATE, CHAT, TGI)
LITELLM_UP_S = 180.0
LITELLM_KEY = "sk-bench"
INSTALL_S = 900.0
KINDS: tuple[Kind, ...] = ("whole", "streamed", "paced")


@dataclass(frozen=True)
class Contestant:
    """One that runs now. `pid` is the root of its process tree; None where there is none."""

    name: str
    pid: int | None
    target: Callable[[str, Kind, int], Target]
    """Makes the request for an address, a kind of answer and a number of tokens."""

    @property
    def pids(self) -> list[int]:
        return tree(self.pid) if self.pid else []


@dataclass(frozen=True)
class Place:
    """Where a contestant is to run."""

    folder: Path
    upstream: Upstream
    core: frozenset[int]


Rival = Callable[[Place], AbstractContextManager[Contestant]]


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


# ---- nobody, and nginx ----


def _as_upstream(ports: dict[Kind, int]) -> Callable[[str, Kind, int], Target]:
    """Return what makes requests for one that speaks as the upstream does."""

    def target(address: str, kind: Kind, tokens: int) -> Target:
        if address == CHAT:
            return Target(ports[kind], CHAT, _chat("m", kind, tokens))
        body = _json({"inputs": PROMPT, "parameters": {"max_new_tokens": tokens}})
        return Target(ports[kind], GENERATE if kind == "whole" else TGI_STREAM, body)

    return target


def _chat(model: str, kind: Kind, tokens: int) -> bytes:
    messages = [{"role": "user", "content": PROMPT}]
    return _json({"model": model, "messages": messages, "max_tokens": tokens, "stream": kind != "whole"})


@contextmanager
def direct(place: Place) -> Iterator[Contestant]:
    """Let nobody stand between."""
    yield Contestant("direct", None, _as_upstream(place.upstream.ports))


PROXY = """\
    upstream {kind} {{ server 127.0.0.1:{behind}; keepalive 512; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://{kind};
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
"""


@contextmanager
def nginx_proxy(place: Place) -> Iterator[Contestant]:
    """Run nginx as reverse proxy: one worker, connections kept, nothing held back, its access log on."""
    ports = {kind: free_port() for kind in KINDS}
    servers = "".join(PROXY.format(kind=kind, port=ports[kind], behind=place.upstream.ports[kind]) for kind in KINDS)
    log = f"{place.folder}/nginx.access.log"
    with nginx(place.folder, "nginx", servers, ports["whole"], place.core, log) as pid:
        yield Contestant("nginx", pid, _as_upstream(ports))


# ---- this gateway ----


@contextmanager
def this_gateway(place: Place) -> Iterator[Contestant]:
    """Run this checkout's gateway, with keys and limits; its log goes to a file."""
    models = {}
    for kind in KINDS:
        room = {"max_concurrency": 1024, "max_queue": 1024, "idle_timeout": "never", "runtime": "external"}
        url = place.upstream.url(kind)
        models[f"tgi-{kind}"] = {"engine": "tgi", "hf_name": f"tgi-{kind}", "url": url, **room}
        models[f"openai-{kind}"] = {"engine": "openai", "args": {"model": "m"}, "url": url, **room}
    with gateway_of(place, models) as (pid, port, key):
        yield Contestant("gateway", pid, _of_gateway(port, {"Authorization": f"Bearer {key}"}))


@contextmanager
def gateway_of(place: Place, models: dict[str, Any]) -> Iterator[tuple[int, int, str]]:
    """Run a gateway for these models; yield its pid, its port, and a key that may do everything."""
    catalog, keys, log = (place.folder / name for name in ("models.yaml", "keys.jsonl", "gateway.log"))
    catalog.write_text(json.dumps({"models": models}))  # JSON is YAML
    keys.unlink(missing_ok=True)
    add_key(keys, "another", ["generate"])
    key = add_key(keys, "bench", ["generate", "manage"], requests_per_minute=MOST, max_concurrency=10_000)
    port = free_port()
    command = [PYTHON, "-m", "gateway", "serve", "--port", str(port), "--catalog", str(catalog)]
    with running(command, log, place.core, {"GATEWAY_API_KEYS_FILE": str(keys)}) as process:
        until_up("the gateway", lambda: answers(port), process, log, UP_S)
        yield process.pid, port, key


def _of_gateway(port: int, headers: dict[str, str]) -> Callable[[str, Kind, int], Target]:
    def target(address: str, kind: Kind, tokens: int) -> Target:
        if address == CHAT:
            return Target(port, CHAT, _chat(f"openai-{kind}", kind, tokens), headers)
        if address == GENERATE:
            asked = {"model_id": f"tgi-{kind}", "prompt": PROMPT, "max_new_tokens": tokens, "stream": kind != "whole"}
            return Target(port, GENERATE, _json(asked), headers)
        path = TGI.format(id=f"tgi-{kind}") + (GENERATE if kind == "whole" else TGI_STREAM)
        return Target(port, path, _json({"inputs": PROMPT, "parameters": {"max_new_tokens": tokens}}), headers)

    return target


# ---- LiteLLM ----


def cache_folder() -> Path:
    """Return where the bench keeps what it installs: beneath XDG's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tgi-gateway" / "bench"


def litellm_program() -> Path:
    """Return LiteLLM's program, in a virtual environment of its own that is made if it is not there.

    Raises:
        CannotMeasure: it cannot be installed.
    """
    home = cache_folder() / "litellm"
    program = home / "bin" / "litellm"
    if program.exists():
        return program
    commands = (
        [sys.executable, "-m", "venv", "--clear", str(home)],
        [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "litellm[proxy]"],
    )
    for command in commands:
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, check=False)
        except subprocess.TimeoutExpired:
            raise CannotMeasure(f"LiteLLM cannot be installed within {INSTALL_S:g} s") from None
        if ran.returncode:
            raise CannotMeasure(f"LiteLLM cannot be installed: {ran.stderr.strip()[-400:]}")
    return program


def litellm_version() -> str:
    """Return the version that is installed."""
    found = next(iter((cache_folder() / "litellm" / "lib").glob("python*/site-packages/litellm-*.dist-info")), None)
    return found.name.removeprefix("litellm-").removesuffix(".dist-info") if found else "none"


@contextmanager
def litellm(place: Place) -> Iterator[Contestant]:
    """Run LiteLLM's proxy: one worker, a key, and its log in a file."""
    program, port = litellm_program(), free_port()
    config, log = place.folder / "litellm.json", place.folder / "litellm.log"
    config.write_text(json.dumps(_litellm_config(place.upstream)))  # JSON is YAML
    command = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    with running(command, log, place.core, {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}) as process:
        until_up("LiteLLM", lambda: _is_live(port), process, log, LITELLM_UP_S)
        yield Contestant("litellm", process.pid, _of_litellm(port))


def _litellm_config(upstream: Upstream) -> dict[str, Any]:
    models, passed = [], []
    for kind in KINDS:
        at = {"api_base": f"{upstream.url(kind)}/v1", "api_key": "none"}
        models.append({"model_name": f"chat-{kind}", "litellm_params": {"model": "openai/m", **at}})
        models.append({"model_name": f"text-{kind}", "litellm_params": {"model": "text-completion-openai/m", **at}})
        target = upstream.url(kind) + (GENERATE if kind == "whole" else TGI_STREAM)
        passed.append({"path": f"/tgi-{kind}", "target": target, "headers": {"content-type": "application/json"}})
    return {
        "model_list": models,
        "litellm_settings": {"telemetry": False},
        "general_settings": {"master_key": LITELLM_KEY, "pass_through_endpoints": passed},
    }


def _is_live(port: int) -> bool:
    try:
        return bool(ask(Target(port, "/health/liveliness", method="GET"), timeout_s=5))
    except CannotMeasure:
        return False


def _of_litellm(port: int) -> Callable[[str, Kind, int], Target]:
    headers = {"Authorization": f"Bearer {LITELLM_KEY}"}

    def target(address: str, kind: Kind, tokens: int) -> Target:
        if address == CHAT:
            return Target(port, CHAT, _chat(f"chat-{kind}", kind, tokens), headers)
        if address == GENERATE:
            asked = {"model": f"text-{kind}", "prompt": PROMPT, "max_tokens": tokens, "stream": kind != "whole"}
            return Target(port, COMPLETION, _json(asked), headers)
        body = _json({"inputs": PROMPT, "parameters": {"max_new_tokens": tokens}})
        return Target(port, f"/tgi-{kind}", body, headers)

    return target


EVERY: dict[str, Rival] = {"direct": direct, "nginx": nginx_proxy, "litellm": litellm, "gateway": this_gateway}
