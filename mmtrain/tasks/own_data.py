"""A user's own pictures and texts: rows of columns, a split by picture, one score for all.

Shared by the tasks that read them from different files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from mmtrain.errors import DataError, nearest
from mmtrain.tasks.interface import Dropped, ImageBytes, Sample, Template, Turn
from mmtrain.tasks.metrics import ACCURACY, mean, target_matches
from mmtrain.tasks.pictures import DIGEST_BYTES, Picture, Unusable, encoded, locate, picture_digest
from mmtrain.tasks.templates import LETTERS, letters, plain

SPLITS = ("train", "val")
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TEMPLATES: Mapping[str, Template] = {"plain": Template(plain), "letters": Template(letters)}
METRICS = (ACCURACY,)


class OwnOptions(BaseModel):
    """Build options that all own data share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Not part of the manifest: shards are the same wherever the pictures lay.
    image_folder: Path | None = Field(
        None, exclude=True, description="folder that picture names start from; default: the file's"
    )
    val: float = Field(
        0.05, ge=0, lt=1, description="share of the pictures that validate, as 5% or 0.05"
    )
    split_seed: int = Field(0, description="keys which pictures these are")
    max_side: int | None = Field(
        None,
        ge=1,
        description="pixels; larger pictures are made smaller (default: kept as they are)",
    )

    @field_validator("val", mode="before")
    @classmethod
    def _percent(cls, value: object) -> object:
        if isinstance(value, str) and value.endswith("%"):
            return float(value.removesuffix("%")) / 100
        return value


class Columns(OwnOptions):
    """What the columns of a table are called."""

    image: str = Field("image", description="column with a picture's name, or a list of names")
    question: str = Field("question", description="column with the question")
    answer: str = Field("answer", description="column with the answer, or a list of right ones")
    choices: str = Field("choices", description="column with a list of choices; may be missing")
    id: str = Field("id", description="column with a name for each row; may be missing")


@dataclass(frozen=True)
class Row:
    """One raw row, its pictures still on the disk."""

    id: str
    pictures: tuple[Picture, ...] = ()
    question: str = ""
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()
    meta: Mapping[str, object] = field(default_factory=dict)


Rows = Callable[[], Iterator[Row | Dropped]]


def samples(rows: Rows, split: str, options: OwnOptions) -> Iterator[Sample | Dropped]:
    """The rows of a split. No picture is in both, also not under two names, or in two rows."""
    if split not in SPLITS:
        return
    shares = _validating(rows(), options)
    names = Names()
    for row, validates in zip(rows(), shares, strict=True):
        if validates != (split == "val"):
            continue
        if isinstance(row, Dropped):
            yield row
            continue
        name = names.free(row.id)
        try:
            images = tuple(encoded(picture, options.max_side) for picture in row.pictures)
        except Unusable as fault:
            yield fault.dropped(name)
            continue
        yield _sample(row, name, images)


class Names:
    """Names that were given; as hashes, because there may be millions."""

    def __init__(self) -> None:
        self._taken: set[int] = set()
        self._repeated: dict[str, int] = {}

    def free(self, name: str) -> str:
        """The name, or with the first number behind it that nobody has."""
        found = name
        while (key := int.from_bytes(_short(found)[:8], "big")) in self._taken:
            self._repeated[name] = self._repeated.get(name, 1) + 1
            found = f"{name}-{self._repeated[name]}"
        self._taken.add(key)
        return found


def _sample(row: Row, name: str, images: tuple[ImageBytes, ...]) -> Sample:
    return Sample(name, images, row.turns, row.question, row.answers, row.choices, row.meta)


def score(
    given: Sequence[Sample], predictions: Sequence[str], template: Template
) -> tuple[dict[str, float], list[float]]:
    """Accuracy: what the template wanted, or another of the sample's right answers."""
    scores = target_matches(given, predictions, template)
    return {ACCURACY.name: mean(scores)}, scores


# --- splits -------------------------------------------------------------------------------------


def _validating(rows: Iterable[Row | Dropped], options: OwnOptions) -> bytearray:
    """Of every row, whether it validates: a keyed draw of pictures, and of all rows they tie."""
    groups = _Groups()
    of_row: list[int | None] = []
    for row in rows:
        if isinstance(row, Dropped):
            of_row.append(None)
            continue
        keys = [_digest_or_name(picture) for picture in row.pictures] or [_text_key(row)]
        of_row.append(groups.tie(keys))
    draws = {number: _draw(options.split_seed, key) for number, key in groups.first_keys().items()}
    found = [None if one is None else groups.root(one) for one in of_row]
    chosen = {number for number, drawn in draws.items() if drawn < options.val}
    if options.val and not chosen and len(draws) > 1:
        chosen = {min(draws, key=lambda number: draws[number])}
    if chosen and len(chosen) == len(draws):
        chosen.remove(max(draws, key=lambda number: draws[number]))
    return bytearray(one in chosen for one in found)


def _digest_or_name(picture: Picture) -> bytes:
    try:
        return picture_digest(picture)
    except OSError:
        return _short(str(picture))


def _text_key(row: Row) -> bytes:
    """Rows without a picture: those that ask the same stay together."""
    return _short("\0".join((row.question, *(turn.text for turn in row.turns[:1]))))


def _short(text: str) -> bytes:
    return sha256(text.encode("utf-8", "surrogatepass")).digest()[:DIGEST_BYTES]


def _draw(seed: int, key: bytes) -> float:
    digest = sha256(b"%d/" % seed + key).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class _Groups:
    """Pictures that some row ties together, as numbers with a common root."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._parents: list[int] = []

    def tie(self, keys: Sequence[bytes]) -> int:
        """Put these into one group; the number of one of them."""
        first, *others = [self._number(key) for key in keys]
        for other in others:
            a, b = sorted((self.root(first), self.root(other)))
            self._parents[b] = a
        return first

    def _number(self, key: bytes) -> int:
        number = self._numbers.setdefault(key, len(self._parents))
        if number == len(self._parents):
            self._parents.append(number)
        return number

    def root(self, number: int) -> int:
        """The lowest number of a group."""
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number

    def first_keys(self) -> dict[int, bytes]:
        """Of every group, its root and its lowest key: the same in whatever order rows come."""
        lowest: dict[int, bytes] = {}
        for key, number in self._numbers.items():
            root = self.root(number)
            lowest[root] = min(key, lowest.get(root, key))
        return lowest


# --- rows of columns ----------------------------------------------------------------------------


def table_rows(
    records: Iterable[tuple[str, Any]], columns: Columns, folder: Path, file: Path
) -> Iterator[Row | Dropped]:
    """Rows of a table: (its place, column -> value) of each."""
    for number, (place, record) in enumerate(records):
        if number == 0:
            _refuse_missing_columns(record, columns, file, place)
        name = place
        try:
            if not isinstance(record, Mapping):
                raise Unusable("it is no object with columns", "Correct the row.")
            if record.get(columns.id) not in (None, ""):
                name = str(record[columns.id])
            yield _table_row(name, record, columns, folder)
        except Unusable as fault:
            yield fault.dropped(name)


def _refuse_missing_columns(record: Any, columns: Columns, file: Path, place: str) -> None:
    if not isinstance(record, Mapping):
        raise DataError(f"'{file}': {place} is no object with columns;", "give one per row.")
    names = [str(name) for name in record]
    asked = columns.model_fields_set & {"image", "choices", "id"}
    for option in ("question", "answer", *sorted(asked)):
        column = getattr(columns, option)
        if column not in record:
            raise DataError(
                f"'{file}' has no column '{column}' ({nearest(column, names)});",
                f"say which one it is: --set {option}=COLUMN, of {', '.join(names)}.",
            )
    pictures = [name for name in names if names_a_picture(record[name])]
    if columns.image not in record and pictures:
        # Without a word, a mistyped name would train on texts alone.
        raise DataError(
            f"'{file}' has no column '{columns.image}', and '{pictures[0]}' looks like pictures;",
            f"give --set image={pictures[0]}, or take that column out to train on texts alone.",
        )


def names_a_picture(value: Any) -> bool:
    """Whether a value is the name of a picture's file, or a list that begins with one."""
    one = value[0] if isinstance(value, list) and value else value
    return isinstance(one, str) and one.casefold().endswith(PICTURE_ENDINGS)


def _table_row(name: str, record: Mapping[str, Any], columns: Columns, folder: Path) -> Row:
    named = {columns.image, columns.question, columns.answer, columns.choices, columns.id}
    choices = _texts(record.get(columns.choices), "its choices are")
    answers, index = _answers(record.get(columns.answer), choices)
    question = record.get(columns.question)
    if not isinstance(question, str):
        raise Unusable("its question is no text", "Correct the row.")
    meta: dict[str, object] = {
        key: value for key, value in record.items() if key not in named and _is_json(value)
    }
    if index is not None:
        meta["answer_index"] = index
    pictures = tuple(_pictures(record.get(columns.image), folder))
    return Row(name, pictures, question, answers, choices, meta=meta)


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False  # a date or a picture of a parquet file: no template asks for it
    return True


def _pictures(value: Any, folder: Path) -> Iterator[Picture]:
    """Names below the folder, or what parquet files hold: bytes, or a name."""
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(one, Mapping):
            one = one.get("bytes") or one.get("path")
        if one is None or one == "":
            continue
        if not isinstance(one, (str, bytes)):
            raise Unusable("its picture is neither a name nor bytes", "Correct the row.")
        yield one if isinstance(one, bytes) else locate(one, folder)


def _texts(value: Any, what: str) -> tuple[str, ...]:
    if value is None:
        return ()
    values = value if isinstance(value, (list, tuple)) else [value]
    texts = tuple(_text(one) for one in values)
    if not all(texts):
        raise Unusable(f"{what} not all texts", "Correct the row.")
    return tuple(filter(None, texts))


def _text(value: Any) -> str | None:
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"  # a column of whole numbers, some of them missing
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return f"{value}"
    return value if isinstance(value, str) and value.strip() else None


def _answers(value: Any, choices: Sequence[str]) -> tuple[tuple[str, ...], int | None]:
    """Right answers; among choices, the right one, which may be given by number or letter."""
    if not choices:
        answers = _texts(value, "its answers are")
        if not answers:
            raise Unusable("it has no answer", "Fill it in.")
        return answers, None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        if str(value) not in choices:
            return (choices[value],), value
    text = _texts(value, "its answers are")
    if (
        len(text) == 1
        and text[0] not in choices
        and text[0].strip() in tuple(LETTERS[: len(choices)])
    ):
        index = LETTERS.index(text[0].strip())
        return (choices[index],), index
    if not text or text[0] not in choices:
        raise Unusable("its answer is none of its choices", "Give its text, letter or number.")
    return text, None
