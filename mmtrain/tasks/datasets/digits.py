"""Handwritten digits: 1,797 real images that come inside scikit-learn, as multiple choice.

The `shifted` domain shows the same images inverted and rotated, to adapt a trained model to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from mmtrain.tasks.interface import ImageBytes, Metric, Rendered, Sample, Template, Turn
from mmtrain.tasks.metrics import ACCURACY, exact_matches, mean

CHOICES = tuple("0123456789")
QUESTION = "Which digit is in the picture?"
SPLIT_SIZES = {"train": 1297, "val": 200, "test": 300}
IMAGE_PIXELS = 32
_BRIGHTEST = 16  # the 8 x 8 counts of scikit-learn run from 0 to 16


class DigitsOptions(BaseModel):
    """Options of `mmtrain shards build digits --set key=value`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    domain: Literal["upright", "shifted"] = Field(
        "upright", description="'shifted' inverts the colours and turns the image by 90 degrees"
    )


def multiple_choice(sample: Sample) -> Rendered:
    """The question with its options; the answer is the option's text."""
    prompt = f"{sample.question}\nOptions: {', '.join(sample.choices)}"
    return Rendered((Turn("user", prompt),), sample.answers[0], candidates=sample.choices)


class Digits:
    """The digits task."""

    description = "1,797 handwritten digits of scikit-learn, multiple choice"
    splits: tuple[str, ...] = tuple(SPLIT_SIZES)
    build_options: type[BaseModel] = DigitsOptions
    needs_raw = False
    templates: Mapping[str, Template] = {"multiple_choice": Template(multiple_choice)}
    metrics: tuple[Metric, ...] = (ACCURACY,)
    primary_metric = ACCURACY

    def read(self, raw: Path | None, split: str, options: DigitsOptions) -> Iterator[Sample]:
        """The images of a split; both domains hold the same ones."""
        # Imported here: it takes over a second, and listing tasks must be instant.
        from sklearn.datasets import load_digits

        bundle = load_digits()
        for number in _split_members(split, len(bundle.target)):
            yield Sample(
                id=f"digits-{number:04d}",
                images=(ImageBytes("png", _png(bundle.images[number], options.domain)),),
                question=QUESTION,
                answers=(CHOICES[int(bundle.target[number])],),
                choices=CHOICES,
                meta={"domain": options.domain},
            )

    def score(
        self, samples: Sequence[Sample], predictions: Sequence[str], template: Template
    ) -> tuple[dict[str, float], list[float]]:
        """Accuracy: the prediction is the digit, or what the template wanted, and nothing else."""
        scores = exact_matches(predictions, [template(sample).target for sample in samples])
        return {ACCURACY.name: mean(scores)}, scores


def _split_members(split: str, num_images: int) -> list[int]:
    """The images of a split, drawn by a hash of their number: the same on every machine."""
    order = sorted(range(num_images), key=lambda number: sha256(b"digit %d" % number).digest())
    names = list(SPLIT_SIZES)
    start = sum(SPLIT_SIZES[name] for name in names[: names.index(split)])
    return order[start : start + SPLIT_SIZES[split]]


def _png(counts: np.ndarray, domain: str) -> bytes:
    """A grey 8 x 8 image, made larger and, in the shifted domain, inverted and rotated."""
    grey = np.round(counts * (255 / _BRIGHTEST)).astype(np.uint8)
    if domain == "shifted":
        grey = np.ascontiguousarray(np.rot90(255 - grey))
    size = (IMAGE_PIXELS, IMAGE_PIXELS)
    file = BytesIO()
    Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR).save(file, "PNG")
    return file.getvalue()


TASK = Digits()
