"""Conversations about pictures in LLaVA's format, of any number of turns and pictures.

Raw: a list of `{id, image | images, conversations: [{from, value}]}`, `.json` or `.jsonl`. A
picture stands before the text of the turn that holds its `<image>`, as in LLaVA's own code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mmtrain.tasks import own_data
from mmtrain.tasks.interface import Dropped, Metric, Sample, Template, Turn
from mmtrain.tasks.json_rows import read_rows
from mmtrain.tasks.own_data import OwnOptions, Row
from mmtrain.tasks.pictures import Unusable, locate
from mmtrain.tasks.raw_files import only_file
from mmtrain.tasks.templates import plain

IMAGE = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_FIX = "Correct the row."


def _row(name: str, record: Any, folder: Path) -> Row:
    if not isinstance(record, Mapping):
        raise Unusable("it is no object", _FIX)
    given = record.get("images", record.get("image"))
    names = given if isinstance(given, list) else [] if given in (None, "") else [given]
    if not all(isinstance(one, str) for one in names):
        raise Unusable("its picture is no name", _FIX)
    turns = _placed(_turns(record.get("conversations")), len(names))
    pictures = tuple(locate(one, folder) for one in names)
    return Row(name, pictures, answers=(turns[-1].text,), turns=turns)


def _turns(conversation: Any) -> list[Turn]:
    """Question and answer in turn; a question at the end, which nobody answers, is left out."""
    if not isinstance(conversation, list) or not conversation:
        raise Unusable("it has no conversations", _FIX)
    turns = []
    for said in conversation:
        role = _ROLES.get(str(said.get("from"))) if isinstance(said, Mapping) else None
        if role is None or not isinstance(said.get("value"), str):
            raise Unusable("a turn is not from human or gpt, or says no text", _FIX)
        turns.append(Turn(role, said["value"]))
    if len(turns) % 2:
        turns.pop()
    if not turns or [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise Unusable("human and gpt do not take turns, human first", _FIX)
    return turns


def _placed(turns: list[Turn], num_pictures: int) -> tuple[Turn, ...]:
    """Pictures before the turns that name them; where none does, before the first."""
    marks = [turn.text.count(IMAGE) for turn in turns]
    if any(marks[1::2]):
        raise Unusable(f"an answer holds {IMAGE}", _FIX)
    if sum(marks) not in (0, num_pictures):
        raise Unusable(f"it has another number of {IMAGE} than of pictures", _FIX)
    return tuple(
        replace(turn, text=turn.text.replace(IMAGE, "").strip(), images=count) if count else turn
        for turn, count in zip(turns, marks, strict=True)
    )


class LlavaJson:
    """The task."""

    description = "conversations in LLaVA's format, with any number of pictures and turns"
    splits: tuple[str, ...] = own_data.SPLITS
    build_options: type[BaseModel] = OwnOptions
    needs_raw = True
    templates: Mapping[str, Template] = {"plain": Template(plain)}
    metrics: tuple[Metric, ...] = own_data.METRICS
    primary_metric = own_data.METRICS[0]

    def read(self, raw: Path | None, split: str, options: OwnOptions) -> Iterator[Sample | Dropped]:
        """The conversations of a split in the order of the file."""
        file = only_file(raw, (".json", ".jsonl"))
        folder = options.image_folder or file.parent

        def rows() -> Iterator[Row | Dropped]:
            for place, record in read_rows(file):
                given = record.get("id") if isinstance(record, Mapping) else None
                name = place if given in (None, "") else str(given)
                try:
                    yield _row(name, record, folder)
                except Unusable as fault:
                    yield fault.dropped(name)

        yield from own_data.samples(rows, split, options)

    def score(
        self, samples: Sequence[Sample], predictions: Sequence[str], template: Template
    ) -> tuple[dict[str, float], list[float]]:
        """Whether the last answer is the conversation's, to the word."""
        return own_data.score(samples, predictions, template)


TASK = LlavaJson()
