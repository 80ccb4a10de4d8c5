"""VQAv2: questions about COCO's pictures, each with ten people's answers.

Raw files as published: `v2_OpenEnded_mscoco_{train,val}2014_questions.json`,
`v2_mscoco_{train,val}2014_annotations.json`; the pictures of COCO 2014 in `train2014/`,
`val2014/`, there or below `--images`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from mmtrain.tasks.interface import Dropped, Metric, Sample, Template
from mmtrain.tasks.metrics import mean
from mmtrain.tasks.published import PictureOptions
from mmtrain.tasks.templates import plain
from mmtrain.tasks.vqa_files import coco_questions
from mmtrain.tasks.vqa_score import VQA_SCORE, vqa_scores
from mmtrain.tasks.vqa_templates import zhou2024


class VQAv2:
    """The VQAv2 task."""

    description = (
        "443,757 questions about COCO's pictures, ten answers each; 214,354 in val, which plays"
        " test: test answers are not public"
    )
    splits: tuple[str, ...] = ("train", "val")
    build_options: type[BaseModel] = PictureOptions
    needs_raw = True
    templates: Mapping[str, Template] = {
        "zhou2024": Template(zhou2024),
        "plain": Template(plain),
    }
    metrics: tuple[Metric, ...] = (VQA_SCORE,)
    primary_metric = VQA_SCORE

    def read(
        self, raw: Path | None, split: str, options: PictureOptions
    ) -> Iterator[Sample | Dropped]:
        """The questions of a split in the order of their annotations."""
        return coco_questions(raw, split, options, "v2_", "question_type", "answer_type")

    def score(
        self, samples: Sequence[Sample], predictions: Sequence[str], template: Template
    ) -> tuple[dict[str, float], list[float]]:
        """The VQA score."""
        scores = vqa_scores(samples, predictions, template)
        return {VQA_SCORE.name: mean(scores, VQA_SCORE.name)}, scores


TASK = VQAv2()
