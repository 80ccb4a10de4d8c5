"""TextVQA: questions that are answered by reading what stands in a picture.

Raw files as published: `TextVQA_0.5.1_{train,val}.json`; the pictures of both in `train_images/`,
there or below `--images`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from mmtrain.tasks.interface import Dropped, Metric, Sample, Template
from mmtrain.tasks.json_rows import read_list
from mmtrain.tasks.lemmas import lemma_form
from mmtrain.tasks.metrics import mean
from mmtrain.tasks.published import PictureOptions
from mmtrain.tasks.raw_files import needed
from mmtrain.tasks.templates import plain
from mmtrain.tasks.vqa_files import Row, answered, built, named, text_of
from mmtrain.tasks.vqa_score import VQA_SCORE, equal_in_form, vqa_scores
from mmtrain.tasks.vqa_templates import first_answer, wang2024

FIRST_ANSWER = Metric("first_answer", larger_is_better=True, unit="%")
FIRST_ANSWER_LEMMAS = Metric("first_answer_lemmas", larger_is_better=True, unit="%")


class TextVQA:
    """The TextVQA task."""

    description = (
        "34,602 questions about text in pictures, ten answers each; 5,000 in val, which plays test:"
        " test answers are not public"
    )
    splits: tuple[str, ...] = ("train", "val")
    build_options: type[BaseModel] = PictureOptions
    needs_raw = True
    templates: Mapping[str, Template] = {
        "wang2024": Template(wang2024),
        "plain": Template(plain),
    }
    metrics: tuple[Metric, ...] = (VQA_SCORE, FIRST_ANSWER, FIRST_ANSWER_LEMMAS)
    primary_metric = VQA_SCORE

    def read(
        self, raw: Path | None, split: str, options: PictureOptions
    ) -> Iterator[Sample | Dropped]:
        """The questions of a split in the order of the file."""
        remedy = "give --raw the folder with the downloaded questions."
        file = needed(raw, [f"TextVQA_0.5.1_{split}.json"], remedy)
        folder = options.image_folder or file.parent

        def make(name: str, row: Row) -> Sample:
            picture = f"train_images/{text_of(row, 'image_id')}.jpg"
            return answered(name, row, picture, folder, "image_id", "image_classes")

        return built(named(read_list(file, "data"), "question_id"), make)

    def score(
        self, samples: Sequence[Sample], predictions: Sequence[str], template: Template
    ) -> tuple[dict[str, float], list[float]]:
        """The VQA score, and how often the first listed answer was met (Wang et al. 2024).

        They compare by dictionary forms: `first_answer_lemmas`.
        """
        scores = vqa_scores(samples, predictions, template)
        pairs = [
            (prediction, first_answer(sample))
            for sample, prediction in zip(samples, predictions, strict=True)
        ]
        first = [equal_in_form(*pair) for pair in pairs]
        by_lemmas = [equal_in_form(*pair, lemma_form) for pair in pairs]
        metrics = {
            VQA_SCORE.name: mean(scores, VQA_SCORE.name),
            FIRST_ANSWER.name: mean(first, FIRST_ANSWER.name),
            FIRST_ANSWER_LEMMAS.name: mean(by_lemmas, FIRST_ANSWER_LEMMAS.name),
        }
        return metrics, scores


TASK = TextVQA()
