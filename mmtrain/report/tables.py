"""A comparison as a table: for the terminal, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

from mmtrain.report.comparison import Group, Statistics, short_keys
from mmtrain.report.units import (
    NOTHING,
    direction_text,
    gain_text,
    spread_text,
    table_unit,
    value_text,
)

if TYPE_CHECKING:
    from rich.table import Table

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def header(result: Statistics) -> list[str]:
    """Column names, the keys by their shortest names."""
    _, at_top = table_unit(result.metric)
    mean = f"mean ± std{at_top}"
    return [*short_keys(result.by), "n", mean, "behind the best", "best", "best run"]


def cells(result: Statistics) -> list[list[str]]:
    """One line of text a group, best mean first."""
    unit, _ = table_unit(result.metric)
    return [
        [
            *group.key,
            str(group.n),
            spread_text(unit, group.mean, group.std),
            _behind_text(unit, group) if number else NOTHING,
            value_text(unit, group.best),
            group.best_run,
        ]
        for number, group in enumerate(result.groups)
    ]


def _behind_text(unit: str, group: Group) -> str:
    """`2.1 points, p 0.03`; without p where nothing is known of how values vary."""
    gap = gain_text(unit, group.behind.gap).removeprefix("+")
    return gap if group.behind.chance is None else f"{gap}, p {group.behind.chance:.2g}"


def rich_table(result: Statistics) -> Table:
    """The table for a terminal. Names are shown as they are: no markup in them is obeyed."""
    from rich.table import Table
    from rich.text import Text

    title = f"{result.metric.name} ({direction_text(result.metric)})"
    table = Table(title=Text(title), title_justify="left")
    for index, name in enumerate(header(result)):
        text_column = name == "best run"
        table.add_column(
            Text(name),
            justify="left" if text_column or index < len(result.by) else "right",
            overflow="fold",
        )
    for row, line in enumerate(cells(result)):
        table.add_row(*(Text(cell) for cell in line), style="bold" if row == 0 else "")
    return table


def markdown(result: Statistics) -> str:
    """The table in GitHub's Markdown."""
    numbers = len(header(result)) - len(result.by) - 1
    rule = ["---"] * len(result.by) + ["---:"] * numbers + ["---"]
    lines = [header(result), rule, *cells(result)]
    return "".join(f"| {' | '.join(map(markdown_text, line))} |\n" for line in lines)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, in a cell or a line."""
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", " ")):
        text = text.replace(character, entity)
    return text


def csv_text(result: Statistics) -> str:
    """Unrounded numbers under full key names; `values` are the single runs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            *map(csv_cell, result.by),
            *("metric", "n", "mean", "std", "behind", "behind_low", "behind_high", "p_holm"),
            *("best", "best_run", "values"),
        ]
    )
    for group in result.groups:
        writer.writerow(
            [
                *map(csv_cell, group.key),
                csv_cell(result.metric.name),
                group.n,
                group.mean,
                "" if group.std is None else group.std,
                group.behind.gap,
                group.behind.low,
                group.behind.high,
                "" if group.behind.chance is None else group.behind.chance,
                group.best,
                csv_cell(group.best_run),
                " ".join(map(repr, group.values)),
            ]
        )
    return out.getvalue()


def csv_cell(text: str) -> str:
    """A name that a spreadsheet would run as a formula is quoted as text; numbers are not."""
    try:
        float(text)
    except ValueError:
        return harmless(text)
    return text


def harmless(text: str) -> str:
    """A spreadsheet runs what begins like a formula; behind a quote it is text."""
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text
