"""Pixels as transformers' image processors make them, to the bit, at a fraction of the cost.

Behind resizing, each number depends on one byte and its channel alone: all 256 of a channel are
computed once, by transformers' own functions, and looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmtrain.models.interface import Size

if TYPE_CHECKING:
    from PIL.Image import Image


def pixel_values(image_processor: Any, image: Image) -> torch.Tensor:
    """[3, height, width] of an RGB image, as the processor gives them."""
    size, values = whole_size(image_processor, image.size), values_of(image_processor)
    if size is None or values is None:
        pixels: torch.Tensor = image_processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels
    return looked_up(np.asarray(image.resize(size, image_processor.resample)), values)


def rgb(image: Image) -> Image:
    """The image in RGB; itself if it is."""
    return image if image.mode == "RGB" else image.convert("RGB")


def looked_up(bytes_hwc: np.ndarray, values_cv: np.ndarray) -> torch.Tensor:
    """Each byte's number [channels, height, width]."""
    height, width, channels = bytes_hwc.shape
    found = np.empty((channels, height, width), np.float32)
    for channel in range(channels):
        # Bytes lie within the table: "clip" only spares the check.
        np.take(values_cv[channel], bytes_hwc[:, :, channel], out=found[channel], mode="clip")
    return torch.from_numpy(found)


def values_of(image_processor: Any) -> np.ndarray | None:
    """[channels, 256]: what a processor makes of each byte; None where it works another way."""
    usual = image_processor.do_rescale and image_processor.do_normalize
    if not usual or image_processor.backend != "pil":
        return None
    mean, spread = image_processor.image_mean, image_processor.image_std
    return _values(image_processor.rescale_factor, tuple(mean), tuple(spread))


@lru_cache(maxsize=8)
def _values(scale: float, mean: Sequence[float], spread: Sequence[float]) -> np.ndarray:
    from transformers.image_transforms import normalize, rescale
    from transformers.image_utils import ChannelDimension

    first = ChannelDimension.FIRST
    bytes_chw = np.broadcast_to(np.arange(256, dtype=np.uint8), (len(mean), 1, 256))
    scaled = rescale(bytes_chw, scale, data_format=first, input_data_format=first)
    found = normalize(scaled, mean, spread, data_format=first, input_data_format=first)
    return np.ascontiguousarray(found[:, 0])


def whole_size(image_processor: Any, given: Size) -> Size | None:
    """What all of an image of a given size is scaled to; None where it is cut, or stays."""
    size, crop = image_processor.size, image_processor.crop_size
    if size.height and size.width:
        found = (size.width, size.height)
    elif size.shortest_edge and not size.longest_edge and given[0] == given[1]:
        found = (size.shortest_edge, size.shortest_edge)
    else:
        return None
    cuts = image_processor.do_center_crop and (crop.width, crop.height) != found
    return found if image_processor.do_resize and not cuts else None
