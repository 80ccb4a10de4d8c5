"""What the published sets of questions about pictures share: rows, ten answers, pictures.

A row that cannot be a sample is told with its reason, and with the name of a picture that is not
there; no row is lost in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmtrain.tasks.interface import Dropped, ImageBytes, Sample
from mmtrain.tasks.json_rows import read_list
from mmtrain.tasks.pictures import Unusable, encoded, locate
from mmtrain.tasks.published import PictureOptions
from mmtrain.tasks.raw_files import needed

Row = Mapping[str, Any]
_FIX = "Download the annotations again."


def built(
    rows: Iterable[tuple[str, Any]], make: Callable[[str, Row], Sample]
) -> Iterator[Sample | Dropped]:
    """The sample of every row, or why it is none."""
    for name, row in rows:
        try:
            if not isinstance(row, Mapping):
                raise Unusable("it is no object with fields", _FIX)
            yield make(name, row)
        except Unusable as fault:
            yield fault.dropped(name)


def named(rows: Iterable[tuple[str, Any]], key: str) -> Iterator[tuple[str, Any]]:
    """Rows by the name that a field gives them; without one, by their place."""
    for place, row in rows:
        name = row.get(key) if isinstance(row, Mapping) else None
        yield place if name in (None, "") else str(name), row


def text_of(row: Row, key: str) -> str:
    """A field that is a text with something in it."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise Unusable(f"its {key} is no text", _FIX)
    return value


def number_of(row: Row, key: str) -> int:
    """A field that is a whole number, zero or above."""
    value = row.get(key)
    if type(value) is not int or value < 0:
        raise Unusable(f"its {key} is no number", _FIX)
    return value


def texts_of(row: Row, key: str) -> tuple[str, ...]:
    """A field that is a list of texts, or of objects with a text `answer`; some may be empty."""
    value = row.get(key)
    listed = value if isinstance(value, list) else []
    given = [one.get("answer") if isinstance(one, Mapping) else one for one in listed]
    texts = tuple(one for one in given if isinstance(one, str))
    if len(texts) < len(given) or not any(one.strip() for one in texts):
        raise Unusable(f"its {key} are no texts", _FIX)
    return texts


def pictures(names: Iterable[str], folder: Path) -> tuple[ImageBytes, ...]:
    """Pictures by name, below their folder and nowhere else."""
    return tuple(encoded(locate(name, folder)) for name in names)


def most_frequent(answers: Sequence[str]) -> str:
    """The answer that most people gave; of equals, the one that is listed first."""
    counts = Counter(answer for answer in answers if answer.strip())
    return max(counts, key=lambda answer: counts[answer])


def first_listed(answers: Sequence[str]) -> str:
    """The first answer that is not empty."""
    return next(answer for answer in answers if answer.strip())


def answered(name: str, row: Row, picture: str, folder: Path, *meta_keys: str) -> Sample:
    """A row with the answers of several people: the most frequent one first, then the others.

    `meta` keeps which one was listed first, and the fields that are named.
    """
    question, listed = text_of(row, "question"), texts_of(row, "answers")
    best, others = most_frequent(listed), list(listed)
    others.remove(best)
    kept = {key: row[key] for key in meta_keys if key in row}
    return Sample(
        id=name,
        images=pictures([picture], folder),
        question=question,
        answers=(best, *others),
        meta={**kept, "first_answer": first_listed(listed)},
    )


def coco_questions(
    raw: Path | None, split: str, options: PictureOptions, prefix: str, *meta_keys: str
) -> Iterator[Sample | Dropped]:
    """The samples of a split in VQA's format: questions in one file, their answers in another.

    In the order of the answers; questions that nobody answered are told behind them.
    """
    remedy = "give --raw the folder with the questions and annotations as they were unpacked."
    asked = needed(raw, [f"{prefix}OpenEnded_mscoco_{split}2014_questions.json"], remedy)
    told = needed(raw, [f"{prefix}mscoco_{split}2014_annotations.json"], remedy)
    folder = options.image_folder or asked.parent

    def make(name: str, row: Row) -> Sample:
        if "question_id" not in row:
            raise Unusable("its question has no annotation", _FIX)
        picture = f"{split}2014/COCO_{split}2014_{number_of(row, 'image_id'):012d}.jpg"
        return answered(name, row, picture, folder, "image_id", *meta_keys)

    return built(_joined(asked, told), make)


def _joined(asked: Path, told: Path) -> Iterator[tuple[str, Any]]:
    """Annotations with the texts of their questions."""
    questions = {
        name: row.get("question") if isinstance(row, Mapping) else None
        for name, row in named(read_list(asked, "questions"), "question_id")
    }
    for name, row in named(read_list(told, "annotations"), "question_id"):
        if isinstance(row, Mapping):
            row = {**row, "question": questions.pop(name, None)}
        yield name, row
    for name in questions:
        yield name, {}
