"""GPU memory of a run, estimated from sizes alone: no torch, no model, no GPU.

The sum is: weights + gradients + optimizer state + what backward keeps + logits + (ZeRO-3) gathered
parameters + a constant for the CUDA context, communication buffers and fragmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GIB = 2**30
CONTEXT_BYTES = 5 * GIB
STAGES = (0, 1, 2, 3)
# DeepSpeed keeps an fp32 master copy and two AdamW moments of what trains.
OPTIMIZER_BYTES_PER_PARAMETER = 12
# Logits, their fp32 copy and its gradient, where labels are.
LOGIT_BYTES_PER_ENTRY = 10


@dataclass(frozen=True)
class Blocks:
    """The transformer blocks of one component that backward passes through."""

    num_blocks: int
    hidden: int
    kv_width: int
    mlp_width: int
    num_tokens: int  # per micro-batch on one rank


@dataclass(frozen=True)
class Sizes:
    """What the estimate depends on. `num_live_parameters`: gathered at once under ZeRO-3."""

    weights: int  # base and adapters
    trainable: int
    bytes_per_weight: int
    blocks: Sequence[Blocks]
    vocabulary: int
    num_label_tokens: int  # per micro-batch on one rank
    num_live_parameters: int
    activation_checkpointing: bool


def memory_per_rank_bytes(sizes: Sizes, world_size: int) -> dict[int, float]:
    """Bytes per rank for each ZeRO stage."""
    fixed = (
        _activation_bytes(sizes)
        + LOGIT_BYTES_PER_ENTRY * sizes.vocabulary * sizes.num_label_tokens
        + CONTEXT_BYTES
    )
    gathered = sizes.bytes_per_weight * min(sizes.num_live_parameters, sizes.weights)
    return {
        stage: fixed
        + sizes.bytes_per_weight * sizes.weights / (world_size if stage == 3 else 1)
        + sizes.bytes_per_weight * sizes.trainable / (world_size if stage >= 2 else 1)
        + OPTIMIZER_BYTES_PER_PARAMETER * sizes.trainable / (world_size if stage >= 1 else 1)
        + (gathered if stage == 3 else 0)
        for stage in STAGES
    }


def _activation_bytes(sizes: Sizes) -> int:
    """With recomputation each block keeps its input, and one block at a time keeps everything."""
    total = 0
    for part in sizes.blocks:
        inside = 6 * part.hidden + 2 * part.kv_width + 3 * part.mlp_width
        if sizes.activation_checkpointing:
            kept = part.num_blocks * part.hidden + (inside if part.num_blocks else 0)
        else:
            kept = part.num_blocks * inside
        total += part.num_tokens * kept * sizes.bytes_per_weight
    return total
