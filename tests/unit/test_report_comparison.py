"""The statistics and files of a comparison."""

import csv
import math
import re
import statistics
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from mmtrain.errors import MmtrainError
from mmtrain.report.comparison import compare, headline, mode_of, short_keys
from mmtrain.report.tables import csv_text, markdown, rich_table
from mmtrain.report.write import write_comparison

BY = ["components.llm.r", "optim.lr"]


def _row(rank: object, lr: object, value: object, name: str = "x", **more: object) -> dict:
    return {"name": name, BY[0]: rank, BY[1]: lr, "val/accuracy": value, **more}


ROWS = [
    _row(4, 1e-3, 0.80, "a"),
    _row("4", "0.001", 0.90, "b"),
    _row(8, 1e-3, 0.95, "c"),
    _row(8, 2e-3, None, "failed"),
    _row(8, 2e-3, math.nan, "broken"),
]


def test_groups_have_sample_statistics_and_are_ordered_by_mean() -> None:
    result = compare(ROWS, BY, "val/accuracy", baseline=0.1)
    assert [group.key for group in result.groups] == [("8", "0.001"), ("4", "0.001")]
    single, pair = result.groups
    assert (single.n, single.mean, single.std) == (1, 0.95, None)
    assert pair.n == 2 and pair.mean == pytest.approx(0.85)
    assert pair.std == pytest.approx(statistics.stdev([0.8, 0.9]))
    assert (pair.best, pair.best_run) == (0.9, "b")
    assert result.without_metric == ("failed", "broken")
    assert result.best_run.name == "c" and result.gain == pytest.approx(0.85)


def test_less_is_better_for_losses() -> None:
    rows = [{"lr": 1, "val/loss": 0.5, "name": "a"}, {"lr": 2, "val/loss": 0.3, "name": "b"}]
    result = compare(rows, ["lr"], "val/loss", baseline=1.0)
    assert mode_of("val/loss") == "min" and mode_of("val/accuracy") == "max"
    assert result.best_run.name == "b" and result.gain == pytest.approx(0.7)
    assert compare(rows, ["lr"], "val/loss", mode="max").best_run.name == "a"


def test_headline_says_best_run_setting_and_gain() -> None:
    lines = headline(compare(ROWS, BY, "val/accuracy", baseline=0.1))
    assert lines == [
        "best run: c with val/accuracy 95.0 %",
        "best setting: r 8 · lr 0.001, 95.0 % ± — over 1 run",
        "gain over the unadapted base (10.0 %): +85.0 points",
    ]


@pytest.mark.parametrize(
    ("by", "metric", "hint"),
    [
        (["optim.lt"], "val/accuracy", "did you mean 'optim.lr'"),
        (BY, "val/acuracy", "did you mean 'val/accuracy'"),
    ],
)
def test_unknown_names_are_corrected(by: list[str], metric: str, hint: str) -> None:
    with pytest.raises(MmtrainError, match=hint):
        compare(ROWS, by, metric)


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(MmtrainError, match="none of 2 runs has a number"):
        compare(ROWS[3:], BY, "val/accuracy")


def test_short_keys_stay_distinct() -> None:
    assert short_keys(["components.llm.r", "optim.lr"]) == ["r", "lr"]
    assert short_keys(["components.llm.r", "components.vision.r"]) == ["llm.r", "vision.r"]


HOSTILE = ['<img src=x onerror="alert(1)">', "=1+cmd|' /C calc'!A0", "[red]a|b[/red]\nc", "$x^"]


def _hostile_rows() -> list[dict]:
    return [_row(text, 1, 0.5 + i / 10, text) for i, text in enumerate(HOSTILE)]


def test_hostile_names_are_text_in_every_table() -> None:
    result = compare(_hostile_rows(), BY, "val/accuracy")
    out = StringIO()
    Console(file=out, width=200).print(rich_table(result))
    assert "[red]a|b[/red]" in out.getvalue()
    lines = markdown(result).splitlines()
    assert len(lines) == 2 + len(HOSTILE) and "<img" not in markdown(result)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {7}
    rows = list(csv.reader(StringIO(csv_text(result))))
    assert len(rows) == 1 + len(HOSTILE)
    assert not any(cell.startswith("=") for row in rows for cell in row)


class _Page(HTMLParser):
    """Collects the tags, what they load, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_self_contained_and_escapes_names(tmp_path: Path) -> None:
    rows = [row | {"curve": [(1, 2.0), (2, 1.0)]} for row in _hostile_rows()]
    found = write_comparison(
        rows, BY, "val/accuracy", tmp_path, baseline=0.1, title=HOSTILE[0], notes=[HOSTILE[0]]
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        f"comparison.{kind}" for kind in ("csv", "md", "html", "png")
    }
    page = _Page()
    page.feed(found.paths["html"].read_text())
    assert page.tags.count("img") == 2  # groups and loss curves, none from a name
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert page.text.count(HOSTILE[0]) >= 4
    assert found.paths["png"].read_bytes().startswith(b"\x89PNG")
    assert found.lines()[0].startswith("best run: $x^")


def test_far_and_near_baselines_and_many_groups_can_be_drawn(tmp_path: Path) -> None:
    rows = [_row(rank, 1, 0.9 + rank / 10000, f"r{rank}") for rank in range(60)]
    for baseline in (0.0, 0.902, None):
        found = write_comparison(rows, BY, "val/accuracy", tmp_path, baseline=baseline)
        assert found.paths["png"].stat().st_size > 5000
