"""TGI's events: those that are written in a hurry say the same, in the same order, as those that are not."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from gateway.generation import GenerationRequest, TokenChance, TokenEvent
from gateway.tgi_events import TokenFrames, Unknown, likely, token

TEXTS = st.text(st.characters(codec=None, exclude_categories=())) | st.sampled_from(['"', "\\", "\u2028", "\ud800", ""])
LOGPROBS = st.none() | st.floats()
EVENTS = st.builds(
    TokenEvent,
    id=st.none() | st.integers(),
    text=TEXTS.filter(bool),
    logprob=LOGPROBS,
    top=st.just(()) | st.tuples(st.builds(TokenChance, st.integers(), TEXTS, st.floats(), st.floats())),
    token=st.none() | TEXTS,
    special=st.booleans(),
)


@given(st.lists(EVENTS, max_size=3), st.builds(Unknown, st.integers(), LOGPROBS), st.sampled_from([0, 5]))
def test_every_event_is_written_as_json_is_written(events: list[TokenEvent], unknown: Unknown, top: int) -> None:
    request = GenerationRequest("Hi", max_new_tokens=None, temperature=0.0, top_tokens=top)
    frames = TokenFrames(request, unknown)

    for index, event in enumerate(events, 1):
        wanted = {"index": index, "token": token(event, unknown)}
        if event.top and top:
            wanted["top_tokens"] = [likely(chance, unknown) for chance in event.top]
        wanted |= {"generated_text": None, "details": None}
        written = json.dumps(wanted, ensure_ascii=False, separators=(",", ":"))
        assert _as_json_writes_it(frames.event(event)) == f"data: {written}\n\n".encode(errors="replace")


def _as_json_writes_it(event: bytes) -> bytes:
    """Return the same event with its numbers as json writes them: 1e-7 is 1e-07 there."""
    assert (event[:6], event[-2:]) == (b"data: ", b"\n\n")
    return b"data: %b\n\n" % json.dumps(json.loads(event[6:]), ensure_ascii=False, separators=(",", ":")).encode()


def test_the_usual_event_has_these_bytes() -> None:
    frames = TokenFrames(GenerationRequest(prompt="x", max_new_tokens=9, temperature=0.0), Unknown(id=-1, logprob=0.0))

    event = frames.event(TokenEvent(7, ' "é"\n', -0.25))

    taken = r'{"id":7,"text":" \"é\"\n","logprob":-0.25,"special":false}'
    said = '{"index":1,"token":' + taken + ',"generated_text":null,"details":null}'
    assert event == f"data: {said}\n\n".encode()
