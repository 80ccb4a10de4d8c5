"""POPE: is this object in the picture? Yes-or-no questions about COCO. Evaluation only.

Raw: `coco_pope_<kind>.jsonl` with question_id, image, text and label in each line, and below it (or
in --images) `val2014/` with the pictures of COCO 2014. The kind says which objects are asked for
that are not there: any (random), frequent ones (popular), or such as are seen beside those that
are there (adversarial).

An answer is no where its first sentence holds the word no, No or not, else yes. `precision`,
`recall` and `f1` are those of yes. `yes_ratio` is the share of answers with yes: half of the
questions want it, and a model that sees what is not there says it more often.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from mmtrain.tasks.interface import Dropped, Metric, Sample, Template
from mmtrain.tasks.json_rows import read_rows
from mmtrain.tasks.metrics import ACCURACY, mean
from mmtrain.tasks.pictures import Unusable
from mmtrain.tasks.published import PictureOptions, picture
from mmtrain.tasks.raw_files import needed
from mmtrain.tasks.templates import plain
from mmtrain.tasks.yes_no import liu2023, right_answers

CHOICES = ("yes", "no")
PRECISION = Metric("precision", larger_is_better=True, unit="%")
RECALL = Metric("recall", larger_is_better=True, unit="%")
F1 = Metric("f1", larger_is_better=True, unit="%")
# Half is right; what goes wrong is saying yes too often.
YES_RATIO = Metric("yes_ratio", larger_is_better=False, unit="%")
_NO = frozenset(("no", "No", "not"))


class PopeOptions(PictureOptions):
    """Options of `mmtrain shards build pope --set key=value`."""

    kind: Literal["adversarial", "popular", "random"] = Field(
        "adversarial", description="which objects are asked for that are not there"
    )


def said(prediction: str) -> str:
    """The yes or no that POPE's evaluator reads from an answer."""
    first = prediction.strip().split(".", 1)[0].replace(",", "")
    return "no" if _NO & set(first.split()) else "yes"


class Pope:
    """The POPE task."""

    description = "yes-or-no questions about objects in COCO's pictures, evaluation only"
    splits: tuple[str, ...] = ("test",)
    build_options: type[BaseModel] = PopeOptions
    needs_raw = True
    templates: Mapping[str, Template] = {"plain": Template(plain), "liu2023": Template(liu2023)}
    metrics: tuple[Metric, ...] = (ACCURACY, PRECISION, RECALL, F1, YES_RATIO)
    primary_metric = ACCURACY

    def read(
        self, raw: Path | None, split: str, options: PopeOptions
    ) -> Iterator[Sample | Dropped]:
        """The questions of a kind in the order of their file."""
        names = [f"coco_pope_{options.kind}{ending}" for ending in (".json", ".jsonl")]
        file = needed(raw, names, "give --raw the folder that holds it.")
        folder = options.image_folder or file.parent / "val2014"
        for place, row in read_rows(file):
            try:
                yield _sample(row, options.kind, folder)
            except Unusable as fault:
                yield fault.dropped(place)

    def score(
        self, samples: Sequence[Sample], predictions: Sequence[str], template: Template
    ) -> tuple[dict[str, float], list[float]]:
        """What yes and no were worth; precision and recall only where they say something."""
        right = right_answers(samples, predictions, template, said)
        scores = [float(one) for one in right]
        metrics = {ACCURACY.name: mean(scores)}
        wanted = [sample.answers[0] == "yes" for sample in samples]
        answered = [want == fits for want, fits in zip(wanted, right, strict=True)]
        found = sum(want and yes for want, yes in zip(wanted, answered, strict=True))
        if any(answered):
            metrics[PRECISION.name] = found / sum(answered)
        if any(wanted):
            metrics[RECALL.name] = found / sum(wanted)
        if any(answered) or any(wanted):
            metrics[F1.name] = 2 * found / (sum(answered) + sum(wanted))
        metrics[YES_RATIO.name] = sum(answered) / len(samples)
        return metrics, scores


def _sample(row: Any, kind: str, folder: Path) -> Sample:
    known: dict[str, Any] = row if isinstance(row, dict) else {}
    fields: list[Any] = [known.get(key) for key in ("image", "text", "label")]
    if not all(isinstance(one, str) for one in fields) or "question_id" not in known:
        raise Unusable("it lacks question_id, image, text or label", "Download the file again.")
    image, text, label = fields
    if label not in CHOICES:
        raise Unusable("its label is neither yes nor no", "Download the file again.", label)
    return Sample(
        id=f"{kind}-{known['question_id']}",
        images=(picture(image, (folder,)),),
        question=text,
        answers=(label,),
        choices=CHOICES,
    )


TASK = Pope()
