"""A task whose metrics mislead by their names: a rate that should fall, a score with `loss`-like
letters that should rise, as a judge of hallucinations and sentiments would give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from mmtrain.tasks.datasets.digits import Digits
from mmtrain.tasks.interface import Metric

RATE = Metric("hallucination_rate", larger_is_better=False, unit="%")
SENTIMENT = Metric("sentiment_accuracy", larger_is_better=True, unit="%")
LENGTH = Metric("glossary_loss_words", larger_is_better=True, unit="words")


def judge_digits(monkeypatch: pytest.MonkeyPatch, rates: Sequence[float]) -> None:
    """The digits task with other metrics: each validation gives the next of the rates."""
    verdicts: Iterator[float] = iter(rates)

    def score(
        self: Digits, samples: Sequence[object], predictions: Sequence[str], template: str
    ) -> tuple[dict[str, float], list[float]]:
        rate = next(verdicts)
        given = {RATE.name: rate, SENTIMENT.name: 1 - rate, LENGTH.name: 10 * (1 - rate)}
        return given, [1 - rate] * len(samples)

    monkeypatch.setattr(Digits, "metrics", (RATE, SENTIMENT, LENGTH))
    monkeypatch.setattr(Digits, "primary_metric", RATE)
    monkeypatch.setattr(Digits, "score", score)
