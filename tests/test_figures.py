"""What is counted, under which names and labels: tables, and no server."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families as families_of
from starlette.types import Message, Receive, Scope, Send

from gateway.api.metrics import api_of, counted, gpus_of
from gateway.api.middleware import RequestLog
from gateway.catalog import ModelSpec
from gateway.figures import FIRST_TOKEN_S, REQUESTS_S, WAITS_S, Figures, Gpu, OfModel
from gateway.fleet.gpus import Gpus
from gateway.fleet.journal import Entry, Journal
from gateway.fleet.placement import Device, Place
from gateway.fleet.starts import PHASES, Moves, Started, Stopped, phase_of
from gateway.fleet.status import Status
from gateway.lifecycle import State
from gateway.outcome import note, outcome_of
from gateway.passage import Told
from tests.runtimes.processes import until

Move = tuple[float, str, str, str]
"""When, from, to, why; or, with `progress` for a state, when and what the progress says."""
UP: list[Move] = [(0, "stopped", "starting", "request"), (2, "starting", "loading", "server made")]
READY: list[Move] = [*UP, (5, "loading", "ready", "health check passed")]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def status_of(model: str, state: State = State.STOPPED, in_flight: int = 0, queued: int = 0) -> Status:
    spec = ModelSpec.model_validate({"id": model, "hf_name": model})
    return Status(spec, f"tgi-{model}", state, 0.0, in_flight, queued, None, None, None, None, None, None)


def values(page: bytes, **labels: str) -> dict[str, float]:
    """Return what a page says of these labels, by name and the other labels, without what is 0."""
    found = {}
    for family in families_of(page.decode()):
        for sample in family.samples:
            if labels.items() <= sample.labels.items() and sample.value:
                rest = [f"{name}={said}" for name, said in sample.labels.items() if name not in labels]
                found[" ".join([sample.name, *rest])] = sample.value
    return found


def page_of(figures: Figures, statuses: Sequence[Status] = (), gpus: Sequence[Gpu] = ()) -> bytes:
    return asyncio.run(figures.page(statuses, gpus))


def after(moves: Sequence[Move], statuses: Sequence[Status] | None = None) -> bytes:
    """Return the page of a gateway whose model `m` went like this."""
    clock = Clock()
    figures = Figures("1", clock)
    journal = Journal(lambda: 0.0, figures.heard)
    for at, before, now, reason in moves:
        clock.now = at
        if before == "progress":
            journal.write("progress", model="m", phase=now, done=1, total=2, unit="files", eta_s=None)
        else:
            journal.write("state", model="m", **{"from": before, "to": now}, at=0.0, reason=reason)
    return page_of(figures, [status_of("m")] if statuses is None else statuses)


# ---- starts ----


@pytest.mark.parametrize(
    ("end", "result"),
    [
        ((5, "loading", "ready", "health check passed"), "ok"),
        ((5, "loading", "stopping", "START_TIMEOUT: the server was not ready"), "timeout"),
        ((5, "loading", "stopping", "START_FAILED: The server of m ended: out of memory"), "failed"),
        ((5, "loading", "stopping", "RUNTIME_UNAVAILABLE: no engine"), "runtime_unavailable"),
        ((5, "loading", "stopping", "INTERNAL_ERROR: KeyError"), "failed"),
        ((5, "loading", "stopping", "nobody waits for it any more"), "called_off"),
        ((5, "loading", "stopping", "operator"), "called_off"),
    ],
)
def test_a_start_is_counted_by_how_it_ended(end: Move, result: str) -> None:
    counted = values(after([*UP, end]), model="m")

    assert counted["gateway_starts_total result=" + result] == 1
    assert sum(value for name, value in counted.items() if name.startswith("gateway_starts_total")) == 1
    assert not [name for name in counted if name.startswith("gateway_stops_total")], "it never was up"
    assert counted.get("gateway_start_duration_seconds_sum", 0) == (5 if result == "ok" else 0)


def test_a_start_without_gpus_is_told_from_a_failure() -> None:
    page = after([UP[0], (9, "starting", "stopping", "NO_CAPACITY: m needs GPUs")])

    assert values(page, result="no_capacity") == {"gateway_starts_total model=m": 1}


def test_the_phases_of_a_good_start_add_up_to_it() -> None:
    moves: list[Move] = [
        UP[0],
        (1, "progress", "waiting for GPUs", ""),
        (4, "progress", "pulling", ""),
        (6, "progress", "extracting", ""),
        (7, "progress", "pulling", ""),
        (10, "starting", "loading", "server made"),
        (12, "progress", "downloading", ""),
        (12, "progress", "waiting: the container is paused", ""),
        (15, "progress", "something new: 17 of `a prompt`", ""),
        (20, "loading", "ready", "health check passed"),
        (99, "progress", "pulling", ""),
    ]

    page = after(moves)

    phases = {
        name.partition("phase=")[2]: value
        for name, value in values(page).items()
        if name.startswith("gateway_start_phase_duration_seconds_sum")
    }
    assert phases == {
        "starting": 1,
        "placing": 3,
        "pulling": 5,
        "extracting": 1,
        "loading": 2,
        "waiting": 3,
        "other": 5,
    }
    assert values(page)["gateway_start_duration_seconds_sum model=m"] == sum(phases.values()) == 20


def test_a_start_that_failed_has_no_share_in_how_long_starts_take() -> None:
    page = after([*UP, (5, "loading", "stopping", "START_FAILED: it ended"), (6, "stopping", "failed", "nothing left")])

    assert not [name for name in values(page) if "duration_seconds" in name and name.startswith("gateway_start")]


def test_each_start_is_counted_for_itself() -> None:
    down: list[Move] = [(50, "ready", "stopping", "idle"), (51, "stopping", "stopped", "nothing left")]
    again: list[Move] = [(at + 100, before, now, why) for at, before, now, why in READY]

    counted = values(after([*READY, *down, *again]), model="m")

    assert counted["gateway_starts_total result=ok"] == counted["gateway_start_duration_seconds_count"] == 2
    assert counted["gateway_start_duration_seconds_sum"] == 10


def test_replicas_start_side_by_side_and_count_as_starts_of_their_model() -> None:
    clock = Clock()
    moves = Moves(clock)

    def heard(replica: int, before: State, to: State) -> Started | Stopped | None:
        about = {"model": "m", "from": before.value, "to": to.value, "reason": "request"}
        return moves.heard(Entry(1, "state", {**about, **({"replica": replica} if replica else {})}))

    clock.now = 0.0
    heard(0, State.STOPPED, State.STARTING)
    clock.now = 4.0
    heard(1, State.STOPPED, State.STARTING)
    clock.now = 10.0
    first, second = heard(0, State.LOADING, State.READY), heard(1, State.LOADING, State.READY)

    assert isinstance(first, Started)
    assert isinstance(second, Started)
    assert (first.model, first.took_s) == ("m", 10.0)
    assert (second.model, second.took_s) == ("m", 6.0)


def test_a_server_that_was_found_was_not_started() -> None:
    found: list[Move] = [(0, "stopped", "loading", "found running"), (1, "loading", "ready", "health check passed")]

    assert not [name for name in values(after(found)) if name.startswith("gateway_start")]


def test_what_the_journal_tells_of_the_catalog_is_nothing_of_a_model() -> None:
    Journal(lambda: 0.0, Figures("1").heard).write("catalog", changed=["m"], catalog_error=None, at=0.0)


def test_what_a_download_says_is_no_phase_of_a_start() -> None:
    assert not [name for name in values(after([(0, "progress", "pulling", "")])) if name.startswith("gateway_start")]


def test_phases_are_few_whatever_is_said() -> None:
    said = [*PHASES, "waiting: for a key", "", "shards", "Once upon a time"]

    assert {phase_of(words) for words in said} == {*PHASES.values(), "waiting", "other"}


# ---- stops ----


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("idle", "idle"),
        ("makes room for gpt-2", "makes_room"),
        ("operator", "operator"),
        ("restart", "restart"),
        ("shutdown", "shutdown"),
        ("the catalog asks for another server", "catalog"),
        ("changed in the catalog", "catalog"),
        ("removed from the catalog", "catalog"),
        ("GENERATION_FAILED: The server of m ended while it served", "failed"),
        ("something new about `a prompt`", "other"),
    ],
)
def test_a_stop_is_counted_by_its_reason(words: str, reason: str) -> None:
    stopped = values(after([*READY, (9, "ready", "stopping", words)]), model="m")
    drained = values(
        after([*READY, (9, "ready", "draining", words), (19, "draining", "stopping", "drained")]), model="m"
    )
    cut = values(
        after([*READY, (9, "ready", "draining", words), (19, "draining", "stopping", "drain_timeout")]), model="m"
    )

    for each in (stopped, drained, cut):
        found = {name: n for name, n in each.items() if name.startswith("gateway_stops_total")}
        assert found == {f"gateway_stops_total reason={reason}": 1}


def test_a_server_that_stayed_ill_is_told_from_one_that_died() -> None:
    ill: list[Move] = [(9, "ready", "unhealthy", "it missed its last 3 health checks")]
    page = after([*READY, *ill, (69, "unhealthy", "stopping", "GENERATION_FAILED: it did not recover")])

    assert values(page, reason="unhealthy") == {"gateway_stops_total model=m": 1}


def test_a_drain_that_came_to_nothing_is_no_reason_of_the_next_stop() -> None:
    kept: list[Move] = [(9, "ready", "draining", "shutdown"), (10, "draining", "stopped", "shutdown")]
    page = after([*READY, *kept, *READY, (20, "ready", "stopping", "idle")])

    assert values(page, reason="idle") == {"gateway_stops_total model=m": 1}
    assert values(page, reason="shutdown") == {}


def test_to_clear_what_a_failed_life_left_stops_nothing() -> None:
    page = after([(0, "failed", "stopping", "it is not known whether its server is gone")])

    assert not [name for name in values(page) if name.startswith("gateway_stops")]


# ---- calls ----


def test_what_models_do_is_counted_for_each() -> None:
    figures = Figures("1")
    one, other = figures.of("one"), figures.of("other")
    one.waited(0.2)
    one.first_token(0.3)
    one.generated(7, 3)
    one.ended("ok")
    one.ended("GENERATION_TIMEOUT")
    other.ended("cancelled")

    page = page_of(figures, [status_of("one"), status_of("other")])

    counted = values(page, model="one")
    assert counted["gateway_queue_wait_seconds_sum"] == 0.2
    assert counted["gateway_time_to_first_token_seconds_sum"] == 0.3
    assert counted["gateway_generated_tokens_total"] == 7
    assert counted["gateway_prompt_tokens_total"] == 3
    assert (
        values(page, outcome="ok") == values(page, outcome="GENERATION_TIMEOUT") == {"gateway_calls_total model=one": 1}
    )
    assert values(page, outcome="cancelled") == {"gateway_calls_total model=other": 1}


class Theirs:
    """What `Figures` counts in the midst of requests, counted by prometheus_client's own counters."""

    def __init__(self, figures: Figures) -> None:
        self.registry = CollectorRegistry()
        words = {family.name: family.documentation for family in figures.registry.collect()}

        def counter(name: str, *labels: str) -> Counter:
            return Counter(name, words[name], labels, registry=self.registry)

        def histogram(name: str, label: str, bounds: Sequence[float]) -> Histogram:
            return Histogram(name, words[name], [label], registry=self.registry, buckets=bounds)

        self.queue_wait = histogram("gateway_queue_wait_seconds", "model", WAITS_S)
        self.first_token = histogram("gateway_time_to_first_token_seconds", "model", FIRST_TOKEN_S)
        self.generated = counter("gateway_generated_tokens", "model")
        self.prompts = counter("gateway_prompt_tokens", "model")
        self.calls = counter("gateway_calls", "model", "outcome")
        self.requests = counter("gateway_requests", "api", "outcome")
        self.request_time = histogram("gateway_request_duration_seconds", "api", REQUESTS_S)

    def call(self, model: str, seconds: float, tokens: int, outcome: str) -> None:
        self.queue_wait.labels(model).observe(seconds)
        self.first_token.labels(model).observe(seconds)
        self.generated.labels(model).inc(tokens)
        self.prompts.labels(model).inc(tokens + 1)
        self.calls.labels(model, outcome).inc()

    def answered(self, api: str, outcome: str, took_s: float) -> None:
        self.requests.labels(api, outcome).inc()
        self.request_time.labels(api).observe(took_s)


def call(one: OfModel, seconds: float, tokens: int, outcome: str) -> None:
    one.waited(seconds)
    one.first_token(seconds)
    one.generated(tokens, tokens + 1)
    one.ended(outcome)


def told_of(names: Iterable[str], page: bytes) -> list[str]:
    """Return what a page tells under these names, each with its help and type."""
    told = page.decode().split("# HELP ")[1:]
    return [text for text in told if text.split(" ")[0] in names]


SECONDS = st.sampled_from([0, *WAITS_S, *FIRST_TOKEN_S, *REQUESTS_S, math.inf]) | st.floats(0, 2000)
OUTCOMES = st.sampled_from(["ok", "cancelled", "START_TIMEOUT"])


@given(
    st.lists(st.tuples(st.sampled_from("abc"), SECONDS, st.integers(0, 10**8), OUTCOMES)),
    st.lists(st.tuples(st.sampled_from(["generate", "openai"]), OUTCOMES, SECONDS)),
)
def test_requests_are_told_as_prometheus_own_counters_would_tell_them(
    calls: list[tuple[str, float, int, str]], answers: list[tuple[str, str, float]]
) -> None:
    figures = Figures("1")
    theirs = Theirs(figures)
    for model, seconds, tokens, outcome in calls:
        call(figures.of(model), seconds, tokens, outcome)
        theirs.call(model, seconds, tokens, outcome)
    for answer in answers:
        figures.answered(*answer)
        theirs.answered(*answer)

    expected = generate_latest(theirs.registry)
    names = {text.split(" ")[0] for text in expected.decode().split("# HELP ")[1:]}
    assert len(names) == 7
    assert told_of(names, page_of(figures, [status_of(model) for model in "abc"])) == told_of(names, expected)


def test_a_model_that_was_never_called_is_told_as_zero_and_without_outcomes() -> None:
    figures = Figures("1")
    figures.of("m")

    page = page_of(figures, [status_of("m")]).decode()

    rows = set(re.findall(r'^(\w+)\{[^}]*model="m"[^}]*\} 0\.0$', page, re.MULTILINE))
    assert {
        "gateway_queue_wait_seconds_bucket",
        "gateway_queue_wait_seconds_count",
        "gateway_queue_wait_seconds_sum",
        "gateway_time_to_first_token_seconds_sum",
        "gateway_generated_tokens_total",
        "gateway_prompt_tokens_total",
    } <= rows
    assert "gateway_calls_total" not in rows


def test_a_model_that_left_the_catalog_is_forgotten_and_begins_anew_when_it_comes_back() -> None:
    figures = Figures("1")
    journal = Journal(lambda: 0.0, figures.heard)
    for model in ("stays", "goes"):
        figures.of(model).ended("ok")
        journal.write("state", model=model, **{"from": "ready", "to": "stopping"}, at=0.0, reason="idle")

    assert values(page_of(figures, [status_of("stays")]), model="goes") == {}
    late = figures.of("goes")
    late.ended("ok")
    page = page_of(figures, [status_of("stays"), status_of("goes")])
    assert values(page, model="goes", outcome="ok") == {"gateway_calls_total": 1}
    assert values(page, model="stays", reason="idle") == {"gateway_stops_total": 1}


def test_what_ends_after_its_model_was_forgotten_is_forgotten_too() -> None:
    figures = Figures("1")
    late = figures.of("goes")
    page_of(figures)
    late.ended("cancelled")

    assert b"goes" not in page_of(figures)


def test_two_gateways_in_one_process_count_apart() -> None:
    one, other = Figures("1"), Figures("2")
    one.of("m").ended("ok")

    assert values(page_of(other, [status_of("m")]), outcome="ok") == {}


# ---- what exists now ----


@pytest.mark.parametrize("state", State)
def test_a_model_is_in_one_state_and_all_others_are_told(state: State) -> None:
    page = page_of(Figures("1"), [status_of("m", state, in_flight=2, queued=3)])

    told = [line for line in page.decode().splitlines() if line.startswith("gateway_model_state{")]
    assert len(told) == len(State)
    assert values(page, model="m") == {
        f"gateway_model_state state={state.value}": 1,
        "gateway_in_flight_calls": 2,
        "gateway_queued_calls": 3,
    }


def test_gpus_are_told_with_what_models_hold_of_them() -> None:
    gpus = [
        Gpu("0", 24, {"a": 10, "b": 4}),
        Gpu("1", 24, {"c": None}),
        Gpu("2", None, {"d": None}),
        Gpu("3", None, {"e": 5}),
        Gpu("4", 24),
    ]

    page = page_of(Figures("1"), [], gpus)

    reserved = {name: value for name, value in values(page).items() if name.startswith("gateway_gpu_reserved")}
    assert reserved == {
        "gateway_gpu_reserved_bytes gpu=0 model=a": 10,
        "gateway_gpu_reserved_bytes gpu=0 model=b": 4,
        "gateway_gpu_reserved_bytes gpu=1 model=c": 24,
        "gateway_gpu_reserved_bytes gpu=3 model=e": 5,
    }
    assert [values(page, gpu=gpu.id).get("gateway_gpu_models", 0) for gpu in gpus] == [2, 1, 1, 1, 0]
    assert [values(page, gpu=gpu.id).get("gateway_gpu_memory_bytes") for gpu in gpus] == [24, 24, None, None, 24]


def test_the_ledger_of_gpus_becomes_figures() -> None:
    ledger = Gpus([Device("0", 24), Device("1")])
    ledger.hold("m", Place(("0",), 10))
    ledger.hold("whole", Place(("1",)))
    ledger.hold("stranger", Place(("GPU-3f2a",)))

    assert gpus_of(ledger) == [
        Gpu("0", 24, {"m": 10}),
        Gpu("1", None, {"whole": None}),
        Gpu("GPU-3f2a", None, {"stranger": None}),
    ]
    assert gpus_of(Gpus(None)) == []


def test_names_are_escaped_where_the_format_asks_for_it() -> None:
    odd = 'GPU-"0"\\\n{}'

    assert values(page_of(Figures("1"), [], [Gpu(odd, 24)]), gpu=odd) == {"gateway_gpu_memory_bytes": 24}


# ---- requests ----


@pytest.mark.parametrize(
    ("path", "api"),
    [
        ("/generate", "generate"),
        ("/generate/", "generate"),
        ("/generate_stream", "generate"),
        ("/inference", "inference"),
        ("/api/llm/inference", "autotrain"),
        ("/models/gpt-2/llm-service/generate", "llm-service"),
        ("/models/gpt-2/api-server", "api-server"),
        ("/models/gpt-2/tgi/v1/chat/completions", "tgi"),
        ("/models/gpt-2/tgi", "tgi"),
        ("/v1/models", "openai"),
        ("/v1/chat/completions", "openai"),
        ("/v1/completions", "openai"),
        ("/models", "models"),
        ("/models/gpt-2/start", "models"),
        ("/", "gateway"),
        ("/health/live", "gateway"),
        ("/metrics/", "gateway"),
        ("/docs", "gateway"),
        ("/generated", "other"),
        ("/wp-login.php", "other"),
        ("/v10", "other"),
        ("", "other"),
        ("/models\n", "other"),
        ("*", "other"),
        ("//generate", "gateway"),
        ("/models//tgi", "models"),
        ("/api/llm/inference/", "autotrain"),
        ("/api/llm", "other"),
        ("/api/llm/inferences", "other"),
    ],
)
def test_an_address_belongs_to_one_of_few_apis(path: str, api: str) -> None:
    assert api_of(path) == api


STEPS = ("", "models", "gpt-2", "tgi", "llm-service", "generate", "api", "llm", "inference", "v1")
SHAPES = {
    re.compile(r"/models/[^/]+/tgi(/.*)?", re.DOTALL): "tgi",
    re.compile(r"/models/[^/]+/llm-service(/.*)?", re.DOTALL): "llm-service",
    re.compile(r"/models/[^/]+/api-server(/.*)?", re.DOTALL): "api-server",
    re.compile(r"/models(/.*)?", re.DOTALL): "models",
    re.compile(r"/(generate|generate_stream)(/.*)?", re.DOTALL): "generate",
    re.compile(r"/inference(/.*)?", re.DOTALL): "inference",
    re.compile(r"/v1(/.*)?", re.DOTALL): "openai",
    re.compile(r"/api/llm/inference(/.*)?", re.DOTALL): "autotrain",
    re.compile(r"/(health|status|info|events|metrics|docs|redoc|openapi\.json)?(/.*)?", re.DOTALL): "gateway",
    re.compile(r".*", re.DOTALL): "other",
}


@pytest.mark.parametrize("count", range(1, 6))
def test_an_address_belongs_where_the_first_shape_that_fits_says(count: int) -> None:
    for path in map("/".join, product(STEPS, repeat=count)):
        api = next(api for shape, api in SHAPES.items() if shape.fullmatch(path))
        assert api_of(path) == api, path


@pytest.mark.parametrize(
    ("noted", "status", "outcome"),
    [
        (None, 200, "ok"),
        (None, 304, "ok"),
        (None, 422, "HTTP_422"),
        (None, None, "left"),
        ("left", 200, "left"),
        ("GENERATION_FAILED", 200, "GENERATION_FAILED"),
        ("MODEL_NOT_FOUND", 404, "MODEL_NOT_FOUND"),
    ],
)
def test_how_a_request_ended(noted: str | None, status: int | None, outcome: str) -> None:
    scope: dict[str, object] = {}
    if noted:
        note(scope, noted)

    assert outcome_of(scope, status) == outcome


@pytest.mark.parametrize(
    ("said", "outcome"), [([200], "ok"), ([404], "HTTP_404"), ([], "left"), ([500, ValueError], "INTERNAL_ERROR")]
)
def test_every_request_is_counted_once_however_it_ends(said: list[Any], outcome: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for each in said:
            if each is ValueError:
                raise ValueError
            await send({"type": "http.response.start", "status": each, "headers": []})

    async def scene() -> bytes:
        figures = Figures("1")
        logged = RequestLog(app, counted(figures))
        for kind in ("lifespan", "websocket", "http"):
            scope: dict[str, Any] = {"type": kind, "method": "GET", "path": "/v1/models", "headers": []}
            with suppress(ValueError):
                await logged(scope, _nothing_comes, _nowhere)
        return await figures.page([], [])

    page = asyncio.run(scene())

    assert values(page, api="openai", outcome=outcome) == {"gateway_requests_total": 1}
    assert values(page, api="openai")["gateway_request_duration_seconds_count"] == 1


async def _nothing_comes() -> Message:
    return {"type": "http.disconnect"}


async def _nowhere(_: Message) -> None:
    pass


# ---- tokens of answers that are passed on ----


STREAM = [b'data: {"token":{"text":" a"}}\n', b"\n", b": a comment\n", b'data:{"token":{"text":" b"}}\n', b"\n"]


@pytest.mark.parametrize(
    ("lines", "tokens"),
    [
        ([], (0, 0)),
        (STREAM, (2, 0)),
        ([*STREAM, b'data: {"details":{"generated_tokens":9,"input_length":4}}\n'], (9, 4)),
        ([*STREAM, b'data: {"usage": {"prompt_tokens": 5, "completion_tokens": 8}}\n', b"data: [DONE]\n"], (8, 5)),
        ([*STREAM, b"data: [DONE]\n"], (2, 0)),
        ([b'data: {"text":"\\"completion_tokens\\": 77"}\n'], (1, 0)),
        ([b'data: {"usage": {"completion_tokens": null}}\n'], (1, 0)),
        ([b'data: {"usage": {"completion_tokens": 99999999999999999999}}\n'], (1, 0)),
    ],
)
def test_the_tokens_of_a_stream_that_is_passed_on(lines: list[bytes], tokens: tuple[int, int]) -> None:
    told = Told()
    for line in lines:
        told.line(line)

    assert (told.tokens, told.prompt_tokens) == tokens


@pytest.mark.parametrize(
    ("headers", "body", "tokens"),
    [
        ({}, b"", (0, 0)),
        ({"x-generated-tokens": "7", "x-prompt-tokens": "3"}, b'{"generated_text":""}', (7, 3)),
        ({"x-generated-tokens": "-7", "x-prompt-tokens": "many"}, b"{}", (0, 0)),
        ({}, b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":7,"total_tokens":10}}', (7, 3)),
        ({}, b'{"text":"' + b"x" * 9000 + b'","usage":{"prompt_tokens":3,"completion_tokens":7}}', (7, 3)),
        ({}, b"\xff\x00 not JSON", (0, 0)),
    ],
)
def test_the_tokens_of_a_whole_answer_that_is_passed_on(
    headers: dict[str, str], body: bytes, tokens: tuple[int, int]
) -> None:
    told = Told()
    told.whole(headers, body)

    assert (told.tokens, told.prompt_tokens) == tokens


# ---- the event loop ----


def test_a_loop_that_stands_still_is_seen_and_no_task_is_left() -> None:
    async def scene() -> tuple[dict[str, float], set[str]]:
        figures = Figures("1")
        async with figures.sampling_lag():
            await asyncio.sleep(0)  # the sampler sleeps now
            time.sleep(0.7)  # noqa: ASYNC251 - which is the point
            await until(lambda: _sampled(figures))
        left = {task.get_name() for task in asyncio.all_tasks()} - {asyncio.current_task().get_name()}  # type: ignore[union-attr]
        return values(await figures.page([], [])), left

    told, left = asyncio.run(scene())

    assert told["gateway_event_loop_lag_seconds_sum"] >= 0.15
    assert left == set()


def _sampled(figures: Figures) -> float | None:
    return figures.registry.get_sample_value("gateway_event_loop_lag_seconds_count")


def test_what_goes_wrong_inside_ends_the_sampling_too() -> None:
    async def scene() -> int:
        with pytest.raises(ZeroDivisionError):
            async with Figures("1").sampling_lag():
                raise ZeroDivisionError
        return len(asyncio.all_tasks())

    assert asyncio.run(scene()) == 1
