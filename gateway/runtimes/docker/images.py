"""Gets the image that a container needs: looks for it, and pulls it with progress, never in silence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from docker import APIClient
from docker.auth import get_config_header, resolve_repository_name
from docker.errors import InvalidRepository
from docker.utils import parse_repository_tag

from gateway.errors import RuntimeUnavailable, StartFailed
from gateway.runtimes.base import Progress, PullPolicy
from gateway.runtimes.docker.engine import Engine, Refused

_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_REGISTRY = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
_PART = "[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_TAG, _DIGEST = r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}", "[a-z0-9]+(?:[.+_-][a-z0-9]+)*:[a-fA-F0-9]{32,}"
NAME = re.compile(rf"(?:{_REGISTRY}/)?{_PART}(?:/{_PART})*(?::{_TAG})?(?:@{_DIGEST})?|sha256:[a-f0-9]{{64}}")
"""The grammar of an image's name, as github.com/distribution/reference has it; or an image's id."""

Report = Callable[[Progress], None]
Image = Mapping[str, Any]
"""What the engine's `inspect` says of an image."""


async def ensure(engine: Engine, image: str, policy: PullPolicy, report: Report) -> Image:
    """Return the image, pulled if `policy` says so. Phases `pulling` and `extracting` are reported in bytes.

    Waits as long as the pull goes on; cancelled, the pull is called off. Whatever the engine says is a sign of life,
    and reported even if it tells nothing new; nothing is reported while nothing comes.

    Raises:
        StartFailed: it cannot be had; the words say why, and what to do.
        RuntimeUnavailable: the engine does not answer.
    """
    if not NAME.fullmatch(image):  # it would become a part of a path
        raise why_not_pulled(image, "invalid reference format")
    found = await _find(engine, image)
    if found and policy != "always":
        return found
    if policy == "never":
        raise _failed(
            f"The image {image} is not on this machine, and pull_policy is never",
            f"Pull it (`docker pull {image}`), or set pull_policy to missing in models.yaml.",
        )
    await _pull(engine, image, report)
    if pulled := await _find(engine, image):
        return pulled
    raise RuntimeUnavailable(f"The pull of {image} ended, and the Docker Engine does not have the image.")


async def _find(engine: Engine, image: str) -> Image | None:
    try:
        found: Image = await engine.ask(lambda client: client.inspect_image(image))  # type: ignore[no-untyped-call]
    except Refused as refused:
        if refused.http_status == 404:
            return None
        raise why_not_pulled(image, refused.words) from refused
    return found


async def _pull(engine: Engine, image: str, report: Report) -> None:
    repository, tag = parse_repository_tag(image)
    params = {"fromImage": repository, "tag": tag or "latest"}  # without a tag the engine would pull all there are
    headers = await engine.ask(lambda client: _credentials(client, image, repository))
    layers = Layers()
    report(Progress("pulling"))
    try:
        async with engine.stream("POST", "/images/create", params, headers) as lines:
            async for line in lines:
                _hear(image, json.loads(line), layers, report)
    except Refused as refused:
        raise why_not_pulled(image, refused.words) from refused
    except (ValueError, AttributeError, TypeError) as error:
        raise RuntimeUnavailable(
            f"The Docker Engine told the progress of a pull in words of its own: {error}."
        ) from error


def _hear(image: str, message: Mapping[str, Any], layers: Layers, report: Report) -> None:
    if words := message.get("error"):
        raise why_not_pulled(image, str(words))
    report(layers.hear(message))


def _credentials(client: APIClient, image: str, repository: str) -> dict[str, str]:
    """Return the header with what `docker login` has stored for the image's registry. May ask a program for it."""
    try:
        registry, _ = resolve_repository_name(repository)
    except InvalidRepository as error:
        raise why_not_pulled(image, f"invalid reference format: {error}") from error
    header = get_config_header(client, registry)
    return {"X-Registry-Auth": header.decode()} if header else {}


@dataclass(slots=True)
class _Layer:
    """How far one layer is, in bytes. `size` is None until the registry has told it."""

    size: int | None = None
    downloaded: int = 0
    extracted: int = 0
    complete: bool = False


class Layers:
    """Adds up the progress of an image's layers."""

    def __init__(self) -> None:
        self._layers: dict[str, _Layer] = {}

    def hear(self, message: Mapping[str, Any]) -> Progress:
        """Return how far the pull has come with this message of the engine's."""
        self._take(message.get("id", ""), message.get("status", ""), message.get("progressDetail") or {})
        return self._progress()

    def _take(self, layer_id: str, status: str, detail: Mapping[str, Any]) -> None:
        current, total = detail.get("current") or 0, detail.get("total")
        match status:
            case "Pulling fs layer" | "Waiting":
                self._layers.setdefault(layer_id, _Layer())
            case "Already exists":
                self._layers.pop(layer_id, None)
            case "Downloading":
                layer = self._layers.setdefault(layer_id, _Layer())
                layer.downloaded, layer.size = current, total or layer.size
            case "Verifying Checksum" | "Download complete":
                self._downloaded(layer_id)
            case "Extracting":
                layer = self._downloaded(layer_id)
                layer.extracted = layer.extracted if "units" in detail else current  # it may count seconds
            case "Pull complete":
                layer = self._downloaded(layer_id)
                layer.extracted = layer.size or 0

    def _downloaded(self, layer_id: str) -> _Layer:
        layer = self._layers.setdefault(layer_id, _Layer())
        layer.size = layer.size or layer.downloaded  # a small one is there before it has told its size
        layer.downloaded, layer.complete = layer.size, True
        return layer

    def _progress(self) -> Progress:
        layers = self._layers.values()
        if not layers:
            return Progress("pulling")
        sizes = [layer.size for layer in layers if layer.size is not None]
        total = float(sum(sizes)) if len(sizes) == len(layers) else None  # not the whole truth before all are known
        if all(layer.complete for layer in layers):
            return Progress("extracting", float(sum(layer.extracted for layer in layers)), total, "bytes")
        return Progress("pulling", float(sum(layer.downloaded for layer in layers)), total, "bytes")


def why_not_pulled(image: str, words: str) -> StartFailed:
    """Return what it means that the engine could not get an image, given the engine's words."""
    said = words.lower()
    for signs, cause, fix in _DIAGNOSES:
        if any(sign in said for sign in signs):
            return _failed(cause.format(image=image), fix.format(image=image), words)
    return _failed(f"The image {image} could not be pulled", f"Try `docker pull {image}` to see more.", words)


def _failed(cause: str, fix: str, *evidence: str) -> StartFailed:
    said = f": {evidence[0]}" if evidence else ""
    return StartFailed(f"{cause}{said}. {fix}", cause=cause, fix=fix, evidence=list(evidence))


_DIAGNOSES = (
    (
        ("no space left on device", "disk quota exceeded"),
        "The disk is full, so the image {image} could not be pulled",
        "Free space where the Docker Engine keeps its data (`docker system df` tells what takes it).",
    ),
    (
        ("invalid reference format", "invalid repository name", "invalid tag"),
        "{image} is not the name of an image",
        "Correct `image` in models.yaml: [registry/]name[:tag], in lower case.",
    ),
    (
        ("no matching manifest", "does not match the specified platform"),
        "The image {image} does not exist for this machine's processor",
        "Choose an image that is built for it.",
    ),
    (
        ("toomanyrequests", "rate limit"),
        "The registry refuses for now: too many pulls of {image}",
        "Wait, or log in (`docker login`) for a higher limit.",
    ),
    (
        ("manifest unknown", "manifest for"),
        "The registry has no image {image}: its tag or its name is wrong",
        "Correct `image` in models.yaml.",
    ),
    (
        ("pull access denied", "repository does not exist", "name unknown", "repository name not known", "not found"),
        "There is no image {image}, or it may not be pulled without logging in",
        "Correct `image` in models.yaml, or log in as the gateway's user (`docker login`).",
    ),
    (
        ("unauthorized", "access denied", "denied:", "authentication required", "forbidden"),
        "The registry denies access to {image}",
        "Log in as the gateway's user (`docker login`), with an account that may pull it.",
    ),
    (
        ("x509", "certificate", "server gave http response to https client"),
        "The registry of {image} cannot be trusted: its certificate is not accepted",
        "Add the registry's certificate to the Docker Engine, or name the registry in its `insecure-registries`.",
    ),
    (
        (
            "connection refused", "no such host", "timeout", "timed out", "deadline exceeded", "no route to host",
            "network is unreachable", "connection reset", "temporary failure", "server misbehaving", ": eof",
            "bad gateway", "service unavailable",
        ),
        "The registry of {image} cannot be reached",
        "Check the network and the engine's proxy, or get the image by other means (`docker load`).",
    ),
)  # fmt: skip
