"""What rank 0 writes down while a run goes on: the journal, and the tracker that follows it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mmtrain.config.load import flatten_run
from mmtrain.config.schema import RunConfig
from mmtrain.errors import TrainingError
from mmtrain.files import write_json
from mmtrain.main_rank import worded
from mmtrain.tasks.choice import tasks_of
from mmtrain.tasks.interface import LOSS, Metric, validation_metrics
from mmtrain.tracking.declared import DECLARED_NAME, as_fields, as_tags
from mmtrain.tracking.fields import environment_tags, flatten
from mmtrain.tracking.journal import JOURNAL_NAME, RunJournal
from mmtrain.tracking.tracker import Status, Tracker

log = logging.getLogger("mmtrain")
# Of what the loop records, that which is better one way: a learning rate is not.
TRAINING_METRICS = (
    replace(LOSS, name="train/loss"),
    Metric("train/samples_per_s", larger_is_better=True, unit="samples/s"),
    Metric("train/tokens_per_s", larger_is_better=True, unit="tokens/s"),
    Metric("memory/peak_gib", larger_is_better=False, unit="GiB"),
)


class Recorder:
    """What a run writes down as it goes on: this one nothing, as on every rank but the first."""

    fault = ""  # why a line could not be written: rank 0 must not leave the others alone with it

    def refuse_fault(self) -> None:
        """An error where the journal has a hole."""
        if self.fault:
            raise TrainingError(
                f"the run's journal could not be written ({self.fault}).",
                "Make room or rights there, and run the same command again to go on from the last"
                " checkpoint.",
            )

    def start(
        self, inputs: Mapping[str, str], step: int, numbers: Mapping[str, float] | None = None
    ) -> None:
        """Forget what was written after the step that training goes on from; begin to track."""

    def record(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        """One line of the journal."""

    def end(self, status: Status, artifacts: Sequence[Path] = ()) -> None:
        """Write down how the run ended, and which files and folders the tracker should also have.

        From here on `mmtrain report --sync` can send what this process does not.
        """

    def wait_until_sent(self, timeout_s: float) -> None:
        """Give the tracker time to send what is written down."""


class RunRecorder(Recorder):
    """The journal of a run and its tracker. Tracking never blocks or fails training."""

    def __init__(self, run_dir: Path, config: RunConfig) -> None:
        self._run_dir, self._config = run_dir, config
        self._journal = RunJournal(run_dir / JOURNAL_NAME)
        self._tracker: Tracker | None = None

    def start(
        self, inputs: Mapping[str, str], step: int, numbers: Mapping[str, float] | None = None
    ) -> None:
        self._journal.truncate_after(step if step > 0 else -1)
        missing = self._journal.missing_steps(step)
        if missing:
            log.warning(
                "%s: %d of the %d steps before this start are missing (first: %d), so its curves"
                " have a gap; the training itself goes on from its checkpoint",
                self._journal.path,
                len(missing),
                step,
                missing[0],
            )
        metrics = (*TRAINING_METRICS, *validation_metrics(tasks_of(self._config)).values())
        write_json(self._run_dir / DECLARED_NAME, as_fields(metrics))
        digests = {f"digest.{name}": digest for name, digest in inputs.items()}
        counted = {f"counted.{name}": f"{number:.0f}" for name, number in (numbers or {}).items()}
        self._tracker = Tracker.start(
            self._run_dir,
            self._config.tracking,
            self._config.name,
            flatten(flatten_run(self._config)),
            {**environment_tags(), **digests, **counted, **as_tags(metrics)},
        )

    def record(self, step: int, epoch: float, metrics: Mapping[str, float]) -> None:
        try:
            self._journal.append(step, epoch, metrics)
        except Exception as error:
            self.fault = self.fault or worded(error)
        if self._tracker is not None:
            self._tracker.wake()

    def end(self, status: Status, artifacts: Sequence[Path] = ()) -> None:
        if self._tracker is not None:
            for path in filter(Path.exists, artifacts):
                folder = path if path.is_dir() else path.parent
                place = folder.relative_to(self._run_dir).as_posix()
                # MLflow refuses "." as a name for the top.
                self._tracker.artifact(path, "" if place == "." else place)
            self._tracker.end(status)
        self._journal.close()

    def wait_until_sent(self, timeout_s: float) -> None:
        if self._tracker is not None:
            self._tracker.wait_until_sent(timeout_s)
