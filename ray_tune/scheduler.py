"""Ray's schedulers, fed by stable trial names and by what the journal remembers.

Ray restores no scheduler state. Every validation is in the study's journal, so a resumed study
plays them back in the order in which they came: the rungs are then what they were.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from mmtrain.tasks.interface import Metric
from ray_tune.journal import STOPPED, Journal, Record
from ray_tune.messages import STEP
from ray_tune.study import SchedulerConfig, Study

_TIME, _VALUE = "validations", "value"
# The median rule would pause a trial where others wait for its place; here none is ever paused.
_NOBODY_WAITS: Any = SimpleNamespace(get_live_trials=lambda: [])


@dataclass(frozen=True)
class _Named:
    """All that Ray's schedulers need of a trial."""

    trial_id: str


class Rungs:
    """The judgements of ASHA or of the median rule, or none: whether a trial goes on."""

    def __init__(self, settings: SchedulerConfig, metric: Metric) -> None:
        self._metric = metric.name
        self._judge = _judge(settings, metric)
        self._known: set[str] = set()

    def goes_on(self, name: str, number: int, metrics: Mapping[str, float]) -> bool:
        """Whether the trial continues after its validation of this number, counted from 1."""
        if self._judge is None or self._metric not in metrics:
            return True
        trial = _Named(name)
        if name not in self._known:
            self._known.add(name)
            self._judge.on_trial_add(_NOBODY_WAITS, trial)
        result = {_TIME: number, _VALUE: metrics[self._metric]}
        return self._judge.on_trial_result(_NOBODY_WAITS, trial, result) != TrialScheduler.STOP

    def replay(self, records: Mapping[str, Record]) -> None:
        """Take the journal's validations in the order in which they came."""
        past = [
            (report.time_s, record.name, number, report.metrics)
            for record in records.values()
            for number, report in enumerate(record.reports, start=1)
        ]
        for _, name, number, metrics in sorted(past, key=lambda item: item[:3]):
            self.goes_on(name, number, metrics)


def _judge(settings: SchedulerConfig, metric: Metric) -> Any:
    """Ray's own, of what it is told."""
    told: dict[str, Any] = {"time_attr": _TIME, "metric": _VALUE, "mode": metric.mode}
    if settings.type == "asha":
        return ASHAScheduler(
            max_t=settings.max,
            grace_period=settings.grace,
            reduction_factor=settings.reduction_factor,
            stop_last_trials=False,
            **told,
        )
    if settings.type == "median":
        return MedianStoppingRule(
            grace_period=settings.grace, min_samples_required=settings.least_trials, **told
        )
    return None


class StudyScheduler(FIFOScheduler):
    """Trials in the study's order; every validation is written down before it is judged."""

    def __init__(self, study: Study, journal: Journal) -> None:
        super().__init__()
        self._journal = journal
        self._rungs = Rungs(study.scheduler, journal.metric)
        self._rungs.replay(journal.records)

    def on_trial_result(self, tune_controller: object, trial: Any, result: dict[str, Any]) -> str:
        """Keep the validation and decide."""
        if STEP not in result:
            return TrialScheduler.CONTINUE
        record = self._journal.records[trial.config["trial"]]
        metrics = {key: value for key, value in result.items() if key.startswith("val/")}
        repeated = any(report.step == result[STEP] for report in record.reports)
        number = record.add(int(result[STEP]), metrics, time.time())
        goes_on = repeated or self._rungs.goes_on(record.name, number, metrics)
        if not goes_on:
            record.status = STOPPED
        self._journal.save(record)
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP
