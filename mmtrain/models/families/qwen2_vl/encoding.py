"""From a conversation and its images to token ids, labels and patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from mmtrain.errors import DataError
from mmtrain.models import text
from mmtrain.models.dropout import stable_hash
from mmtrain.models.families.qwen2_vl.processing import (
    IMAGE_TOKEN,
    TURN_END,
    TURN_START,
    VISION_END,
    VISION_START,
    Processor,
)
from mmtrain.models.interface import Example, Size
from mmtrain.models.pixels import rgb, values_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmtrain.tasks.interface import Rendered

MAX_ASPECT_RATIO = 200  # of the published resizing
TEXT_REMEDY = "Raise data.max_length or leave the sample out."
IMAGE_REMEDY = "Lower model.max_pixels, raise data.max_length or leave the sample out."


def encode_text(
    processor: Processor,
    sample_id: str,
    rendered: Rendered,
    sizes: Sequence[Size],
    max_length: int,
    truncation_side: str,
) -> Example:
    """One conversation whose last turn is the answer; images stand before their questions."""
    turns = text.conversation(rendered, len(sizes))
    text.refuse_control_tokens(processor.control_tokens, sample_id, (said for _, said, _ in turns))
    ids, labels = text.tokenise(processor.tokenizer, pieces(processor, turns))
    grids = [_grid(processor.image_processor, sample_id, size) for size in sizes]
    ids, labels = _expand(ids, labels, processor, grids)
    ids, labels = text.truncate(
        ids,
        labels,
        processor.image_token_id,
        max_length,
        truncation_side,
        sample_id,
        processor.num_cue_tokens,
        also_kept=processor.kept_ids,
        remedy=IMAGE_REMEDY if sizes else TEXT_REMEDY,
    )
    return Example(sample_id, stable_hash(sample_id), ids, labels, extras={"grid": grids})


def pixels(processor: Processor, images: Sequence[Image]) -> list[torch.Tensor]:
    """The patches of each image."""
    return [_patches(processor.image_processor, rgb(image)) for image in images]


def _patches(cutter: Any, image: Image) -> torch.Tensor:
    """[patches, numbers of one], as the processor cuts them: bytes are cut, then looked up."""
    values, side, merged = values_of(cutter), cutter.patch_size, cutter.merge_size
    if values is None:
        found: torch.Tensor = cutter(image, return_tensors="pt")["pixel_values"]
        return found
    height, width = _resized(cutter, image.size)
    pixels_hwc = np.asarray(image.resize((width, height), cutter.resample))
    rows, columns = height // (side * merged), width // (side * merged)
    blocks = pixels_hwc.reshape(rows, merged, side, columns, merged, side, -1)
    bytes_pcx = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, len(values), side * side)
    times = cutter.temporal_patch_size
    patches = np.empty((len(bytes_pcx), len(values), times, side * side), np.float32)
    for channel, of_bytes in enumerate(values):
        # Bytes lie within the table: "clip" only spares the check.
        patches[:, channel] = np.take(of_bytes, bytes_pcx[:, channel], mode="clip")[:, None]
    return torch.from_numpy(patches.reshape(len(patches), -1))


def pieces(processor: Processor, turns: text.Turns) -> list[text.Piece]:
    """The chat template of the published checkpoints, with the stretches that are answers.

    An answer ends with its end-of-turn token. The newline behind it is no part of the answer:
    generation stops before it, so it is never asked for.
    """
    found = []
    if processor.system is not None:
        found.append(text.Piece(f"{TURN_START}system\n{processor.system}{TURN_END}\n"))
    for role, said, num_images in turns:
        if role == "user":
            images = f"{VISION_START}{IMAGE_TOKEN}{VISION_END}" * num_images
            found.append(text.Piece(f"{TURN_START}user\n{images}{said}{TURN_END}\n"))
        else:
            found.append(text.Piece(f"{TURN_START}assistant\n"))
            found.append(text.Piece(f"{said}{TURN_END}", is_answer=True))
            found.append(text.Piece("\n"))
    return found


def num_tokens(grid: Sequence[int], merge_size: int) -> int:
    """Tokens that an image of so many patches (time, height, width) makes."""
    frames, height, width = grid
    return frames * height * width // merge_size**2


def _expand(
    ids: Sequence[int], labels: Sequence[int], processor: Processor, grids: Sequence[Sequence[int]]
) -> tuple[list[int], list[int]]:
    """Repeat each image token as often as its own image has tokens."""
    remaining = iter(grids)
    out_ids: list[int] = []
    out_labels: list[int] = []
    for token, label in zip(ids, labels, strict=True):
        is_image = token == processor.image_token_id
        count = num_tokens(next(remaining), processor.merge_size) if is_image else 1
        out_ids.extend([token] * count)
        out_labels.extend([label] * count)
    return out_ids, out_labels


def _grid(cutter: Any, sample_id: str, size: Size) -> tuple[int, int, int]:
    """Patches in time, height and width that an image of this size is cut into."""
    width, height = size
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise DataError(
            f"sample {sample_id}: an image of {width} x {height} pixels is more than"
            f" {MAX_ASPECT_RATIO} times as long as wide.",
            "Crop the image or leave the sample out.",
        )
    height, width = _resized(cutter, size)
    return 1, height // cutter.patch_size, width // cutter.patch_size


def _resized(cutter: Any, size: Size) -> tuple[int, int]:
    """Height and width that an image of this size is scaled to."""
    width, height = size
    budget = cutter.size
    found: tuple[int, int] = smart_resize(
        height,
        width,
        factor=cutter.patch_size * cutter.merge_size,
        min_pixels=budget.shortest_edge,
        max_pixels=budget.longest_edge,
    )
    return found
