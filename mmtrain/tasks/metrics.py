"""Scores that several tasks share."""

from __future__ import annotations

from collections.abc import Sequence

from mmtrain.errors import DataError
from mmtrain.tasks.interface import Metric, Sample, Template

ACCURACY = Metric("accuracy", larger_is_better=True, unit="%")
# Of tasks that only a judge can score: whether the model said something, whatever it was.
ANSWERED = Metric("answered", larger_is_better=True, unit="%")


def mean(scores: Sequence[float], name: str = "accuracy") -> float:
    """The mean of per-sample scores; a metric without data is an error, never 0 or NaN."""
    if not scores:
        raise DataError(f"metric '{name}' has no samples;", "evaluate at least one sample.")
    return sum(scores) / len(scores)


def exact_matches(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """1.0 where prediction and reference are equal once outer white space is gone."""
    return [
        float(prediction.strip() == reference.strip())
        for prediction, reference in zip(predictions, references, strict=True)
    ]


def lower_case_matches(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """1.0 where both are equal once case and outer white space are gone."""
    return exact_matches([one.lower() for one in predictions], [one.lower() for one in references])


def target_matches(
    samples: Sequence[Sample], predictions: Sequence[str], template: Template
) -> list[float]:
    """1.0 where a prediction is what the template wanted, or another of the sample's answers.

    Case, outer white space and a closing full stop do not count.
    """
    return [
        float(_plain(prediction) in {_plain(one) for one in (template(sample).target, *others)})
        for sample, prediction in zip(samples, predictions, strict=True)
        for others in [sample.answers[1:]]
    ]


def _plain(text: str) -> str:
    return text.strip().rstrip(".").rstrip().casefold()
