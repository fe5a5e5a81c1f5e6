"""The bench's own arithmetic, tables and words. How long anything takes is not asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.bench import plot, telling
from tests.bench.answers import (
    CHAT,
    COMPLETION,
    TGI_STREAM,
    event,
    nginx_text,
    paced_parts,
    stamps,
    streamed,
    whole,
)
from tests.bench.arithmetic import Case, Figure, Results, Sample, percentile, ratio, slope
from tests.bench.budgets import (
    MANY_STREAMS,
    ONE,
    THIRTY_TWO,
    Budget,
    all_kept,
    of_cold_start,
    of_relay,
    of_scale,
    of_soak,
)
from tests.bench.callers import Target, Throughput, is_whole, lua, throughput
from tests.bench.machine import CannotMeasure, cpu_s, needed, rss_mib, tree
from tests.bench.paced_server import tokens_of
from tests.bench.soak import WARM_UP_S, Open, Soaked
from tests.runtimes.processes import wait_until

# ---- arithmetic ----


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([5.0], 50, 5.0),
        ([5.0], 99, 5.0),
        ([3.0, 1.0, 2.0], 50, 2.0),
        ([1.0, 2.0, 3.0, 4.0], 50, 2.0),
        ([float(value) for value in range(1, 101)], 99, 99.0),
        ([float(value) for value in range(1, 101)], 100, 100.0),
        ([1.0] * 98 + [50.0, 70.0], 99, 50.0),
        ([1.0, 2.0], 0, 1.0),
    ],
)
def test_a_percentile_is_a_value_that_was_measured(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == expected


def test_there_is_no_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="of nothing"):
        percentile([], 50)


def test_a_slope_is_that_of_the_line_through_all_points() -> None:
    assert slope([(0, 10), (1, 12), (2, 14)]) == 2
    assert slope([(0, 1), (1, 0), (2, 1), (3, 0)]) == pytest.approx(-0.2)


@pytest.mark.parametrize("points", [[], [(1.0, 1.0)], [(1.0, 1.0), (1.0, 2.0)]])
def test_less_than_two_points_have_no_slope(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="no slope"):
        slope(points)


NOTHING_MORE = Open(0, 0, 0)


def soaked(rss_mib: list[tuple[float, float]], more: Open = NOTHING_MORE, under_way: int = 0) -> Soaked:
    return Soaked({}, {}, rss_mib, more, under_way)


def rising(mib_per_minute: float) -> list[tuple[float, float]]:
    return [(float(second), 50 + second * mib_per_minute / 60) for second in range(200)]


def test_memory_is_judged_without_its_warm_up() -> None:
    warming_up = [(float(second), WARM_UP_S if second >= WARM_UP_S else float(second)) for second in range(200)]

    assert soaked(warming_up).growth_mb_per_minute == pytest.approx(0)
    assert soaked(rising(1)).growth_mb_per_minute == pytest.approx(2**20 / 1e6)


def test_nothing_may_be_left_behind() -> None:
    assert all_kept(of_soak(soaked(rising(0.19))))
    assert all_kept(of_soak(soaked(rising(-1), Open(-1, -1, -1))))
    assert not all_kept(of_soak(soaked(rising(0.3))))
    for more in (Open(1, 0, 0), Open(0, 1, 0), Open(0, 0, 1)):
        assert not all_kept(of_soak(soaked(rising(0), more)))
    assert not all_kept(of_soak(soaked(rising(0), under_way=1)))


def test_a_ratio_to_nothing_is_not_known() -> None:
    assert ratio(6, 3) == 2
    assert ratio(0, 3) == 0
    assert [ratio(1, 0), ratio(None, 1), ratio(1, None)] == [None, None, None]


def sample(name: str, case: Case = THIRTY_TWO, **figures: float) -> Sample:
    known: dict[Figure, float] = figures  # type: ignore[assignment]
    return Sample(name, case, known)


def test_the_median_of_the_runs_counts_and_of_no_other_case() -> None:
    results = Results(
        [
            *(sample("gateway", requests_per_s=value) for value in (900, 100, 500)),
            sample("gateway", ONE, requests_per_s=1),
            sample("nginx", requests_per_s=5000),
        ]
    )

    assert results.median("gateway", THIRTY_TWO, "requests_per_s") == 500
    assert results.ratio("gateway", THIRTY_TWO, "requests_per_s", to="nginx") == 0.1
    assert results.median("litellm", THIRTY_TWO, "requests_per_s") is None
    assert results.ratio("gateway", THIRTY_TWO, "requests_per_s", to="litellm") is None


def test_what_is_added_is_the_difference_to_what_it_takes_without() -> None:
    results = Results([sample("direct", p50_ms=0.2), sample("nginx", p50_ms=0.3), sample("gateway", p50_ms=1.0)])

    assert results.added("gateway", THIRTY_TWO, "p50_ms") == 0.8
    assert results.added("gateway", THIRTY_TWO, "p50_ms", over="nginx") == pytest.approx(0.7)
    assert results.added("gateway", THIRTY_TWO, "p99_ms") is None


# ---- budgets ----


def test_a_budget_is_kept_up_to_its_bound() -> None:
    assert [Budget("x", "ms", 5, measured=value).verdict for value in (5.0, 5.1, None)] == [
        "kept",
        "MISSED",
        "not measured",
    ]
    assert [Budget("x", "times", 5, at_least=True, measured=value).verdict for value in (5.0, 4.9)] == [
        "kept",
        "MISSED",
    ]


def test_a_further_goal_is_reached_by_its_own_bound() -> None:
    assert not Budget("x", "times", 5, 10, at_least=True, measured=9).reaches_goal
    assert Budget("x", "times", 5, 10, at_least=True, measured=10).reaches_goal
    assert not Budget("x", "ms", 5, measured=1).reaches_goal
    assert not Budget("x", "ms", 5, 1).reaches_goal


def test_what_was_not_measured_is_not_missed_and_never_a_number() -> None:
    budgets = [*of_relay(Results([])), *of_cold_start(None, None), *of_scale(None, None, None)]

    assert {budget.verdict for budget in budgets} == {"not measured"}
    assert all_kept(budgets)
    assert all(
        row.split()[-3:] == ["-", "not", "measured"] or "not measured" in row for row in telling.of_budgets(budgets)[1:]
    )


def test_every_budget_of_the_relay_is_judged_by_its_own_figures() -> None:
    results = Results(
        [
            sample("direct", MANY_STREAMS, p99_ms=1.0),
            sample("nginx", requests_per_s=10_000),
            sample("nginx", ONE, p50_ms=0.2),
            sample("nginx", MANY_STREAMS, cpu_s_per_1000=0.02),
            sample("litellm", requests_per_s=100),
            sample("gateway", requests_per_s=3000),
            sample("gateway", ONE, p50_ms=0.9),
            sample("gateway", MANY_STREAMS, p99_ms=7.0, cpu_s_per_1000=0.2),
        ]
    )

    budgets = of_relay(results)

    assert [budget.measured for budget in budgets] == pytest.approx([30, 30, 0.7, 6.0, 10])
    assert [budget.verdict for budget in budgets] == ["kept", "kept", "MISSED", "kept", "MISSED"]
    assert [budget.reaches_goal for budget in budgets] == [False, True, False, False, False]
    assert not all_kept(budgets)


def test_a_gateway_too_slow_to_have_a_time_in_every_run_has_missed_it() -> None:
    quick, slow = sample("gateway", ONE, requests_per_s=1100, p50_ms=0.3), sample("gateway", ONE, requests_per_s=900)
    nginx = sample("nginx", ONE, requests_per_s=5000, p50_ms=0.2)

    def row(*samples: Sample) -> Budget:
        [found] = [budget for budget in of_relay(Results([nginx, *samples])) if "1 connection" in budget.what]
        return found

    assert row(quick, quick).verdict == "kept"
    assert row(quick, quick).measured == pytest.approx(0.1)
    assert (row(quick, slow).verdict, row(quick, slow).measured) == ("MISSED", None)
    assert row(slow).verdict == "MISSED"
    assert row().verdict == "not measured"
    assert not all_kept([row(slow)])


def test_what_is_added_at_the_slower_rate_is_told_beside_what_is_judged() -> None:
    results = Results([sample("nginx", ONE, calm_p50_ms=0.7), sample("gateway", ONE, calm_p50_ms=1.5)])

    assert any("at 100/s: 0.80" in budget.what for budget in of_relay(results))


def test_memory_is_judged_in_megabytes() -> None:
    assert of_scale(1, 1, 143)[-1].verdict == "kept"
    assert of_scale(1, 1, 144)[-1].verdict == "MISSED"  # 144 MiB are 151 MB


# ---- words ----


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "-"),
        (0.0, "0.000"),
        (0.1234, "0.123"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (123.4, "123"),
        (83000.4, "83,000"),
        (-0.25, "-0.250"),
        (-12.34, "-12.3"),
    ],
)
def test_numbers_have_three_digits_that_count(value: float | None, words: str) -> None:
    assert telling.number(value) == words


def test_columns_stand_below_one_another() -> None:
    assert telling.table([("name", "n"), ("a", "100"), ("longer", "1")]) == [
        "name      n",
        "a       100",
        "longer    1",
    ]


def test_the_tables_tell_every_case_of_every_contestant() -> None:
    results = Results(
        [
            sample("direct", p50_ms=0.5, p99_ms=1.0, requests_per_s=1000),
            sample("gateway", p50_ms=0.75, p99_ms=2.0, requests_per_s=500, cpu_s_per_1000=2.0, rss_mib=90),
            sample("gateway", MANY_STREAMS, p50_ms=3.0, p99_ms=4.0),
        ]
    )

    lines = list(telling.of_relay(results))

    assert "/generate, not streamed" in lines
    assert "/generate, streamed at 50 tokens/s" in lines
    [row] = [line for line in lines if line.startswith("  32 gateway")]
    assert row.split() == [
        "32",
        "gateway",
        "500",
        "-",
        "-",
        "0.750",
        "0.250",
        "2.00",
        "1.00",
        *"--",
        "2.00",
        "-",
        "90.0",
        "-",
    ]
    assert len([line for line in lines if line.startswith(" 200 ")]) == 2


def test_the_picture_is_well_formed_and_tells_what_was_not_measured() -> None:
    results = Results([sample("direct", requests_per_s=9000), sample("gateway", requests_per_s=90), sample("<b>")])

    drawn = plot.svg(plot.panels(results), ["a caption & more", "a second line"])

    ElementTree.fromstring(drawn)  # noqa: S314 - our own
    assert "9,000" in drawn
    assert "not measured" in drawn
    assert "&lt;b&gt;" in drawn
    assert drawn.count("logarithmic") == 1
    assert "a caption &amp; more" in drawn


@pytest.mark.parametrize("values", [[], [None], [0.0, None], [1.0, 2.0, None], [80_000.0, 140.0], [1e-9, 1e9]])
def test_no_bar_is_longer_than_its_place_or_shorter_than_nothing(values: list[float | None]) -> None:
    lengths = plot.bar_lengths(values)

    assert len(lengths) == len(values)
    assert all(0 <= length <= plot.BAR_WIDTH for length in lengths)
    assert all(bool(length) == bool(value) for length, value in zip(lengths, values, strict=True))


def test_bars_are_in_proportion_where_that_can_be_seen() -> None:
    assert plot.bar_lengths([1.0, 4.0]) == [plot.BAR_WIDTH / 4, plot.BAR_WIDTH]


# ---- what is asked and answered ----


@pytest.mark.parametrize("path", [TGI_STREAM, COMPLETION, CHAT])
def test_a_token_tells_its_time_at_every_address(path: str) -> None:
    before, behind = paced_parts(path)
    written = event(path, "ignored", -1) + before + b"17" + behind + event(path, " @18@", 0, full=" @17@ @18@")

    assert stamps(written)[0] == [17, 18]


@pytest.mark.parametrize("path", [TGI_STREAM, COMPLETION, CHAT])
def test_no_token_is_lost_or_counted_twice_wherever_a_stream_is_cut(path: str) -> None:
    before, behind = paced_parts(path)
    written = b"".join(before + b"%d" % (10**15 + number) + behind for number in range(3))
    expected = [10**15 + number for number in range(3)]

    for cut in range(len(written)):
        first, rest = stamps(written[:cut])
        second, _ = stamps(rest + written[cut:])
        assert first + second == expected, cut


@pytest.mark.parametrize("path", [TGI_STREAM, COMPLETION, CHAT])
def test_a_stream_has_an_event_for_each_token(path: str) -> None:
    lines = [line for line in streamed(path, 3).split(b"\n\n") if line and line != b"data: [DONE]"]

    events = [json.loads(line.removeprefix(b"data: ")) for line in lines]

    assert len(events) == 3
    assert streamed(path, 3).endswith(b"data: [DONE]\n\n") == (path != TGI_STREAM)
    if path == TGI_STREAM:
        assert [each["generated_text"] for each in events] == [None, None, " word0 word1 word2"]
    else:
        assert [each["choices"][0]["finish_reason"] for each in events] == [None, None, "length"]


@pytest.mark.parametrize("path", ["/generate", COMPLETION, CHAT])
def test_a_whole_answer_has_the_same_text(path: str) -> None:
    assert b'" word0 word1"' in whole(path, 2)


def test_no_word_of_a_configuration_of_nginx_is_too_long() -> None:
    pieces = list(nginx_text(streamed(TGI_STREAM, 100)))

    assert all(len(piece) < 4096 for piece in pieces)
    assert all("\n" not in piece for piece in pieces)
    assert "".join(pieces).replace('\\"', '"').replace("\\n", "\n").encode() == streamed(TGI_STREAM, 100)


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"parameters": {"max_new_tokens": 7}}, 7),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6, "max_tokens": None}, 6),
        ({"parameters": None}, 1),
        ({}, 1),
    ],
)
def test_a_paced_answer_is_as_long_as_asked_for(body: dict[str, object], tokens: int) -> None:
    assert tokens_of(body) == tokens


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\na", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length:0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", False),
    ],
)
def test_an_answer_is_whole_when_it_says_so(answer: bytes, expected: bool) -> None:
    assert is_whole(answer) is expected


def test_a_request_says_how_long_it_is() -> None:
    request = Target(80, "/x", b'{"a": 1}', {"Authorization": "Bearer k"}).request

    assert request.startswith(b"POST /x HTTP/1.1\r\nHost: 127.0.0.1:80\r\n")
    assert b"\r\nContent-Length: 8\r\n" in request
    assert request.endswith(b'Authorization: Bearer k\r\n\r\n{"a": 1}')


def test_wrk_is_told_the_request_and_tells_its_figures() -> None:
    script = lua(Target(80, "/x", b'{"a": "b"}', {"Authorization": "Bearer k"}))

    assert 'wrk.body = [==[{"a": "b"}]==]' in script
    assert '["Authorization"] = "Bearer k"' in script
    told = 'Running 1s test\n  12 requests in 1.00s\n{"requests": 12, "us": 2000000, "failed": 3}\n'
    assert throughput(told) == Throughput(12, 2.0, 3)
    with pytest.raises(CannotMeasure, match="told nothing"):
        throughput("Segmentation fault")


def test_a_program_that_is_not_there_is_named_with_its_package() -> None:
    with pytest.raises(CannotMeasure, match=r"no nothing-of-this-name .* apt-get install its-package"):
        needed("nothing-of-this-name", "its-package")


def test_a_process_that_is_gone_uses_nothing() -> None:
    gone = 2**22 + 1  # above the largest pid there can be

    assert (tree(gone), cpu_s([gone]), rss_mib([gone])) == ([], 0, 0)


def test_the_tree_of_a_process_has_its_children(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, cwd=tmp_path) as process:
        wait_until(lambda: len(tree(process.pid)) == 2)
        assert process.pid in tree(os.getpid())
        assert rss_mib(tree(process.pid)) > 0
        process.communicate(b"\n")
