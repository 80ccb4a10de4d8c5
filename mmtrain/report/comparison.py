"""Runs compared: grouped by what was varied, averaged over the rest. Pure statistics.

A row is a mapping with the keys to group by, the metric, and optionally `name` (of the run) and
`curve` (its training loss as (step, value) pairs).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmtrain.errors import MmtrainError, nearest
from mmtrain.report.units import NOTHING, gain_text, spread_text, value_text
from mmtrain.tasks.interface import Metric


@dataclass(frozen=True)
class Measured:
    """One run that has the metric."""

    name: str
    key: tuple[str, ...]
    value: float
    curve: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Group:
    """Runs that agree in every key that is grouped by."""

    key: tuple[str, ...]
    values: tuple[float, ...]
    mean: float
    std: float | None  # of a sample (n - 1); None for a single run
    best: float
    best_run: str

    @property
    def n(self) -> int:
        """How many runs."""
        return len(self.values)


@dataclass(frozen=True)
class Statistics:
    """The comparison: groups from the best mean to the worst."""

    by: tuple[str, ...]
    metric: Metric
    groups: tuple[Group, ...]
    runs: tuple[Measured, ...]  # best first
    without_metric: tuple[str, ...]  # names of runs left out
    baseline: float | None = None

    @property
    def best_run(self) -> Measured:
        """The best single run."""
        return self.runs[0]

    @property
    def gain(self) -> float | None:
        """How much better than the baseline the best run is; positive is better."""
        if self.baseline is None:
            return None
        return self.metric.cost(self.baseline) - self.metric.cost(self.best_run.value)


def compare(
    rows: Sequence[Mapping[str, object]],
    by: Sequence[str],
    metric: Metric,
    baseline: float | None = None,
) -> Statistics:
    """Group the rows and rank the groups by their mean."""
    name = metric.name
    _check_names(rows, by, name)
    measured = [_measured(row, by, name) for row in rows if _has_number(row, name)]
    left_out = [str(row.get("name", NOTHING)) for row in rows if not _has_number(row, name)]
    if not measured:
        raise MmtrainError(
            f"none of {len(rows)} runs has a number for '{name}'.",
            "Wait for a validation, or compare another metric.",
        )
    members: dict[tuple[str, ...], list[Measured]] = {}
    for run in measured:
        members.setdefault(run.key, []).append(run)
    groups = [_group(key, runs, metric) for key, runs in members.items()]
    return Statistics(
        tuple(by),
        metric,
        tuple(sorted(groups, key=lambda group: (metric.cost(group.mean), group.key))),
        tuple(sorted(measured, key=lambda run: (metric.cost(run.value), run.name))),
        tuple(left_out),
        baseline,
    )


def _check_names(rows: Sequence[Mapping[str, object]], by: Sequence[str], metric: str) -> None:
    if not rows:
        raise MmtrainError("there are no runs to compare.", "Run some, or look elsewhere.")
    known = {name for row in rows for name in row} - {"name", "curve"}
    for key in by:
        if key not in known and key != "name":
            raise MmtrainError(f"no run has the key '{key}':", nearest(key, known - {metric}))
    if metric not in known:
        raise MmtrainError(f"no run has the metric '{metric}':", nearest(metric, known - set(by)))


def _has_number(row: Mapping[str, object], metric: str) -> bool:
    value = row.get(metric)
    return isinstance(value, int | float) and math.isfinite(value)


def _measured(row: Mapping[str, Any], by: Sequence[str], metric: str) -> Measured:
    return Measured(
        name=str(row.get("name", NOTHING)),
        key=tuple(_key_text(row.get(name)) for name in by),
        value=float(row[metric]),
        curve=tuple((int(step), float(value)) for step, value in row.get("curve") or ()),
    )


def _key_text(value: Any) -> str:
    """A value as it is grouped and shown: 0.0002, '0.0002' and '2e-4' are one."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return f"{float(value):.6g}"
    except (TypeError, ValueError):
        return str(value)


def _group(key: tuple[str, ...], runs: Sequence[Measured], metric: Metric) -> Group:
    values = tuple(run.value for run in runs)
    best = min(runs, key=lambda run: (metric.cost(run.value), run.name))
    std = statistics.stdev(values) if len(values) > 1 else None
    return Group(key, values, statistics.fmean(values), std, best.value, best.name)


def short_keys(by: Sequence[str]) -> list[str]:
    """The shortest endings of dotted keys that still tell them apart: r, lr."""
    return [_short(key, by) for key in by]


def _short(key: str, keys: Sequence[str]) -> str:
    parts = key.split(".")
    for length in range(1, len(parts)):
        ending = parts[-length:]
        if sum(other.split(".")[-length:] == ending for other in keys) == 1:
            return ".".join(ending)
    return key


def label(result: Statistics, key: tuple[str, ...]) -> str:
    """A group in words: `r 8 · lr 0.002`; a run by itself has no keys."""
    names = short_keys(result.by)
    return " · ".join(f"{name} {value}" for name, value in zip(names, key)) or "all runs"


def headline(result: Statistics) -> list[str]:
    """The result in two or three sentences."""
    metric, best, group = result.metric, result.best_run, result.groups[0]
    lines = [f"best run: {best.name} with {metric.name} {value_text(metric.unit, best.value)}"]
    if result.by:
        runs = f"{group.n} run{'s' if group.n > 1 else ''}"
        spread = spread_text(metric.unit, group.mean, group.std)
        lines.append(f"best setting: {label(result, group.key)}, {spread} over {runs}")
    if result.gain is not None:
        base = value_text(metric.unit, result.baseline)
        gain = gain_text(metric.unit, result.gain)
        lines.append(f"gain over the unadapted base ({base}): {gain}")
    return lines
