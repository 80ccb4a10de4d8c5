"""OKVQA: questions about COCO's pictures that need knowledge from outside of them.

Raw files as published: `OpenEnded_mscoco_{train,val}2014_questions.json`,
`mscoco_{train,val}2014_annotations.json`; the pictures of COCO 2014 in `train2014/`, `val2014/`,
there or below `--images`.

`vqa_score_lemmas` compares words by their dictionary forms, as Wang et al. 2024 report it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from mmtrain.tasks.interface import Dropped, Metric, Sample, Template
from mmtrain.tasks.lemmas import lemma_form
from mmtrain.tasks.metrics import mean
from mmtrain.tasks.published import PictureOptions
from mmtrain.tasks.templates import plain
from mmtrain.tasks.vqa_files import coco_questions
from mmtrain.tasks.vqa_score import VQA_SCORE, VQA_SCORE_LEMMAS, vqa_scores
from mmtrain.tasks.vqa_templates import wang2024, zhou2024


class OKVQA:
    """The OKVQA task."""

    description = (
        "9,009 questions that need knowledge, ten answers each; 5,046 in val, which plays test"
    )
    splits: tuple[str, ...] = ("train", "val")
    build_options: type[BaseModel] = PictureOptions
    needs_raw = True
    templates: Mapping[str, Template] = {
        "zhou2024": Template(zhou2024),
        "wang2024": Template(wang2024),
        "plain": Template(plain),
    }
    metrics: tuple[Metric, ...] = (VQA_SCORE, VQA_SCORE_LEMMAS)
    primary_metric = VQA_SCORE

    def read(
        self, raw: Path | None, split: str, options: PictureOptions
    ) -> Iterator[Sample | Dropped]:
        """The questions of a split in the order of their annotations."""
        return coco_questions(raw, split, options, "", "question_type", "answer_type")

    def score(
        self, samples: Sequence[Sample], predictions: Sequence[str], template: Template
    ) -> tuple[dict[str, float], list[float]]:
        """The VQA score of the words as they stand, and of their dictionary forms."""
        scores = vqa_scores(samples, predictions, template)
        by_lemmas = vqa_scores(samples, predictions, template, lemma_form)
        metrics = {
            VQA_SCORE.name: mean(scores, VQA_SCORE.name),
            VQA_SCORE_LEMMAS.name: mean(by_lemmas, VQA_SCORE_LEMMAS.name),
        }
        return metrics, scores


TASK = OKVQA()
