"""A table as papers print it: settings down, data sets across, ours beside what was printed."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmtrain.report import html
from mmtrain.report.tables import csv_cell, markdown_text
from mmtrain.report.units import NOTHING, PERCENT
from mmtrain.tasks.interface import Metric

_KINDS = ("csv", "md", "html", "tex")
_MEAN = "mean"


@dataclass(frozen=True)
class Column:
    """One data set. `times`: what its values are multiplied by to be read."""

    name: str
    metric: Metric
    times: float = 1.0

    @property
    def header(self) -> str:
        """What it is, and which way it is better."""
        return f"{self.name} {'↑' if self.metric.larger_is_better else '↓'}"

    @property
    def in_words(self) -> str:
        """How it is measured."""
        unit = " in %" if self.metric.unit == PERCENT else ""
        factor = f" × {self.times:g}" if self.times != 1 and not unit else ""
        return f"{self.name}: {self.metric.name.removeprefix('val/')}{unit}{factor}"


@dataclass(frozen=True)
class Cell:
    """The runs of one setting on one data set, and what a paper prints for them."""

    values: tuple[float, ...] = ()  # one a seed, as they are read
    printed: float | None = None

    @property
    def mean(self) -> float | None:
        """Of ours."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Of ours, n - 1; None of a single run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def text(self) -> str:
        """`78.9 ± 0.3 (78.7 +0.2)`, as much of it as there is."""
        if self.mean is None:
            return NOTHING if self.printed is None else f"{NOTHING} ({self.printed:.1f})"
        text = f"{self.mean:.1f}"
        if self.std is not None:
            text += f" ± {self.std:.1f}"
        if self.printed is not None:
            text += f" ({self.printed:.1f} {self.mean - self.printed:+.1f})"
        return text


@dataclass(frozen=True)
class CrossTable:
    """All of it. Rows are the options of the axes, in the study's order."""

    title: str
    axes: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    columns: tuple[Column, ...]
    cells: Mapping[tuple[tuple[str, ...], str], Cell] = field(default_factory=dict)

    def cell(self, row: tuple[str, ...], column: Column) -> Cell:
        """An empty one where nothing ran and nothing was printed."""
        return self.cells.get((row, column.name), Cell())

    @property
    def has_mean(self) -> bool:
        """Whether a mean over the columns means something."""
        return len({column.metric.unit for column in self.columns}) == 1 < len(self.columns)

    def mean(self, row: tuple[str, ...]) -> Cell:
        """Over the columns, of those rows that have all."""
        cells = [self.cell(row, column) for column in self.columns]
        means = [cell.mean for cell in cells if cell.mean is not None]
        printed = [cell.printed for cell in cells if cell.printed is not None]
        whole = len(cells)
        return Cell(
            (statistics.fmean(means),) if len(means) == whole else (),
            statistics.fmean(printed) if len(printed) == whole else None,
        )

    @property
    def legend(self) -> list[str]:
        """How to read it."""
        seeds = {len(cell.values) for cell in self.cells.values()}
        found = ["; ".join(column.in_words for column in self.columns)]
        if max(seeds, default=0) > 1:
            found.append("± is the standard deviation over seeds (n − 1)")
        if any(cell.printed is not None for cell in self.cells.values()):
            found.append("in brackets: what the paper prints, and how far ours is from it")
        return found

    def lines(self) -> list[list[str]]:
        """Header and rows, as text."""
        extra = [_MEAN] if self.has_mean else []
        lines = [[*self.axes, *(column.header for column in self.columns), *extra]]
        for row in self.rows:
            cells = [self.cell(row, column) for column in self.columns]
            cells += [self.mean(row)] if self.has_mean else []
            lines.append([*row, *(cell.text for cell in cells)])
        return lines


def write_table(table: CrossTable, folder: Path, notes: Sequence[str]) -> dict[str, Path]:
    """table.{csv,md,html,tex} in the folder."""
    texts = {
        "csv": csv_text(table),
        "md": markdown_page(table, notes),
        "html": html_page(table, notes),
        "tex": latex(table),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"table.{kind}" for kind in _KINDS}
    for kind, path in paths.items():
        path.write_text(texts[kind], encoding="utf-8")
    return paths


def csv_text(table: CrossTable) -> str:
    """A line for each cell, numbers unrounded."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ["column", "metric", "times", "n", "mean", "std", "printed", "values"]
    writer.writerow([*map(csv_cell, table.axes), *header])
    for row in table.rows:
        for column in table.columns:
            cell = table.cell(row, column)
            facts = [column.name, column.metric.name]
            numbers = [column.times, len(cell.values), cell.mean, cell.std, cell.printed]
            values = " ".join(map(repr, cell.values))
            writer.writerow([*map(csv_cell, (*row, *facts)), *numbers, values])
    return out.getvalue()


def markdown_page(table: CrossTable, notes: Sequence[str]) -> str:
    """Title, table, notes."""
    header, *rows = table.lines()
    rule = ["---"] * len(table.axes) + ["---:"] * (len(header) - len(table.axes))
    lines = [f"| {' | '.join(map(markdown_text, line))} |" for line in (header, rule, *rows)]
    remarks = [f"- {markdown_text(note)}" for note in (*table.legend, *notes)]
    return "\n".join([f"# {markdown_text(table.title)}", "", *lines, "", *remarks, ""])


def html_page(table: CrossTable, notes: Sequence[str]) -> str:
    """The same as a page."""
    header, *rows = table.lines()
    numbers = frozenset(range(len(table.axes), len(header)))
    remarks = html.notes("Notes", [*table.legend, *notes])
    return html.page(table.title, [html.table("", header, rows, numbers), remarks])


def latex(table: CrossTable) -> str:
    """A tabular of plain LaTeX."""
    header, *rows = table.lines()
    kinds = "l" * len(table.axes) + "r" * (len(header) - len(table.axes))
    lines = [" & ".join(map(_latex_text, line)) + r" \\" for line in (header, *rows)]
    body = [lines[0], r"\hline", *lines[1:]]
    return "\n".join([rf"\begin{{tabular}}{{{kinds}}}", *body, r"\end{tabular}", ""])


def _latex_text(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, rf"\{character}")
    pairs = {"±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "×": r"$\times$", "—": "--"}
    for character, command in pairs.items():
        text = text.replace(character, command)
    return text
