"""A comparison as files: comparison.csv, .md, .html and .png."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmtrain.report import html, tables
from mmtrain.report.comparison import Statistics, compare, headline, label, short_keys
from mmtrain.report.plot import comparison_png, curves_png
from mmtrain.report.units import direction_text, gain_text, spread_text, table_unit, value_text
from mmtrain.tasks.interface import Metric

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_TITLE = "Comparison of runs"


@dataclass(frozen=True)
class Comparison:
    """What was found and where it was written."""

    statistics: Statistics
    notes: tuple[str, ...]
    paths: dict[str, Path]  # csv, md, html, png

    def table(self) -> Table:
        """The table for a terminal."""
        return tables.rich_table(self.statistics)

    def lines(self) -> list[str]:
        """The headline and the notes, a line each."""
        return [*headline(self.statistics), *all_notes(self.statistics, self.notes)]


def write_comparison(
    rows: Sequence[Mapping[str, object]],
    by: Sequence[str],
    metric: Metric,
    out_dir: Path,
    baseline: float | None = None,
    title: str = DEFAULT_TITLE,
    notes: Sequence[str] = (),
) -> Comparison:
    """Compare the rows (see `report.comparison`) and write comparison.{csv,md,html,png}."""
    result = compare(rows, by, metric, baseline)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = {kind: out_dir / f"comparison.{kind}" for kind in ("csv", "md", "html", "png")}
    write_files(result, paths, title, notes)
    return Comparison(result, tuple(notes), paths)


def write_files(
    result: Statistics, paths: Mapping[str, Path], title: str, notes: Sequence[str] = ()
) -> None:
    """Write the kinds that have a path."""
    writers = {
        "csv": lambda: tables.csv_text(result).encode(),
        "md": lambda: markdown_page(result, title, notes).encode(),
        "html": lambda: html_page(result, title, notes).encode(),
        "png": lambda: comparison_png(result),
    }
    for kind, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(writers[kind]())


def all_notes(result: Statistics, notes: Sequence[str]) -> list[str]:
    """The caller's notes and which runs are not in the table."""
    left_out = result.without_metric
    if not left_out:
        return list(notes)
    few = ", ".join(left_out[:5]) + (", …" if len(left_out) > 5 else "")
    return [*notes, f"{len(left_out)} without {result.metric.name}, left out: {few}"]


def markdown_page(result: Statistics, title: str, notes: Sequence[str]) -> str:
    """Title, headline, table and notes in Markdown."""
    found = "".join(f"- {tables.markdown_text(line)}\n" for line in headline(result))
    more = "".join(f"- {tables.markdown_text(line)}\n" for line in all_notes(result, notes))
    parts = [f"# {tables.markdown_text(title)}\n", found, tables.markdown(result), more]
    return "\n".join(part for part in parts if part)


def html_page(result: Statistics, title: str, notes: Sequence[str]) -> str:
    """Headline, plots, both tables and notes on one page."""
    columns = tables.header(result)
    first = len(result.by)
    sections = [
        html.cards(_cards(result)),
        html.table(
            f"By setting, best first ({direction_text(result.metric)})",
            columns,
            tables.cells(result),
            frozenset(range(first, len(columns) - 1)),
            mark_first=True,
        ),
        html.image(
            f"{result.metric.name} by setting",
            comparison_png(result),
            "mean and single runs by group",
        ),
    ]
    curves = curves_png(result)
    if curves is not None:
        sections.append(html.image("Training loss", curves, "training loss of every run"))
    sections.append(_all_runs(result))
    remarks = all_notes(result, notes)
    if remarks:
        sections.append(html.notes("Notes", remarks))
    written = time.strftime("%Y-%m-%d %H:%M %Z")
    told = (
        "± is the standard deviation of single runs (n − 1). p: of a difference as large between"
        " settings that are alike, over seeds and samples, with Holm's correction for all pairs."
    )
    return html.page(title, sections, f"{told} Written {written}.")


def _cards(result: Statistics) -> list[tuple[str, str]]:
    metric, best, group = result.metric, result.best_run, result.groups[0]
    facts = [(value_text(metric.unit, best.value), f"best run: {best.name}")]
    if group.n > 1:
        spread = spread_text(metric.unit, group.mean, group.std)
        facts.append((spread, f"best mean: {label(result, group.key)}"))
    if result.gain is not None:
        base = value_text(metric.unit, result.baseline)
        gain = gain_text(metric.unit, result.gain)
        facts.append((gain, f"gain of the best run over the unadapted base ({base})"))
    runs = f"runs in {len(result.groups)} settings of {', '.join(short_keys(result.by))}"
    return [*facts, (str(len(result.runs)), runs if result.by else "runs")]


def _all_runs(result: Statistics) -> str:
    unit, at_top = table_unit(result.metric)
    rows = [[run.name, *run.key, value_text(unit, run.value)] for run in result.runs]
    header = ["run", *short_keys(result.by), f"{result.metric.name}{at_top}"]
    numbers = frozenset({len(header) - 1})
    return html.table("Every run, best first", header, rows, numbers, mark_first=True)
