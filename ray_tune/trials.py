"""From a study to its trials: a pure, ordered expansion with names that depend on content only."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmtrain.config.problems import shown
from mmtrain.config.schema import RunConfig, TrackingConfig
from mmtrain.errors import ConfigError, nearest
from mmtrain.tasks.choice import tasks_of
from mmtrain.tasks.interface import Metric, validation_metrics
from ray_tune.study import BOOKKEEPING, SearchKey, Study

_MAX_NAME_LENGTH = 80
_PARENT_TAG = "mlflow.parentRunId"  # MLflow's own name


@dataclass(frozen=True)
class Trial:
    """One run of a study. `run` is its complete run file as data."""

    id: str
    name: str
    params: Mapping[str, object]
    run: Mapping[str, Any]

    @property
    def tracking(self) -> dict[str, Any]:
        """Where the trial is logged, defaults filled in."""
        return TrackingConfig(**self.run["tracking"]).model_dump()

    def with_tag(self, parent_run_id: str | None) -> Trial:
        """The trial as a child of the study's MLflow run, if there is one."""
        if parent_run_id is None:
            return self
        tracking = dict(self.run["tracking"])
        tracking["tags"] = {**tracking["tags"], _PARENT_TAG: parent_run_id}
        return replace(self, run={**self.run, "tracking": tracking})


def expand(study: Study) -> list[Trial]:
    """The study's trials in order; points that random search draws twice appear once."""
    trials: dict[str, Trial] = {}
    for params in _points(study):
        trial = _trial(study, params)
        trials.setdefault(trial.id, trial)
    return list(trials.values())


def check_trials(study: Study, trials: Sequence[Trial], source: str) -> Metric:
    """The metric that ranks the trials, as their task declares it.

    Raises with every distinct problem that any trial's run file has in this study.
    """
    from mmtrain.resolve import resolve

    first_seen: dict[str, str] = {}
    metrics: dict[Metric, str] = {}
    for trial in trials:
        try:
            config = resolve(trial.run, (), study.ranks_per_trial)
            metrics.setdefault(_ranking_metric(study, config), trial.name)
        except ConfigError as error:
            for problem in error.problems:
                first_seen.setdefault(problem, trial.name)
    if len(metrics) > 1:
        fault = f"metric: {study.metric} does not mean the same in {' and '.join(metrics.values())}"
        first_seen[f"{fault}; search one task at a time"] = trials[0].name
    if first_seen:
        raise ConfigError([f"{text} (trial {name})" for text, name in first_seen.items()], source)
    return next(iter(metrics))


def _ranking_metric(study: Study, config: RunConfig) -> Metric:
    """The best trial's adapter must be that of the step which made it the best."""
    declared, name = validation_metrics(tasks_of(config)), study.metric
    if name not in declared:
        hint = nearest(name, declared)
        raise ConfigError([f"metric: validation of the trials gives no '{name}'; {hint}"])
    metric, kept = declared[name], config.validation.metric
    if name != f"val/{kept}":
        fault = f"metric: {name} ranks the trials, but each exports its step of best val/{kept}"
        remedy = f"set validate.metric: {name.removeprefix('val/')} in the base run"
        raise ConfigError([f"{fault}; {remedy}"])
    if study.mode not in (None, metric.mode):
        fault = f"mode: '{study.mode}' of {name} would rank the worst trial first"
        raise ConfigError([f"{fault}; set mode: {metric.mode}, or leave it out"])
    return metric


def columns_of(study: Study) -> dict[str, Study]:
    """The studies of a table by the names of its columns; of any other study itself alone."""
    if not study.columns:
        return {"": study}
    return {name: _column(study, name) for name in study.columns}


def _column(study: Study, name: str) -> Study:
    column, base = study.columns[name], _copied(study.base)
    for key, value in column.run.items():
        _set(base, key, value)
    changes: dict[str, object] = {
        "name": f"{study.name}-{_slug(name)}",
        "output_dir": f"{study.study_dir}/{_slug(name)}",
        "base": base,
        "metric": column.metric or study.metric,
        "columns": {},
        "printed": {},
    }
    return study.model_copy(update=changes)


def _points(study: Study) -> Iterator[dict[str, object]]:
    """Every combination of parameters: draws outside, grid keys inside, in the file's order."""
    grids = {key: entry.grid for key, entry in study.search.items() if entry.grid is not None}
    drawn = {key: entry for key, entry in study.search.items() if entry.grid is None}
    for sample in range(study.num_samples or 1):
        draws = {
            key: draw(entry, keyed_fraction(study.seed, sample, key))
            for key, entry in drawn.items()
        }
        for values in itertools.product(*study.axes.values(), *grids.values()):
            point = {**draws, **dict(zip((*study.axes, *grids), values))}
            yield _with_held({key: point[key] for key in study.varied}, study.search)


def _with_held(point: dict[str, object], search: Mapping[str, SearchKey]) -> dict[str, object]:
    """Without the keys whose `when` does not hold, or names a key that was left out so."""
    left = {k: v for k, v in point.items() if k not in search or search[k].holds_in(point)}
    return left if left == point else _with_held(left, search)


def keyed_fraction(seed: int, sample: int, key: str) -> float:
    """A number in [0, 1) that depends only on its arguments: more samples keep earlier ones."""
    digest = hashlib.sha256(f"{seed}/{sample}/{key}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def draw(entry: SearchKey, fraction: float) -> object:
    """The value of a search key at a fraction in [0, 1)."""
    if entry.choice is not None:
        return entry.choice[int(fraction * len(entry.choice))]
    if entry.uniform is not None:
        low, high = entry.uniform
        return _rounded(low + fraction * (high - low))
    if entry.loguniform is not None:
        low, high = entry.loguniform
        return _rounded(math.exp(math.log(low) + fraction * math.log(high / low)))
    assert entry.randint is not None, "the schema admits exactly one kind, and not grid here"
    first, last = entry.randint
    return first + int(fraction * (last - first + 1))


def _rounded(value: float) -> float:
    """Six digits: the same on every platform's exp and log, and readable in tables."""
    return float(f"{value:.6g}")


def _trial(study: Study, params: Mapping[str, object]) -> Trial:
    run = _copied(study.base)
    for name, value in params.items():
        changes = study.axes[name][str(value)] if name in study.axes else {name: value}
        for key, changed in changes.items():
            _set(run, key, changed)
    content = {key: value for key, value in run.items() if key not in BOOKKEEPING}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    trial_id = hashlib.sha256(text.encode()).hexdigest()[:10]
    label = _label(params, study.axes)[: _MAX_NAME_LENGTH - 11].strip("-._")
    name = f"{label}-{trial_id}" if label else trial_id
    run.update(name=name, output_dir=f"{study.study_dir}/trials/{name}")
    options = {name: str(params[name]) for name in study.axes}
    run["tracking"] = _tracking(study, run.get("tracking"), options)
    return Trial(trial_id, name, dict(params), run)


def _tracking(study: Study, of_base: Any, options: Mapping[str, str]) -> object:
    """The base's settings with the study's, and tags to filter by: the options of the axes.

    What is no such thing is left to the run's check.
    """
    tags = of_base.get("tags") if isinstance(of_base, Mapping) else of_base
    if not isinstance(tags, Mapping | None):
        return of_base
    tracking = dict(of_base or {})
    ours = {"uri": study.tracking.uri, "experiment": study.tracking.experiment}
    tracking.update({key: value for key, value in ours.items() if value is not None})
    tracking["tags"] = {**(tags or {}), **options, "study": study.name}
    return tracking


def _copied(value: object) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _set(run: dict[str, Any], key: str, value: object) -> None:
    *sections, last = key.split(".")
    here = run
    for depth, section in enumerate(sections, start=1):
        if here.get(section) is None:
            here[section] = {}
        here = here[section]
        if not isinstance(here, dict):
            above = ".".join(sections[:depth])
            fault = f"search key '{key}' cannot be set: {above} is {shown(here)}, not a section"
            raise ConfigError([fault], "study")
    here[last] = value


def _label(params: Mapping[str, object], axes: Collection[str]) -> str:
    """`LoRA-r4-lr0.002-seed1`: options, and the shortest endings that tell keys apart, values."""
    return "-".join(
        _slug(str(value)) if key in axes else f"{_short(key, params)}{_value_text(value)}"
        for key, value in params.items()
    )


def _short(key: str, keys: Mapping[str, object]) -> str:
    parts = key.split(".")
    for length in range(1, len(parts) + 1):
        ending = parts[-length:]
        if sum(other.split(".")[-length:] == ending for other in keys) == 1:
            return _slug("_".join(ending))
    return _slug(key)


def _value_text(value: object) -> str:
    if isinstance(value, float):
        return re.sub(r"e\+0*", "e", f"{value:g}")  # names hold no plus sign
    if isinstance(value, str):  # of a path, its last part tells more than its first
        return f"_{_slug(value.rstrip('/').rsplit('/', 1)[-1])[:24]}"
    return _slug(json.dumps(value))[:24]


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "_", text).strip("_.")
