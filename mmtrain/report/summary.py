"""What one run's folder says about it: the settings, the last and the best values."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmtrain.config.yaml_text import parse
from mmtrain.errors import MmtrainError
from mmtrain.report import html
from mmtrain.report.plot import run_png, series_of
from mmtrain.report.units import unit_of, value_text
from mmtrain.tasks.interface import LOSS, Metric
from mmtrain.tracking.declared import read_declared
from mmtrain.tracking.fields import flatten
from mmtrain.tracking.journal import JOURNAL_NAME, JournalEntry, RunJournal

_SPEEDS = ("train/samples_per_s", "train/tokens_per_s")


@dataclass(frozen=True)
class Best:
    """The validation that the best checkpoint comes from."""

    metric: str
    value: float
    step: int


@dataclass(frozen=True)
class RunSummary:
    """Everything the report of a run shows."""

    name: str
    state: str
    entries: tuple[JournalEntry, ...]
    last: dict[str, float]
    decides: str  # the metric that chooses the checkpoint
    best: Best | None
    declared: Mapping[str, Metric]
    evaluations: dict[str, str]  # 'val: accuracy' -> value
    params: dict[str, str]

    @property
    def last_step(self) -> int:
        """The last optimizer step that was written down."""
        return self.entries[-1].step


def summarize(run_dir: Path) -> RunSummary:
    """Read a run's folder; a folder without a journal is an error."""
    run_dir = Path(run_dir)
    entries = RunJournal.read(run_dir / JOURNAL_NAME)
    if not entries:
        raise MmtrainError(
            f"{run_dir} is no run folder with results: {JOURNAL_NAME} is missing or empty.",
            "Give the folder of a run, e.g. runs/NAME.",
        )
    config = _mapping(run_dir / "run.yaml")
    status = _mapping(run_dir / "status.json")
    declared = read_declared(run_dir)
    decides = _decides(config)
    return RunSummary(
        name=str(config.get("name") or run_dir.resolve().name),
        state=str(status.get("state") or status.get("status") or "unknown"),
        entries=tuple(entries),
        last=_last_values(entries),
        decides=decides,
        best=_best(entries, declared[decides]) if decides in declared else None,
        declared=declared,
        evaluations=dict(_evaluations(run_dir, declared)),
        params=flatten(config),
    )


def _last_values(entries: list[JournalEntry]) -> dict[str, float]:
    """The last value of each metric; of speeds the median, as single steps vary."""
    series = series_of(entries)
    last = {name: points[-1][1] for name, points in series.items()}
    medians = {
        name: statistics.median(value for _, value in series[name])
        for name in _SPEEDS
        if name in series
    }
    return last | medians


def _decides(config: Mapping[str, object]) -> str:
    section = config.get("validate")
    metric = section.get("metric", LOSS.name) if isinstance(section, dict) else LOSS.name
    return f"val/{metric}"


def _best(entries: list[JournalEntry], metric: Metric) -> Best | None:
    known = series_of(entries).get(metric.name, [])
    points = [point for point in known if math.isfinite(point[1])]
    if not points:
        return None
    step, value = min(points, key=lambda point: metric.cost(point[1]))
    return Best(metric.name, value, step)


def _evaluations(run_dir: Path, declared: Mapping[str, Metric]) -> Iterator[tuple[str, str]]:
    for path in sorted(run_dir.glob("evaluation/*/metrics.json")):
        for name, value in _mapping(path).items():
            known = isinstance(value, int | float)
            text = value_text(unit_of(f"val/{name}", declared), value) if known else str(value)
            yield f"{path.parent.name}: {name}", text


def _mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file's mapping; empty when the run has not written it (yet)."""
    if not path.exists():
        return {}
    try:
        text = path.read_text("utf-8")
        content = json.loads(text) if path.suffix == ".json" else parse(text)[0]
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise MmtrainError(
            f"{path} cannot be read: {error}.", "Restore it or delete it."
        ) from error
    return content if isinstance(content, dict) else {}


def results(summary: RunSummary) -> dict[str, str]:
    """The results, named and formatted."""
    facts = {"state": summary.state, "optimizer steps": str(summary.last_step)}
    if summary.best:
        facts[f"best {summary.best.metric}"] = f"{_best_text(summary)} at step {summary.best.step}"
    elif summary.decides in summary.last and summary.decides not in summary.declared:
        facts[f"best {summary.decides}"] = "unknown: an older version stored no direction of it"
    for name, value in sorted(summary.last.items()):
        title = f"median {name}" if name in _SPEEDS else f"last {name}"
        facts[title] = value_text(unit_of(name, summary.declared), value)
    return facts | summary.evaluations


def _best_text(summary: RunSummary) -> str:
    assert summary.best is not None
    return value_text(unit_of(summary.best.metric, summary.declared), summary.best.value)


def html_page(summary: RunSummary) -> str:
    """The report of one run as a page."""
    cards = [(str(summary.last_step), f"optimizer steps, {summary.state}")]
    if summary.best:
        best = summary.best
        cards.insert(0, (_best_text(summary), f"best {best.metric}, at step {best.step}"))
    sections = [
        html.cards(cards),
        html.image(
            "Curves",
            run_png(summary.entries, summary.declared),
            "losses and metrics by optimizer step",
        ),
        html.facts("Results", results(summary)),
    ]
    if summary.params:
        sections.append(html.facts("Settings", summary.params))
    return html.page(summary.name, sections)
