"""The gateway's figures, as Prometheus has them: what is counted, under which names, and the page that tells.

Labels are bounded by the catalog and by the tables in here: a model's id, a state, a reason, an API, a code of ours.
Nothing that a caller sent is ever one. What exists now (states, queues, GPUs) is read when somebody asks for the page;
what happens is counted as it happens.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client import generate_latest as rendered
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from gateway.counts import Buckets, Count, Counts, Histograms
from gateway.fleet.journal import Entry
from gateway.fleet.starts import Moves, Started, Stopped
from gateway.fleet.status import Status
from gateway.lifecycle import State

WAITS_S = (0.01, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)
FIRST_TOKEN_S = (0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
STARTS_S = (0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1200)
REQUESTS_S = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
LAG_S = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
LAG_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU: all of its memory, None where that is not known, and what each model holds of it (None: all)."""

    id: str
    memory_bytes: int | None
    held: Mapping[str, int | None] = field(default_factory=dict)


class Figures:
    """Counts for one gateway, in a registry of its own."""

    def __init__(self, version: str, clock: Callable[[], float] = time.monotonic) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # when each counter began: twice the series
        own = self.registry = CollectorRegistry()
        ProcessCollector(registry=own)
        Gauge("gateway_build_info", "1; the label tells the version.", ["version"], registry=own).labels(version).set(1)
        self.queue_wait = Histograms(
            "gateway_queue_wait_seconds",
            "Time from a call's arrival until it had the model's server, a cold start included.",
            ["model"],
            registry=own,
            buckets=WAITS_S,
        )
        self.first_token = Histograms(
            "gateway_time_to_first_token_seconds",
            "Time from a call's arrival until the first token of its stream, the wait in the queue included.",
            ["model"],
            registry=own,
            buckets=FIRST_TOKEN_S,
        )
        self.generated_tokens = Counts(
            "gateway_generated_tokens_total",
            "Tokens of answers that came to their end, by the server's own count; its events where it tells no count.",
            ["model"],
            registry=own,
        )
        self.prompt_tokens = Counts(
            "gateway_prompt_tokens_total", "Tokens of prompts, where the server tells.", ["model"], registry=own
        )
        self.calls = Counts(
            "gateway_calls_total",
            "Calls to models' servers by how they ended; a request with many prompts makes many.",
            ["model", "outcome"],
            registry=own,
        )
        self._starts = Counter(
            "gateway_starts_total", "Starts of models' servers by result.", ["model", "result"], registry=own
        )
        self._start_time = Histogram(
            "gateway_start_duration_seconds",
            "How long starts took that ended well, the wait for GPUs included.",
            ["model"],
            registry=own,
            buckets=STARTS_S,
        )
        self._phase_time = Histogram(
            "gateway_start_phase_duration_seconds",
            "How long each phase took of starts that ended well.",
            ["phase"],
            registry=own,
            buckets=STARTS_S,
        )
        self._stops = Counter(
            "gateway_stops_total",
            "Servers that were up and were taken down, by reason; makes_room: evicted for another model.",
            ["model", "reason"],
            registry=own,
        )
        self._requests = Counts(
            "gateway_requests_total", "Requests by API and outcome.", ["api", "outcome"], registry=own
        )
        self._request_time = Histograms(
            "gateway_request_duration_seconds",
            "How long requests took, to the last byte of the answer.",
            ["api"],
            registry=own,
            buckets=REQUESTS_S,
        )
        self._lag = Histogram(
            "gateway_event_loop_lag_seconds",
            "How much later than asked for the event loop came back to a task that slept.",
            registry=own,
            buckets=LAG_S,
        )
        self._tasks = Gauge(
            "gateway_event_loop_tasks",
            "Tasks of the event loop: with nothing under way always about as many.",
            registry=own,
        )
        self._answers: dict[tuple[str, str], tuple[Count, Buckets]] = {}
        self._models: dict[str, OfModel] = {}
        self._moves = Moves(clock)

    # What happens

    def of(self, model: str) -> OfModel:
        """Return what counts for one model."""
        if model not in self._models:
            self._models[model] = OfModel(self, model)
        return self._models[model]

    def heard(self, entry: Entry) -> None:
        """Count what the journal tells."""
        match self._moves.heard(entry):
            case Started(model, result, took_s, phases_s):
                self.of(model)  # so that it is forgotten with the model
                self._starts.labels(model, result).inc()
                if took_s is not None:
                    self._start_time.labels(model).observe(took_s)
                for phase, phase_s in phases_s.items():
                    self._phase_time.labels(phase).observe(phase_s)
            case Stopped(model, reason):
                self.of(model)
                self._stops.labels(model, reason).inc()

    def answered(self, api: str, outcome: str, took_s: float) -> None:
        """Count a request. `api` and `outcome` come from tables, and never from the caller."""
        if (api, outcome) not in self._answers:
            self._answers[api, outcome] = self._requests.of(api, outcome), self._request_time.of(api)
        requests, took = self._answers[api, outcome]
        requests.value += 1
        took.sum += took_s  # as observe() does, without a call: it is asked at every request
        took.counts[bisect_left(took.bounds, took_s)] += 1

    @asynccontextmanager
    async def sampling_lag(self) -> AsyncIterator[None]:
        """Measure the event loop's lag while what is inside goes on."""
        sampler = asyncio.create_task(self._sample_lag(), name="event-loop lag")
        try:
            yield
        finally:
            sampler.cancel()
            await asyncio.wait([sampler])

    async def _sample_lag(self) -> None:
        while True:
            due = time.monotonic() + LAG_EVERY_S  # the loop's own clock stands still while a step takes long
            await asyncio.sleep(LAG_EVERY_S)
            self._lag.observe(max(time.monotonic() - due, 0.0))

    # What is told

    async def page(self, statuses: Sequence[Status], gpus: Sequence[Gpu]) -> bytes:
        """Return all figures in Prometheus' text format. Those of models that are not among `statuses` are forgotten.

        Written in a thread: with a thousand models it takes longer than the event loop should stand still.
        """
        if gone := self._models.keys() - {status.spec.id for status in statuses}:
            self._forget(gone)
        self._tasks.set(len(asyncio.all_tasks()))
        now = Now(statuses, gpus)
        return await asyncio.to_thread(lambda: rendered(now) + rendered(self.registry))

    def _forget(self, models: set[str]) -> None:
        for rows in (self.queue_wait, self.first_token, self.generated_tokens, self.prompt_tokens, self.calls):
            rows.forget(models)
        of_starts: tuple[MetricWrapperBase, ...] = (self._starts, self._start_time, self._stops)
        for model in models:
            del self._models[model]
            for metric in of_starts:
                metric.remove_by_labels({"model": model})


class OfModel:
    """Counts for one model: the rows are looked up once, because this is called in the midst of requests."""

    def __init__(self, figures: Figures, model: str) -> None:
        self._figures = figures
        self._model = model
        self._outcomes: dict[str, Count] = {}
        self.waited = figures.queue_wait.of(model).observe
        self.first_token = figures.first_token.of(model).observe
        self._generated = figures.generated_tokens.of(model)
        self._prompts = figures.prompt_tokens.of(model)

    def generated(self, tokens: int, prompt_tokens: int) -> None:
        self._generated.value += tokens
        self._prompts.value += prompt_tokens

    def ended(self, outcome: str) -> None:
        if outcome not in self._outcomes:
            self._figures.of(self._model)  # so that it is forgotten again, should the model be gone
            self._outcomes[outcome] = self._figures.calls.of(self._model, outcome)
        self._outcomes[outcome].value += 1


class Now(Collector):
    """What exists at this moment."""

    def __init__(self, statuses: Sequence[Status], gpus: Sequence[Gpu]) -> None:
        self._statuses = statuses
        self._gpus = gpus

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield from self._of_models()
        yield from self._of_gpus()

    def _of_models(self) -> Iterator[GaugeMetricFamily]:
        states = GaugeMetricFamily(
            "gateway_model_state", "1 for the state that a model is in.", labels=["model", "state"]
        )
        in_flight = GaugeMetricFamily("gateway_in_flight_calls", "Calls that a model works on.", labels=["model"])
        queued = GaugeMetricFamily("gateway_queued_calls", "Calls that wait for a model.", labels=["model"])
        for status in self._statuses:
            for state in State:
                states.add_metric([status.spec.id, state.value], float(state is status.state))
            in_flight.add_metric([status.spec.id], status.in_flight)
            queued.add_metric([status.spec.id], status.queued)
        yield from (states, in_flight, queued)

    def _of_gpus(self) -> Iterator[GaugeMetricFamily]:
        memory = GaugeMetricFamily("gateway_gpu_memory_bytes", "Memory of a GPU, where it is known.", labels=["gpu"])
        held = GaugeMetricFamily(
            "gateway_gpu_reserved_bytes",
            "Memory of a GPU that a model holds, where it is known.",
            labels=["gpu", "model"],
        )
        models = GaugeMetricFamily("gateway_gpu_models", "Models that hold a GPU, or some of it.", labels=["gpu"])
        for gpu in self._gpus:
            if gpu.memory_bytes is not None:
                memory.add_metric([gpu.id], gpu.memory_bytes)
            for model, share in gpu.held.items():
                if (held_bytes := share or gpu.memory_bytes) is not None:
                    held.add_metric([gpu.id, model], held_bytes)
            models.add_metric([gpu.id], len(gpu.held))
        yield from (memory, held, models)
