"""An evaluation as somebody judged it: the same predictions with other scores, in a folder beside.

What reads evaluations reads these, too: `mmtrain answers` compares two runs by their verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mmtrain.evaluation.evaluate import Evaluation, Prediction, write_evaluation
from mmtrain.evaluation.uncertainty import Interval, interval
from mmtrain.tasks.interface import Metric
from mmtrain.tasks.metrics import mean

# Of a judge and of people alike.
HALLUCINATION_RATE = Metric("hallucination_rate", larger_is_better=False, unit="%")


@dataclass(frozen=True)
class Column:
    """A metric, and the values that it is the mean of."""

    metric: Metric
    values: tuple[float, ...]

    @property
    def value(self) -> float:
        """The metric's value."""
        return mean(self.values, self.metric.name)

    @property
    def interval(self) -> Interval:
        """Where it lies, 95 of 100 times."""
        return interval(self.values)


@dataclass(frozen=True)
class Judged:
    """Metrics over the judged samples, and one score for each, which is better the larger it is."""

    columns: tuple[Column, ...]
    scores: Mapping[str, float]  # by the sample's id


def keep_judged(folder: Path, by_id: Mapping[str, Prediction], judged: Judged) -> None:
    """predictions.jsonl and metrics.json, as every evaluation has them."""
    predictions = [
        replace(one, score=judged.scores[name])
        for name, one in by_id.items()
        if name in judged.scores
    ]
    metrics = {column.metric.name: column.value for column in judged.columns}
    write_evaluation(folder, Evaluation(metrics, predictions, num_tokens=0))
