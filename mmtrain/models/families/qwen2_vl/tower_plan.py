"""What the towers compute of the images' sizes, computed on the host.

Left to themselves they do it from a grid on the GPU, and every block of theirs waits there for the
lengths of its images.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import vision_utils
from transformers.utils.generic import get_max_seqlen, is_flash_attention_requested

_LONGEST = {"cu_seqlens": "max_seqlen", "cu_window_seqlens": "max_window_seqlen"}


def plan(tower: Any, grid: torch.Tensor, device: torch.device) -> dict[str, object]:
    """The arguments that make a tower compute none of this, from a grid on the host."""
    merge = tower.spatial_merge_size
    tensors = {"position_ids": vision_utils.get_vision_position_ids(grid, merge)}
    ends = {"cu_seqlens": vision_utils.get_vision_cu_seqlens(grid)}
    if hasattr(tower, "window_size"):  # Qwen2.5's
        tensors["window_index"], ends["cu_window_seqlens"] = vision_utils.get_vision_window_index(
            grid, merge, tower.window_size, tower.patch_size
        )
    if hasattr(tower, "num_grid_per_side"):  # Qwen3's
        taps = vision_utils.get_vision_interpolation_indices_and_weights(
            grid,
            tower.num_grid_per_side,
            tower.interpolation_mode,
            tower.interpolation_align_corners,
            merge,
        )
        tensors["interp_indices"], tensors["interp_weights"] = taps
    lengths = {}
    if is_flash_attention_requested(tower.config):
        lengths = {
            _LONGEST[name]: get_max_seqlen(found, tower.config) for name, found in ends.items()
        }
        # Its kernels read them; other attention only cuts its inputs there.
        tensors, ends = tensors | ends, {}
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    return {**moved, **ends, **lengths}
