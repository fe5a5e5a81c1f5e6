"""What TGI does with a request between its HTTP face and its model: permits, generation, failures, the books."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from random import SystemRandom
from typing import Any

from .failures import OOM_SERVING
from .generation import Generation, Step
from .log import Log
from .metrics import Metrics
from .personality import Personality
from .validation import Job, Limits, Refused, check_streamable, checked_best_of, validated
from .web import Cut

KILLED = 128 + signal.SIGKILL
SERVER = ("text_generation_router::server", "router/src/server.rs")


@dataclass(frozen=True)
class Answer:
    """A whole answer: the best sequence, and the others if there were any."""

    best: Generation
    others: list[Generation]
    total_s: float


class Service:
    """Everything the routes share. `crashed` is set when a shard has died: the launcher ends then, and so do all."""

    def __init__(self, limits: Limits, personality: Personality, log: Log) -> None:
        self.limits = limits
        self.args = limits.args
        self.personality = personality
        self.metrics = Metrics(limits.max_total_tokens)
        self.crashed = asyncio.Event()
        self.ready_at = time.monotonic()
        self._log = log
        self._permits = 0 if personality.overloaded else self.args.max_concurrent_requests
        self._running = 0

    async def generate(self, inputs: str, parameters: Mapping[str, Any], span: str = "generate") -> Answer:
        """Return the whole answer.

        Raises:
            Refused: 422, 429 or 424; the caller is told in JSON.
        """
        with self._counted():
            best_of = checked_best_of(parameters, self.args)
            with self._permit(best_of):
                started = time.monotonic()
                job = validated(inputs, parameters, self.limits)
                seeds = [job.seed, *(SystemRandom().getrandbits(64) for _ in range(best_of - 1))]
                made = await asyncio.gather(*(self._whole(job, seed) for seed in seeds))
                best, *others = sorted(made, key=lambda generation: -generation.mean_logprob)
                answer = Answer(best, others, time.monotonic() - started)
                self._succeeded(span, job, best, answer.total_s)
                return answer

    async def stream(
        self, inputs: str, parameters: Mapping[str, Any], span: str = "generate_stream"
    ) -> AsyncGenerator[tuple[Generation, Step], None]:
        """Yield each token as it is made, with the generation so far.

        Raises:
            Refused: as `generate`; by then the caller has his status 200.
        """
        with self._counted():
            check_streamable(parameters)
            with self._permit(1):
                started = time.monotonic()
                job = validated(inputs, parameters, self.limits)
                async with aclosing(self._tokens(job, job.seed)) as tokens:
                    async for generation, step in tokens:
                        yield generation, step
                self._succeeded(span, job, generation, time.monotonic() - started)

    async def _whole(self, job: Job, seed: int) -> Generation:
        async with aclosing(self._tokens(job, seed)) as tokens:
            return [generation async for generation, _step in tokens][-1]

    async def _tokens(self, job: Job, seed: int) -> AsyncGenerator[tuple[Generation, Step], None]:
        generation = Generation(job.prompt, job.sampling, job.limit, seed, job.stop, job.top_n, job.forced)
        while generation.finish_reason is None:
            await self._misbehave(len(generation.steps))
            await self._pause(self.personality.token_s)
            step = generation.step()
            yield generation, step

    async def _misbehave(self, made: int) -> None:
        """Do what the personality has in mind for a generation that has made so many tokens."""
        if made == self.personality.hangs_after_tokens:
            await self._pause(None)
        if made == self.personality.cuts_after_tokens:
            raise Cut
        if made == self.personality.dies_after_tokens:
            die()
        if made == self.personality.oom_after_tokens:
            self._log.launcher(f"Method Decode encountered an error.\n{OOM_SERVING}", "ERROR")
            self.crashed.set()

    async def _pause(self, seconds: float | None) -> None:
        """Wait, or fail as soon as a shard crashes: its whole batch fails with it."""
        try:
            async with asyncio.timeout(seconds):
                await (self.crashed.wait() if seconds != 0 else asyncio.sleep(0))
        except TimeoutError:
            pass
        if self.crashed.is_set():
            raise Refused(f"Request failed during generation: Server error: {OOM_SERVING}", "generation", 424)

    @contextmanager
    def _permit(self, count: int) -> Iterator[None]:
        """Take permits of `--max-concurrent-requests`, or refuse at once; give them back when the caller leaves."""
        if count > self._permits:
            self._log.router("no permits available", (*_INFER, 125), "ERROR", "generate")
            raise Refused("Model is overloaded", "overloaded", 429)
        self._permits -= count
        self._set_running(self._running + count)
        try:
            yield
        finally:
            self._permits += count
            self._set_running(self._running - count)

    def _set_running(self, count: int) -> None:
        self._running = count
        self.metrics.gauge("tgi_queue_size", 0)
        self.metrics.gauge("tgi_batch_current_size", count)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.metrics.count("tgi_request_count")
        try:
            yield
        except Refused as refused:
            self.metrics.count("tgi_request_failure", err=refused.kind)
            if refused.kind != "overloaded":
                self._log.router(refused.words, (*_INFER, 180), "ERROR", "generate")
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self.metrics.count("tgi_request_failure", err="dropped")
            if self.personality.tells_aborts:  # TGI says nothing of it
                self._log.bare(f"aborted at {time.monotonic():.6f}")
            raise

    def _succeeded(self, span: str, job: Job, generation: Generation, total_s: float) -> None:
        tokens = len(generation.steps)
        self.metrics.count("tgi_request_success")
        self.metrics.observe("tgi_request_duration", total_s)
        self.metrics.observe("tgi_request_queue_duration", 0.0)
        self.metrics.observe("tgi_request_inference_duration", total_s)
        self.metrics.observe("tgi_request_mean_time_per_token_duration", total_s / tokens)
        self.metrics.observe("tgi_request_input_length", len(job.prompt))
        self.metrics.observe("tgi_request_generated_tokens", tokens)
        self.metrics.observe("tgi_request_max_new_tokens", job.limit)
        times = {
            "validation_time": 0.0,
            "queue_time": 0.0,
            "inference_time": total_s,
            "time_per_token": total_s / tokens,
        }
        self._log.router(
            "Success",
            (*SERVER, 424),
            span=span,
            parameters=_shown(job.parameters),
            total_time=duration(total_s),
            **{name: duration(seconds) for name, seconds in times.items()},
            seed=_option(generation.reported_seed),
        )


_INFER = ("text_generation_router::infer", "router/src/infer/mod.rs")


def die() -> None:
    """End as if the host had killed us: exit status 137, nothing said, every connection cut."""
    os.kill(os.getpid(), signal.SIGKILL)
    os._exit(KILLED)  # the first process of a container cannot kill itself


def duration(seconds: float) -> str:
    """Return a duration as Rust's `{:?}` shows it."""
    for unit, size, digits in (("s", 1.0, 9), ("ms", 1e-3, 6), ("µs", 1e-6, 3)):
        if seconds >= size:
            return f"{seconds / size:.{digits}f}".rstrip("0").rstrip(".") + unit
    return f"{round(seconds * 1e9)}ns"


def _shown(parameters: Mapping[str, Any]) -> str:
    inner = ", ".join(
        f"{name}: {_option(value) if value is None or not isinstance(value, bool | list) else str(value).lower()}"
        for name, value in parameters.items()
        if name in _SHOWN
    )
    return f"GenerateParameters {{ {inner} }}"


_SHOWN = ("best_of", "temperature", "top_k", "top_p", "do_sample", "max_new_tokens", "details", "seed", "top_n_tokens")
"""Not `stop`: it is the caller's text, and one line of our own log is as good without it."""


def _option(value: object) -> str:
    return "None" if value is None else f"Some({value})"
