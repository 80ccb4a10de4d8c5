"""Runs compared: grouped by what was varied, averaged over the rest. Pure statistics.

A row is a mapping with the keys to group by, the metric, and optionally `name` (of the run),
`curve` (its training loss as (step, value) pairs) and `scores` (by the sample's id, where the
metric is their mean).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmtrain.errors import MmtrainError, nearest
from mmtrain.report.significance import (
    LEVEL,
    Behind,
    Setting,
    against_best,
    corrected_for_choice,
    explained,
)
from mmtrain.report.units import NOTHING, gain_text, spread_text, value_text
from mmtrain.tasks.interface import Metric


@dataclass(frozen=True)
class Measured:
    """One run that has the metric."""

    name: str
    key: tuple[str, ...]
    value: float
    curve: tuple[tuple[int, float], ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Runs that agree in every key that is grouped by."""

    key: tuple[str, ...]
    values: tuple[float, ...]
    mean: float
    std: float | None  # of a sample (n - 1); None for a single run
    best: float
    best_run: str
    behind: Behind = Behind(0.0, 0.0, 0.0, None)  # the best group

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
    expected: float | None = None  # of the best group, less what it owes to being chosen
    explained: Mapping[str, float] = field(default_factory=dict)  # key -> share of the variance

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
    groups.sort(key=lambda group: (metric.cost(group.mean), group.key))
    settings = _settings([members[group.key] for group in groups], metric)
    behind = zip(groups, against_best(settings), strict=True)
    expected = corrected_for_choice(settings)
    return Statistics(
        tuple(by),
        metric,
        tuple(replace(group, behind=how_far) for group, how_far in behind),
        tuple(sorted(measured, key=lambda run: (metric.cost(run.value), run.name))),
        tuple(left_out),
        baseline,
        None if expected is None else -metric.cost(expected),
        explained(
            [dict(zip(by, run.key, strict=True)) for run in measured],
            [run.value for run in measured],
        ),
    )


def _settings(members: Sequence[Sequence[Measured]], metric: Metric) -> list[Setting]:
    """Oriented so that more is better; scores of the samples that all runs were asked."""
    runs = [run for group in members for run in group]
    common = [name for name in runs[0].scores if all(name in run.scores for run in runs)]
    return [
        Setting(
            tuple(-metric.cost(run.value) for run in group),
            tuple(
                statistics.fmean(-metric.cost(run.scores[name]) for run in group) for name in common
            ),
        )
        for group in members
    ]


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
        scores=row.get("scores") or {},
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
    return [*lines, *_how_sure(result)]


def _how_sure(result: Statistics) -> list[str]:
    """Whether the best is the best, what to expect of it, and which key mattered."""
    lines = []
    metric = result.metric
    others = result.groups[1:]
    unsettled = [group for group in others if (group.behind.chance or 0.0) > LEVEL]
    if others and all(group.behind.chance is None for group in others):
        lines.append("whether it is the best is not known: repeat each setting with other seeds")
    elif unsettled:
        lines.append(
            f"not told from the best: {_listed(result, unsettled)}; {_settled_by(unsettled)}"
        )
    if result.expected is not None:
        expected = value_text(metric.unit, result.expected)
        lines.append(f"chosen among {len(result.groups)}: expect {expected} of it on another try")
    names = dict(zip(result.by, short_keys(result.by), strict=True))
    varied = {key for number, key in enumerate(result.by) if _values_of(result, number) > 1}
    if len(varied) > 1:
        shares = sorted(result.explained.items(), key=lambda item: -item[1])
        told = ", ".join(
            f"{names[key]} {100 * share:.0f} %" for key, share in shares if key in varied
        )
        lines.append(f"of the variance between runs, keys explain: {told}")
    return lines


def _values_of(result: Statistics, number: int) -> int:
    return len({group.key[number] for group in result.groups})


def _listed(result: Statistics, groups: Sequence[Group]) -> str:
    few = ", ".join(label(result, group.key) for group in groups[:3])
    return few + f" and {len(groups) - 3} more" * (len(groups) > 3)


def _settled_by(groups: Sequence[Group]) -> str:
    needed = [group.behind.more_seeds for group in groups]
    known = [number for number in needed if number is not None]
    if not known:
        return "more seeds would not settle it, more samples to validate on might"
    runs = f"{min(known)} more seed{'s' if min(known) > 1 else ''} of each"
    return f"{runs} would settle one, if they differ as it looks"
