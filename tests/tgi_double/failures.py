"""How a start can fail, in TGI's own words (tgi.md 7.5). `DOUBLE_FAILS` names one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Stage = Literal["arguments", "download", "load", "warm-up", "webserver"]


@dataclass(frozen=True)
class Failure:
    """What breaks, and where. `{model}` in the words stands for the model's id."""

    stage: Stage
    words: str = ""
    """The end of a Python traceback, or what the router says."""
    signal: int | None = None
    """The process was killed by it and said nothing."""
    last: str = ""
    """The router's own last line."""
    warning: str = ""
    """What was said before."""


def traceback(words: str) -> str:
    """Return a Python traceback that ends in these words."""
    return (
        "Traceback (most recent call last):\n\n"
        '  File "/usr/src/.venv/bin/text-generation-server", line 10, in <module>\n    sys.exit(app())\n\n'
        f'  File "/usr/src/server/text_generation_server/cli.py", line 119, in serve\n    server.serve(\n\n{words}'
    )


_HUB = "https://huggingface.co/api/models/{model}"
_ROOT = "(Request ID: Root=1-67ff0000-0123456789abcdef01234567;00000000-0000-0000-0000-000000000000)"
_OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has a total capacity of 23.64 GiB "
    "of which 1.02 GiB is free. Process 4242 has 22.61 GiB memory in use."
)
_NO_FLASH = "Could not import Flash Attention enabled models: CUDA is not available"
OOM_SERVING = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB"
)

FAILURES: Mapping[str, Failure] = {
    "gated": Failure(
        "download",
        f"huggingface_hub.errors.GatedRepoError: 401 Client Error. {_ROOT}\n\n"
        f"Cannot access gated repo for url {_HUB}.\n"
        "Access to model {model} is restricted. You must have access to it and be authenticated to access it. "
        "Please log in.",
    ),
    "not-granted": Failure(
        "download",
        f"huggingface_hub.errors.GatedRepoError: 403 Client Error. {_ROOT}\n\n"
        f"Cannot access gated repo for url {_HUB}.\n"
        "Access to model {model} is restricted and you are not in the authorized list. "
        "Visit https://huggingface.co/{model} to ask for access.",
    ),
    "bad-token": Failure(
        "download",
        f"huggingface_hub.errors.HfHubHTTPError: 401 Client Error: Unauthorized for url: {_HUB} {_ROOT}\n\n"
        "Invalid credentials in Authorization header",
    ),
    "no-repository": Failure(
        "download",
        f"huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. {_ROOT}\n\n"
        f"Repository Not Found for url: {_HUB}.\n"
        "Please make sure you specified the correct `repo_id` and `repo_type`.\n"
        "If you are trying to access a private or gated repo, make sure you are authenticated.",
    ),
    "network": Failure(
        "download",
        "requests.exceptions.ConnectionError: (MaxRetryError("
        "'HTTPSConnectionPool(host=\\'huggingface.co\\', port=443): "
        'Max retries exceeded with url: /api/models/{model} (Caused by NameResolutionError("Failed to resolve '
        "\\'huggingface.co\\' ([Errno -3] Temporary failure in name resolution)\"))'))",
    ),
    "disk-full": Failure("download", "OSError: [Errno 28] No space left on device"),
    "download-killed": Failure("download", signal=9),
    "oom-load": Failure("load", _OOM),
    "no-gpu": Failure(
        "load",
        "RuntimeError: Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a "
        "driver from http://www.nvidia.com/Download/index.aspx",
        warning=_NO_FLASH,
    ),
    "no-flash-attention": Failure(
        "load", "NotImplementedError: Sharded Llama requires Flash Attention enabled models.", warning=_NO_FLASH
    ),
    "quantization": Failure(
        "load", "ValueError: Unsupported quantization method: quantize 'exl2' is not supported for this model"
    ),
    "model-type": Failure("load", "ValueError: Unsupported model type toy"),
    "remote-code": Failure(
        "load",
        "ValueError: The repository for {model} contains custom code which must be executed to correctly load the "
        "model. You can inspect the repository content at https://hf.co/{model}.\n"
        "Please pass the argument `trust_remote_code=True` to allow custom code to be run.",
    ),
    "one-gpu-per-process": Failure("load", "AssertionError: Each process is one gpu"),
    "shard-killed": Failure("load", signal=9),
    "illegal-instruction": Failure("load", signal=4),
    "killed": Failure("load"),
    "oom-warmup": Failure(
        "warm-up", _OOM, last='Error: Backend(Warmup(Generation("CUDA out of memory. Tried to allocate 1.96 GiB.")))'
    ),
    "oom-warmup-prefill": Failure(
        "warm-up",
        "RuntimeError: Not enough memory to handle 4096 prefill tokens. "
        "You need to decrease `--max-batch-prefill-tokens`",
        last="Error: Backend(NotEnoughMemory(4096))",
    ),
    "limits": Failure(
        "webserver",
        last='Error: ArgumentValidation("`max_batch_prefill_tokens` must be >= `max_input_tokens`. '
        'Given: 4096 and 8191")',
    ),
    "tokenizer": Failure(
        "webserver", "Failed to import python tokenizer", last='Error: Tokenizer("Unable to load tokenizer.")'
    ),
    "port-taken": Failure("webserver"),
    "too-few-gpus": Failure("arguments"),
}
