"""What stands behind every contestant: nginx for answers that are there at once, our own program for paced streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.answers import CHAT, COMPLETION, TGI_STREAM, nginx_text, streamed, whole
from tests.bench.arithmetic import Kind
from tests.bench.machine import PYTHON, needed, running, until_up
from tests.tgi_double.process import answers, free_port

UP_S = 20.0
TOKENS_PER_S = 50
SHELL = """\
daemon off;
worker_processes 1;
pid {folder}/{name}.pid;
error_log {folder}/{name}.error.log;
events {{ worker_connections 8192; }}
http {{
    access_log {access_log};
    keepalive_requests 100000000;
    keepalive_timeout 1h;
    client_body_temp_path {folder}/{name}.body;
    proxy_temp_path {folder}/{name}.proxy;
    fastcgi_temp_path {folder}/{name}.fastcgi;
    uwsgi_temp_path {folder}/{name}.uwsgi;
    scgi_temp_path {folder}/{name}.scgi;
{servers}
}}
"""

ANYTHING_ELSE = "        location / { return 200; }\n"


@dataclass(frozen=True)
class Upstream:
    """Where each kind of answer is to be had. It knows no keys."""

    ports: dict[Kind, int]

    def url(self, kind: Kind) -> str:
        return f"http://127.0.0.1:{self.ports[kind]}"


@contextmanager
def nginx(folder: Path, name: str, servers: str, port: int, on: frozenset[int], access_log: str) -> Iterator[int]:
    """Run one nginx of one worker until the context ends; yield its pid. It listens at `port`, among others."""
    config = folder / f"{name}.conf"
    config.write_text(SHELL.format(folder=folder, name=name, servers=servers, access_log=access_log))
    log = folder / f"{name}.log"
    program = needed("nginx", "nginx-light")
    with running([program, "-p", str(folder), "-c", str(config)], log, on) as process:
        until_up(f"nginx ({name})", lambda: answers(port), process, log, UP_S)
        yield process.pid


@contextmanager
def upstream(folder: Path, tokens: int, on: frozenset[int]) -> Iterator[Upstream]:
    """Run the upstream on these cores; answers that are there at once have so many tokens."""
    ports: dict[Kind, int] = {"whole": free_port(), "streamed": free_port(), "paced": free_port()}
    servers = "".join(_server(ports[kind], kind, tokens) for kind in ("whole", "streamed"))
    pacing = [PYTHON, "-m", "tests.bench.paced_server", str(ports["paced"]), str(TOKENS_PER_S)]
    log = folder / "paced.log"
    with nginx(folder, "upstream", servers, ports["whole"], on, "off"), running(pacing, log, on) as process:
        until_up("the upstream of streams", lambda: answers(ports["paced"]), process, log, UP_S)
        yield Upstream(ports)


def _server(port: int, kind: Kind, tokens: int) -> str:
    """Return a server that answers as TGI and as OpenAI, the latter with streams or without.

    TGI's own two addresses say themselves which they are.
    """
    openai = streamed if kind == "streamed" else whole
    places = {
        "/generate": (whole("/generate", tokens), "application/json"),
        TGI_STREAM: (streamed(TGI_STREAM, tokens), "text/event-stream"),
    }
    for path in (COMPLETION, CHAT):
        places[path] = (openai(path, tokens), "text/event-stream" if kind == "streamed" else "application/json")
    places["/v1/models"] = (b'{"object":"list","data":[]}', "application/json")
    locations = "".join(_location(path, *said) for path, said in places.items())
    return f"    server {{\n        listen 127.0.0.1:{port} backlog=4096;\n{locations}{ANYTHING_ELSE}    }}\n"


def _location(path: str, body: bytes, content_type: str) -> str:
    pieces = list(nginx_text(body))
    sets = " ".join(f'set $p{number} "{piece}";' for number, piece in enumerate(pieces))
    names = "".join(f"$p{number}" for number in range(len(pieces)))
    return f"        location = {path} {{ default_type {content_type}; {sets} return 200 {names}; }}\n"
