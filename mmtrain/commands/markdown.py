"""Tables of the generated pages."""

from __future__ import annotations

from collections.abc import Sequence


def table(titles: Sequence[str]) -> str:
    """The head of a table; its rows follow."""
    return row(titles) + row(["---"] * len(titles))


def row(cells: Sequence[str]) -> str:
    """One row."""
    return f"| {' | '.join(cells)} |\n"
