"""What runtime `docker` reads in an engine's answers, and says of them. Needs no engine."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from gateway.runtimes.base import Container, Launch, Progress
from gateway.runtimes.docker.container_log import Frames, unix_time
from gateway.runtimes.docker.containers import Seen
from gateway.runtimes.docker.failures import how_it_ended, is_port_taken, not_started
from gateway.runtimes.docker.images import NAME, Layers, why_not_pulled
from gateway.runtimes.docker.place import Place, host_name
from gateway.runtimes.docker.runtime import found_in
from gateway.runtimes.docker.watch import End

LAUNCH = Launch("tgi-model", container=Container("registry/image:1"), gpus=("7",))


def seen(
    status: str = "exited", code: int = 0, *, out_of_memory: bool = False, addresses: dict[str, str] | None = None
) -> Seen:
    return Seen(
        id="a" * 64,
        name="tgi-model",
        labels={},
        status=status,
        started_at="",
        exit_code=code,
        out_of_memory=out_of_memory,
        stop_signal="SIGTERM",
        published=None,
        addresses=addresses or {},
    )


# ---- failures ----


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ('could not select device driver "" with capabilities: [[gpu]]', "nvidia-container-toolkit"),
        ('could not select device driver "nvidia" with capabilities: [[gpu]]', "nvidia-ctk runtime configure"),
        (
            "OCI runtime create failed: ... nvidia-container-cli: device error: 7: unknown device: unknown",
            "no such GPU on this machine (asked for: 7)",
        ),
        ("nvidia-container-cli: initialization error: nvml error: driver not loaded", "nvidia-smi"),
        ("failed to inject CDI devices: unresolvable CDI devices nvidia.com/gpu=7", "GATEWAY_GPUS"),
        ('invalid mount config for type "bind": bind source path does not exist: /x', "does not exist"),
        ("Duplicate mount point: /data", "/run/tgi-gateway-secrets"),
        ('create a b: "a b" includes invalid characters for a local volume name', "`volumes` in models.yaml"),
        ("invalid mount config for type \"volume\": invalid mount path: 'x'", "volumes"),
        ("write /var/lib/docker/x: no space left on device", "disk is full"),
        ('exec: "docker-init": executable file not found in $PATH', "tini"),
        ('exec: "nope": executable file not found in $PATH: unknown', "no such program"),
        ('exec: "/nope": stat /nope: no such file or directory: unknown', "no such program"),
        ('exec: "/etc": permission denied: unknown', "not executable"),
        ("exec /bin/x: exec format error", "another processor"),
        ("Minimum memory limit allowed is 6MB", "`memory`"),
        ("No such image: registry/image:1", "was removed"),
        ("network tgi not found", "network"),
        ("something new under the sun", "something new under the sun"),
    ],
)
def test_the_engines_words_become_cause_and_fix(words: str, expected: str) -> None:
    failed = not_started(LAUNCH, words)
    assert expected in failed.detail
    assert failed.extra["evidence"] == [words]
    assert failed.extra["cause"]
    assert failed.extra["fix"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("manifest for x:nope not found: manifest unknown: manifest unknown", "tag or its name is wrong"),
        ("pull access denied for nope, repository does not exist or may require 'docker login'", "logging in"),
        ("name unknown: repository name not known to registry", "logging in"),
        ("Head https://x: unauthorized: authentication required", "denies access"),
        ("denied: requested access to the resource is denied", "denies access"),
        ("Get https://127.0.0.1:1/v2/: dial tcp 127.0.0.1:1: connect: connection refused", "cannot be reached"),
        ("dial tcp: lookup nope.invalid: no such host", "cannot be reached"),
        ("net/http: request canceled while waiting for connection (Client.Timeout exceeded)", "cannot be reached"),
        ("x509: certificate signed by unknown authority", "cannot be trusted"),
        ("http: server gave HTTP response to HTTPS client", "insecure-registries"),
        ("failed to register layer: write /x: no space left on device", "disk is full"),
        ("toomanyrequests: You have reached your pull rate limit", "too many pulls"),
        ("no matching manifest for linux/arm64/v8 in the manifest list entries", "processor"),
        ("invalid reference format", "not the name of an image"),
        ("something new under the sun", "something new under the sun"),
    ],
)
def test_a_failed_pull_says_why(words: str, expected: str) -> None:
    failed = why_not_pulled("registry/image:1", words)
    assert expected in failed.detail
    assert failed.extra["evidence"] == [words]


@pytest.mark.parametrize(
    "words",
    [
        "driver failed programming external connectivity: Bind for 127.0.0.1:8080 failed: port is already allocated",
        "Error starting userland proxy: listen tcp4 127.0.0.1:8080: bind: address already in use",
    ],
)
def test_a_taken_port_is_recognised(words: str) -> None:
    assert is_port_taken(words)


# ---- ends ----


@pytest.mark.parametrize(
    ("end", "by_gateway", "expected"),
    [
        (End(seen(code=0)), False, (0, "exit status 0")),
        (End(seen(code=137)), False, (137, "killed by SIGKILL")),
        (End(seen(code=143)), True, (143, "killed by SIGTERM (by the gateway)")),
        (End(seen(code=255)), False, (255, "exit status 255")),
        (End(seen(code=127)), False, (127, "exit status 127: the image has no such program as it was to run")),
        (
            End(seen(code=137, out_of_memory=True)),
            False,
            (137, "killed: out of memory (the container's memory limit; killed by SIGKILL)"),
        ),
        (
            End(seen(code=1), out_of_memory=True),
            False,
            (1, "killed: out of memory (the container's memory limit; exit status 1)"),
        ),
        (
            End(seen(code=143), engine_went=True),
            False,
            (143, "killed by SIGTERM (the Docker Engine went away meanwhile)"),
        ),
        (End(None), False, (None, "removed by somebody else")),
        (End(None), True, (None, "removed by the gateway")),
        (End(seen("running"), restarted=True), False, (None, "restarted by somebody else")),
    ],
)
def test_an_end_is_told_in_words(end: End, by_gateway: bool, expected: tuple[int | None, str]) -> None:
    assert how_it_ended(end, by_gateway=by_gateway) == expected


# ---- lists ----


@pytest.mark.parametrize(
    ("listed", "name"),
    [
        ({"Names": ["/renamed"], "Labels": {"tgi-gateway.name": "tgi-model"}}, "tgi-model"),
        ({"Names": ["/other/link", "/tgi-model"], "Labels": {}}, "tgi-model"),
        ({"Names": None, "Labels": {"tgi-gateway.name": "tgi-model"}}, "tgi-model"),
        ({"Names": None, "Labels": {}}, "abc"),
        ({"Names": [], "Labels": {}, "Created": None, "State": None}, "abc"),
        ({"Names": ["/other/link"], "Labels": {}, "Created": 2**40}, "abc"),
    ],
)
def test_a_container_is_known_by_its_label_whatever_the_engine_lists_of_it(listed: dict[str, Any], name: str) -> None:
    assert found_in({"Id": "abc", "Created": 1, "State": "exited", **listed}).name == name


# ---- pulls ----


def test_the_progress_of_a_pull_is_the_sum_of_its_layers() -> None:
    layers = Layers()

    def hear(layer: str, status: str, current: int | None = None, total: int | None = None) -> Progress:
        detail = {} if current is None else {"current": current, "total": total}
        return layers.hear({"id": layer, "status": status, "progressDetail": detail})

    assert hear("1.0", "Pulling from library/x") == Progress("pulling")
    assert hear("a", "Already exists") == Progress("pulling")
    assert hear("b", "Pulling fs layer") == Progress("pulling", 0.0, None, "bytes")
    assert hear("c", "Pulling fs layer") == Progress("pulling", 0.0, None, "bytes")
    assert hear("b", "Downloading", 10, 100) == Progress("pulling", 10.0, None, "bytes")  # c is not known yet
    assert hear("c", "Downloading", 5, 50) == Progress("pulling", 15.0, 150.0, "bytes")
    assert hear("c", "Retrying in 5 seconds") == Progress("pulling", 15.0, 150.0, "bytes")
    assert hear("b", "Download complete") == Progress("pulling", 105.0, 150.0, "bytes")
    assert hear("b", "Extracting", 60, 100) == Progress("pulling", 105.0, 150.0, "bytes")  # the rest still comes
    assert hear("c", "Verifying Checksum") == Progress("extracting", 60.0, 150.0, "bytes")
    assert hear("b", "Pull complete") == Progress("extracting", 100.0, 150.0, "bytes")
    assert hear("c", "Pull complete") == Progress("extracting", 150.0, 150.0, "bytes")
    assert hear("", "Status: Downloaded newer image for x") == Progress("extracting", 150.0, 150.0, "bytes")


def test_a_layer_that_comes_at_once_has_no_size_to_tell() -> None:
    layers = Layers()
    layers.hear({"id": "a", "status": "Pulling fs layer"})
    assert layers.hear({"id": "a", "status": "Download complete"}) == Progress("extracting", 0.0, 0.0, "bytes")


def test_a_layer_that_counts_seconds_while_it_is_extracted_is_heard_each_time() -> None:
    layers = Layers()
    layers.hear({"id": "a", "status": "Downloading", "progressDetail": {"current": 5, "total": 50}})
    for seconds in (1, 2, 3):
        told = layers.hear({"id": "a", "status": "Extracting", "progressDetail": {"current": seconds, "units": "s"}})
        assert told == Progress("extracting", 0.0, 50.0, "bytes")
    assert layers.hear({"id": "a", "status": "Extracting"}) == told


@pytest.mark.parametrize(
    ("image", "is_one"),
    [
        ("ghcr.io/huggingface/text-generation-inference:3.3.4", True),
        ("localhost:5000/a/b_c__d-e--f.g@sha256:" + "0" * 64, True),
        ("x", True),
        ("[::1]:5000/x:A_b", True),
        ("sha256:" + "0" * 64, True),
        ("UPPER", False),
        ("x/../../y", False),
        ("http://registry/x", False),
        ("x//y", False),
        ("x:", False),
        ("x?y", False),
        ("-x", False),
        ("x\n", False),
        ("", False),
    ],
)
def test_what_can_be_the_name_of_an_image(image: str, is_one: bool) -> None:
    assert (NAME.fullmatch(image) is not None) is is_one


# ---- logs and names ----


def test_the_log_stream_comes_apart_however_it_is_cut() -> None:
    entries = [(1, b"out\n"), (2, b"err\n"), (1, b""), (1, b"x" * 70000)]
    stream = b"".join(struct.pack(">BxxxL", channel, len(data)) + data for channel, data in entries)
    for size in (1, 7, 4096, len(stream)):
        frames = Frames()
        cut = [stream[at : at + size] for at in range(0, len(stream), size)]
        assert [entry for chunk in cut for entry in frames.feed(chunk)] == entries


def test_a_time_stamp_is_handed_back_to_the_nanosecond() -> None:
    assert unix_time("2026-01-02T03:04:05.000000006Z") == "1767323045.000000006"


@pytest.mark.parametrize(
    ("name", "kept"),
    [("tgi-gpt-2", True), ("tgi-a.b_c", True), ("x" * 63, True), ("x" * 64, False), ("a..b", False), ("a.", False)],
)
def test_a_name_that_is_no_dns_name_gets_another(name: str, kept: bool) -> None:
    assert (host_name(name) == name) is kept
    assert len(host_name(name)) <= 63


def test_a_server_is_reached_where_the_gateway_is() -> None:
    server = seen("running", addresses={"bridge": "172.17.0.5", "shared": "10.1.0.5"})
    assert Place().base_url(server, 80, 8080) == ("http://127.0.0.1:8080", 8080)
    assert Place("shared").base_url(server, 80, None) == ("http://tgi-model:80", 80)
    assert Place("bridge").base_url(server, 80, None) == ("http://172.17.0.5:80", 80)
