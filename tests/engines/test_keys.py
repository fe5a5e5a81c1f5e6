"""The key of a server that already runs: whatever that server says, and wherever its words are cut, nobody sees it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.engines import llamacpp_answers, openai_answers, tgi_answers
from gateway.engines.keys import LEAST_TELLING, hidden, without_key
from gateway.errors import GatewayError, UpstreamFailed
from tests.fleet.scenes import spec

KEY = "sk-SECRETPROVIDERKEY-0123456789abcdefghij"


@pytest.mark.parametrize("refusal", [openai_answers.refusal, tgi_answers.refusal, llamacpp_answers.refusal])
def test_no_telling_part_of_a_key_is_in_words_wherever_they_are_cut(refusal: Any) -> None:
    for before in range(300 - len(KEY) - 2, 303):
        said = {"error": {"message": f"{'p' * before}{KEY}", "type": "x"}}
        error = without_key(refusal(500, json.dumps(said).encode()), spec(api_key=KEY))
        assert KEY[:LEAST_TELLING] not in error.detail


@pytest.mark.parametrize(
    ("key", "words", "shown"),
    [
        (KEY, f"a {KEY}, {KEY[:20]}. And {KEY}", "a [key], [key]. And [key]"),
        (KEY, f"a {KEY[:8]}", "a [key]"),
        (KEY, f"a {KEY[:7]}", f"a {KEY[:7]}"),
        ("abcdefghabcdefghXYZ", "abcdefghabcdefghXYZ abcdefghabcdefghX.", "[key] [key]."),
        ("short", "my short key", "my [key] key"),
        ("key", "my key", "my [key]"),
        (None, "my key", "my key"),
    ],
)
def test_a_key_and_its_beginnings_are_taken_out(key: str | None, words: str, shown: str) -> None:
    assert without_key(UpstreamFailed(words), spec(api_key=key)).detail == shown


def test_an_error_without_the_key_keeps_all_else() -> None:
    error: GatewayError = UpstreamFailed(f"no {KEY}", retry_after_s=2.0, cause="c")
    found = without_key(error, spec(api_key=KEY))

    assert (type(found), found.retry_after_s, found.extra) == (UpstreamFailed, 2.0, {"cause": "c"})


def test_a_whole_answer_is_shown_without_the_key() -> None:
    assert hidden(f"a {KEY}".encode(), spec(api_key=KEY)) == b"a [key]"
    assert hidden(KEY.encode(), spec()) == KEY.encode()
