"""BLEU and ROUGE: how many words, and runs of words, a text shares with its references."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from mmtrain.tasks.cider import Words, ngrams
from mmtrain.tasks.interface import Metric

BLEU_LONGEST = 4
BLEU = tuple(Metric(f"bleu_{n}", larger_is_better=True, unit="%") for n in range(1, 5))
ROUGE = tuple(Metric(f"rouge_{n}", larger_is_better=True, unit="%") for n in ("1", "2", "l"))


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, float]:
    """Corpus BLEU with runs of up to 1, 2, 3 and 4 words (Papineni et al. 2002), unsmoothed.

    The reference whose length is closest counts for the penalty of brevity, the shorter of two.
    """
    shared, possible = [0] * BLEU_LONGEST, [0] * BLEU_LONGEST
    length = wanted = 0
    for words, others in zip(candidates, references, strict=True):
        length += len(words)
        wanted += min((abs(len(one) - len(words)), len(one)) for one in others)[1]
        for number in range(BLEU_LONGEST):
            own = ngrams(words, number + 1)
            most: Counter[tuple[str, ...]] = Counter()
            for one in others:
                most |= ngrams(one, number + 1)
            shared[number] += (own & most).total()
            possible[number] += own.total()
    brevity = 0.0 if not length else min(0.0, 1 - wanted / length)
    scores, logs = {}, 0.0
    for number, metric in enumerate(BLEU):
        logs += math.log(shared[number] / possible[number]) if shared[number] else -math.inf
        scores[metric.name] = math.exp(brevity + logs / (number + 1))
    return scores


def rouge(words: Words, references: Sequence[Words]) -> dict[str, float]:
    """F1 of shared words, pairs and the longest common sequence, mean over the references.

    Formulas of Lin 2004; a repeated word counts as often as it is in both.
    """
    sums = {metric.name: 0.0 for metric in ROUGE}
    for other in references:
        for n in (1, 2):
            own, wanted = ngrams(words, n), ngrams(other, n)
            sums[f"rouge_{n}"] += _f1((own & wanted).total(), own.total(), wanted.total())
        sums["rouge_l"] += _f1(_common(words, other), len(words), len(other))
    return {name: value / len(references) for name, value in sums.items()}


def mean_of(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over all samples."""
    return {name: sum(one[name] for one in scores) / len(scores) for name in scores[0]}


def _f1(shared: int, own: int, wanted: int) -> float:
    return 2 * shared / (own + wanted) if shared else 0.0


def _common(words: Words, other: Words) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in words:
        above_left = 0
        for at, one in enumerate(other, start=1):
            above = row[at]
            row[at] = above_left + 1 if one == word else max(above, row[at - 1])
            above_left = above
    return row[-1]
