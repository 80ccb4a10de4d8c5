"""OCR-VQA: questions about the covers of books, answered by reading them.

Raw files as published: `dataset.json`, and the covers in `images/` under the names that its own
loader gives them: a book's key with the ending of its address.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel

from mmtrain.tasks.interface import Dropped, Metric, Sample, Template
from mmtrain.tasks.json_rows import read_items
from mmtrain.tasks.metrics import ACCURACY, lower_case_matches, mean, target_matches
from mmtrain.tasks.pictures import Unusable
from mmtrain.tasks.published import PictureOptions
from mmtrain.tasks.raw_files import needed
from mmtrain.tasks.templates import plain
from mmtrain.tasks.vqa_files import Row, built, pictures, text_of
from mmtrain.tasks.vqa_templates import zhou2024

_SPLITS = {"train": 1, "val": 2, "test": 3}
_META_KEYS = ("title", "authorName", "genre")


def _questions(file: Path, split: str) -> Iterator[tuple[str, Any]]:
    """Every question of every book of a split, with what is known of the book."""
    for key, book in read_items(file):
        if not isinstance(book, Mapping):
            yield key, book
        elif book.get("split") == _SPLITS[split]:
            yield from _of_book(key, book)
        elif split == "train" and book.get("split") not in _SPLITS.values():
            yield key, {"split": book.get("split")}


def _of_book(key: str, book: Row) -> Iterator[tuple[str, Any]]:
    questions, answers = book.get("questions"), book.get("answers")
    if isinstance(questions, list) and isinstance(answers, list) and len(questions) == len(answers):
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True), start=1):
            yield f"{key}-{number}", {**book, "key": key, "question": question, "answer": answer}
    else:
        yield key, {"split": book.get("split"), "key": key}


def _sample(name: str, row: Row, folder: Path) -> Sample:
    if "key" not in row:
        raise Unusable("its split is none of 1, 2 and 3", "Download dataset.json again.")
    if "question" not in row:
        raise Unusable("its questions and answers are no pairs", "Download dataset.json again.")
    question, answer = text_of(row, "question"), text_of(row, "answer")
    ending = PurePosixPath(text_of(row, "imageURL")).suffix
    return Sample(
        id=name,
        images=pictures([f"images/{row['key']}{ending}"], folder),
        question=question,
        answers=(answer,),
        meta={key: row[key] for key in _META_KEYS if row.get(key)},
    )


class OCRVQA:
    """The OCR-VQA task."""

    description = "about a million questions on 207,572 book covers: 166,022, 20,731 and 20,796"
    splits: tuple[str, ...] = tuple(_SPLITS)
    build_options: type[BaseModel] = PictureOptions
    needs_raw = True
    templates: Mapping[str, Template] = {
        "zhou2024": Template(zhou2024),
        "plain": Template(plain),
    }
    metrics: tuple[Metric, ...] = (ACCURACY,)
    primary_metric = ACCURACY

    def read(
        self, raw: Path | None, split: str, options: PictureOptions
    ) -> Iterator[Sample | Dropped]:
        """The questions of a split, book by book in the order of the file."""
        remedy = "give --raw the folder with dataset.json and images/."
        file = needed(raw, ["dataset.json"], remedy)
        folder = options.image_folder or file.parent
        return built(_questions(file, split), lambda name, row: _sample(name, row, folder))

    def score(
        self, samples: Sequence[Sample], predictions: Sequence[str], template: Template
    ) -> tuple[dict[str, float], list[float]]:
        """Accuracy; case and outer white space do not count."""
        if template.name in self.templates:
            scores = lower_case_matches(predictions, [template(each).target for each in samples])
        else:
            scores = target_matches(samples, predictions, template)
        return {ACCURACY.name: mean(scores)}, scores


TASK = OCRVQA()
