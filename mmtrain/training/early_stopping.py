"""Which validation was best, and whether to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from mmtrain.config.schema import ValidateConfig
from mmtrain.errors import TrainingError, nearest
from mmtrain.tasks.interface import Metric, Task, validation_metrics


class StoppingState(TypedDict):
    """What a checkpoint keeps of it."""

    best_value: float | None
    best_step: int
    since_best: int


@dataclass
class EarlyStopping:
    """The best value so far and the validations since."""

    metric: Metric  # by the name that validations record it under
    patience: int | None
    min_epochs: int
    best_value: float | None = None
    best_step: int = -1
    since_best: int = 0

    @classmethod
    def of(cls, settings: ValidateConfig, tasks: Mapping[str, Task]) -> EarlyStopping:
        """A fresh one, by a metric that the tasks declare."""
        metric = validation_metrics(tasks)[f"val/{settings.metric}"]
        return cls(metric, settings.patience, settings.min_epochs)

    def update(self, metrics: dict[str, float], step: int) -> bool:
        """Take one validation's metrics; whether it is the best so far."""
        name = self.metric.name
        if name not in metrics:
            short = name.removeprefix("val/")
            known = [key.removeprefix("val/") for key in metrics if key.startswith("val/")]
            fault = f"validate.metric: validation gives no '{short}';"
            raise TrainingError(fault, nearest(short, known))
        value = metrics[name]
        better = (
            self.best_value is None
            or math.isnan(self.best_value)
            or self.metric.cost(value) < self.metric.cost(self.best_value)
        )
        if better:
            self.best_value, self.best_step, self.since_best = value, step, 0
        else:
            self.since_best += 1
        return better

    def should_stop(self, epochs_done: float) -> bool:
        """Whether patience has run out."""
        if self.patience is None or epochs_done < self.min_epochs:
            return False
        return self.since_best >= self.patience

    def state(self) -> StoppingState:
        """What a checkpoint keeps."""
        return StoppingState(
            best_value=self.best_value, best_step=self.best_step, since_best=self.since_best
        )

    def restore(self, state: StoppingState) -> None:
        """Continue from a checkpoint."""
        self.best_value = state["best_value"]
        self.best_step = state["best_step"]
        self.since_best = state["since_best"]
