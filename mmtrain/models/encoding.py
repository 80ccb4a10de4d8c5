"""From a rendered sample and its images to an example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mmtrain.models.interface import Example, Family

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmtrain.tasks.interface import Rendered


def encode(
    family: Family,
    processor: object,
    sample_id: str,
    rendered: Rendered,
    images: Sequence[Image],
    max_length: int,
    truncation_side: str,
) -> Example:
    """Tokenise, then cut the images as the tower reads them."""
    sizes = [image.size for image in images]
    example = family.code.encode_text(
        processor, sample_id, rendered, sizes, max_length, truncation_side
    )
    return replace(example, pixels=family.code.pixels(processor, images))
