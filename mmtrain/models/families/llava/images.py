"""Images as LLaVA-1.5 was trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


def pad_to_square(image: Image, colour: tuple[int, ...]) -> Image:
    """The whole image in the middle of a square of one colour."""
    from PIL import Image as pillow

    image = image.convert("RGB")
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
    squares = [pad_to_square(image, colour) for image in images]
    return [image_processor(one, return_tensors="pt")["pixel_values"][0] for one in squares]


def padding_processor(image_processor: Any) -> Any:
    """The same settings in transformers' class that pads to a square by itself, for others."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    return LlavaImageProcessorPil.from_dict(image_processor.to_dict(), do_pad=True)
