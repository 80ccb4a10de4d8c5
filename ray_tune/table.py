"""The table of a study that has columns: what its studies found, beside what a paper prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path

from mmtrain.report.crosstab import Cell, Column, CrossTable, write_table
from mmtrain.report.units import PERCENT
from mmtrain.tasks.interface import Metric
from ray_tune.journal import FAILED, FINISHED, Journal
from ray_tune.study import Study

_BETWEEN = " / "


def table_of(
    study: Study, metrics: Mapping[str, Metric], journals: Mapping[str, Journal]
) -> CrossTable:
    """As far as the columns have run."""
    rows = tuple(product(*study.axes.values()))
    columns = tuple(
        Column(name, metrics[name], _factor(study, name, metric))
        for name, metric in metrics.items()
    )
    cells = {
        (row, column.name): Cell(
            _values(study, row, column, journals.get(column.name)),
            study.printed.get(_BETWEEN.join(row), {}).get(column.name),
        )
        for row in rows
        for column in columns
    }
    return CrossTable(study.name, tuple(study.axes), rows, columns, cells)


def write_study_table(
    study: Study, metrics: Mapping[str, Metric], journals: Mapping[str, Journal]
) -> dict[str, Path]:
    """table.{csv,md,html,tex} in the study's folder."""
    notes = [*study.notes, *_failures(journals)]
    return write_table(table_of(study, metrics, journals), Path(study.study_dir), notes)


def _factor(study: Study, name: str, metric: Metric) -> float:
    return study.columns[name].times or (100.0 if metric.unit == PERCENT else 1.0)


def _values(
    study: Study, row: tuple[str, ...], column: Column, journal: Journal | None
) -> tuple[float, ...]:
    """Of the finished trials of a row; what else was searched falls together."""
    if journal is None:
        return ()
    wanted = dict(zip(study.axes, row, strict=True))
    found = [
        record.best(journal.metric)
        for record in journal.records.values()
        if record.status == FINISHED and wanted.items() <= record.params.items()
    ]
    return tuple(column.times * best[0] for best in found if best is not None)


def _failures(journals: Mapping[str, Journal]) -> Iterator[str]:
    for name, journal in journals.items():
        for record in journal.records.values():
            if record.status == FAILED:
                yield f"failed: {name}, {record.name}: {record.reason}"
