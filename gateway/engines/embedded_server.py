"""The embedded model server: llama.cpp with its own HTTP server, in a process of its own.

    EMBEDDED_API_KEY=... python -P embedded_server.py --model FILE --port N --slots N --context-tokens N
                         --device auto|cpu|cuda --args JSON [--chat-template JINJA]

Run by its path: it imports nothing of the package, so that it is up at once, and runs `gguf.py` by its path too. It
ends at SIGTERM, with exit status 2 if its arguments are wrong, 3 if llama.cpp is not installed, 1 if llama.cpp cannot
load the model (its own lines say why).
The port must be held by the caller with SO_REUSEPORT.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

WRONG_ARGUMENTS = 2
NOT_INSTALLED = 3
KEY_VARIABLE = "EMBEDDED_API_KEY"
LOG_FLUSH_S = 0.5
"""llama.cpp says why it failed in a thread of its own, and an exit before that thread had its turn loses every line."""
TOOLS = Path(__file__).with_name("tools.jinja")
GGUF = Path(__file__).parents[1] / "gguf.py"
NO_TEMPLATE = (
    "{% if of_request %}{{ raise_exception('it has none') }}{% endif %}"
    "{% for message in messages %}{{ message.content }}{% endfor %}"
)
"""For models that have no template. llama.cpp would take ChatML, which they do not know. It also tries every template
when it starts: so this one fails only where the variable is set, as it is for every request."""
GPU_LAYERS = {"auto": -1, "cpu": 0, "cuda": 999}


def main() -> NoReturn:
    options = parse_options(sys.argv[1:])
    llama = import_llama()
    check_device(llama, options.device)
    params = make_params(llama, options, os.environ.pop(KEY_VARIABLE, ""))
    try:
        server = llama.Server(params)
    except RuntimeError as error:
        time.sleep(LOG_FLUSH_S)
        fail(1, str(error))
    print(f"embedded server: ready on {server.listening_address}", flush=True)  # noqa: T201 - its log
    while True:
        signal.pause()


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("embedded_server")
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--context-tokens", type=int, required=True, help="of each slot")
    parser.add_argument("--device", choices=sorted(GPU_LAYERS), required=True)
    parser.add_argument("--args", type=json.loads, default={}, help="JSON object of llama.cpp's flags")
    parser.add_argument("--chat-template", default="", help="Jinja; the model's own if it is empty")
    return parser.parse_args(arguments)


def import_llama() -> Any:
    try:
        import xllamacpp
    except ImportError as error:
        fail(NOT_INSTALLED, f"xllamacpp is not installed ({error}); run: pip install 'tgi-gateway[embedded]'")
    return xllamacpp


def check_device(llama: Any, device: str) -> None:
    """Refuse a GPU that is not there: llama.cpp would silently compute on the CPU."""
    kinds = llama.ggml_backend_dev_type
    gpus = {kinds.GGML_BACKEND_DEVICE_TYPE_GPU, kinds.GGML_BACKEND_DEVICE_TYPE_IGPU}
    if device == "cuda" and not any(found["type"] in gpus for found in llama.get_device_info()):
        fail(WRONG_ARGUMENTS, "no GPU that the installed xllamacpp can use")


def make_params(llama: Any, options: argparse.Namespace, key: str) -> Any:
    """Return llama.cpp's parameters: ours first, then what the catalog's `args` say."""
    if not key:
        fail(WRONG_ARGUMENTS, f"{KEY_VARIABLE} is not set: without a key the server would answer anybody")
    params = llama.CommonParams()
    params.model.path = options.model
    params.hostnames, params.port, params.reuse_port = ["127.0.0.1"], options.port, True
    params.api_keys = [key]
    params.ui = params.endpoint_slots = False  # /slots would show prompts
    params.n_parallel, params.kv_unified = options.slots, False
    params.n_ctx = options.slots * options.context_tokens
    params.n_threads_http = 2 * options.slots + 4  # a kept connection holds a thread; health checks need one too
    set_threads(llama, params, spare_threads())
    params.fit_params = False  # or it would change the two lines above to fit the memory
    params.n_gpu_layers = GPU_LAYERS[options.device]
    params.use_jinja, params.chat_template = True, chat_template(options.chat_template, options.model)
    params.cache_ram_mib = 0  # its default is 8 GiB of old prompts
    for name, value in options.args.items():
        set_flag(llama, params, name, value)
    return params


def chat_template(given: str, weights: str) -> str:
    """Return the template to use, or nothing for the model's own as it is. Every one that is used knows tools."""
    about = {} if given else metadata_of(weights)
    if about is None:
        return ""
    template = given or about.get("tokenizer.chat_template")
    if not template:
        return NO_TEMPLATE
    if re.search(r"\btools\b", template) or "tokenizer.chat_template.tool_use" in about:
        return given
    return TOOLS.read_text().rstrip("\n") + template


def metadata_of(weights: str) -> dict[str, Any] | None:
    """Return what the file's head says; None if it cannot be read: llama.cpp then says what is wrong with it."""
    reader = runpy.run_path(str(GGUF))
    try:
        with open(weights, "rb") as file:  # noqa: PTH123
            found: dict[str, Any] = reader["read_metadata"](file)
    except (OSError, ValueError, reader["NotGguf"]):
        return None
    return found


def spare_threads() -> int:
    """Return how many threads compute, with a core to spare for everything else.

    llama.cpp's threads wait for each other by spinning, a thousand times per token. With one of them on every core, any
    other busy process there makes all of them wait: 2 threads on 2 busy cores gave 1 token/s, and 1 thread 30 to 90.
    """
    cores = usable_cores()
    return max(1, cores - 1) if cores <= 4 else cores // 2  # beyond 4, two are often one core in truth


def usable_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as limit:  # noqa: PTH123 - pathlib is not worth its import here
            quota, period = limit.read().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def set_flag(llama: Any, params: Any, name: str, value: Any) -> None:
    """Apply one of the catalog's `args`."""
    kind, apply = FLAGS.get(name.replace("_", "-"), (None, None))
    if kind is None or apply is None:
        fail(WRONG_ARGUMENTS, f"unknown flag {name!r} in args; known are {', '.join(FLAGS)}")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        fail(WRONG_ARGUMENTS, f"flag {name} in args must be {KIND_WORDS[kind]}, not {value!r}")
    try:
        apply(llama, params, value)
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        fail(WRONG_ARGUMENTS, f"flag {name} in args cannot be {value!r} ({error})")


def set_threads(_: Any, params: Any, count: int) -> None:
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = count


def set_flash_attention(llama: Any, params: Any, word: str) -> None:
    kinds = llama.llama_flash_attn_type
    words = {
        "on": kinds.LLAMA_FLASH_ATTN_TYPE_ENABLED,
        "off": kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        "auto": kinds.LLAMA_FLASH_ATTN_TYPE_AUTO,
    }
    if word not in words:
        raise ValueError("it is on, off or auto")
    params.flash_attn_type = words[word]


def set_verbosity(_: Any, params: Any, level: int) -> None:
    if level > MOST_VERBOSE:
        raise ValueError(f"it is at most {MOST_VERBOSE}: above, llama.cpp prints prompts and keys")
    params.verbosity = level


def plain(attribute: str) -> Callable[[Any, Any, Any], None]:
    """Return what sets an attribute of llama.cpp's parameters to the value as it is."""
    return lambda _, params, value: setattr(params, attribute, value)


KIND_WORDS: dict[Any, str] = {int: "a whole number", (int, float): "a number", bool: "true or false", str: "text"}
FLAGS: dict[str, tuple[Any, Callable[[Any, Any, Any], None]]] = {
    "threads": (int, set_threads),
    "n-gpu-layers": (int, plain("n_gpu_layers")),
    "main-gpu": (int, plain("main_gpu")),
    "batch-size": (int, plain("n_batch")),
    "ubatch-size": (int, plain("n_ubatch")),
    "flash-attn": (str, set_flash_attention),
    "cache-ram": (int, plain("cache_ram_mib")),
    "slots": (bool, plain("endpoint_slots")),
    "rope-freq-base": ((int, float), plain("rope_freq_base")),
    "rope-freq-scale": ((int, float), plain("rope_freq_scale")),
    "check-tensors": (bool, plain("check_tensors")),
    "warmup": (bool, plain("warmup")),
    "verbosity": (int, set_verbosity),
}


MOST_VERBOSE = 3


def fail(status: int, words: str) -> NoReturn:
    print(f"embedded server: {words}", file=sys.stderr, flush=True)  # noqa: T201 - its log
    sys.exit(status)


if __name__ == "__main__":
    main()
