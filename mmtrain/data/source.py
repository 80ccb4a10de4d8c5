"""Samples of one shard folder, rendered and encoded on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mmtrain.data.codec import decode_image
from mmtrain.data.shards import ShardFolder
from mmtrain.errors import DataError
from mmtrain.models.interface import Example
from mmtrain.tasks.interface import Rendered, Sample, Template

Encode = Callable[[str, Rendered, Sequence[Any]], Example]


def open_images(sample: Sample) -> list[Image.Image]:
    """The images of a sample, decoded."""
    return [decode_image(image.data, sample.id) for image in sample.images]


def render(template: Template, sample: Sample) -> Rendered:
    """A sample through a template, which shards of any origin may not fit."""
    try:
        return template(sample)
    except (LookupError, TypeError, ValueError, AttributeError) as fault:
        raise DataError(
            f"sample {sample.id!r} does not fit the task's template '{template.__name__}'"
            f" ({type(fault).__name__}: {fault});",
            "give its JSON the fields that the task's own samples have.",
        ) from fault


@dataclass(frozen=True)
class Source:
    """The first `limit` samples of a folder, through one template and one family."""

    shards: ShardFolder
    template: Template
    encode: Encode
    limit: int | None = None
    blank_images: bool = False  # for the proof that answers come from the images

    def __len__(self) -> int:
        return min(len(self.shards), self.limit or len(self.shards))

    def sample(self, index: int) -> Sample:
        """The raw sample."""
        return self.shards.read(index)

    def rendered(self, sample: Sample) -> Rendered:
        """A sample as the run's template asks it."""
        return render(self.template, sample)

    def example(self, index: int) -> Example:
        """The tokenised sample with its processed images."""
        sample = self.sample(index)
        images = open_images(sample)
        if self.blank_images:
            images = [Image.new("RGB", image.size, (127, 127, 127)) for image in images]
        return self.encode(sample.id, self.rendered(sample), images)
