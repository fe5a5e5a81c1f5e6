"""A body is read by the faster of two readers, and whatever that one refuses by the other, which has the words."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.api.json_body import json_in
from gateway.errors import InvalidRequest

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None, exclude_categories=())),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
WRITTEN = VALUES.map(json.dumps).map(str.encode)
CHANGED = st.tuples(WRITTEN, st.integers(0, 200), st.binary(max_size=3)).map(
    lambda each: each[0][: each[1]] + each[2] + each[0][each[1] :]
)


def by_python(sent: bytes) -> Any:
    """Return what Python's own reader makes of it; ValueError stands for all that it refuses."""
    try:
        return json.loads(sent.decode())
    except (ValueError, RecursionError):
        return ValueError


def same(one: Any, other: Any) -> bool:
    """Say whether two values are the same, in kind too: a NaN is another one's like, and 1 is not 1.0 or True."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return repr(one) == repr(other)  # of zero the sign too
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(same, one.values(), other.values()))
    return bool(one == other)


@given(WRITTEN | CHANGED)
@example(b"NaN")
@example(b"[-Infinity, Infinity, -0, -0.0, 1e999, 5e-324]")
@example(b'{"a": 1, "a": 2}')
@example(b'"\\ud83d"')
@example(b'"\\ud83d\\ude00"')
@example(b"\xef\xbb\xbf{}")
@example(b'"\xff"')
@example(b'"\t"')
@example(b"9" * 4300)
@example(b"9" * 4301)
@example(b"[" * 500 + b"]" * 500)
@example(b"[" * 100_000)
@example(b" {} ")
@example(b"{} {}")
@example(b"01")
@example(b"")
def test_a_body_means_what_it_means_to_python_and_is_refused_where_that_refuses_it(sent: bytes) -> None:
    meant = by_python(sent)
    if meant is ValueError:
        with pytest.raises(InvalidRequest):
            json_in(sent)
    else:
        assert same(json_in(sent), meant)
