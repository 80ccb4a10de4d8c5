"""CIDEr, BLEU, ROUGE and the words they count, against published implementations.

tests/golden/captions/ holds what those gave for the 200 small sets that `_corpus` makes up
(pycocoevalcap 1.2, rouge-score 0.1.2), and the words of 26 sentences (Stanford's PTBTokenizer 3.4.1
as pycocoevalcap calls it). With both packages on the path, `python -m
tests.unit.test_caption_scores` writes the scores anew.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from mmtrain.tasks.cider import cider, cider_d
from mmtrain.tasks.overlap import bleu, mean_of, rouge
from mmtrain.tasks.words import ptb_words, spaced_words

GOLDEN = Path(__file__).parents[1] / "golden" / "captions"
NUM_CORPORA = 200
_VOCABULARY = "a the man dog red runs on beach two with and sits".split()
_DIGITS = 9

Corpus = tuple[list[list[str]], list[list[list[str]]]]


class _Draws:
    """Numbers that are the same under every version of Python."""

    def __init__(self, key: str) -> None:
        self._key, self._number = key, 0

    def below(self, limit: int) -> int:
        self._number += 1
        return int.from_bytes(sha256(f"{self._key}/{self._number}".encode()).digest()) % limit

    def sentence(self) -> list[str]:
        return [_VOCABULARY[self.below(len(_VOCABULARY))] for _ in range(1 + self.below(12))]


def _corpus(number: int) -> Corpus:
    """Candidates, most of which are like one of their references, and these."""
    draws = _Draws(f"corpus {number}")
    candidates, references = [], []
    for _ in range(2 + draws.below(5)):
        others = [draws.sentence() for _ in range(1 + draws.below(4))]
        words = list(others[0]) if draws.below(4) else draws.sentence()
        for _ in range(draws.below(4)):
            words[draws.below(len(words))] = _VOCABULARY[draws.below(len(_VOCABULARY))]
        words += draws.sentence()[: draws.below(4)] * draws.below(3)
        candidates.append(words)
        references.append(others)
    return candidates, references


def _ours(number: int) -> dict[str, list[float]]:
    candidates, references = _corpus(number)
    rouges = mean_of([rouge(*pair) for pair in zip(candidates, references, strict=True)])
    return {
        "cider": cider_d(candidates, references),
        "bleu": list(bleu(candidates, references).values()),
        "rouge": list(rouges.values()),
    }


# --- against what others gave -------------------------------------------------------------------


def test_scores_are_those_of_published_implementations() -> None:
    published = json.loads((GOLDEN / "scores.json").read_text())
    assert len(published) == NUM_CORPORA
    for number, wanted in enumerate(published):
        ours = _ours(number)
        assert ours["cider"] == pytest.approx(wanted["cider"], rel=1e-6, abs=1e-8), number
        assert ours["rouge"] == pytest.approx(wanted["rouge"], rel=1e-6, abs=1e-8), number
        # Where no run of four words is shared, pycocoevalcap gives a little instead of nothing.
        for mine, theirs in zip(ours["bleu"], wanted["bleu"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6) or (mine == 0 and theirs < 1e-3), number
    values = np.array([one["bleu"] + one["rouge"] for one in published])
    assert (values.std(axis=0) > 0.05).all(), "the sets differ in all scores"


def test_words_are_those_of_the_published_tokenizer() -> None:
    sentences = (GOLDEN / "sentences.txt").read_text(encoding="utf-8").splitlines()
    words = (GOLDEN / "words.txt").read_text(encoding="utf-8").splitlines()
    assert [" ".join(ptb_words(one)) for one in sentences] == words


# --- against the formulas, computed another way --------------------------------------------------


def _plain_cider(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """Dense vectors over all n-grams, cosines by numpy."""

    def counts(words: list[str], n: int) -> Counter[str]:
        return Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))

    totals = np.zeros(len(candidates))
    for n in (1, 2, 3, 4):
        everything = [counts(words, n) for words in candidates]
        everything += [counts(words, n) for others in references for words in others]
        terms = sorted(set().union(*everything))
        used = [set().union(*(counts(words, n) for words in others)) for others in references]
        rare = np.array(
            [math.log(len(references) / max(1, sum(t in one for one in used))) for t in terms]
        )

        def vector(words: list[str], n: int = n) -> np.ndarray:
            found = counts(words, n)
            return np.array([found[term] for term in terms], dtype=float) * rare

        for at, (words, others) in enumerate(zip(candidates, references, strict=True)):
            for other in others:
                a, b = vector(words), vector(other)
                norm = np.linalg.norm(a) * np.linalg.norm(b)
                totals[at] += (a @ b) / norm / len(others) if norm else 0.0
    return list(10 * totals / 4)


@pytest.mark.parametrize("first", range(0, NUM_CORPORA, 50))
def test_plain_cider_is_the_mean_cosine(first: int) -> None:
    for number in range(first, first + 50):
        candidates, references = _corpus(number)
        assert cider(candidates, references) == pytest.approx(
            _plain_cider(candidates, references), abs=1e-9
        )


def test_hand_counted_scores() -> None:
    scores = bleu([["the", "the", "cat"]], [[["the", "cat", "sat"], ["a", "cat"]]])
    # the: at most once; two of three words, one of two pairs, no three words; no penalty.
    assert scores["bleu_1"] == pytest.approx(2 / 3)
    assert scores["bleu_2"] == pytest.approx(math.sqrt(2 / 3 * 1 / 2))
    assert scores["bleu_3"] == scores["bleu_4"] == 0
    short = bleu([["the", "cat"]], [[["the", "cat", "sat", "down"]]])
    assert short["bleu_1"] == pytest.approx(math.exp(1 - 4 / 2))
    found = rouge(["a", "b", "c", "d"], [["b", "a", "c", "d"], ["x"]])
    assert found["rouge_1"] == pytest.approx(0.5)
    assert found["rouge_2"] == pytest.approx((1 / 3) / 2)
    assert found["rouge_l"] == pytest.approx((3 / 4) / 2)


def test_nothing_said_is_nothing_won() -> None:
    references = [[["a", "dog"]], [["a", "cat"]]]
    assert cider_d([[], []], references) == [0.0, 0.0]
    assert set(bleu([[], []], references).values()) == {0.0}
    assert set(rouge([], references[0]).values()) == {0.0}
    assert cider_d([["dog"]], [[["dog"]]]) == [0.0], "one picture: no word tells it from others"


def test_repetition_and_length_cost_in_cider_d_alone() -> None:
    references = [[["red", "dog"]], [["two", "cats", "sit"]]]
    once, often = [["red", "dog"], ["no"]], [["red", "dog", "red", "dog"], ["no"]]
    assert cider_d(often, references)[0] < cider_d(once, references)[0]
    assert cider_d(once, references)[0] == pytest.approx(cider(once, references)[0])


def test_any_text_has_words() -> None:
    draws = random.Random(0)
    signs = "ab1 .,'\"-/&@#!?()[]{}\u2019\u00e9\u4e2d\n\t$%"
    for _ in range(2000):
        text = "".join(draws.choice(signs) for _ in range(draws.randrange(30)))
        assert all(word and word == word.lower() and not word.isspace() for word in ptb_words(text))
    assert spaced_words(" A dog. ") == ["A", "dog."]


def _theirs(number: int) -> dict[str, list[float]]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from rouge_score.rouge_scorer import RougeScorer

    candidates, references = _corpus(number)
    said = {at: [" ".join(words)] for at, words in enumerate(candidates)}
    wanted = {at: [" ".join(one) for one in others] for at, others in enumerate(references)}
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    rouges = [
        [
            np.mean([scorer.score(one, said[at][0])[kind].fmeasure for one in wanted[at]])
            for at in said
        ]
        for kind in ("rouge1", "rouge2", "rougeL")
    ]
    values = {
        "cider": Cider().compute_score(wanted, said)[1],
        "bleu": Bleu().compute_score(wanted, said, verbose=0)[0],
        "rouge": np.mean(rouges, axis=1),
    }
    return {name: [round(float(one), _DIGITS) for one in each] for name, each in values.items()}


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(_theirs(number)) for number in range(NUM_CORPORA))
    (GOLDEN / "scores.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
