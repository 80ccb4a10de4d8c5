"""From examples to padded tensors: texts, packed patches, and positions in three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from mmtrain.models import batching
from mmtrain.models.families.qwen2_vl.encoding import num_tokens
from mmtrain.models.families.qwen2_vl.processing import Processor
from mmtrain.models.families.qwen2_vl.shapes import image_tokens
from mmtrain.models.interface import Batch, BatchSize, Example

COLOURS = 3


def collate(examples: Sequence[Example], processor: Processor, generating: bool = False) -> Batch:
    """Padded texts with their positions; the patches of all images one after another."""
    tensors = batching.text_tensors(examples, processor.image_token_id, generating)
    mask = tensors["attention_mask"]
    rows = batching.token_rows(examples, generating)
    tensors["position_ids"] = padded_positions(examples, rows, processor, mask)
    images, grid = image_tensors(examples, processor)
    if not generating:
        tensors |= batching.answer_targets(examples, mask.shape[1])
    return batching.make_batch(examples, tensors | images, grid=grid)


def planned_batch(config: Any, size: BatchSize) -> Batch:
    """A batch of this size with square images of the usual size, to measure what it costs."""
    vision, image_id = config.vision_config, config.image_token_id
    patch, frames = vision.patch_size, vision.temporal_patch_size
    cutter = SimpleNamespace(
        temporal_patch_size=frames, patch_size=patch, merge_size=vision.spatial_merge_size
    )
    processor = Processor(None, cutter, image_id, frozenset(), 0, (), (), None)
    num_patches = image_tokens(config, "vision")
    side = math.isqrt(num_patches)
    pixels = torch.zeros(num_patches, COLOURS * frames * patch**2)
    image = [image_id] * image_tokens(config, "llm")
    examples = batching.planned_examples(size, image, pixels, {"grid": [(1, side, side)]})
    return collate(examples, processor)


def image_tensors(
    examples: Sequence[Example], processor: Processor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Patches with their dropout keys, and the grid [images, 3] that they lie in.

    Without any image, those of a blank one that nothing reads.
    """
    pixels = [rows for example in examples for rows in example.pixels]
    grids = [grid for example in examples for grid in example.extras["grid"]]
    keys = batching.image_keys(examples)
    num_read = sum(num_tokens(grid, processor.merge_size) for grid in grids)
    if not pixels:
        side = processor.merge_size
        cutter = processor.image_processor
        width = COLOURS * cutter.temporal_patch_size * cutter.patch_size**2
        pixels, grids, keys = [torch.zeros(side * side, width)], [(1, side, side)], [0]
    counts = torch.tensor([len(rows) for rows in pixels])
    tensors = {
        "pixel_values": torch.cat(pixels),
        "patch_keys": torch.tensor(keys).repeat_interleave(counts),
        "patch_index": torch.cat([torch.arange(count) for count in counts.tolist()]),
        "feature_index": torch.arange(num_read),
    }
    return tensors, torch.tensor(grids)


def padded_positions(
    examples: Sequence[Example],
    rows: Sequence[Sequence[int]],
    processor: Processor,
    attention_mask: torch.Tensor,
) -> torch.Tensor:
    """Positions [3, rows, tokens] (time, height, width), zero where there is padding."""
    padded = torch.zeros(3, *attention_mask.shape, dtype=torch.long)
    for number, (example, row) in enumerate(zip(examples, rows, strict=True)):
        found = positions(row, example.extras["grid"], processor)
        padded[:, number, attention_mask[number].bool()] = found
    return padded


def positions(
    ids: Sequence[int], grids: Sequence[Sequence[int]], processor: Processor
) -> torch.Tensor:
    """Positions [3, tokens] of one unpadded row.

    Text advances all three by one per token. An image's tokens share their time and count height
    and width from there; the text behind it goes on after the image's longer side.
    """
    merge = processor.merge_size
    parts, position, start = [], 0, 0
    for _, height, width in grids:
        first = list(ids).index(processor.image_token_id, start)
        parts.append(_text_positions(position, first - start))
        position += first - start
        high, wide = torch.arange(height // merge), torch.arange(width // merge)
        grid = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), high, wide)
        parts.append(grid.T + position)
        position += max(height, width) // merge
        start = first + len(grid)
    parts.append(_text_positions(position, len(ids) - start))
    return torch.cat(parts, dim=1)


def _text_positions(first: int, count: int) -> torch.Tensor:
    return (torch.arange(count) + first).expand(3, -1)
