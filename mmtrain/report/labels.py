"""What people say of answers: a sheet to fill in, blind to whose answer it is, and what came back.

A sheet is CSV that any spreadsheet opens. Each row is one run's answer to one sample; the answers
to a sample stand together, the runs in an order of their own each time. `key` says whose it is to
this program alone.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from mmtrain.data.order import sample_key
from mmtrain.data.shards import ShardFolder
from mmtrain.data.source import open_images
from mmtrain.errors import DataError, MmtrainError
from mmtrain.evaluation.evaluate import Prediction
from mmtrain.evaluation.judged import HALLUCINATION_RATE, Column, Judged
from mmtrain.files import read_regular
from mmtrain.report.answers import Answers, Compared
from mmtrain.report.html import page
from mmtrain.report.samples import card, sheet
from mmtrain.report.tables import harmless

_COLUMNS = ("number", "key", "asked", "wanted", "answer", "hallucination")
_LABELS = {"yes": 1.0, "y": 1.0, "1": 1.0, "no": 0.0, "n": 0.0, "0": 0.0}
_KEY_CHARACTERS = 16
_MOST_BYTES = 2**28


@dataclass(frozen=True)
class Row:
    """One answer to be labelled."""

    key: str
    prediction: Prediction


def rows_of(compared: Compared, num: int | None) -> list[Row]:
    """The answers of all runs to the same samples, drawn by a hash of their ids."""
    names = [run.name for run in compared.runs]
    if len(set(names)) < len(names):
        raise MmtrainError("two runs have one name.", "Label them one by one.")
    ids = sorted(compared.ids, key=lambda one: (sample_key(one), one))[:num]
    return [
        row
        for one in ids
        for row in sorted(
            (Row(_key(run, one), run.by_id[one]) for run in compared.runs),
            key=lambda row: row.key,
        )
    ]


def _key(run: Answers, sample_id: str) -> str:
    """Of other predictions the key is another: a label never comes to stand at a new answer."""
    said = run.by_id[sample_id].prediction
    text = f"{run.name}\0{sample_id}\0{said}".encode("utf-8", "surrogatepass")
    return sha256(text).hexdigest()[:_KEY_CHARACTERS]


def sheet_csv(rows: Sequence[Row]) -> bytes:
    """The sheet; with a mark at its start that makes spreadsheets read it as UTF-8."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(_COLUMNS)
    for number, row in enumerate(rows, start=1):
        one = row.prediction
        cells = map(harmless, (one.prompt, one.target, one.prediction))
        writer.writerow([number, f"k{row.key}", *cells, ""])
    return text.getvalue().encode("utf-8-sig", "replace")


def sheet_page(rows: Sequence[Row], shards: ShardFolder) -> str:
    """The same rows with their pictures, by number."""
    return page("Answers to be labelled", [sheet(list(_cards(rows, shards)))], "one card per row")


def _cards(rows: Sequence[Row], shards: ShardFolder) -> Iterator[str]:
    for number, row in enumerate(rows, start=1):
        one = row.prediction
        texts = [("asked", one.prompt, ""), ("wanted", one.target, "target")]
        texts.append(("answer", one.prediction or "(nothing)", ""))
        yield card(str(number), open_images(shards.find(one.id)), texts)


def read_labels(path: Path) -> dict[str, float]:
    """By key: 1 where somebody saw a hallucination, 0 where not; rows without a label are left."""
    try:
        found = _filled_in(read_regular(path, _MOST_BYTES).decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise DataError(
            f"'{path}' is not readable ({fault});", "save it as CSV in UTF-8."
        ) from fault
    except KeyError as fault:
        raise DataError(f"'{path}': no column {fault};", "keep the sheet's columns.") from fault
    labels: dict[str, float] = {}
    for number, (key, label) in enumerate(found, start=1):
        if label and label.lower() not in _LABELS:
            raise DataError(f"'{path}', row {number}: '{label}';", "write yes or no.")
        if label:
            labels[key] = _LABELS[label.lower()]
    return labels


def _filled_in(text: str) -> list[tuple[str, str]]:
    """Key and label of every row."""
    first = text.partition("\n")[0]
    # Some languages' spreadsheets save with semicolons.
    delimiter = ";" if first.count(";") > first.count(",") else ","
    rows = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    return [
        ((row["key"] or "").strip().removeprefix("k"), (row["hallucination"] or "").strip())
        for row in rows
    ]


def labelled(compared: Compared, labels: dict[str, float]) -> list[Judged]:
    """The rate of each run; every label must belong to an answer that is there."""
    judged = []
    used: set[str] = set()
    for run in compared.runs:
        keys = {one: _key(run, one) for one in compared.ids}
        mine = {one: labels[key] for one, key in keys.items() if key in labels}
        if not mine:
            raise MmtrainError(f"{run.name}: no answer of it is labelled.", "Fill in the sheet.")
        used |= {keys[one] for one in mine}
        column = Column(HALLUCINATION_RATE, tuple(mine.values()))
        judged.append(Judged((column,), {one: 1 - label for one, label in mine.items()}))
    if left := labels.keys() - used:
        raise MmtrainError(
            f"{len(left)} labels are of other answers than these runs gave.",
            "Give the runs that the sheet was made of; what was evaluated anew is labelled anew.",
        )
    return judged
