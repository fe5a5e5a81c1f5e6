"""The launcher's command line (tgi.md section 5): flags, the same names as variables, and clap's words for mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

FALSE = {"", "0", "f", "false", "n", "no", "off"}
SHORT = {"-p": "--port", "-g": "--graceful-termination-timeout", "-e": "--env"}
WITHOUT_VARIABLE = {"env"}
CHOICES: Mapping[str, Sequence[str]] = {
    "quantize": [
        *("awq", "compressed-tensors", "eetq", "exl2", "gptq", "marlin"),
        *("bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4", "fp8"),
    ],
    "dtype": ["float16", "bfloat16"],
    "kv_cache_dtype": ["fp8_e4m3fn", "fp8_e5m2"],
    "usage_stats": ["on", "off", "no-stack"],
}


class UsageError(Exception):
    """A command line that clap refuses; the words are clap's. The launcher exits with 2."""


@dataclass(frozen=True)
class Args:
    """One field for each flag, with TGI's default."""

    model_id: str = "bigscience/bloom-560m"
    revision: str | None = None
    validation_workers: int = 2
    sharded: bool | None = None
    num_shard: int | None = None
    quantize: str | None = None
    speculate: int | None = None
    dtype: str | None = None
    kv_cache_dtype: str | None = None
    trust_remote_code: bool = False
    max_concurrent_requests: int = 128
    max_best_of: int = 2
    max_stop_sequences: int = 4
    max_top_n_tokens: int = 5
    max_input_tokens: int | None = None
    max_input_length: int | None = None
    max_total_tokens: int | None = None
    waiting_served_ratio: float = 0.3
    max_batch_prefill_tokens: int | None = None
    max_batch_total_tokens: int | None = None
    max_waiting_tokens: int = 20
    max_batch_size: int | None = None
    cuda_graphs: str | None = None
    hostname: str = "0.0.0.0"
    port: int = 3000
    prometheus_port: int = 9000
    shard_uds_path: str = "/tmp/text-generation-server"  # noqa: S108 - TGI's own
    master_addr: str = "localhost"
    master_port: int = 29500
    huggingface_hub_cache: str | None = None
    weights_cache_override: str | None = None
    disable_custom_kernels: bool = False
    cuda_memory_fraction: float = 1.0
    rope_scaling: str | None = None
    rope_factor: float | None = None
    json_output: bool = False
    otlp_endpoint: str | None = None
    otlp_service_name: str = "text-generation-inference.router"
    cors_allow_origin: str | None = None
    api_key: str | None = None
    watermark_gamma: float | None = None
    watermark_delta: float | None = None
    tokenizer_config_path: str | None = None
    disable_grammar_support: bool = False
    env: bool = False
    max_client_batch_size: int = 4
    lora_adapters: str | None = None
    usage_stats: str = "on"
    payload_limit: int = 2_000_000
    enable_prefill_logprobs: bool = False
    graceful_termination_timeout: int = 90


KINDS = {each.name: str(each.type) for each in fields(Args)}


def parse(argv: Sequence[str], env: Mapping[str, str]) -> Args:
    """Return what the command line says; the environment where it is silent.

    Raises:
        UsageError: an unknown flag, or a value that it cannot have.
    """
    texts = {name: env[name.upper()] for name in KINDS if name not in WITHOUT_VARIABLE and name.upper() in env}
    texts |= _flags(argv)
    values: dict[str, Any] = {name: _value(name, text) for name, text in texts.items()}
    return Args(**values)


def _flags(argv: Sequence[str]) -> dict[str, str]:
    """Return the text given to each flag."""
    given = {}
    words = list(argv)
    while words:
        flag, sign, text = words.pop(0).partition("=")
        name = SHORT.get(flag, flag).removeprefix("--").replace("-", "_")
        if not flag.startswith("-") or name not in KINDS:
            raise UsageError(
                f"error: unexpected argument '{flag}' found\n\nUsage: text-generation-launcher [OPTIONS]\n\n"
                "For more information, try '--help'."
            )
        if KINDS[name] == "bool":
            given[name] = "true"
        elif sign:
            given[name] = text
        elif words and not words[0].startswith("--"):
            given[name] = words.pop(0)
        else:
            raise _refused(f"a value is required for '{_shown(name)}' but none was supplied")
    return given


def _value(name: str, text: str) -> bool | int | float | str:
    kind = KINDS[name].removesuffix(" | None")
    if kind == "bool":
        return text.lower() not in FALSE
    if text not in CHOICES.get(name, [text]):
        raise _refused(f"invalid value '{text}' for '{_shown(name)}'\n  [possible values: {', '.join(CHOICES[name])}]")
    if kind == "str":
        return text
    try:
        return int(text) if kind == "int" else float(text)
    except ValueError:
        why = "invalid digit found in string" if kind == "int" else "invalid float literal"
        raise _refused(f"invalid value '{text}' for '{_shown(name)}': {why}") from None


def _refused(words: str) -> UsageError:
    return UsageError(f"error: {words}\n\nFor more information, try '--help'.")


def _shown(name: str) -> str:
    return f"--{name.replace('_', '-')} <{name.upper()}>"


def described(args: Args) -> str:
    """Return the arguments as Rust's `{:#?}` shows them: the launcher's first log line, API key and all."""
    lines = (f"    {name}: {_rust(getattr(args, name), kind)},\n" for name, kind in KINDS.items())
    return f"Args {{\n{''.join(lines)}}}"


def _rust(value: object, kind: str) -> str:
    if value is None:
        return "None"
    shown = f'"{value}"' if isinstance(value, str) else str(value).lower()
    return f"Some(\n        {shown},\n    )" if kind.endswith("None") else shown
