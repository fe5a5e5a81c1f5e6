"""Stop texts: found and cut off, however the answer is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.engines.stops import StopTexts


def read(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    """Return what is passed on of an answer, and whether a stop text ended it."""
    texts, passed = StopTexts(stops), ""
    for piece in pieces:
        passed += texts.feed(piece)
        if texts.found:
            break
    return passed + texts.rest(), texts.found


@pytest.mark.parametrize(
    ("pieces", "stops", "passed", "found"),
    [
        (["all", " of it"], [], "all of it", False),
        (["one\n", "two"], ["\n"], "one", True),
        (["a EN", "D b"], ["END"], "a ", True),
        (["a EN", "C b"], ["END"], "a ENC b", False),
        (["the answer e"], ["end"], "the answer e", False),  # held back, and given at the end
        (["aab"], ["ab"], "a", True),
        (["a", "a", "b"], ["ab"], "a", True),
        (["x stop y END"], ["END", "stop"], "x ", True),
        (["nothing"], [""], "nothing", False),
        (["\U0001f600\U0001f600"], ["\U0001f600"], "", True),
    ],
)
def test_an_answer_ends_before_its_first_stop_text(
    pieces: list[str], stops: list[str], passed: str, found: bool
) -> None:
    assert read(pieces, stops) == (passed, found)


def test_what_may_become_a_stop_text_is_held_back_and_no_more() -> None:
    texts = StopTexts(["abcd", "xy"])
    assert [texts.feed(piece) for piece in ("1ab", "c", "a", "bx", "yz")] == ["1", "", "abc", "ab", ""]
    assert texts.found


@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=8),
    stop=st.text("ab\n", min_size=1, max_size=4),
)
def test_with_one_stop_text_the_pieces_do_not_matter(pieces: list[str], stop: str) -> None:
    before, found, _ = "".join(pieces).partition(stop)
    assert read(pieces, [stop]) == (before, bool(found))


@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=8),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_no_stop_text_is_ever_passed_on_and_nothing_else_is_lost(pieces: list[str], stops: list[str]) -> None:
    answer = "".join(pieces)
    passed, found = read(pieces, stops)
    assert not any(stop in passed for stop in stops)
    assert answer.startswith(passed)
    assert found or passed == answer
    assert not found or answer[len(passed) :].startswith(tuple(stops))
