"""What the metrics of a run mean, kept with it: a file in its folder, tags of its MLflow run.

Whoever reads stored runs needs no task, which may be another one by then or not be installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from mmtrain.errors import DataError
from mmtrain.tasks.interface import Metric

DECLARED_NAME = "declared_metrics.json"
_TAG_PREFIX = "mmtrain.metric."


def as_fields(metrics: Iterable[Metric]) -> dict[str, dict[str, object]]:
    """The contents of declared_metrics.json: recorded name -> direction and unit."""
    return {
        metric.name: {"larger_is_better": metric.larger_is_better, "unit": metric.unit}
        for metric in metrics
    }


def as_tags(metrics: Iterable[Metric]) -> dict[str, str]:
    """One tag for each metric."""
    return {f"{_TAG_PREFIX}{name}": json.dumps(each) for name, each in as_fields(metrics).items()}


def read_declared(run_dir: Path) -> dict[str, Metric]:
    """What a run's folder says of its metrics; nothing if an older version wrote it."""
    path = Path(run_dir) / DECLARED_NAME
    try:
        fields = json.loads(path.read_text("utf-8"))
        return {name: _metric(name, each) for name, each in fields.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}: {error}).",
            "Delete it: the report then marks no best value, and a resume writes it anew.",
        ) from error


def declared_in_tags(tags: Mapping[str, str]) -> dict[str, Metric]:
    """What a stored run says of its metrics; a tag that somebody has broken says nothing."""
    declared: dict[str, Metric] = {}
    for key, text in tags.items():
        name = key.removeprefix(_TAG_PREFIX)
        if name == key:
            continue
        try:
            declared[name] = _metric(name, json.loads(text))
        except (ValueError, TypeError, KeyError):
            continue
    return declared


def _metric(name: str, fields: Mapping[str, object]) -> Metric:
    larger, unit = fields["larger_is_better"], fields["unit"]
    if not isinstance(larger, bool) or not isinstance(unit, str):
        raise ValueError(f"{name}: {fields!r} is no direction and unit")
    return Metric(name, larger, unit)
