"""GPU memory of a run before it runs, rank by rank and part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmtrain.config.deepspeed import find_deepspeed_config
from mmtrain.config.schema import RunConfig
from mmtrain.models.interface import BatchSize
from mmtrain.models.quantization import BYTES
from mmtrain.planning.census import Census, count

GIB = 2**30
# CUDA context, communication buffers and fragmentation.
CONTEXT_BYTES = 5 * GIB
STAGES = (0, 1, 2, 3)
_FP32_BYTES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: float  # base and adapters
    gradients: float  # summed in fp32 over micro-steps
    optimizer: float  # AdamW's two moments, and the fp32 weights that it updates
    activations: float  # the most that forward, backward or the optimizer hold beside all else
    gathered: float  # parameters that ZeRO-3 holds whole at once
    context: float = CONTEXT_BYTES

    @property
    def total(self) -> float:
        """All parts."""
        return sum(vars(self).values())

    @property
    def allocated(self) -> float:
        """What `torch.cuda.max_memory_allocated` shows."""
        return self.total - self.context


def estimate(
    config: RunConfig, world_size: int, size: BatchSize | None = None
) -> Mapping[int, Memory]:
    """The memory of a run under each ZeRO stage; `size` is of one micro-batch on one rank."""
    return memory_by_stage(config, count(config, size), world_size)


def memory_by_stage(config: RunConfig, census: Census, world_size: int) -> Mapping[int, Memory]:
    """The same, of a run that is counted already; quantised weights cannot be sharded."""
    stages = STAGES[:3] if config.model.quantization else STAGES
    return {stage: _memory(config, census, world_size, stage) for stage in stages}


def _memory(config: RunConfig, census: Census, world_size: int, stage: int) -> Memory:
    is_bf16 = config.model.dtype == "bf16"
    if is_bf16 and stage == 0:
        stage = 1  # as in training
    weight_bytes = 2 if is_bf16 else _FP32_BYTES
    unquantized = census.base_params - census.quantized_params + census.peft_params
    weights: float = weight_bytes * unquantized
    if config.model.quantization is not None:
        weights += BYTES[config.model.quantization] * census.quantized_params
    trained_fp32 = _FP32_BYTES * census.trainable_params
    shares = {first: world_size if stage >= first else 1 for first in (1, 2, 3)}
    # Without ZeRO, fp32 weights are updated in place.
    states = 3 if stage else 2
    # The optimizer's own intermediate result, when activations are gone.
    in_step = trained_fp32 / shares[1]
    return Memory(
        weights=weights / shares[3],
        gradients=trained_fp32 / shares[2],
        optimizer=states * trained_fp32 / shares[1],
        activations=max(census.activation_bytes + weight_bytes * census.quantized_at_once, in_step),
        gathered=min(weights, weight_bytes * _num_live_parameters()) if stage == 3 else 0,
    )


def _num_live_parameters() -> int:
    zero3 = find_deepspeed_config("zero3")["zero_optimization"]
    return int(zero3["stage3_max_live_parameters"] + zero3["stage3_prefetch_bucket_size"])
