"""From the first line to `Connected`: TGI's phases in order (tgi.md 7.1), and how they fail."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from .api import MODEL_SHA
from .arguments import Args, described
from .failures import FAILURES, Failure, Stage, traceback
from .log import Log
from .personality import Personality
from .service import die, duration
from .validation import Limits

DEFAULT_TOTAL_TOKENS = 4096
WAITING_EVERY_S = 10.0
BACKEND = ("text_generation_router_v3", "backends/v3/src/lib.rs")
ROUTER = ("text_generation_router::server", "router/src/server.rs")


class Failed(Exception):
    """The launcher ends with 1, and with the words `Error: <variant>`."""


class Load:
    """Says what TGI says while it loads, and takes as long as the personality wants."""

    def __init__(self, args: Args, personality: Personality, log: Log) -> None:
        self._args = args
        self._personality = personality
        self._log = log
        self._failure = FAILURES.get(personality.fails)

    def check(self) -> tuple[Limits, int]:
        """Return the limits and the number of shards.

        Raises:
            Failed: the arguments do not go together.
        """
        args, log = self._args, self._log
        log.launcher(described(args))
        log.launcher("Using attention flashinfer - Prefix caching true")
        shards = self._shards()
        if shards > 1:
            log.launcher(f"Sharding model on {shards} processes")
        limits = self._limits()
        if args.max_batch_prefill_tokens is None:
            log.launcher(f"Default `max_batch_prefill_tokens` to {limits.max_input_tokens + 50}")
        if args.cuda_graphs is None:
            log.launcher("Using default cuda graphs [1, 2, 4, 8, 16, 32]")
        return limits, shards

    def _limits(self) -> Limits:
        args = self._args
        if args.max_input_tokens is not None and args.max_input_length is not None:
            raise Failed(
                f'ArgumentValidation("Both `max_input_tokens` ({args.max_input_tokens}) and `max_input_length` '
                f'({args.max_input_length}) are set. Please define only `max_input_tokens`.")'
            )
        total = args.max_total_tokens or DEFAULT_TOTAL_TOKENS
        most = args.max_input_tokens or args.max_input_length or total - 1
        if most >= total:
            raise Failed('ArgumentValidation("`max_input_tokens must be < `max_total_tokens`")')
        if args.validation_workers == 0:
            raise Failed('ArgumentValidation("`validation_workers` must be > 0")')
        return Limits(most, total, args)

    def _shards(self) -> int:
        args, devices = self._args, _visible_devices(os.environ)
        if self._personality.fails == "too-few-gpus":
            raise Failed(f'NotEnoughCUDADevices("`sharded` is true but only found {devices} CUDA devices")')
        if args.sharded and args.num_shard is not None and args.num_shard <= 1:
            raise Failed('ArgumentValidation("`sharded` is true but `num_shard` <= 1")')
        shards = (1 if args.sharded is False else devices) if args.num_shard is None else args.num_shard
        if shards < 1:
            raise Failed('ArgumentValidation("`num_shard` cannot be < 1")')
        return shards

    async def download(self) -> None:
        """Play the download process, span and all.

        Raises:
            Failed: DownloadError.
        """
        model = self._args.model_id
        self._log.launcher(f"Starting check and download process for {model}", span="download")
        failure = self._fails_at("download")
        await download(self._args, self._personality, self._log.launcher, failure)
        if failure and failure.signal:
            words = f"Download process was signaled to shutdown with signal {failure.signal}: "
            self._log.launcher(words, "ERROR", "download")
        elif failure:
            words = f"Download encountered an error: \n{self._traceback(failure)}"
            self._log.launcher(words, "ERROR", "download")
        if failure:
            raise Failed("DownloadError")
        self._log.launcher(f"Successfully downloaded weights for {model}", span="download")

    async def shards(self, count: int) -> None:
        """Play the shards, until their weights are loaded.

        Raises:
            Failed: ShardCannotStart.
        """
        started = time.monotonic()
        for rank in range(count):
            self._log.launcher("Starting shard", span="shard-manager", rank=rank)
        await self._wait_for_shards(count)
        if failure := self._fails_at("load"):
            self._shard_failed(failure)
        for words in ("Detected system cuda", "Using prefix caching = True", "Using Attention = flashinfer"):
            self._log.launcher(words)
        for rank in range(count):
            self._log.launcher(f"Server started at unix://{self._args.shard_uds_path}-{rank}")
            ready = f"Shard ready in {duration(time.monotonic() - started)}"
            self._log.launcher(ready, span="shard-manager", rank=rank)

    async def _wait_for_shards(self, count: int) -> None:
        """Wait, and say so every ten seconds as TGI does, or at least once if there is anything to wait for."""
        left_s = math.inf if self._personality.endless else self._personality.shard_s
        turn_s = min(WAITING_EVERY_S, left_s / 2)
        while left_s > 0:
            await asyncio.sleep(min(turn_s, left_s))
            left_s -= turn_s
            if left_s > 0:
                for rank in range(count):
                    self._log.launcher("Waiting for shard to be ready...", span="shard-manager", rank=rank)

    def _shard_failed(self, failure: Failure) -> None:
        if self._personality.fails == "killed":
            die()
        words = self._traceback(failure)
        if failure.warning:
            self._log.launcher(failure.warning, "WARN")
        if failure.signal is None:
            self._log.launcher(f"Error when initializing model\n{words}", "ERROR")
        self._shard_line(f"Shard complete standard error output:\n\n{words}".rstrip())
        if failure.signal is not None:
            self._shard_line(f"Shard process was signaled to shutdown with signal {failure.signal}")
        self._log.launcher("Shard 0 failed to start", "ERROR")
        self._log.launcher("Shutting down shards")
        raise Failed("ShardCannotStart")

    def _shard_line(self, words: str) -> None:
        self._log.launcher(words, "ERROR", "shard-manager", rank=0)

    async def webserver(self, limits: Limits) -> None:
        """Play the router until it is about to listen.

        Raises:
            Failed: WebserverFailed.
        """
        log = self._log
        log.launcher("Starting Webserver")
        log.router("Warming up model", (*BACKEND, 125))
        await asyncio.sleep(self._personality.warmup_s)
        if failure := self._fails_at("warm-up"):
            log.launcher(f"Method Warmup encountered an error.\n{self._traceback(failure)}", "ERROR")
            self._webserver_crashed(failure.last)
        log.launcher("KV-cache blocks: 65536, size: 1")
        log.launcher("Cuda Graphs are enabled for sizes [32, 16, 8, 4, 2, 1]")
        log.router("Setting max batch total tokens to 65536", (*BACKEND, 137))
        log.router("Using backend V3", (*BACKEND, 166))
        if self._args.max_input_tokens is None:
            log.router(f"Maximum input tokens defaulted to {limits.max_input_tokens}", (*BACKEND, 168))
        if self._args.max_total_tokens is None:
            log.router(f"Maximum total tokens defaulted to {limits.max_total_tokens}", (*BACKEND, 170))
        log.router("Using the Hugging Face API", (*ROUTER, 1661))
        log.router(f"Serving revision {MODEL_SHA} of model {self._args.model_id}", (*ROUTER, 1732))
        if (failure := self._fails_at("webserver")) and failure.last:
            if failure.words:
                log.router(failure.words, (*ROUTER, 1795), "WARN")
            self._webserver_crashed(failure.last)
        if not is_address(self._args.hostname):
            log.router("Invalid hostname, defaulting to 0.0.0.0", (*ROUTER, 1877), "WARN")
        log.router("Connected", (*ROUTER, 2454))

    def not_bound(self, error: OSError, address: str) -> None:
        """Play the router that cannot listen.

        Raises:
            Failed: WebserverFailed.
        """
        words = f"Failed to bind to {address}: {error.strerror} (os error {error.errno})"
        self._log.router(words, (*ROUTER, 2460), "ERROR")
        self._webserver_crashed(f'Error: WebServer(Axum(Os {{ code: {error.errno}, message: "{error.strerror}" }}))')

    def _webserver_crashed(self, last: str) -> None:
        self._log.bare(last)
        self._log.launcher("Webserver Crashed", "ERROR")
        self._log.launcher("Shutting down shards")
        raise Failed("WebserverFailed")

    def _fails_at(self, stage: Stage) -> Failure | None:
        return self._failure if self._failure and self._failure.stage == stage else None

    def _traceback(self, failure: Failure) -> str:
        if not failure.words:
            return ""
        return "\n" + traceback(failure.words.replace("{model}", self._args.model_id))


async def download(args: Args, personality: Personality, say: Callable[[str], object], failure: Failure | None) -> None:
    """Say what `text-generation-server download-weights` says; stop half-way if it is to fail."""
    cache = _snapshot(args, os.environ)
    if personality.cached or (cache and cache.exists()):
        say("Files are already present on the host. Skipping download.")
        return
    await asyncio.sleep(0)
    started, count = time.monotonic(), personality.files
    for number in range(1, count + 1):
        name = f"model-{number:05}-of-{count:05}.safetensors"
        say(f"Download file: {name}")
        await asyncio.sleep(personality.download_s / count)
        if failure:
            return
        path = f"/data/hub/{_folder(args.model_id)}/snapshots/{MODEL_SHA}/{name}"
        elapsed = timedelta(seconds=int(time.monotonic() - started))
        say(f"Downloaded {path} in {elapsed}.")
        say(f"Download: [{number}/{count}] -- ETA: {elapsed / number * (count - number) if number < count else 0}")
    if cache:
        with suppress(OSError):  # a cache that cannot be written remembers nothing
            cache.mkdir(parents=True)


def _snapshot(args: Args, env: Mapping[str, str]) -> Path | None:
    """Return where the hub cache keeps this revision, if there is a hub cache."""
    home = env.get("HF_HOME")
    cache = args.huggingface_hub_cache or (home and f"{home}/hub")
    return Path(cache) / _folder(args.model_id) / "snapshots" / (args.revision or "main") if cache else None


def _folder(model_id: str) -> str:
    return f"models--{model_id.replace('/', '--')}"


def _visible_devices(env: Mapping[str, str]) -> int:
    listed = env.get("CUDA_VISIBLE_DEVICES") or env.get("NVIDIA_VISIBLE_DEVICES") or ""
    return 1 if listed in ("", "all", "void", "none") else len(listed.split(","))


def is_address(hostname: str) -> bool:
    """Say whether TGI would listen there; a name, such as Docker puts into HOSTNAME, is none."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):
            return bool(socket.inet_pton(family, hostname))
    return False
