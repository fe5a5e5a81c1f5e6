"""What it means when the engine cannot make or start a container, and how a container's end is told."""

from __future__ import annotations

import signal

from gateway.errors import StartFailed
from gateway.runtimes.base import Launch
from gateway.runtimes.docker.containers import Seen
from gateway.runtimes.docker.launch import SECRETS
from gateway.runtimes.docker.watch import End

PORT_TAKEN = (
    "port is already allocated",
    "address already in use",
    "ports are not available",
    "failed to bind host port",
)


def is_port_taken(words: str) -> bool:
    return any(sign in words.lower() for sign in PORT_TAKEN)


def not_started(launch: Launch, words: str) -> StartFailed:
    """Return why no server came of `launch`, given the engine's words."""
    image = launch.container.image if launch.container else ""
    facts = {"image": image, "gpus": ", ".join(launch.gpus) or "none", "secrets": SECRETS}
    for signs, cause, fix in _DIAGNOSES:
        if all(sign in words.lower() for sign in signs):
            return _failed(cause.format(**facts), fix.format(**facts), words)
    return _failed(f"The Docker Engine cannot start {launch.name}", "Its words say why; mend that.", words)


def foreign(seen: Seen, name: str) -> StartFailed:
    """Return what to say of a container that has our name and is not ours."""
    cause = f"The name {name} is taken: container {seen.short_id} ({seen.status}) has it, and is not its server"
    fix = f"Rename it (`docker rename {name} NEW`) or remove it (`docker rm --force {name}`)."
    return StartFailed(f"{cause}. {fix}", cause=cause, fix=fix)


def how_it_ended(end: End, *, by_gateway: bool) -> tuple[int | None, str]:
    """Return a container's exit code, and in words how it ended."""
    if end.last is None:
        return None, f"removed by {'the gateway' if by_gateway else 'somebody else'}"
    if end.restarted:
        return None, "restarted by somebody else"
    code = end.last.exit_code
    words = _exit_words(code) + (" (by the gateway)" if by_gateway and code > 128 else "")
    if end.last.out_of_memory or end.out_of_memory:
        words = f"killed: out of memory (the container's memory limit; {words})"
    elif end.engine_went and not by_gateway:
        words += " (the Docker Engine went away meanwhile)"
    return code, words


def _exit_words(code: int) -> str:
    try:
        return f"killed by {signal.Signals(code - 128).name}"  # as a shell, and the container's init, tell it
    except ValueError:
        meaning = _BY_INIT.get(code)
        return f"exit status {code}: {meaning}" if meaning else f"exit status {code}"


def _failed(cause: str, fix: str, words: str) -> StartFailed:
    return StartFailed(f"{cause}: {words}. {fix}", cause=cause, fix=fix, evidence=[words])


_BY_INIT = {
    126: "what it was to run is no program",
    127: "the image has no such program as it was to run",
}
_NO_GPU = "There is no such GPU on this machine (asked for: {gpus})"
_GPU_FIX = "Name only GPUs that `nvidia-smi -L` lists: in GATEWAY_GPUS, or in `gpus` of models.yaml."
_TOOLKIT_FIX = (
    "Install the package nvidia-container-toolkit, run `nvidia-ctk runtime configure --runtime=docker`, "
    "and restart the engine (`systemctl restart docker`)."
)
_NO_TARGET = "Nothing can be mounted where one of the volumes is to be: not on /, /proc or /dev"
_TARGET_FIX = "Correct the target of `volumes` in models.yaml: a directory of the server's own, such as /data."
_DIAGNOSES = (
    (
        ("could not select device driver", "gpu"),
        "No GPU runtime: the NVIDIA Container Toolkit is not installed, or not known to the Docker Engine",
        _TOOLKIT_FIX,
    ),
    (("unknown device",), _NO_GPU, _GPU_FIX),
    (("device error",), _NO_GPU, _GPU_FIX),
    (("unresolvable cdi device",), _NO_GPU, _GPU_FIX),
    (
        ("nvidia-container-cli",),
        "The NVIDIA Container Toolkit cannot use this machine's GPUs",
        "See that `nvidia-smi` works on the machine itself; after a driver update it needs a restart.",
    ),
    (
        ("bind source path does not exist",),
        "A directory that is to be mounted does not exist on the Docker Engine's machine",
        "Make it, or correct `volumes` in models.yaml.",
    ),
    (
        ("duplicate mount point",),
        "Two volumes have one target",
        "Give each of `volumes` in models.yaml a target of its own; {secrets} is the gateway's.",
    ),
    (("not of type proc",), _NO_TARGET, _TARGET_FIX),
    (("inside /proc",), _NO_TARGET, _TARGET_FIX),
    (("destination can't be",), _NO_TARGET, _TARGET_FIX),
    (("/dev/null", "no such file"), _NO_TARGET, _TARGET_FIX),
    (
        ("invalid characters for a local volume name",),
        "A volume has a name that none can have",
        "Correct `volumes` in models.yaml: an absolute path, or a name of letters, digits and ._- as source.",
    ),
    (
        ("invalid mount",),
        "What is to be mounted cannot be",
        "Correct `volumes` in models.yaml: [source, absolute] path or volume name, and an absolute target.",
    ),
    (
        ("no space left on device",),
        "The disk is full",
        "Free space where the Docker Engine keeps its data (`docker system df` tells what takes it).",
    ),
    (
        ("docker-init", "not found"),
        "The Docker Engine has no docker-init",
        "Install it: it comes with Docker's own packages, or as package tini.",
    ),
    (
        ("executable file not found",),
        "The image {image} has no such program as it is to run",
        "Correct `image` or `args` in models.yaml.",
    ),
    (
        ("no such file or directory", "exec"),
        "The image {image} has no such program as it is to run, or lacks what that needs",
        "Correct `image` or `args` in models.yaml.",
    ),
    (
        ("permission denied", "exec"),
        "The program of the image {image} is not executable",
        "Correct `image` or `args` in models.yaml.",
    ),
    (
        ("exec format error",),
        "The image {image} is made for another processor",
        "Choose an image that is built for this machine.",
    ),
    (
        ("minimum memory limit",),
        "`memory` of the model is less than a container can do with",
        "Raise it in models.yaml.",
    ),
    (
        ("no such image",),
        "The image {image} was removed while the container was made",
        "Start the model again; it is pulled again unless pull_policy is never.",
    ),
    (
        ("network", "not found"),
        "The network that the gateway shares with its models is gone",
        "Restart the gateway.",
    ),
)
