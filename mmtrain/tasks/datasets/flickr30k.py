"""Flickr30k: 31,014 photos of people and animals with five captions each.

Raw: `dataset_flickr30k.json` of Karpathy's splits, or else LAVIS's `flickr30k_train.json`,
`flickr30k_val.json` and `flickr30k_test.json`, which are the same splits; beside them (or in
--images) `flickr30k-images/` with the photos, which the data set's owners give on request.

Without --set rows=pictures, `train` has a sample for each caption; `val` and `test` have one for
each photo. `cider` is what pycocoevalcap prints as CIDEr, in words as the Penn Treebank cuts them
(papers show 100 times it); `cider_d` is the same in words as white space cuts them;
`cider_unclipped` is CIDEr's first formula. BLEU is that of the set, ROUGE the mean F1 over samples
and references. `wang2024` asks in validation as in training, where its paper's code asked nothing.
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
from mmtrain.tasks.json_rows import read_rows
from mmtrain.tasks.pictures import Unusable
from mmtrain.tasks.raw_files import json_object

KARPATHY = "dataset_flickr30k.json"
SPLITS = ("train", "val", "test")
_PROMPT = "write a description for the photo"


def _karpathy(file: Path, split: str) -> Iterator[Captioned | Dropped]:
    images = json_object(file, "download it again.").get("images")
    if not isinstance(images, list):
        raise DataError(f"'{file}' has no list 'images';", "download it again.")
    for number, image in enumerate(images):
        known = image if isinstance(image, dict) else {}
        place = f"row-{number + 1}"
        if known.get("split") == split:
            name = known.get("filename")
            found = [one.get("raw") for one in _objects(known.get("sentences"))]
            stem = Path(name).stem if isinstance(name, str) and name else place
            yield captioned(stem, name, found)
        elif split == "train" and known.get("split") not in SPLITS:
            stray = Unusable("its split is none of train, val and test", "Download the file again.")
            yield stray.dropped(place)  # told once, with the largest


def _objects(value: Any) -> list[dict[str, Any]]:
    return (
        [one if isinstance(one, dict) else {} for one in value] if isinstance(value, list) else []
    )


def _lavis(file: Path) -> Iterator[Captioned | Dropped]:
    """One row for each photo: training files have one for each caption, the others lists."""
    of_photo: dict[str, list[Any]] = {}
    for place, row in read_rows(file):
        known = row if isinstance(row, dict) else {}
        name, said = known.get("image"), known.get("caption")
        if not isinstance(name, str) or not name:
            yield captioned(place, name, ())
            continue
        of_photo.setdefault(name, []).extend(said if isinstance(said, list) else [said])
    for name, found in of_photo.items():
        yield captioned(Path(name).stem, name, found)


class Flickr30k:
    """The Flickr30k task."""

    description = "31,014 photos with five captions each, to be captioned"
    splits: tuple[str, ...] = SPLITS
    build_options: type[BaseModel] = CaptionOptions
    needs_raw = True
    templates: Mapping[str, Template] = captions.templates(_PROMPT)
    metrics: tuple[Metric, ...] = captions.METRICS
    primary_metric = captions.CIDER

    def read(
        self, raw: Path | None, split: str, options: CaptionOptions
    ) -> Iterator[Sample | Dropped]:
        """The photos of a split in the order of the file."""
        assert raw is not None, "needs_raw is True"
        karpathy, lavis = raw / KARPATHY, raw / f"flickr30k_{split}.json"
        if not karpathy.is_file() and not lavis.is_file():
            raise DataError(
                f"Flickr30k needs {KARPATHY} or {lavis.name} in '{raw}';",
                "give --raw the folder with one of them.",
            )
        rows = _karpathy(karpathy, split) if karpathy.is_file() else _lavis(lavis)
        folder = options.image_folder or raw / "flickr30k-images"
        yield from captions.samples(rows, (folder,), split, options.rows)

    def score(
        self, samples: Sequence[Sample], predictions: Sequence[str], template: Template
    ) -> tuple[dict[str, float], list[float]]:
        """CIDEr, BLEU and ROUGE."""
        return captions.score(samples, predictions, template)


TASK = Flickr30k()
