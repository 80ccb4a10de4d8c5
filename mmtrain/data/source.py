"""Samples of one shard folder, rendered and encoded on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from mmtrain.data.cache import Blob
from mmtrain.data.codec import decode_image, image_size
from mmtrain.data.shards import ShardFolder
from mmtrain.data.windows import Share
from mmtrain.errors import DataError
from mmtrain.models.encoding import encode
from mmtrain.models.interface import Example, Family, Processor
from mmtrain.tasks.interface import Rendered, Sample, Template


@dataclass(frozen=True)
class Encoder:
    """A family's side of a run: how a rendered sample becomes an example."""

    family: Family
    processor: Processor
    max_length: int
    truncation_side: str

    def example(self, sample_id: str, rendered: Rendered, images: Sequence[Image.Image]) -> Example:
        """Tokens and pixels."""
        limits = (self.max_length, self.truncation_side)
        return encode(self.family, self.processor, sample_id, rendered, images, *limits)

    def text(self, sample_id: str, rendered: Rendered, sizes: Sequence[tuple[int, int]]) -> Example:
        """Tokens alone, of a sample with images of these sizes."""
        limits = (self.max_length, self.truncation_side)
        code = self.family.code
        return code.encode_text(self.processor, sample_id, rendered, sizes, *limits)

    def with_answer(self, question: Question, answer: str) -> Example:
        """The question's example with another answer; its images are not cut again."""
        rendered = replace(question.rendered, target=answer)
        text = self.text(question.example.id, rendered, question.sizes)
        return replace(text, pixels=question.example.pixels, weight=question.example.weight)


@dataclass(frozen=True)
class Question:
    """A sample as it is asked: read, decoded and encoded once. Its images' bytes are gone."""

    sample: Sample
    rendered: Rendered
    example: Example
    sizes: tuple[tuple[int, int], ...]  # of its images


def open_images(sample: Sample) -> list[Image.Image]:
    """The images of a sample, decoded."""
    return [decode_image(image.data, sample.id) for image in sample.images]


def render(template: Template, sample: Sample) -> Rendered:
    """A sample through a template, which shards of any origin may not fit."""
    try:
        return template(sample)
    except (LookupError, TypeError, ValueError, AttributeError) as fault:
        raise DataError(
            f"sample {sample.id!r} does not fit the task's template '{template.name}'"
            f" ({type(fault).__name__}: {fault});",
            "give its JSON the fields that the task's own samples have.",
        ) from fault


def emptied(sample: Sample) -> Sample:
    """Without its images' bytes."""
    return replace(sample, images=tuple(replace(one, data=b"") for one in sample.images))


@dataclass(frozen=True)
class Source:
    """The first `limit` samples of a folder, through one template and one family."""

    shards: ShardFolder
    template: Template
    encoder: Encoder
    limit: int | None = None
    blank_images: bool = False  # for the proof that answers come from the images
    prefix: str = ""  # of ids, which several data sets may share

    def __len__(self) -> int:
        return min(len(self.shards), self.limit or len(self.shards))

    @property
    def share(self) -> Share:
        """What is read of the folder."""
        return Share(self.shards.manifest, len(self), bool(self.shards.blobs))

    @property
    def blobs(self) -> Sequence[Blob]:
        """The shards that are read, where they must be fetched."""
        return self.shards.blobs[: len(self.share.shards)]

    def ask(self, index: int) -> tuple[Sample, Rendered]:
        """A sample in its words, no image decoded."""
        sample = self.shards.read(index)
        return emptied(sample), render(self.template, sample)

    def question(self, index: int) -> Question:
        """A sample with all that asking and scoring it needs."""
        sample = self.shards.read(index)
        rendered = render(self.template, sample)
        images = open_images(sample)
        if self.blank_images:
            images = [Image.new("RGB", image.size, (127, 127, 127)) for image in images]
        example = self.encoder.example(f"{self.prefix}{sample.id}", rendered, images)
        return Question(emptied(sample), rendered, example, tuple(one.size for one in images))

    def example(self, index: int) -> Example:
        """The tokenised sample with its processed images."""
        return self.question(index).example

    def num_tokens(self, index: int) -> int:
        """Length of the sample, no image decoded."""
        sample = self.shards.read(index)
        sizes = [image_size(image.data, sample.id) for image in sample.images]
        rendered = render(self.template, sample)
        return len(self.encoder.text(f"{self.prefix}{sample.id}", rendered, sizes).input_ids)
