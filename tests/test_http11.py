"""How a request is written and how an answer is read, without any socket."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.engines.base import Call
from gateway.http11 import MOST_HEAD_BYTES, Reading, idle_s, request_head
from tests.raw_servers import chunked, said


def read(*pieces: bytes, ended: bool = False) -> Reading:
    reading = Reading()
    for piece in pieces:
        reading.feed(piece)
    if ended:
        reading.end()
    return reading


def body_of(reading: Reading) -> bytes:
    return b"".join(reading.pieces)


# ---- requests ----


def lines_of(call: Call, headers: dict[str, str] | None = None) -> list[str]:
    head = request_head(call, call.path, "model:80", headers or {})
    assert head.endswith(b"\r\n\r\n")
    return head[:-4].decode().split("\r\n")


def test_a_request_says_where_it_goes_how_long_it_is_and_that_it_wants_no_compression() -> None:
    lines = lines_of(Call("/generate", b"{}", {"Content-Type": "application/json"}), {"x-request-id": "7"})

    assert lines[:2] == ["POST /generate HTTP/1.1", "Host: model:80"]
    assert {
        "Content-Length: 2",
        "Accept-Encoding: identity",
        "Content-Type: application/json",
        "x-request-id: 7",
    } < set(lines)
    assert not any(line.startswith("Connection") for line in lines)


def test_a_post_without_a_body_has_a_length_and_a_get_has_none() -> None:
    assert "Content-Length: 0" in lines_of(Call("/x"))
    assert not any("Content-Length" in line for line in lines_of(Call("/x", method="GET")))


def test_a_fresh_call_says_that_its_connection_ends_with_it() -> None:
    assert "Connection: close" in lines_of(Call("/x", fresh=True))


def test_a_calls_own_header_wins() -> None:
    assert [line for line in lines_of(Call("/x", headers={"a": "own"}), {"a": "other"}) if line[0] == "a"] == ["a: own"]


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "a\rb", "a\0b", "a\x7fb", "\r\n\r\nGET / HTTP/1.1"])
@pytest.mark.parametrize("where", ["call", "tags"])
def test_a_header_cannot_smuggle_anything_in(value: str, where: str) -> None:
    call = Call("/x", headers={"Authorization": value} if where == "call" else {})

    with pytest.raises(ValueError, match="header") as caught:
        lines_of(call, {"x-request-id": value} if where == "tags" else None)
    assert value not in str(caught.value)


@pytest.mark.parametrize("name", ["a b", "a:", "", "a\r\nb", "é", "Host", "content-length", "Transfer-Encoding"])
def test_a_headers_name_is_a_name_and_none_of_those_that_frame_a_message(name: str) -> None:
    with pytest.raises(ValueError, match="header"):
        lines_of(Call("/x", headers={name: "1"}))


@pytest.mark.parametrize("path", ["/a b", "/a\r\nHost: b", "/a\n", "x", "", "http://elsewhere/", "/é", "/\0"])
def test_a_path_is_a_path(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        lines_of(Call(path))


@given(st.text("ab/ \r\n").map("/".__add__), st.text("ab: \r\n"), st.text("ab: \r\n\0é\x85\u2028"))
def test_a_head_has_one_line_for_each_header_or_is_refused(path: str, name: str, value: str) -> None:
    try:
        head = request_head(Call(path, headers={name: value}), path, "m", {})
    except ValueError:
        return
    assert head.count(b"\r") == head.count(b"\n") == head.count(b"\r\n") == 8
    assert head.find(b"\r\n\r\n") == len(head) - 4


@given(
    st.sampled_from(["GET", "POST"]),
    st.binary(max_size=3),
    st.dictionaries(st.sampled_from(["Authorization", "X-B", "x-b", "c"]), st.text("ab \t:é\udc80", max_size=4)),
    st.dictionaries(st.sampled_from(["x-request-id", "X-B", "c"]), st.text("ab", max_size=4)),
    st.booleans(),
)
def test_a_head_is_these_lines_in_this_order(
    method: Literal["GET", "POST"], body: bytes, own: dict[str, str], tags: dict[str, str], fresh: bool
) -> None:
    head = request_head(Call("/x", body, own, method, fresh), "/v1/x", "model:80", tags)

    assert head.decode("utf-8", "surrogateescape").split("\r\n") == [
        f"{method} /v1/x HTTP/1.1",
        "Host: model:80",
        "Accept: */*",
        "Accept-Encoding: identity",
        "User-Agent: tgi-gateway",
        *[f"{name}: {own.get(name, value)}" for name, value in tags.items()],
        *[f"{name}: {value}" for name, value in own.items() if name not in tags],
        *([f"Content-Length: {len(body)}"] if body or method == "POST" else []),
        *(["Connection: close"] if fresh else []),
        "",
        "",
    ]


# ---- answers ----

WELL_SAID = {
    "a length": (said(b"hello"), 200, b"hello"),
    "an empty body": (said(b""), 200, b""),
    "chunks": (chunked(b"he", b"llo"), 200, b"hello"),
    "chunks with trailers": (chunked(b"hello", trailers=b"Status: bad\r\nX: y\r\n"), 200, b"hello"),
    "chunk extensions": (chunked().replace(b"0\r\n", b"5;a=b\r\nhello\r\n0;c\r\n"), 200, b"hello"),
    "interim answers": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + said(b"hi"),
        200,
        b"hi",
    ),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
    "not modified": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", 304, b""),
    "an error": (said(b"no", status="500 Oh"), 500, b"no"),
    "no reason": (b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok", 200, b"ok"),
    "an offer of another protocol": (said(b"ok", "Connection: Upgrade", "Upgrade: h2c"), 200, b"ok"),
}
UNTIL_CLOSE = {
    "no length": (b"HTTP/1.1 200 OK\r\n\r\nhello", 200, b"hello"),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\n\r\nhello", 200, b"hello"),
    "nothing at all": (b"HTTP/1.1 200 OK\r\n\r\n", 200, b""),
}


@pytest.mark.parametrize("what", WELL_SAID)
def test_an_answer_that_tells_its_end_is_complete_there_and_not_before(what: str) -> None:
    data, status, body = WELL_SAID[what]

    whole, cut = read(data), read(data[:-1], ended=True)

    assert (whole.is_complete, whole.keeps, whole.status, body_of(whole), whole.fault) == (True, True, status, body, "")
    assert not cut.is_complete
    assert cut.fault.startswith("it closed the connection")


@pytest.mark.parametrize("what", UNTIL_CLOSE)
def test_an_answer_without_a_length_ends_with_the_connection(what: str) -> None:
    data, status, body = UNTIL_CLOSE[what]

    begun, whole = read(data), read(data, ended=True)

    assert not begun.is_complete
    assert (whole.is_complete, whole.keeps, whole.status, body_of(whole)) == (True, False, status, body)


def test_an_answer_without_a_length_is_not_whole_if_the_connection_broke() -> None:
    reading = read(b"HTTP/1.1 200 OK\r\n\r\nhello")
    reading.end(well=False)

    assert (reading.is_complete, bool(reading.fault)) == (False, True)


EVERY = [data for data, _, _ in [*WELL_SAID.values(), *UNTIL_CLOSE.values()]]


@given(st.sampled_from(EVERY), st.sets(st.integers(1, 200)))
def test_however_an_answer_is_cut_it_is_the_same(data: bytes, cuts: set[int]) -> None:
    at = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    cut, whole = read(*(data[a:b] for a, b in pairwise(at)), ended=True), read(data, ended=True)

    def seen(reading: Reading) -> tuple[object, ...]:
        return reading.status, reading.headers, body_of(reading), reading.is_complete, reading.fault, reading.keeps

    assert seen(cut) == seen(whole)
    assert cut.is_complete


@given(st.sampled_from(EVERY), st.integers(0, 300), st.binary(max_size=20), st.integers(0, 20))
def test_whatever_comes_is_read_without_an_error_of_ours(data: bytes, at: int, noise: bytes, instead: int) -> None:
    reading = read(data[:at] + noise + data[at + instead :], ended=True)

    assert reading.is_over
    assert reading.is_complete != bool(reading.fault)


@given(st.binary())
def test_noise_is_no_answer(noise: bytes) -> None:
    assert not read(noise, ended=True).is_complete


NOT_HTTP = "its answer is not HTTP"
ILL_SAID = {
    "another protocol": (b"SSH-2.0-OpenSSH_9.2\r\n", NOT_HTTP),
    "nonsense": (b"\x00\x01\x02", NOT_HTTP),
    "no status": (b"HTTP/1.1 OK\r\n\r\n", NOT_HTTP),
    "two lengths": (said(b"ok", "Content-Length: 3"), NOT_HTTP),
    "no number": (b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\nok", NOT_HTTP),
    "a negative length": (b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nok", NOT_HTTP),
    "chunks and a length": (chunked(b"ok").replace(b"\r\n\r\n", b"\r\nContent-Length: 2\r\n\r\n", 1), NOT_HTTP),
    "a chunk that has no number": (chunked(b"ok").replace(b"\r\n2\r\n", b"\r\nz\r\n"), NOT_HTTP),
    "a chunk that is longer than it says": (chunked(b"ok").replace(b"ok", b"okay"), NOT_HTTP),
    "a line without an end in a header": (b"HTTP/1.1 200 OK\r\nA: b\rc\r\n\r\n", NOT_HTTP),
    "another protocol after all": (b"HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", "another protocol"),
    "a coding that nobody asked for": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "transfer encoding",
    ),
}


@pytest.mark.parametrize("what", ILL_SAID)
def test_what_is_wrong_with_an_answer_is_told_without_repeating_it(what: str) -> None:
    data, words = ILL_SAID[what]
    reading = read(data, ended=True)

    assert words in reading.fault
    assert not reading.is_complete
    assert not reading.keeps


def test_an_answers_names_are_in_lower_case_and_its_values_are_trimmed() -> None:
    headers = read(said(b"", "X-Compute-TIME:  5 ", "Café: x".replace("é", "e"), "Server: gruñón")).headers

    assert (headers["x-compute-time"], headers["cafe"], headers["server"]) == ("5", "x", "gruñón")


NAMES = st.sampled_from(["Vary", "vary", "VARY", "Keep-Alive", "keep-alive", "X-Keep-Alive", "Keep", "Alive"])


@given(st.lists(st.tuples(NAMES, st.text("ab \té", max_size=4))))
def test_a_header_that_is_asked_for_alone_is_the_one_among_all(headers: list[tuple[str, str]]) -> None:
    reading = read(said(b"", *[f"{name}: {value}" for name, value in headers]))
    plain = {"content-length": "0"} | {name.lower(): value.strip(" \t") for name, value in headers}

    assert reading.headers == plain
    for name in ("vary", "keep-alive", "x-keep-alive", "keep", "alive", "content-length", "content", "", "v"):
        found = reading.header(name.encode())
        assert (found is None) == (name not in plain)
        assert found is None or found.strip().decode() == plain[name]


def test_an_answer_without_headers_has_none() -> None:
    reading = read(b"HTTP/1.1 204 No Content\r\n\r\n")

    assert (reading.headers, reading.header(b""), reading.header(b"keep-alive")) == ({}, None, None)


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("TRANSFER-encoding", "gzip, chunked", True),
        ("transfer-encoding", "gzip, chunked", True),
        ("Transfer-Encoding", "Chunked ", False),
        ("X-Transfer-Encoding", "gzip", False),
    ],
)
def test_the_encoding_of_a_transfer_is_found_however_it_is_written(name: str, value: str, refused: bool) -> None:
    data = chunked(b"ok").replace(b"Transfer-Encoding: chunked", f"{name}: {value}".encode(), 1)
    reading = read(data if name[0] != "X" else data.replace(b"\r\n", b"\r\nTransfer-Encoding: chunked\r\n", 1))

    assert (reading.is_complete, "transfer encoding" in reading.fault) == (not refused, refused)


def test_trailers_and_interim_answers_leave_no_header() -> None:
    assert "status" not in read(WELL_SAID["chunks with trailers"][0]).headers
    assert "link" not in read(WELL_SAID["interim answers"][0]).headers


ENDLESS = {
    "one header": (b"HTTP/1.1 200 OK\r\nX: ", b"x" * 1024),
    "many headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 128),
    "a reason": (b"HTTP/1.1 200 ", b"x" * 1024),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 40),
    "trailers": (chunked(b"x")[:-2], b"X: y\r\n" * 128),
    "a chunk's extension": (chunked(b"x")[:-5] + b"5;", b"x" * 1024),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_is_no_body_has_a_bound(what: str) -> None:
    beginning, more = ENDLESS[what]
    reading = read(beginning, *[more] * (MOST_HEAD_BYTES // len(more) - 2))
    assert not reading.fault

    for _ in range(4):
        reading.feed(more)

    assert "too large" in reading.fault


def test_a_large_head_is_refused_even_if_it_comes_at_once() -> None:
    reading = read(said(b"ok", *["X: " + "y" * 1000] * 70))

    assert "too large" in reading.fault
    assert not reading.has_head


@pytest.mark.parametrize("spare_bytes", [0, 1])
def test_the_heads_of_interim_answers_count_too(spare_bytes: int) -> None:
    hints = b"HTTP/1.1 103 Hints\r\nX: %b\r\n\r\n"
    left_bytes = MOST_HEAD_BYTES - len("XContent-Length2") - 40_001 - spare_bytes + 1
    reading = read(hints % (b"y" * 40_000) + said(b"ok", "X: " + "y" * left_bytes))

    assert (reading.is_complete, "too large" in reading.fault) == (bool(spare_bytes), not spare_bytes)


def test_a_body_has_no_bound_here() -> None:
    assert read(said(b"x" * 10**6)).is_complete


@pytest.mark.parametrize(
    "headers",
    [
        ("HTTP/1.1", "Connection: close"),
        ("HTTP/1.1", "connection: Keep-Alive, Close"),
        ("HTTP/1.0", "X: y"),
        ("HTTP/1.0", "Connection: close"),
    ],
)
def test_a_connection_that_the_server_ends_is_not_kept(headers: tuple[str, str]) -> None:
    version, header = headers
    reading = read(said(b"ok", header).replace(b"HTTP/1.1", version.encode()))

    assert (reading.is_complete, reading.keeps) == (True, False)


def test_http_1_0_keeps_a_connection_if_it_says_so() -> None:
    assert read(said(b"ok", "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0")).keeps


@pytest.mark.parametrize("more", [b"x", said(b"another"), b"HTTP/1.1", b"\0"])
@pytest.mark.parametrize("at_once", [True, False])
def test_an_answer_that_is_followed_by_something_is_whole_and_its_connection_is_not_kept(
    more: bytes, at_once: bool
) -> None:
    reading = read(said(b"ok") + more) if at_once else read(said(b"ok"), more)

    assert (reading.is_complete, body_of(reading), reading.fault, reading.keeps) == (True, b"ok", "", False)


def test_a_connection_that_ended_after_its_answer_is_not_kept() -> None:
    reading = read(said(b"ok"), ended=True)

    assert (reading.is_complete, reading.keeps) == (True, False)


@pytest.mark.parametrize(
    ("words", "uses", "expected_s"),
    [
        ("", 1, 1.0),
        ("timeout=5, max=100", 1, 1.0),
        ("timeout=5, max=100", 99, 1.0),
        ("timeout=5, max=100", 100, 0.0),
        ("max=1", 1, 0.0),
        ("max=0", 1, 0.0),
        ("Timeout = 1", 1, 0.5),
        ("timeout=0", 1, 0.0),
        ("timeout=x, max=", 1, 1.0),
        ("maximum=1", 1, 1.0),
        ("timeout=99999999999999999999", 1, 1.0),
    ],
)
def test_what_a_server_says_of_kept_connections_counts(words: str, uses: int, expected_s: float) -> None:
    assert idle_s({"keep-alive": words}, uses, 1.0) == expected_s
