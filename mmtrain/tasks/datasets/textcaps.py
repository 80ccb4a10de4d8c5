"""TextCaps: 25,119 pictures with text in them, and five captions that read it.

Raw: `TextCaps_0.1_train.json` and `TextCaps_0.1_val.json`, and beside them (or in --images)
`train_images/` of TextVQA's `train_val_images.zip`, which both splits share. The captions of the
test split are hidden, so `val` is what is scored.

Without --set rows=pictures, `train` has a sample for each caption; `val` has one for each picture.
Metrics as those of `flickr30k`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mmtrain.errors import DataError
from mmtrain.tasks import captions
from mmtrain.tasks.captions import Captioned, CaptionOptions, captioned
from mmtrain.tasks.interface import Dropped, Metric, Sample, Template
from mmtrain.tasks.raw_files import json_object

_PROMPT = "a photo of"


def _rows(file: Path) -> Iterator[Captioned | Dropped]:
    """One row for each picture; the file has one for each caption, each with all of them."""
    rows = json_object(file, "give --raw the folder that holds it.").get("data")
    if not isinstance(rows, list):
        raise DataError(f"'{file}' has no list 'data';", "download it again.")
    of_picture: dict[str, list[Any]] = {}
    for number, row in enumerate(rows):
        known = row if isinstance(row, dict) else {}
        name = known.get("image_id")
        if not isinstance(name, str) or not name:
            yield captioned(f"row-{number + 1}", None, ())
        elif isinstance(known.get("reference_strs"), list) and known["reference_strs"]:
            of_picture[name] = known["reference_strs"]
        else:
            of_picture.setdefault(name, []).append(known.get("caption_str"))
    for name, found in of_picture.items():
        yield captioned(name, f"{name}.jpg", found)


class TextCaps:
    """The TextCaps task."""

    description = "25,119 pictures with text in them and five captions each, to be captioned"
    splits: tuple[str, ...] = ("train", "val")
    build_options: type[BaseModel] = CaptionOptions
    needs_raw = True
    templates: Mapping[str, Template] = captions.templates(_PROMPT)
    metrics: tuple[Metric, ...] = captions.METRICS
    primary_metric = captions.CIDER

    def read(
        self, raw: Path | None, split: str, options: CaptionOptions
    ) -> Iterator[Sample | Dropped]:
        """The pictures of a split in the order of the file."""
        assert raw is not None, "needs_raw is True"
        rows = _rows(raw / f"TextCaps_0.1_{split}.json")
        folder = options.image_folder or raw / "train_images"
        yield from captions.samples(rows, (folder,), split, options.rows)

    def score(
        self, samples: Sequence[Sample], predictions: Sequence[str], template: Template
    ) -> tuple[dict[str, float], list[float]]:
        """CIDEr, BLEU and ROUGE."""
        return captions.score(samples, predictions, template)


TASK = TextCaps()
