"""VizWiz: what blind people asked about their own photographs, a part of it unanswerable.

Raw files as published: `train.json` and `val.json`, there or in `Annotations/`; the pictures in
`train/` and `val/`, there or below `--images`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from mmtrain.tasks.interface import Dropped, Metric, Rendered, Sample, Template, Turn
from mmtrain.tasks.json_rows import read_list
from mmtrain.tasks.metrics import mean
from mmtrain.tasks.published import PictureOptions
from mmtrain.tasks.raw_files import needed
from mmtrain.tasks.templates import plain
from mmtrain.tasks.vqa_files import Row, answered, built, named, text_of
from mmtrain.tasks.vqa_score import VQA_SCORE, vqa_scores
from mmtrain.tasks.vqa_templates import SHORT_ANSWER


def zhou2024(sample: Sample) -> Rendered:
    """The question and what to say without enough to go by (Zhou et al. 2024, Table 10)."""
    prompt = (
        f"Question: {sample.question} When the information is insufficient, respond with"
        f' "Unanswerable". {SHORT_ANSWER}'
    )
    return Rendered((Turn("user", prompt),), sample.answers[0])


class VizWiz:
    """The VizWiz task."""

    description = (
        "20,523 questions of blind people about their photographs, ten answers each; 4,319 in val,"
        " which plays test: test answers are not public"
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
        """The questions of a split in the order of the file; a picture has one."""
        remedy = "give --raw the folder that Annotations.zip was unpacked in."
        file = needed(raw, [f"{split}.json", f"Annotations/{split}.json"], remedy)
        assert raw is not None, "needs_raw is True"
        folder = options.image_folder or raw

        def make(name: str, row: Row) -> Sample:
            picture = f"{split}/{text_of(row, 'image')}"
            return answered(name, row, picture, folder, "answer_type", "answerable")

        return built(named(read_list(file), "image"), make)

    def score(
        self, samples: Sequence[Sample], predictions: Sequence[str], template: Template
    ) -> tuple[dict[str, float], list[float]]:
        """The VQA score, unanswerable questions among the others."""
        scores = vqa_scores(samples, predictions, template)
        return {VQA_SCORE.name: mean(scores, VQA_SCORE.name)}, scores


TASK = VizWiz()
