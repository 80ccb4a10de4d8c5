"""Looked-up pixels are those of transformers' processors and of plain arithmetic, to the bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mmtrain.models.families.qwen2_vl import encoding as qwen2_vl
from mmtrain.models.families.qwen_vl import processing as qwen_vl
from mmtrain.models.pixels import pixel_values, values_of, whole_size
from tests.unit.test_llava_pictures import noise

SIZES = [(90, 40), (41, 90), (32, 32), (200, 150)]
CROP = {"height": 32, "width": 32}
LOOKED_UP: dict[str, Any] = {
    "blip": BlipImageProcessorPil(size=CROP),
    "blip wide": BlipImageProcessorPil(size={"height": 20, "width": 50}, resample=2),
    "other colours": BlipImageProcessorPil(
        size=CROP, image_mean=[0.5] * 3, image_std=[0.25] * 3, rescale_factor=1 / 127
    ),
}
# Cut, left as large as it is, or left in bytes: the processor itself is asked.
ASKED: dict[str, Any] = {
    "crop": CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size=CROP),
    "short side": CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False),
    "no size": BlipImageProcessorPil(size=CROP, do_resize=False),
    "no scale": BlipImageProcessorPil(size=CROP, do_rescale=False),
    "no mean": BlipImageProcessorPil(size=CROP, do_normalize=False),
}


def _is_looked_up(processor: Any, size: tuple[int, int]) -> bool:
    return values_of(processor) is not None and whole_size(processor, size) is not None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*LOOKED_UP, *ASKED])
def test_pixels_are_the_processors(name: str, size: tuple[int, int]) -> None:
    processor = (LOOKED_UP | ASKED)[name]
    wanted = processor(noise(*size), return_tensors="pt")["pixel_values"][0]
    found = pixel_values(processor, noise(*size))
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    assert size == (32, 32) or _is_looked_up(processor, size) == (name in LOOKED_UP)


@pytest.mark.parametrize("size", SIZES)
def test_patches_are_the_processors(size: tuple[int, int]) -> None:
    limits = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    plain = Qwen2VLImageProcessorPil(size=limits)
    other = Qwen2VLImageProcessorPil(size=limits, temporal_patch_size=1, merge_size=3)
    bytes_only = Qwen2VLImageProcessorPil(size=limits, do_normalize=False)
    for cutter in (plain, other, bytes_only):
        processor: Any = SimpleNamespace(image_processor=cutter)
        wanted = cutter(noise(*size), return_tensors="pt")["pixel_values"]
        assert torch.equal(qwen2_vl.pixels(processor, [noise(*size)])[0], wanted)


def test_qwen_vls_pixels_are_plain_arithmetic() -> None:
    square = torch.from_numpy(np.array(noise(40, 30).resize((32, 32), Image.Resampling.BICUBIC)))
    mean, spread = (torch.tensor(one) for one in (qwen_vl._MEAN, qwen_vl._SPREAD))
    wanted = ((square.float() / 255 - mean) / spread).permute(2, 0, 1)
    assert torch.equal(qwen_vl.pixel_values(noise(40, 30), 32), wanted)
