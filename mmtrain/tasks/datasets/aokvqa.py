"""A-OKVQA: questions that need knowledge, with four choices and with ten answers in free words.

Raw files as published: `aokvqa_v1p0_{train,val}.json`; the pictures of COCO 2017 in `train2017/`,
`val2017/`, there or below `--images`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from mmtrain.tasks.interface import Dropped, Metric, Rendered, Sample, Template, Turn
from mmtrain.tasks.json_rows import read_list
from mmtrain.tasks.metrics import ACCURACY, mean, target_matches
from mmtrain.tasks.pictures import Unusable
from mmtrain.tasks.published import PictureOptions
from mmtrain.tasks.raw_files import needed
from mmtrain.tasks.templates import letters
from mmtrain.tasks.vqa_files import (
    Row,
    built,
    first_listed,
    most_frequent,
    named,
    number_of,
    pictures,
    text_of,
    texts_of,
)
from mmtrain.tasks.vqa_score import direct_score
from mmtrain.tasks.vqa_templates import wang2024


def plain(sample: Sample) -> Rendered:
    """The question alone, answered in free words: the most frequent answer."""
    return Rendered((Turn("user", sample.question),), most_frequent(_direct_answers(sample)))


def _direct_answers(sample: Sample) -> list[str]:
    listed = sample.meta.get("direct_answers")
    return [str(answer) for answer in listed] if isinstance(listed, list) else [*sample.answers]


def _sample(name: str, row: Row, split: str, folder: Path) -> Sample:
    choices, answers = texts_of(row, "choices"), texts_of(row, "direct_answers")
    right = number_of(row, "correct_choice_idx")
    if right >= len(choices):
        raise Unusable("its right choice is none of its choices", "Download it again.")
    return Sample(
        id=name,
        images=pictures([f"{split}2017/{number_of(row, 'image_id'):012d}.jpg"], folder),
        question=text_of(row, "question"),
        answers=(choices[right],),
        choices=choices,
        meta={
            "answer_index": right,
            "direct_answers": list(answers),
            "first_answer": first_listed(answers),
            **{key: row[key] for key in ("rationales", "difficult_direct_answer") if key in row},
        },
    )


class AOKVQA:
    """The A-OKVQA task."""

    description = (
        "17,056 questions that need knowledge, four choices and ten answers each; 1,145 in val,"
        " which plays test: test answers are not public"
    )
    splits: tuple[str, ...] = ("train", "val")
    build_options: type[BaseModel] = PictureOptions
    needs_raw = True
    templates: Mapping[str, Template] = {
        "wang2024": Template(wang2024),
        "plain": Template(plain),
        "letters": Template(letters),
    }
    metrics: tuple[Metric, ...] = (ACCURACY,)
    primary_metric = ACCURACY

    def read(
        self, raw: Path | None, split: str, options: PictureOptions
    ) -> Iterator[Sample | Dropped]:
        """The questions of a split in the order of the file."""
        remedy = "give --raw the folder that aokvqa_v1p0.tar.gz was unpacked in."
        file = needed(raw, [f"aokvqa_v1p0_{split}.json"], remedy)
        folder = options.image_folder or file.parent
        rows = named(read_list(file), "question_id")
        return built(rows, lambda name, row: _sample(name, row, split, folder))

    def score(
        self, samples: Sequence[Sample], predictions: Sequence[str], template: Template
    ) -> tuple[dict[str, float], list[float]]:
        """Direct answers by how many people gave them, choices by whether they are the right one.

        A template of a run file may ask for either: the better of both counts.
        """
        matches = target_matches(samples, predictions, template)
        direct = [
            direct_score(prediction, _direct_answers(sample))
            for sample, prediction in zip(samples, predictions, strict=True)
        ]
        if template.name in (wang2024.__name__, plain.__name__):
            scores = direct
        elif template.name == letters.__name__:
            scores = matches
        else:
            scores = [max(pair) for pair in zip(matches, direct, strict=True)]
        return {ACCURACY.name: mean(scores)}, scores


TASK = AOKVQA()
