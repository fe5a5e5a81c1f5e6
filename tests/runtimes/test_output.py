"""Lines from bytes, and the log that keeps the last of them."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.runtimes.output import KEPT_LINES, LINE_BYTES, LineSplitter, Log


def split(*chunks: bytes) -> list[str]:
    splitter = LineSplitter()
    return [line for chunk in chunks for line in splitter.feed(chunk)] + splitter.end()


@pytest.mark.parametrize(
    ("output", "lines"),
    [
        (b"", []),
        (b"one\ntwo\n", ["one", "two"]),
        (b"no end", ["no end"]),
        (b"one\r\n\r\ntwo\r\n", ["one", "", "two"]),
        (b"\r 10%\r 20%\rdone\n", ["", " 10%", " 20%", "done"]),
        (b"ends in a return\r", ["ends in a return"]),
        ("gr\u00fc\u00df dich\n".encode(), ["gr\u00fc\u00df dich"]),
        (b"\xff\xfe\x00\n", ["\ufffd\ufffd\x00"]),
    ],
)
def test_lines_are_the_same_however_the_output_is_cut(output: bytes, lines: list[str]) -> None:
    assert split(output) == lines
    assert split(*(output[i : i + 1] for i in range(len(output)))) == lines


@given(st.lists(st.binary(max_size=30), max_size=10))
def test_cuts_never_matter(chunks: list[bytes]) -> None:
    assert split(*chunks) == split(b"".join(chunks))


def test_of_a_huge_line_only_the_start_is_kept() -> None:
    splitter = LineSplitter()
    for _ in range(1000):
        assert splitter.feed(b"x" * 10_000) == []
        assert len(splitter._rest) <= LINE_BYTES + 1
    assert splitter.feed(b"\nnext\n") == ["x" * LINE_BYTES + " [cut]", "next"]


def test_of_a_flood_only_the_last_lines_are_taken() -> None:
    lines = LineSplitter().feed(b"".join(b"%d\n" % number for number in range(10_000)))
    assert lines == [str(number) for number in range(10_000 - KEPT_LINES, 10_000)]


async def read(log: Log, lines: int, *, follow: bool = False) -> list[str]:
    return [line async for line in log.read(lines=lines, follow=follow)]


def test_a_log_gives_its_last_lines() -> None:
    async def scenario() -> None:
        log = Log()
        log.add(["a", "b", "c"])
        assert await read(log, 2) == ["b", "c"]
        assert await read(log, 99) == ["a", "b", "c"]
        assert await read(log, 0) == []

    asyncio.run(scenario())


def test_a_follower_reads_on_until_the_end() -> None:
    async def scenario() -> None:
        log = Log()
        log.add(["a", "b"])
        follower = asyncio.create_task(read(log, 1, follow=True))
        for line in ("c", "d"):
            await asyncio.sleep(0)
            log.add([line])
        log.end()
        assert await follower == ["b", "c", "d"]
        assert await read(log, 1, follow=True) == ["d"]

    asyncio.run(scenario())


def test_a_slow_follower_is_told_what_it_missed() -> None:
    async def scenario() -> None:
        log = Log()
        follower = asyncio.create_task(read(log, 0, follow=True))
        await asyncio.sleep(0)
        log.add([str(number) for number in range(KEPT_LINES + 7)])
        log.end()
        lines = await follower
        assert lines[:2] == ["[7 lines skipped]", "7"]
        assert lines[-1] == str(KEPT_LINES + 6)

    asyncio.run(scenario())
