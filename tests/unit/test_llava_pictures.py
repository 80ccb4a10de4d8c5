"""Images are padded to squares with the mean colour before anything else, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mmtrain.models.families.llava.images import mean_colour, pad_to_square, pixel_values

COLOUR = (122, 116, 104)  # int(255 * CLIP's mean)
# (width, height) -> columns and rows of padding before the image
SIZES = {"wide": (9, 4, 0, 2), "tall": (5, 8, 1, 0), "square": (6, 6, 0, 0)}


def noise(width: int, height: int) -> Image.Image:
    generator = torch.Generator().manual_seed(width * 100 + height)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("shape", SIZES)
def test_every_pixel(shape: str) -> None:
    width, height, left, top = SIZES[shape]
    image = noise(width, height)
    wanted = np.empty((max(width, height),) * 2 + (3,), dtype=np.uint8)
    wanted[:] = COLOUR
    wanted[top : top + height, left : left + width] = np.asarray(image)
    assert np.array_equal(np.asarray(pad_to_square(image, COLOUR)), wanted)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_kinds_of_images_become_rgb(mode: str) -> None:
    padded = pad_to_square(noise(7, 3).convert(mode), COLOUR)
    assert padded.mode == "RGB" and padded.size == (7, 7)
    assert padded.getpixel((0, 0)) == COLOUR


@pytest.mark.parametrize("size", [(90, 40), (41, 90), (50, 50)])
def test_pixels_equal_those_of_transformers_own_padding(size: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessor, LlavaImageProcessorPil

    shape = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    ours = CLIPImageProcessor(**shape)
    theirs = LlavaImageProcessorPil(do_pad=True, **shape)
    assert mean_colour(ours) == COLOUR
    wanted = theirs(noise(*size), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(pixel_values(ours, [noise(*size)])[0], wanted)
    # A processor that pads by itself finds nothing left to pad.
    assert torch.equal(pixel_values(theirs, [noise(*size)])[0], wanted)


def test_nothing_at_the_sides_is_cut_off() -> None:
    """Without padding the processor would cut a wide image to its middle."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    image = Image.new("RGB", (96, 32))
    marked = image.copy()
    marked.paste((255, 255, 255), (0, 0, 8, 32))
    plain, seen = (pixel_values(processor, [one])[0] for one in (image, marked))
    assert not torch.equal(plain, seen)
