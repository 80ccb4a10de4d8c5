"""What happens to a trial, written down and shown."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune import Callback

from mmtrain.errors import nearest
from mmtrain.safe_text import redact
from mmtrain.tracking.journal import JOURNAL_NAME, RunJournal
from ray_tune.cleaning import drop_checkpoints
from ray_tune.failures import died_in_words, last_line
from ray_tune.journal import FAILED, FINISHED, RUNNING, SETTLED, Journal, Record
from ray_tune.messages import FAILURE, FIRST_FAILURE, OUTCOME, STARTED, TRAINING_SECONDS
from ray_tune.progress import View
from ray_tune.study import Study

_PENDING_S = 60.0


class StudyCallback(Callback):
    """Tune's callback of one study."""

    def __init__(
        self, study: Study, journal: Journal, view: View, availability: Callable[[], str]
    ) -> None:
        self._study, self._journal, self._view = study, journal, view
        self._availability = availability
        self._started_s: dict[str, float] = {}
        self._without_ranks: dict[str, float] = {}

    def on_trial_start(
        self, iteration: int, trials: list[Any], trial: object, **info: object
    ) -> None:
        """The trial's driver runs; its ranks still have to find room."""
        record = self._record(trial)
        record.status, record.reason = RUNNING, ""
        record.attempts += 1
        self._started_s[record.name] = self._without_ranks[record.name] = time.time()
        self._journal.save(record)
        self._view.started(record)

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Any],
        trial: object,
        result: dict[str, Any],
        **info: object,
    ) -> None:
        """A validation, which the scheduler has kept, or news of another kind."""
        record = self._record(trial)
        if STARTED in result:
            self._without_ranks.pop(record.name, None)
        if OUTCOME in result:
            record.training_seconds = float(result[TRAINING_SECONDS])
            self._settle(record, str(result[FAILURE]), str(result.get(FIRST_FAILURE, "")))
        self._view.refresh()

    def on_trial_complete(
        self, iteration: int, trials: list[Any], trial: object, **info: object
    ) -> None:
        """The trial's driver has ended, or the scheduler ended it."""
        record = self._record(trial)
        if record.status == RUNNING:
            self._settle(record, "its driver ended without a word")
        record.seconds += time.time() - self._started_s[record.name]
        self._without_ranks.pop(record.name, None)
        self._journal.save(record)
        self._view.ended(record)
        drop_checkpoints(self._study, self._journal)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: object) -> None:
        """The trial's driver itself died."""
        record = self._record(trial)
        # Where Ray writes it first; `get_error` reads a copy that is not made yet.
        text = Path(trial.error_file).read_text("utf-8") if trial.error_file else ""
        self._settle(record, f"its driver died: {died_in_words(text) or last_line(text)}")
        now_s = time.time()
        record.seconds += now_s - self._started_s.get(record.name, now_s)
        self._without_ranks.pop(record.name, None)
        self._journal.save(record)
        self._view.ended(record)

    def on_step_end(self, iteration: int, trials: list[Any], **info: object) -> None:
        """Say so when a trial finds no room for its ranks."""
        now_s = time.time()
        for name, since_s in self._without_ranks.items():
            if now_s - since_s > _PENDING_S:
                self._without_ranks[name] = now_s  # once a minute
                waited_s = now_s - self._started_s[name]
                self._view.say(
                    f"{name} has been pending for {waited_s:.0f} s: {self._availability()}"
                )
        self._view.refresh()

    def _record(self, trial: Any) -> Record:
        return self._journal.records[trial.config["trial"]]

    def _settle(self, record: Record, failure: str, first_failure: str = "") -> None:
        if record.status in SETTLED:
            return
        _take_missing_reports(record, Path(self._study.study_dir) / "trials" / record.name)
        if not failure and record.best(self._journal.metric) is None:
            failure = _no_metric(record, self._study.metric)
        record.status, record.reason = (FAILED, redact(failure)) if failure else (FINISHED, "")
        if first_failure:
            again = "; then, with half the micro-batch: " + (record.reason or "finished")
            record.reason = redact(first_failure) + again
            record.attempts += 1
        self._journal.save(record)


def _take_missing_reports(record: Record, run_dir: Path) -> None:
    """Validations that the run wrote down while no study was listening (it was being killed)."""
    path = run_dir / JOURNAL_NAME
    known = {report.step for report in record.reports}
    for entry in RunJournal.read(path) if path.exists() else []:
        metrics = {key: value for key, value in entry.metrics.items() if key.startswith("val/")}
        if metrics and entry.step not in known:
            record.add(entry.step, metrics, entry.time_s)


def _no_metric(record: Record, metric: str) -> str:
    given = sorted({key for report in record.reports for key in report.metrics})
    if not given:
        return f"it never validated, so it has no {metric}: set data.val and validate.every"
    return f"validation gives no {metric}; {nearest(metric, given)}"
