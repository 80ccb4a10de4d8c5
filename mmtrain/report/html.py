"""One page that needs nothing but itself: no script, no font, no address is loaded."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
  color: #24231f; background: #f7f6f3; margin: 0; padding: 2rem 1rem 4rem; }
main { max-width: 60rem; margin: 0 auto; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .75rem; }
section { background: #fff; border: 1px solid #e6e4df; border-radius: 8px;
  padding: 1.25rem 1.5rem; margin: 1rem 0; }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }
.card { flex: 1 1 10rem; background: #fff; border: 1px solid #e6e4df; border-radius: 8px;
  padding: .9rem 1.1rem; }
.card b { display: block; font-size: 1.55rem; font-weight: 650; color: #0b6e99; }
.card span { color: #6b6963; font-size: .85rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .9rem .4rem 0; border-bottom: 1px solid #eceae5;
  vertical-align: top; }
th { color: #6b6963; font-weight: 500; font-size: .85rem; white-space: nowrap; }
td { overflow-wrap: anywhere; min-width: 4rem; }
td.number, th.number { text-align: right; white-space: nowrap; padding-right: 1.8rem; }
tr.first td { font-weight: 600; }
tr:last-child td { border-bottom: 0; }
img { max-width: 100%; height: auto; display: block; }
ul { margin: 0; padding-left: 1.2rem; }
footer { color: #8a8880; font-size: .8rem; margin-top: 1.5rem; }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, sections: Sequence[str], footer: str = "") -> str:
    """A whole page from finished sections; title and footer are escaped here."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body><main>\n"
        f"<h1>{escape(title)}</h1>\n"
        + "\n".join(sections)
        + (f"\n<footer>{escape(footer)}</footer>" if footer else "")
        + "\n</main></body>\n</html>\n"
    )


def cards(facts: Sequence[tuple[str, str]]) -> str:
    """The headline: (value, what it is) pairs in large type."""
    inner = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for value, name in facts
    )
    return f'<div class="cards">{inner}</div>'


def table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: frozenset[int] = frozenset(),
    mark_first: bool = False,
) -> str:
    """A titled table; `numbers` are the columns set to the right."""

    def line(tag: str, texts: Sequence[str]) -> str:
        kinds = (' class="number"' if column in numbers else "" for column in range(len(texts)))
        return "".join(f"<{tag}{kind}>{escape(text)}</{tag}>" for kind, text in zip(kinds, texts))

    marks = (' class="first"' if mark_first and row == 0 else "" for row in range(len(rows)))
    body = "".join(f"<tr{mark}>{line('td', row)}</tr>" for mark, row in zip(marks, rows))
    head = f"<thead><tr>{line('th', header)}</tr></thead>" if header else ""
    return section(title, f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>')


def facts(title: str, pairs: Mapping[str, str]) -> str:
    """A table of names and values."""
    return table(title, [], [[name, value] for name, value in pairs.items()])


def image(title: str, png: bytes, description: str) -> str:
    """An image inside the page."""
    data = base64.b64encode(png).decode("ascii")
    return section(title, f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">')


def notes(title: str, lines: Sequence[str]) -> str:
    """A list of sentences."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return section(title, f"<ul>{items}</ul>")


def section(title: str, html: str) -> str:
    """A titled box around finished HTML."""
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    return f"<section>{heading}{html}</section>"
