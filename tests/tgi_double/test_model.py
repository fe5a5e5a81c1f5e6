from __future__ import annotations

import math
import random
from typing import Any

import pytest

from tests.tgi_double import model
from tests.tgi_double.generation import Generation, Sampling, budget, most_likely, warped

TEXTS = ["", "Once upon a time", "Zürich, 東京 and 🙂!", "\tif x:\n        y = 1", "\0\x7f", "\u200d🏳️‍🌈"]


def greedy(prompt: str, limit: int = 40, **more: Any) -> Generation:
    return made(prompt, Sampling(), limit, **more)


def made(prompt: str, sampling: Sampling, limit: int = 40, seed: int = 1, **more: Any) -> Generation:
    generation = Generation([piece.id for piece in model.tokenize(prompt)], sampling, limit, seed, **more)
    while generation.finish_reason is None:
        generation.step()
    return generation


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_of_any_text_make_the_text_again_and_tile_its_bytes(text: str) -> None:
    pieces = model.tokenize(text)
    detokenizer = model.Detokenizer()
    assert "".join(detokenizer.feed(piece.id) for piece in pieces) == text
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces)][: len(pieces)]
    assert sum(piece.stop - piece.start for piece in pieces) == len(text.encode())


def test_probabilities_of_a_position_add_up_to_one_whatever_is_asked_for() -> None:
    context = [piece.id for piece in model.tokenize("Once upon a")]
    for sampling in (
        Sampling(),
        Sampling(temperature=0.3, do_sample=True),
        Sampling(top_k=3),
        Sampling(top_p=0.5),
        Sampling(typical_p=0.5),
        Sampling(repetition_penalty=1.3, frequency_penalty=0.5),
    ):
        logprobs = model.log_softmax(warped(model.logits(context), context, sampling))
        assert math.fsum(math.exp(each) for each in logprobs) == pytest.approx(1)


def test_what_is_likeliest_depends_on_the_text_and_is_always_the_same() -> None:
    assert greedy("Once upon a").text == greedy("Once upon a").text
    assert greedy("Once upon a").text.startswith(" time there was a small model")


def test_a_seed_makes_sampling_repeatable_and_another_makes_another_text() -> None:
    warm = Sampling(temperature=2.0, do_sample=True)
    assert made("The", warm, seed=7).text == made("The", warm, seed=7).text
    assert len({made("The", warm, seed=seed).text for seed in range(5)}) > 1


def test_sampled_tokens_come_as_often_as_their_probability_says() -> None:
    context = [piece.id for piece in model.tokenize("the")]
    logprobs = model.log_softmax(model.logits(context))
    best = max(range(len(logprobs)), key=logprobs.__getitem__)
    seeds = [random.Random(1).getrandbits(64) for _ in range(3)] + list(range(397))
    hits = sum(made("the", Sampling(do_sample=True), 1, seed).steps[0].token.id == best for seed in seeds)
    assert hits / len(seeds) == pytest.approx(math.exp(logprobs[best]), abs=0.12)


def test_a_text_that_ends_by_itself_and_one_that_never_does() -> None:
    ended = greedy("say good")
    assert (ended.text, ended.finish_reason) == (" bye.", "eos_token")
    assert ended.steps[-1].token.special
    assert ended.steps[-1].token.text == "</s>"
    assert greedy("go round and", 300).finish_reason == "length"


def test_the_bytes_of_a_character_are_held_back_until_it_is_whole() -> None:
    cup = greedy("a cup of", 20)
    texts = [step.token.text for step in cup.steps]
    assert "☕" in cup.text
    assert "☕" in texts
    assert "" in texts
    assert "�" not in cup.text
    assert "".join(text for step, text in zip(cup.steps, texts, strict=True) if not step.token.special) == cup.text


def test_a_cut_character_at_the_limit_is_shown_as_such() -> None:
    limit = next(n for n, step in enumerate(greedy("a cup of", 20).steps, 1) if not step.token.text)
    assert greedy("a cup of", limit).text.endswith("�")


def test_the_stop_text_stays_in_the_text_and_is_seen_only_where_a_token_ends() -> None:
    assert greedy("Once upon a", stop=["was"]).text == " time there was"
    assert greedy("Once upon a", stop=["was"]).finish_reason == "stop_sequence"
    assert greedy("Once upon a", 10, stop=["wa"]).finish_reason == "length"


def test_ties_are_all_reported_and_removed_tokens_are_not() -> None:
    assert [token.id for token in most_likely([-1.0, -3.0, -2.0, -3.0, -9.0], 3)] == [0, 2, 1, 3]
    assert [token.id for token in most_likely([-1.0, -math.inf, -math.inf], 3)] == [0]
    context = [piece.id for piece in model.tokenize("Once upon a")]
    logprobs = model.log_softmax(model.logits(context))
    assert any(len(most_likely(logprobs, count)) > count for count in range(1, 51))


def test_a_big_limit_is_rounded_up_to_whole_chunks_and_down_to_what_fits() -> None:
    assert budget(10, 1024, 4096) == 1024
    assert budget(10, 1500, 4096) == 2048
    assert budget(10, 100_000, 4096) == 3 * 1024
    assert budget(10, None, 4096) == 4086


def test_temperature_or_a_filter_turns_sampling_on_whatever_do_sample_says() -> None:
    assert not Sampling(temperature=1.0).samples
    assert Sampling(temperature=0.9).samples
    assert Sampling(top_p=0.9).samples
    assert Sampling(do_sample=True).samples
