"""What several runs answered to the same questions: how sure their scores are, and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from mmtrain.data.shards import ShardFolder
from mmtrain.data.source import open_images
from mmtrain.errors import MmtrainError
from mmtrain.evaluation.evaluate import Prediction
from mmtrain.evaluation.uncertainty import Interval, Paired, interval, paired
from mmtrain.files import read_regular
from mmtrain.report.html import cards, page, table
from mmtrain.report.samples import card, sheet

PREDICTIONS = "predictions.jsonl"
_LINE = TypeAdapter(Prediction)
_MOST_BYTES = 2**31


@dataclass(frozen=True)
class Answers:
    """One run's predictions, by the id of their sample."""

    name: str
    folder: Path
    by_id: Mapping[str, Prediction]


@dataclass(frozen=True)
class Compared:
    """Runs on the samples that all of them answered."""

    runs: tuple[Answers, ...]
    ids: tuple[str, ...]

    def scores(self, run: Answers) -> list[float]:
        """A run's scores, in the order of `ids`."""
        return [run.by_id[one].score for one in self.ids]

    def intervals(self) -> list[tuple[float, Interval]]:
        """Mean score and where it lies, of each run."""
        found = [self.scores(run) for run in self.runs]
        return [(sum(scores) / len(scores), interval(scores)) for scores in found]

    def gains(self) -> list[Paired]:
        """Of each run but the first, over the first."""
        first = self.scores(self.runs[0])
        return [paired(first, self.scores(run)) for run in self.runs[1:]]


def read_answers(place: Path, split: str) -> Answers:
    """Of a run folder's split, or of a folder that holds predictions itself."""
    folder = place if (place / PREDICTIONS).is_file() else place / "evaluation" / split
    path = folder / PREDICTIONS
    try:
        lines = read_regular(path, _MOST_BYTES).decode("utf-8").splitlines()
        found = [_LINE.validate_python(json.loads(line)) for line in lines]
    except OSError as fault:
        there = sorted(one.name for one in (place / "evaluation").glob("*") if one.is_dir())
        raise MmtrainError(
            f"{path}: no predictions there ({fault.strerror}).",
            f"Give --split: {', '.join(there)}." if there else "Run `mmtrain evaluate` first.",
        ) from fault
    except (ValueError, ValidationError) as fault:
        raise MmtrainError(
            f"{path}: damaged ({fault}).", "Run `mmtrain evaluate` again."
        ) from fault
    return Answers(_name(place, folder, split), folder, {one.id: one for one in found})


def _name(place: Path, folder: Path, split: str) -> str:
    if folder != place:
        return place.resolve().name
    run, label = folder.resolve().parents[1].name, folder.resolve().name
    return run if label == split else f"{run} {label}"


def compare(runs: Sequence[Answers]) -> Compared:
    """On the samples that all have; which must be some."""
    first, *others = runs
    ids = tuple(one for one in first.by_id if all(one in other.by_id for other in others))
    if not ids:
        raise MmtrainError(
            f"{' and '.join(run.name for run in runs)} answered no sample in common.",
            "Evaluate them on the same folder.",
        )
    return Compared(tuple(runs), ids)


def answers_page(compared: Compared, shards: ShardFolder | None, num: int) -> str:
    """Scores and differences, then samples, those that the runs score most differently first."""
    runs, ids = compared.runs, compared.ids
    facts = [(f"{len(ids):,}", "samples that all answered")]
    facts += [
        (f"{mean:.4f}", f"{run.name} ({found.low:.4f} to {found.high:.4f})")
        for run, (mean, found) in zip(runs, compared.intervals(), strict=True)
    ]
    sections = [cards(facts)]
    if len(runs) > 1:
        rows = [gain_row(run, gain) for run, gain in zip(runs[1:], compared.gains(), strict=True)]
        sections.append(table(f"Beside {runs[0].name}", GAIN_HEADER, rows, frozenset({1, 2, 3})))
    order = sorted(range(len(ids)), key=lambda number: (-_spread(compared, number), number))[:num]
    sections.append(sheet([_card(compared, shards, number) for number in order]))
    footer = f"{len(order)} of {len(ids)} samples, those with the widest spread of scores first"
    return page(f"Answers of {', '.join(run.name for run in runs)}", sections, footer)


GAIN_HEADER = ("run", "difference", "95 % interval", "by chance")


def gain_row(run: Answers, gain: Paired) -> tuple[str, str, str, str]:
    """One line of the table of differences."""
    low, high = gain.interval.low, gain.interval.high
    return run.name, f"{gain.difference:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{gain.chance:.4f}"


def _spread(compared: Compared, number: int) -> float:
    scores = [run.by_id[compared.ids[number]].score for run in compared.runs]
    return max(scores) - min(scores)


def _card(compared: Compared, shards: ShardFolder | None, number: int) -> str:
    name = compared.ids[number]
    first = compared.runs[0].by_id[name]
    texts = [("asked", first.prompt, ""), ("wanted", first.target, "target")]
    for run in compared.runs:
        said = run.by_id[name]
        kind = "right" if said.score >= 1 else "wrong" if said.score <= 0 else ""
        texts.append((f"{run.name}: {said.score:g}", said.prediction or "(nothing)", kind))
    images = [] if shards is None else open_images(shards.find(name))
    return card(name, images, texts)
