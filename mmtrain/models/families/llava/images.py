"""Images as LLaVA-1.5 was trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmtrain.models import pixels

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


def pad_to_square(image: Image, colour: tuple[int, ...]) -> Image:
    """The whole image in the middle of a square of one colour."""
    from PIL import Image as pillow

    image = pixels.rgb(image)
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    square = pillow.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def mean_colour(image_processor: Any) -> tuple[int, ...]:
    """The colour that becomes about zero when the processor normalises."""
    return tuple(int(255 * mean) for mean in image_processor.image_mean)


def pixel_values(image_processor: Any, images: Sequence[Image]) -> list[torch.Tensor]:
    """Padded to a square with the mean colour, then resized and normalised by the processor.

    The published models were trained so; processors of Hugging Face folders would cut the sides
    of wide images off instead, because their files know of no padding.
    """
    colour = mean_colour(image_processor)
    return [_of_square(image_processor, pixels.rgb(image), colour) for image in images]


def _of_square(image_processor: Any, image: Image, colour: tuple[int, ...]) -> torch.Tensor:
    """The padded image's pixels; above and below a wide one, padding is added when half is done.

    Pillow scales lines first, each by itself and to bytes: a line of one colour stays as it is.
    """
    from PIL import Image as pillow

    width, height = image.size
    size = pixels.whole_size(image_processor, (width, width))
    values = pixels.values_of(image_processor)
    if width <= height or size is None or values is None:
        return pixels.pixel_values(image_processor, pad_to_square(image, colour))
    scaled = image.resize((size[0], height), image_processor.resample)
    square = pillow.new("RGB", (size[0], width), colour)
    square.paste(scaled, (0, (width - height) // 2))
    return pixels.looked_up(np.asarray(square.resize(size, image_processor.resample)), values)


def padding_processor(image_processor: Any) -> Any:
    """The same settings in transformers' class that pads to a square by itself, for others."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    return LlavaImageProcessorPil.from_dict(image_processor.to_dict(), do_pad=True)
