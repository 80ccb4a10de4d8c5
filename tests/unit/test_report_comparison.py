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
from mmtrain.report.comparison import compare, headline, short_keys
from mmtrain.report.direction import agreed_metric
from mmtrain.report.tables import csv_text, markdown, rich_table
from mmtrain.report.write import write_comparison
from mmtrain.tasks.interface import Metric

ACCURACY = Metric("val/accuracy", larger_is_better=True, unit="%")
LOSS = Metric("val/loss", larger_is_better=False)
RATE = Metric("val/hallucination_rate", larger_is_better=False, unit="%")
SENTIMENT = Metric("val/sentiment_accuracy", larger_is_better=True, unit="%")
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
    result = compare(ROWS, BY, ACCURACY, baseline=0.1)
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
    result = compare(rows, ["lr"], LOSS, baseline=1.0)
    assert result.best_run.name == "b" and result.gain == pytest.approx(0.7)
    assert headline(result)[0] == "best run: b with val/loss 0.3"


def test_headline_says_best_run_setting_and_gain() -> None:
    lines = headline(compare(ROWS, BY, ACCURACY, baseline=0.1))
    assert lines == [
        "best run: c with val/accuracy 95.0 %",
        "best setting: r 8 · lr 0.001, 95.0 % ± — over 1 run",
        "gain over the unadapted base (10.0 %): +85.0 points",
        "not told from the best: r 4 · lr 0.001; 4 more seeds of each would settle one, if they"
        " differ as it looks",
        "chosen among 2: expect 93.2 % of it on another try",
    ]


def test_single_runs_tell_no_best_and_keys_are_weighed() -> None:
    rows = [_row(r, lr, 0.5 + 0.1 * (r == 8) + 0.3 * (lr == 1)) for r in (4, 8) for lr in (1, 2)]
    assert headline(compare(rows, BY, ACCURACY))[2:] == [
        "whether it is the best is not known: repeat each setting with other seeds",
        "of the variance between runs, keys explain: lr 90 %, r 10 %",
    ]


def test_scores_of_the_same_samples_tell_settings_apart() -> None:
    hard = [float(number % 3 > 0) for number in range(90)]
    easy = [1.0 if number % 9 else score for number, score in enumerate(hard)]

    def row(rank: int, scores: list[float]) -> dict:
        named = {str(number): score for number, score in enumerate(scores)}
        return _row(rank, 1, sum(scores) / len(scores), scores=named)

    best, other = compare([row(4, hard), row(8, easy)], BY, ACCURACY).groups
    assert best.key[0] == "8" and best.behind.chance is None
    assert other.behind.chance is not None and other.behind.chance < 1e-4
    assert 0 < other.behind.low < other.behind.gap < other.behind.high
    # Without the samples, nothing is known of one run each.
    assert (
        compare([row(4, hard) | {"scores": {}}, row(8, easy)], BY, ACCURACY).groups[1].behind.chance
        is None
    )


@pytest.mark.parametrize(
    ("by", "metric", "hint"),
    [
        (["optim.lt"], "val/accuracy", "did you mean 'optim.lr'"),
        (BY, "val/acuracy", "did you mean 'val/accuracy'"),
    ],
)
def test_unknown_names_are_corrected(by: list[str], metric: str, hint: str) -> None:
    with pytest.raises(MmtrainError, match=hint):
        compare(ROWS, by, Metric(metric, larger_is_better=True))


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(MmtrainError, match="none of 2 runs has a number"):
        compare(ROWS[3:], BY, ACCURACY)


def test_short_keys_stay_distinct() -> None:
    assert short_keys(["components.llm.r", "optim.lr"]) == ["r", "lr"]
    assert short_keys(["components.llm.r", "components.vision.r"]) == ["llm.r", "vision.r"]


HOSTILE = ['<img src=x onerror="alert(1)">', "=1+cmd|' /C calc'!A0", "[red]a|b[/red]\nc", "$x^"]


def _hostile_rows() -> list[dict]:
    return [_row(text, 1, 0.5 + i / 10, text) for i, text in enumerate(HOSTILE)]


def test_hostile_names_are_text_in_every_table() -> None:
    result = compare(_hostile_rows(), BY, ACCURACY)
    out = StringIO()
    Console(file=out, width=200).print(rich_table(result))
    assert "[red]a|b[/red]" in out.getvalue()
    lines = markdown(result).splitlines()
    assert len(lines) == 2 + len(HOSTILE) and "<img" not in markdown(result)
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {8}
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
        rows, BY, ACCURACY, tmp_path, baseline=0.1, title=HOSTILE[0], notes=[HOSTILE[0]]
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
        found = write_comparison(rows, BY, ACCURACY, tmp_path, baseline=baseline)
        assert found.paths["png"].stat().st_size > 5000


@pytest.mark.parametrize(
    ("metric", "best", "better", "gain"),
    [(RATE, "low", "lower is better", "+40.0"), (SENTIMENT, "high", "higher is better", "+40.0")],
)
def test_the_page_marks_the_best_as_the_metric_declares_it(
    tmp_path: Path, metric: Metric, best: str, better: str, gain: str
) -> None:
    values = {"low": 0.1, "middle": 0.5, "high": 0.9}
    rows = [{"name": name, "by": name, metric.name: value} for name, value in values.items()]
    found = write_comparison(rows, ["by"], metric, tmp_path, baseline=0.5)
    page = found.paths["html"].read_text()
    marked = re.findall('<tr class="first">(.*?)</tr>', page)
    assert len(marked) == 2 and all(f"<td>{best}</td>" in row for row in marked)
    assert better in page and f"<b>{gain} points</b>" in page
    out = StringIO()
    Console(file=out, width=200).print(found.table())
    assert better in out.getvalue()
    assert markdown(found.statistics).splitlines()[2].startswith(f"| {best} |")


def test_units_are_shown_and_only_shares_become_percent() -> None:
    rows = [{"lr": 1, "name": name, "memory": value} for name, value in (("a", 7.25), ("b", 0.5))]
    memory = Metric("memory", larger_is_better=False, unit="GiB")
    assert headline(compare(rows, ["lr"], memory, baseline=1.0)) == [
        "best run: b with memory 0.5 GiB",
        "best setting: lr 1, 3.875 ± 4.8 GiB over 2 runs",
        "gain over the unadapted base (1 GiB): +0.5 GiB",
    ]
    table = markdown(compare(rows, ["lr"], memory)).splitlines()
    assert table[0] == "| lr | n | mean ± std in GiB | behind the best | best | best run |"
    assert table[2] == "| 1 | 2 | 3.875 ± 4.8 | — | 0.5 | b |", "a unit stands once in a table"
    plain = Metric("memory", larger_is_better=True)
    assert headline(compare(rows, [], plain)) == ["best run: a with memory 7.25"]


def test_stored_runs_say_which_way_they_are_better() -> None:
    assert agreed_metric(RATE.name, [("a", RATE), ("b", RATE)]) == (RATE, [])
    metric, notes = agreed_metric(RATE.name, [("old", None), ("new", RATE)])
    assert metric == RATE
    assert notes == [f"1 stored without a direction of {RATE.name}, read like the others: old"]


def test_runs_that_do_not_say_it_or_disagree_are_not_guessed_about() -> None:
    name = RATE.name
    with pytest.raises(MmtrainError, match="no run says whether more or less .*--mode max"):
        agreed_metric(name, [("old", None)])
    assert agreed_metric(name, [("old", None)], "min") == (Metric(name, False), [])
    other = Metric(name, larger_is_better=True, unit="points")
    both = [("a", RATE), ("b", other), ("c", RATE)]
    with pytest.raises(MmtrainError) as caught:
        agreed_metric(name, both)
    assert "(a: less is better in %, b: more is better in points)" in str(caught.value)
    metric, notes = agreed_metric(name, both, "min")
    assert metric == Metric(name, False) and notes == [
        f"--mode min, against what runs declare of {name}"
    ]
    assert agreed_metric(name, [("a", RATE)], "min") == (RATE, [])
