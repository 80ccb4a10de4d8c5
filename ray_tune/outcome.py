"""The end of a study: results.csv, the comparison, and the study's MLflow run."""

from __future__ import annotations

import csv
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtrain.errors import MmtrainError, nearest
from mmtrain.evaluation.uncertainty import is_mean
from mmtrain.report.answers import read_answers
from mmtrain.report.plot import plot_run
from mmtrain.report.write import Comparison, write_comparison
from mmtrain.tracking.client import TrackingError, end_parent_run, parent_run
from mmtrain.tracking.journal import JOURNAL_NAME, RunJournal
from mmtrain.tracking.state import load_state
from mmtrain.tracking.tracker import DISABLED, sync
from ray_tune.journal import FAILED, FINISHED, SETTLED, STOPPED, Journal, Record
from ray_tune.study import Study

log = logging.getLogger("mmtrain")
_CURVE = "train/loss"
_MAX_CURVE_POINTS = 400


def write_results(study: Study, journal: Journal) -> Path:
    """results.csv: one line per trial, whatever became of it."""
    path = journal.folder / "results.csv"
    keys = study.varied
    header = ["trial", "status", *keys, study.metric, "step", "seconds", "training_seconds"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*header, "attempts", "reason"])
        for record in journal.records.values():
            value, step = record.best(journal.metric) or ("", "")
            values = [_cell(record.params.get(key, "")) for key in keys]
            times = [f"{record.seconds:.1f}", f"{record.training_seconds:.1f}"]
            row = [record.name, record.status, *values, value, step, *times]
            writer.writerow([*row, record.attempts, record.reason])
    return path


def plot_trials(journal: Journal) -> None:
    """plot.png in the folder of every trial that measured anything, as a lone run has it."""
    for record in journal.records.values():
        folder = journal.folder / "trials" / record.name
        if RunJournal.read(folder / JOURNAL_NAME):  # empty: it failed before its first step
            plot_run(folder)


def compare_trials(study: Study, journal: Journal) -> Comparison:
    """comparison.{csv,md,html,png} of the finished trials, grouped as the study says."""
    rows = [
        _row(study, journal, record)
        for record in journal.records.values()
        if record.status == FINISHED
    ]
    return write_comparison(
        rows,
        study.group_by,
        journal.metric,
        journal.folder,
        baseline=baseline_value(study),
        title=f"Study {study.name}",
        notes=_notes(study, journal),
    )


def _row(study: Study, journal: Journal, record: Record) -> dict[str, object]:
    found = record.best(journal.metric)
    path = journal.folder / "trials" / record.name / JOURNAL_NAME
    entries = RunJournal.read(path) if path.exists() else []
    curve = [(entry.step, entry.metrics[_CURVE]) for entry in entries if _CURVE in entry.metrics]
    every = math.ceil(len(curve) / _MAX_CURVE_POINTS) or 1
    params = {key: _cell(record.params.get(key)) for key in study.varied}
    value = found[0] if found else None
    measured = {study.metric: value, "scores": _scores(path.parent, value)}
    return {**params, **measured, "name": record.name, "curve": curve[::every]}


def _scores(run_dir: Path, value: float | None) -> dict[str, float]:
    """Of each sample at the best step, where the metric is their mean."""
    try:
        found = read_answers(run_dir, "val").by_id
    except MmtrainError:
        return {}  # several data sets, or an evaluation that did not come so far
    scores = {name: one.score for name, one in found.items()}
    return scores if value is not None and is_mean(value, list(scores.values())) else {}


def _cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _notes(study: Study, journal: Journal) -> list[str]:
    notes = [f"each trial counts with its best {study.metric} over its validations"]
    stopped = journal.count(STOPPED)
    if stopped:
        notes.append(f"{stopped} stopped early by {study.scheduler.type}, left out")
    for record in journal.records.values():
        if record.status == FAILED:
            notes.append(f"failed: {record.name}: {record.reason}")
    return notes


def baseline_value(study: Study) -> float | None:
    """The unadapted base's metric, given as a number or as an evaluation's metrics file."""
    if not isinstance(study.baseline, str):
        return study.baseline
    path = Path(study.baseline)
    try:
        metrics = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise MmtrainError(
            f"baseline: {path} cannot be read ({error}).",
            "Evaluate the base first, or give the number.",
        ) from error
    metrics = metrics if isinstance(metrics, Mapping) else {}
    for name in (study.metric, study.metric.rsplit("/", 1)[-1]):
        if isinstance(metrics.get(name), int | float):
            return float(metrics[name])
    raise MmtrainError(f"baseline: {path} has no {study.metric};", nearest(study.metric, metrics))


def open_parent(study: Study, journal: Journal, tracking: Mapping[str, Any]) -> str | None:
    """The id of the study's MLflow run, made at the first start; None without a tracker."""
    if tracking["uri"] == DISABLED or journal.parent_run_id is not None:
        return journal.parent_run_id
    params = {
        "study.metric": study.metric,
        "study.mode": journal.metric.mode,
        "study.algorithm": study.algorithm,
        "study.trials": str(len(journal.records)),
        "study.scheduler": study.scheduler.type,
        **{f"search.{key}": _in_short(entry) for key, entry in study.search.items()},
        **{f"axes.{name}": json.dumps(list(options)) for name, options in study.axes.items()},
    }
    try:
        tags = {"study": study.name}
        run_id = parent_run(tracking["uri"], tracking["experiment"], study.name, tags, params)
    except TrackingError as error:
        log.warning("the study goes on without a parent run: %s", error)
        return None
    journal.remember_parent(run_id)
    return run_id


def _in_short(entry: Any) -> str:
    return json.dumps({entry.kind: getattr(entry, entry.kind)})


def close_parent(study: Study, journal: Journal, uri: str, files: list[Path]) -> None:
    """Send the results, and end the MLflow runs that the scheduler cut off."""
    if journal.parent_run_id is None:
        return
    best = journal.best()
    found = best.best(journal.metric) if best else None
    metrics = {
        "trials/finished": float(journal.count(FINISHED)),
        "trials/stopped": float(journal.count(STOPPED)),
        "trials/failed": float(journal.count(FAILED)),
        **({f"best/{study.metric}": found[0]} if found else {}),
    }
    for record in journal.records.values():
        if record.status in SETTLED:
            _complete_tracking(journal.folder / "trials" / record.name, record.status, uri)
    try:
        status = "FINISHED" if found else "FAILED"
        end_parent_run(uri, journal.parent_run_id, status, metrics, files)
    except TrackingError as error:
        log.warning("the study's results are complete in %s, but %s", journal.folder, error)


def _complete_tracking(run_dir: Path, status: str, uri: str) -> None:
    """Send what a trial still owes; one that the scheduler cut off could not say that it ended."""
    state = load_state(run_dir)
    if state is None or state.complete:
        return
    if status == STOPPED:
        state.final_status, state.end_time_ms = "KILLED", int(time.time() * 1000)
        state.save(run_dir)
    try:
        sync(run_dir, uri)
    except TrackingError as error:
        log.warning("trial %s is not completely tracked: %s", run_dir.name, error)
