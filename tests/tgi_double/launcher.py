"""A double of text-generation-inference: its command line, its HTTP API, its log lines, and no weights.

    launcher.py --model-id org/model --num-shard 1 --port 8080 --json-output ...      as text-generation-launcher
    launcher.py download-weights org/model --revision main                            as text-generation-server

It needs Python 3.11 and this directory. How it behaves is said by variables; without any it is ready at once and well.

    while it starts
      DOUBLE_DOWNLOAD_S            seconds for all files together [0]
      DOUBLE_FILES                 how many files [2]
      DOUBLE_CACHED                1: the files are there already (so are those in HF_HOME from an earlier download)
      DOUBLE_SHARD_S               seconds to load the weights [0]
      DOUBLE_WARMUP_S              seconds to warm up [0]
      DOUBLE_ENDLESS               1: the weights are never loaded
      DOUBLE_SILENT                1: prints nothing, ever
      DOUBLE_FAILS                 how the start fails:
        download                     gated not-granted bad-token no-repository network disk-full download-killed
        weights                      oom-load no-gpu no-flash-attention quantization model-type remote-code
                                     one-gpu-per-process shard-killed (signal 9) illegal-instruction (signal 4)
                                     killed (the launcher itself, exit status 137)
        warm-up                      oom-warmup oom-warmup-prefill
        webserver                    limits tokenizer port-taken (so does a port that really is)
        arguments                    too-few-gpus (counts NVIDIA_VISIBLE_DEVICES)
    while it serves
      DOUBLE_TOKEN_S               seconds a token [0]
      DOUBLE_KEEP_ALIVE_S          seconds of silence before a stream gets a comment [15]
      DOUBLE_OVERLOADED            1: answers 429 whatever it has to do (else: above --max-concurrent-requests)
      DOUBLE_GARBAGE               1: answers HTML everywhere but on its health check
      DOUBLE_NO_TEMPLATE           1: has no chat template
      DOUBLE_OOM_AFTER_TOKENS      a generation that has made n tokens: memory ends, all in flight fail, exit status 1
      DOUBLE_DIES_AFTER_TOKENS     ... : the process is killed, exit status 137
      DOUBLE_CUTS_AFTER_TOKENS     ... : its connection is cut; nothing else happens
      DOUBLE_HANGS_AFTER_TOKENS    ... : it makes no more
      DOUBLE_TELLS_ABORTS          1: prints `aborted at SECONDS` when a caller has left (the machine's monotonic clock)
      DOUBLE_HEALTH_HANGS_AFTER_S  seconds from which on the health check does not answer
      DOUBLE_HEALTH_FAILS_AFTER_S  seconds from which on it answers 503
      DOUBLE_HEALTH_RECOVERS_AFTER_S  seconds from which on it is well again [never]
    when it is asked to stop
      DOUBLE_IGNORES_SIGTERM       1: does not
      DOUBLE_STOP_S                seconds it takes beyond its last answer [0]

It differs from TGI where a model would be needed: a grammar gets the smallest text that fits it; of tools it calls the
one that the last user message names; images are text; adapters are the base model (as unknown ones are in TGI).
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: nothing but this directory is known
    sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
    __package__ = Path(__file__).resolve().parent.name

from .api import Api
from .arguments import Args, UsageError, parse
from .failures import FAILURES, OOM_SERVING, traceback
from .load import ROUTER, Failed, Load, download, is_address
from .log import Log
from .personality import Personality, UnknownPersonality, from_environment
from .service import Service, die
from .validation import Limits
from .web import Server

USAGE_STATUS = 2
DOWNLOAD = "download-weights"


class Launcher:
    """One life of the double: loads, serves, stops."""

    def __init__(self, args: Args, personality: Personality, log: Log) -> None:
        self._args = args
        self._personality = personality
        self._log = log
        self._load = Load(args, personality, log)
        self._asked_to_stop = asyncio.Event()
        self._shards = 0

    async def run(self) -> int:
        """Return the exit status: 0 if it was asked to stop, else 1."""
        self._listen_for_signals()
        try:
            limits, self._shards = self._load.check()
            if not await self._unless_stopped(self._load.download()):
                self._terminated("download")
            elif not await self._unless_stopped(self._load.shards(self._shards)):
                self._shards_terminated()
            elif not await self._unless_stopped(self._load.webserver(limits)):
                self._terminated("webserver")
                self._shards_terminated()
            else:
                await self._serve(limits)
        except Failed as failed:
            self._log.error(str(failed))
            return 1
        return 0

    def _listen_for_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked)

    def _asked(self) -> None:
        if not self._personality.ignores_sigterm:
            self._asked_to_stop.set()

    async def _unless_stopped(self, phase: Coroutine[Any, Any, None]) -> bool:
        """Run a phase; say whether it came to its end before somebody asked us to stop."""
        working = asyncio.ensure_future(phase)
        asked = asyncio.ensure_future(self._asked_to_stop.wait())
        await asyncio.wait({working, asked}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if working.done():
            working.result()
            return True
        working.cancel()
        await asyncio.wait({working})
        return False

    async def _serve(self, limits: Limits) -> None:
        """Answer until asked to stop, or until a shard has crashed."""
        service = Service(limits, self._personality, self._log)
        server = Server(Api(service), self._args.payload_limit)
        await self._bind(server)
        ends = {asyncio.ensure_future(event.wait()) for event in (self._asked_to_stop, service.crashed)}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        if service.crashed.is_set():
            words = f"Shard complete standard error output:\n\n{traceback(OOM_SERVING)}"
            self._log.launcher(words, "ERROR", "shard-manager", rank=0)
            self._log.launcher("Shard 0 crashed", "ERROR")
        await self._stop(server)
        if service.crashed.is_set():
            raise Failed("ShardFailed")

    async def _bind(self, server: Server) -> None:
        host = self._args.hostname if is_address(self._args.hostname) else "0.0.0.0"
        try:
            if self._personality.fails == "port-taken":
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            await server.start(host, self._args.port)
        except OSError as error:
            self._load.not_bound(error, f"{host}:{self._args.port}")

    async def _stop(self, server: Server) -> None:
        """Close the listener, let those in flight finish for a while, and go."""
        self._log.launcher("Terminating webserver")
        self._log.launcher("Waiting for webserver to gracefully shutdown")
        self._log.router("signal received, starting graceful shutdown", (*ROUTER, 2496))
        await server.stop(self._args.graceful_termination_timeout)
        await asyncio.sleep(self._personality.stop_s)
        self._log.launcher("webserver terminated")
        self._shards_terminated()

    def _shards_terminated(self) -> None:
        self._log.launcher("Shutting down shards")
        for rank in range(self._shards):
            self._terminated("shard", span="shard-manager", rank=rank)

    def _terminated(self, process: str, **place: Any) -> None:
        for words in (
            f"Terminating {process}",
            f"Waiting for {process} to gracefully shutdown",
            f"{process} terminated",
        ):
            self._log.launcher(words, **place)


def launch(argv: Sequence[str]) -> int:
    """Be `text-generation-launcher`; return its exit status."""
    args, personality = parse(argv, os.environ), _personality()
    log = Log(as_json=args.json_output, silent=personality.silent)
    return asyncio.run(Launcher(args, personality, log).run())


def download_weights(argv: Sequence[str]) -> int:
    """Be `text-generation-server download-weights`; return its exit status. Its lines are loguru's."""
    args, personality = _download_arguments(argv), _personality()
    failure = FAILURES.get(personality.fails)
    failure = failure if failure and failure.stage == "download" else None
    signal.signal(signal.SIGTERM, signal.SIG_IGN if personality.ignores_sigterm else signal.SIG_DFL)

    def say(words: str) -> None:
        record = {"text": f"{words}\n", "record": {"level": {"name": "INFO", "no": 20}, "message": words}}
        print(json.dumps(record) if args.json_output else words, flush=True)  # noqa: T201

    asyncio.run(download(args, personality, (lambda _words: None) if personality.silent else say, failure))
    if not failure:
        return 0
    if failure.signal:
        die()
    print(traceback(failure.words.replace("{model}", args.model_id)), file=sys.stderr)  # noqa: T201
    return 1


def _download_arguments(argv: Sequence[str]) -> Args:
    """Return what it was told: the first word is the model, and most flags are not of interest."""
    words = list(argv)
    options = dict(pairwise(words))
    revision = options.get("--revision") or os.environ.get("REVISION")
    cache = os.environ.get("HUGGINGFACE_HUB_CACHE")
    model_id = words[0] if words else os.environ.get("MODEL_ID", Args.model_id)
    return Args(model_id=model_id, revision=revision, huggingface_hub_cache=cache, json_output="--json-output" in words)


def _personality() -> Personality:
    personality = from_environment(os.environ)
    if personality.fails and personality.fails not in FAILURES:
        raise UnknownPersonality(f"DOUBLE_FAILS knows {', '.join(FAILURES)}, and not {personality.fails}")
    return personality


def main(argv: Sequence[str]) -> int:
    """Be the launcher, or the other program if its command comes first; return the exit status."""
    try:
        return download_weights(argv[1:]) if argv[:1] == [DOWNLOAD] else launch(argv)
    except (UsageError, UnknownPersonality) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return USAGE_STATUS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
