"""A toy language model: a vocabulary of words and bytes, and a real distribution over it for each next token.

It has read a few sentences. What it would say next depends on the last two tokens alone, so a greedy answer is
always the same; a seed makes a sampled one the same. `CORPUS` is written so that tests can choose what happens:

    "go round and"     goes on for ever: round and round and ...
    "say good"         ends by itself: " bye", ".", "</s>"
    "a cup of"         goes on with characters of several bytes, each made of several tokens
"""

from __future__ import annotations

import codecs
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

CORPUS = """\
Once upon a time there was a small model that lived in a box of glass.
It read every book in the house and told the children what came next.
The wheels of the bus go round and round and round and round and round and
We say good bye.
She drank a cup of ☕ at the café with 🙂 and paid.
Paris is the capital of France, and Rome is the capital of Italy.
The cat sat on the mat, and the dog sat by the door.
One, two, three, four, five, six, seven, eight, nine, ten.
A model of language knows which word is likely, and how likely it is.
Who asks for less gets it sooner; who asks for more has to wait.
"""
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>")
EOS = SPECIALS.index("</s>")
FIRST_BYTE = len(SPECIALS)
FIRST_WORD = FIRST_BYTE + 256
WORD = re.compile(r" ?[A-Za-z]+|[.,;\n]")

SEEN_PAIR = 6.0
SEEN_TRIPLE = 4.0
INSIDE_CHARACTER = 20.0
UNLIKELY = -10.0
NOISE = 4.0
"""Few levels of noise for many tokens: equal logits are common, so that ties are, too."""


@dataclass(frozen=True)
class Piece:
    """A token of a text, and the bytes of it that the token stands for."""

    id: int
    start: int
    stop: int


WORDS = tuple(sorted({word for line in CORPUS.splitlines() for word in WORD.findall(line)} | {"\n"}))
SIZE = FIRST_WORD + len(WORDS)
_IDS = {word: FIRST_WORD + rank for rank, word in enumerate(WORDS)}
_LONGEST = max(map(len, WORDS))


def is_special(token: int) -> bool:
    return token < FIRST_BYTE


def token_bytes(token: int) -> bytes:
    """Return what a token stands for; the name of a special one."""
    if is_special(token):
        return SPECIALS[token].encode()
    return bytes([token - FIRST_BYTE]) if token < FIRST_WORD else WORDS[token - FIRST_WORD].encode()


def token_text(token: int) -> str:
    """Return a token decoded alone: half a character cannot be."""
    return token_bytes(token).decode(errors="replace")


def tokenize(text: str) -> list[Piece]:
    """Return the tokens of a text: the longest known word at each place, else the bytes of a character."""
    pieces, at, offset = [], 0, 0
    while at < len(text):
        length = next((n for n in range(min(_LONGEST, len(text) - at), 0, -1) if text[at : at + n] in _IDS), 0)
        part = text[at : at + (length or 1)]
        data = part.encode(errors="replace")
        ids = [_IDS[part]] if length else [FIRST_BYTE + byte for byte in data]
        width = len(data) // len(ids)
        pieces += [Piece(each, offset + n * width, offset + (n + 1) * width) for n, each in enumerate(ids)]
        at, offset = at + len(part), offset + len(data)
    return pieces


class Detokenizer:
    """Turns tokens into text as they come, and holds back the bytes of a character until it is whole."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return SPECIALS[token] if is_special(token) else self._decoder.decode(token_bytes(token))

    def rest(self) -> str:
        return self._decoder.decode(b"", final=True)


def _sentences() -> Iterator[list[int]]:
    for line in CORPUS.splitlines():
        ids = [piece.id for piece in tokenize(line)]
        yield ids if line.endswith("and") else [*ids, EOS]


_PAIRS: dict[int, set[int]] = {}
_TRIPLES: dict[tuple[int, int], set[int]] = {}
for _sentence in _sentences():
    for _first, _second in pairwise(_sentence):
        _PAIRS.setdefault(_first, set()).add(_second)
    for _first, _second, _third in zip(_sentence, _sentence[1:], _sentence[2:], strict=False):
        _TRIPLES.setdefault((_first, _second), set()).add(_third)


def logits(context: Sequence[int]) -> tuple[float, ...]:
    """Return how much the model favours each token of the vocabulary after these."""
    return _logits(context[-2] if len(context) > 1 else EOS, context[-1])


@lru_cache(maxsize=4096)
def _logits(before: int, last: int) -> tuple[float, ...]:
    noise = random.Random(before * SIZE + last).randbytes(SIZE)
    scores = [NOISE * level / 256 + (0.0 if token >= FIRST_WORD else UNLIKELY) for token, level in enumerate(noise)]
    inside = FIRST_BYTE + 0x80 <= last < FIRST_WORD  # the byte of a longer character: only its next byte makes sense
    for token in _PAIRS.get(last, ()):
        scores[token] += SEEN_PAIR - (UNLIKELY if token < FIRST_WORD else 0.0)
    for token in _TRIPLES.get((before, last), ()):
        scores[token] += SEEN_TRIPLE + (INSIDE_CHARACTER if inside else 0.0)
    return tuple(scores)


def log_softmax(scores: Sequence[float]) -> list[float]:
    top = max(scores)
    total = top + math.log(sum(math.exp(score - top) for score in scores))
    return [score - total for score in scores]
