"""What a study remembers on disk, so that it can be killed at any moment and go on.

`study.json` says which study and which trials; `results/<trial>.json` what became of one trial.
Every file is replaced at once. Nothing here needs ray: Ray's own experiment state is not used,
because it does not bring back the scheduler.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from mmtrain.config.problems import checked, shown
from mmtrain.errors import ConfigError, MmtrainError
from mmtrain.files import lock, replace_file
from mmtrain.safe_text import redacted
from mmtrain.tasks.interface import Metric
from ray_tune.study import Study
from ray_tune.trials import Trial

FORMAT_VERSION = 1
WAITING, RUNNING, FINISHED = "waiting", "running", "finished"
STOPPED, FAILED = "stopped", "failed"
# Neither is run again: the scheduler's verdict on a stopped trial still stands.
SETTLED = frozenset({FINISHED, STOPPED})
# These say how trials are run and shown, not what they compute: they may change on a resume.
_FREE_KEYS = frozenset(
    "max_concurrent resources_per_rank by baseline keep_checkpoints output_dir mode".split()
)


@dataclass
class Report:
    """One validation of a trial."""

    step: int
    metrics: dict[str, float]
    time_s: float


@dataclass
class Record:
    """What became of one trial so far."""

    name: str
    id: str
    params: dict[str, object]
    status: str = WAITING
    reports: list[Report] = field(default_factory=list)
    attempts: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    reason: str = ""

    def add(self, step: int, metrics: Mapping[str, float], time_s: float) -> int:
        """Keep a validation; its number among all, from 1.

        A trial that resumes from a checkpoint repeats the validations after it: the newer values
        count, but at the time of the first, so that playing back keeps its order.
        """
        known = {report.step: report for report in self.reports}
        if step in known:
            known[step].metrics = dict(metrics)
        else:
            self.reports.append(Report(step, dict(metrics), time_s))
            self.reports.sort(key=lambda report: report.step)
        return [report.step for report in self.reports].index(step) + 1

    def best(self, metric: Metric) -> tuple[float, int] | None:
        """The best value of a metric over the validations, and its step; NaN is never best."""
        known = [
            (report.metrics[metric.name], report.step)
            for report in self.reports
            if not math.isnan(report.metrics.get(metric.name, math.nan))
        ]
        return min(known, key=lambda pair: (metric.cost(pair[0]), pair[1]), default=None)


class Journal:
    """The study's folder. Holds plain data only, so that Ray may copy it about.

    `metric` ranks the trials.
    """

    def __init__(
        self,
        folder: Path,
        records: Sequence[Record],
        metric: Metric,
        parent_run_id: str | None,
    ) -> None:
        self.folder = folder
        self.metric = metric
        self.records = {record.name: record for record in records}
        self.parent_run_id = parent_run_id

    def save(self, record: Record) -> None:
        """Write one trial's result file."""
        _write_json(_result_path(self.folder, record.name), asdict(record))

    def unsettled(self) -> list[Record]:
        """The trials that still have to run, in the study's order."""
        return [record for record in self.records.values() if record.status not in SETTLED]

    def count(self, status: str) -> int:
        """How many trials have this status."""
        return sum(record.status == status for record in self.records.values())

    def best(self, statuses: Sequence[str] = (FINISHED,)) -> Record | None:
        """The trial with the best value among those of these statuses; the first one on a tie."""
        ranked = [
            (self.metric.cost(found[0]), number, record)
            for number, record in enumerate(self.records.values())
            if record.status in statuses and (found := record.best(self.metric)) is not None
        ]
        return min(ranked)[2] if ranked else None

    def remember_parent(self, run_id: str) -> None:
        """Keep the id of the study's MLflow run: a resumed study goes on in the same one."""
        self.parent_run_id = run_id
        path = self.folder / "study.json"
        _write_json(path, {**json.loads(path.read_text("utf-8")), "parent_run_id": run_id})


def open_journal(study: Study, trials: Sequence[Trial], metric: Metric, resume: bool) -> Journal:
    """Start the study's folder, or go on with it; a folder of another study is an error."""
    folder = Path(study.study_dir)
    path = folder / "study.json"
    stored = _stored_study(path) if path.exists() else {}
    settings = redacted(study.model_dump(mode="json"))
    started = any((folder / "results").glob("*.json"))  # else there is nothing to lose
    if stored and started and not resume:
        raise MmtrainError(
            f"the study folder {folder} is in use: it holds {len(stored['trials'])} trials.",
            "Go on with it by --resume, or choose another name or output_dir.",
        )
    if stored and started:
        _refuse_difference(stored["study"], settings, path)
    parent = stored.get("parent_run_id") if started or stored.get("study") == settings else None
    content = {
        "format_version": FORMAT_VERSION,
        "study": settings,
        "trials": [{"id": t.id, "name": t.name, "params": redacted(t.params)} for t in trials],
        "parent_run_id": parent,
        "created_s": stored.get("created_s", time.time()),
    }
    _write_json(path, content)
    records = [_stored_record(folder, trial) for trial in trials]
    return Journal(folder, records, metric, parent)


@contextmanager
def study_lock(folder: Path) -> Iterator[IO[str]]:
    """Hold the study: one driver at a time. Yields the lock's file, which outlives a crash."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        if not lock(file):
            raise MmtrainError(
                f"another `mmtrain tune` is running in {folder}.",
                "Wait for it, end it, or choose another name or output_dir.",
            )
        yield file


def _stored_study(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise MmtrainError(f"{path} is not readable ({error}).", "Delete the folder.") from error
    if stored.get("format_version") != FORMAT_VERSION:
        raise MmtrainError(
            f"{path} has format version {shown(stored.get('format_version'))}, not"
            f" {FORMAT_VERSION}.",
            "Go on with the version of mmtrain that wrote it, or choose another output_dir.",
        )
    stored["study"] = _with_new_keys(stored["study"])
    return redacted(stored)


def _with_new_keys(stored: dict[str, Any]) -> dict[str, Any]:
    """A study that an older version wrote, with the defaults of keys that it did not know."""
    found, problems = checked(Study, stored)
    return stored if found is None or problems else found.model_dump(mode="json")


def _refuse_difference(stored: Mapping[str, object], now: Mapping[str, object], path: Path) -> None:
    changed = [
        f"{key}: the folder's study says {shown(stored.get(key))}, this one {shown(now.get(key))}"
        for key in sorted({*stored, *now} - _FREE_KEYS)
        if stored.get(key) != now.get(key)
    ]
    if changed:
        remedy = "only the same study can go on here: restore it, or choose another output_dir"
        raise ConfigError([*changed, remedy], str(path))


def _stored_record(folder: Path, trial: Trial) -> Record:
    fresh = Record(trial.name, trial.id, dict(trial.params))
    try:
        stored = json.loads(_result_path(folder, trial.name).read_text("utf-8"))
        record = Record(**{**stored, "reports": [Report(**item) for item in stored["reports"]]})
    except (OSError, ValueError, TypeError, KeyError):
        return fresh  # at worst a trial runs again, and its own folder knows that it is finished
    if record.status == RUNNING:
        record.status = WAITING
    return record


def _result_path(folder: Path, name: str) -> Path:
    return folder / "results" / f"{name}.json"


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(value, indent=1) + "\n", sync=True)
