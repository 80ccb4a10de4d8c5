"""CIDEr: how much a caption says what people say of this picture, and of no other.

Formulas of Vedantam et al. 2015: n-grams of one to four words, weighted by how often they are used
and by how few pictures they are used for; the mean cosine with the references, times ten.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LONGEST = 4
_SCALE = 10.0
_SIGMA = 6.0  # of the penalty for another length, in words

Words = Sequence[str]
_Ngram = tuple[str, ...]


def ngrams(words: Words, length: int) -> Counter[_Ngram]:
    """How often each run of so many words occurs."""
    return Counter(tuple(words[at : at + length]) for at in range(len(words) - length + 1))


def cider(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """Each caption's score, from 0 to 10: the plain cosine."""
    return _scores(candidates, references, clipped=False)


def cider_d(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """CIDEr-D: repeating a word gains nothing, and another length than the reference's costs.

    pycocoevalcap's class Cider computes this one; so do papers that say CIDEr.
    """
    return _scores(candidates, references, clipped=True)


@dataclass(frozen=True)
class _Vectors:
    """The weights of a caption's n-grams for each length, their norms, and how long it is."""

    weights: tuple[Mapping[_Ngram, float], ...]
    norms: tuple[float, ...]
    pairs: int  # of neighbouring words: the length that the published code compares


class _Rarity:
    """How much an n-gram tells, by the number of pictures whose references hold it."""

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        self._pictures: Counter[_Ngram] = Counter()
        for of_picture in references:
            self._pictures.update(
                {one for words in of_picture for n in _LENGTHS for one in ngrams(words, n)}
            )
        self._log_all = math.log(len(references)) if references else 0.0

    def vectors(self, words: Words) -> _Vectors:
        """A caption, weighted."""
        weights = tuple(
            {one: count * self._of(one) for one, count in ngrams(words, n).items()}
            for n in _LENGTHS
        )
        norms = tuple(math.sqrt(sum(value * value for value in one.values())) for one in weights)
        return _Vectors(weights, norms, max(len(words) - 1, 0))

    def _of(self, ngram: _Ngram) -> float:
        return self._log_all - math.log(max(1, self._pictures[ngram]))


_LENGTHS = range(1, LONGEST + 1)


def _scores(
    candidates: Sequence[Words], references: Sequence[Sequence[Words]], clipped: bool
) -> list[float]:
    rarity = _Rarity(references)
    scores = []
    for words, of_picture in zip(candidates, references, strict=True):
        own = rarity.vectors(words)
        alike = [_likeness(own, rarity.vectors(one), clipped) for one in of_picture]
        scores.append(_SCALE * sum(alike) / len(alike))
    return scores


def _likeness(own: _Vectors, other: _Vectors, clipped: bool) -> float:
    """The mean over the lengths of n-grams."""
    total = 0.0
    for number in range(LONGEST):
        mine, theirs = own.weights[number], other.weights[number]
        norm = own.norms[number] * other.norms[number]
        if norm:
            shared = (
                (min(value, theirs[one]) if clipped else value) * theirs[one]
                for one, value in mine.items()
                if one in theirs
            )
            total += sum(shared) / norm
    penalty = math.exp(-((own.pairs - other.pairs) ** 2) / (2 * _SIGMA**2)) if clipped else 1.0
    return penalty * total / LONGEST
