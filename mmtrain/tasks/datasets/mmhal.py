"""MMHAL-Bench: 96 questions of eight types that tempt a model to make things up. Evaluation only.

Raw files as published: `response_template.json`, a list with question_type, question_topic,
image_id, image_src, image_content, question and gt_answer (a model_answer is left alone), and its
pictures in `images/` or beside it, there or below --images: called as the addresses in image_src
end, or as image_id with an ending.

Only a judge can score such answers: [`mmtrain judge`](judging.md) asks one, and tells score,
hallucination rate and the score of each type. Without a judge nothing is known but whether the
model said something: `answered` is no measure of quality.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from mmtrain.tasks.interface import Dropped, ImageBytes, Metric, Sample, Template
from mmtrain.tasks.json_rows import read_list
from mmtrain.tasks.metrics import ANSWERED, mean
from mmtrain.tasks.pictures import Unusable, encoded, locate
from mmtrain.tasks.published import PictureOptions
from mmtrain.tasks.raw_files import needed
from mmtrain.tasks.templates import plain
from mmtrain.tasks.vqa_files import Row, built, text_of

# In this order, again and again: the published evaluation knows a question's type by its place.
TYPES = ("attribute adversarial comparison counting relation environment holistic other").split()
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


class MmHal:
    """The MMHAL-Bench task."""

    description = "96 questions that tempt a model to make things up, for a judge to score"
    splits: tuple[str, ...] = ("test",)
    build_options: type[BaseModel] = PictureOptions
    needs_raw = True
    templates: Mapping[str, Template] = {"plain": Template(plain, answer_tokens=1024)}
    metrics: tuple[Metric, ...] = (ANSWERED,)
    primary_metric = ANSWERED

    def read(
        self, raw: Path | None, split: str, options: PictureOptions
    ) -> Iterator[Sample | Dropped]:
        """The questions in the order of the file."""
        remedy = "give --raw the folder that holds it."
        file = needed(raw, ["response_template.json"], remedy)
        top = options.image_folder or file.parent
        rows = ((str(number), row) for number, (_, row) in enumerate(read_list(file)))
        return built(rows, lambda name, row: _sample(int(name), row, (top / "images", top)))

    def score(
        self, samples: Sequence[Sample], predictions: Sequence[str], template: Template
    ) -> tuple[dict[str, float], list[float]]:
        """Whether something was said at all."""
        scores = [float(bool(prediction.strip())) for prediction in predictions]
        return {ANSWERED.name: mean(scores, ANSWERED.name)}, scores


def _sample(number: int, row: Row, folders: Sequence[Path]) -> Sample:
    given = row.get("question_type")
    meta = {
        "question_type": given if given in TYPES else TYPES[number % len(TYPES)],
        "question_topic": str(row.get("question_topic", "")),
        "image_content": _content(row),
    }
    return Sample(
        id=f"mmhal-{number:02d}",
        images=(_picture(row, folders),),
        question=text_of(row, "question"),
        answers=(text_of(row, "gt_answer"),),
        meta=meta,
    )


def _content(row: Row) -> str:
    """What is in the picture, for a judge that does not see it."""
    content = row.get("image_content")
    if not isinstance(content, list) or not all(isinstance(one, str) for one in content):
        raise Unusable("its image_content is no list of texts", "Download the file again.")
    return ", ".join(content)


def _picture(row: Row, folders: Sequence[Path]) -> ImageBytes:
    address = text_of(row, "image_src").rpartition("/")[2]
    for name in (address, *(f"{row.get('image_id')}{ending}" for ending in _ENDINGS)):
        for folder in folders:
            try:
                place = locate(name, folder)
            except Unusable:
                continue
            return encoded(place)
    raise Unusable(
        "its picture is not there", "Give --images the folder that holds the pictures.", address
    )


TASK = MmHal()
