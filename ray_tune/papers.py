"""Packaged studies of papers, and where their models and shards lie on this machine."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmtrain.errors import ConfigError, MmtrainError, nearest
from ray_tune.study import Study
from ray_tune.trials import Trial

_PREFIX = "paper/"
_STUDIES = Path(__file__).parent / "studies"
_NAME = re.compile(r"paper-(\w+)-table-([\w-]+)")


def study_path(given: str, table: str | None) -> Path:
    """A study file: a path, or `paper/ID` with one of that paper's tables."""
    if not given.startswith(_PREFIX):
        if table is not None:
            raise MmtrainError(f"--table {table} is of papers, not of {given}.", "Leave it out.")
        return Path(given)
    tables = _tables()
    paper = given.removeprefix(_PREFIX)
    if paper not in tables:
        raise MmtrainError(f"there is no paper '{paper}' here;", nearest(paper, tables))
    found = tables[paper]
    if table is None and len(found) == 1:
        return next(iter(found.values()))
    if table not in found:
        listed = " | ".join(found)
        which = f"has no table '{table}'." if table else "has several tables."
        raise MmtrainError(f"{given} {which}", f"Give --table {listed}.")
    return found[table]


def _tables() -> dict[str, dict[str, Path]]:
    """Paper -> table -> study file."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(_STUDIES.glob("*.yaml")):
        if name := _NAME.fullmatch(path.stem):
            found.setdefault(name[1], {})[name[2]] = path
    return found


def placed(study: Study, data: str | None, models: str | None) -> Study:
    """With a preset as a folder of that name in `models`, and relative shards in `data`."""
    base = dict(study.base)
    for section, value in study.base.items():
        if isinstance(value, Mapping):
            base[section] = _placed(value, data, models, f"{section}.")
    axes = {
        axis: {option: _placed(keys, data, models) for option, keys in options.items()}
        for axis, options in study.axes.items()
    }
    columns = {
        name: column.model_copy(update={"run": _placed(column.run, data, models)})
        for name, column in study.columns.items()
    }
    return study.model_copy(update={"base": base, "axes": axes, "columns": columns})


def _placed(
    keys: Mapping[str, Any], data: str | None, models: str | None, section: str = ""
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in keys.items():
        full = section + key
        if models and full == "model.preset":
            found["model.checkpoint".removeprefix(section)] = str(Path(models) / str(value))
        elif data and full in ("data.train", "data.val") and isinstance(value, str):
            found[key] = str(Path(data) / value)
        else:
            found[key] = value
    return found


def refuse_missing(trials: Iterable[Trial], source: str) -> None:
    """What a table needs and this machine lacks: known before the first column trains for days."""
    problems: dict[str, None] = {}
    for trial in trials:
        model, data = trial.run.get("model") or {}, trial.run.get("data") or {}
        if preset := model.get("preset"):
            text = f"model.preset: '{preset}' has no weights; give --models, a folder that holds it"
            problems[f"{text} as {preset}/"] = None
        for key, file in (("checkpoint", "config.json"), ("train", ""), ("val", "")):
            place = (model if key == "checkpoint" else data).get(key)
            if place and "://" not in str(place) and not (Path(place) / file).exists():
                hint = "--models" if key == "checkpoint" else "--data"
                problems[f"{key}: there is no {place}; {hint} says where such folders are"] = None
    if problems:
        raise ConfigError(list(problems), source)
