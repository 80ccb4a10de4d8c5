"""AdamW's parameter groups and the learning-rate schedule, both pure functions of the run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch

from mmtrain.config.schema import ComponentConfig, OptimConfig
from mmtrain.distributed import full_shape


def parameter_groups(
    parameters: Mapping[str, torch.nn.Parameter],
    owner: Mapping[str, str],
    components: Mapping[str, ComponentConfig],
    optim: OptimConfig,
) -> list[dict[str, object]]:
    """One group per component and weight decay; biases and norms are not decayed."""
    members: dict[tuple[str, float], list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters.items():
        decay = components[owner[name]].weight_decay
        decay = optim.weight_decay if decay is None else decay
        members[owner[name], decay if len(full_shape(parameter)) > 1 else 0.0].append(parameter)
    peaks = {name: block.lr or optim.lr for name, block in components.items()}
    return [
        {
            "params": group,
            "lr": peaks[component],
            "peak_lr": peaks[component],
            "weight_decay": decay,
            "name": component,
        }
        for (component, decay), group in members.items()
    ]


def total_steps(optim: OptimConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    if optim.max_steps is not None:
        return optim.max_steps
    return (optim.epochs or 1) * steps_per_epoch


def warmup_steps(optim: OptimConfig, total: int) -> int:
    """Steps of linear warm-up."""
    if optim.warmup_steps is not None:
        return min(optim.warmup_steps, total)
    return math.ceil((optim.warmup_ratio or 0.0) * total)


def learning_rate(
    peak: float, step: int, total: int, steps_per_epoch: int, optim: OptimConfig
) -> float:
    """The rate used in optimizer step `step` (from 0). `min_lr` scales with a group's own peak."""
    warmup = warmup_steps(optim, total)
    scale = peak / optim.lr
    if step < warmup:
        start = optim.warmup_start_lr * scale
        return start + (peak - start) * (step + 1) / warmup
    if optim.schedule == "constant":
        return peak
    if optim.schedule_unit == "epoch":
        # The rate changes between epochs only: epoch e of E uses the value at e / E.
        step = max((step // steps_per_epoch) * steps_per_epoch, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    floor = optim.min_lr * scale
    if optim.schedule == "linear":
        return floor + (peak - floor) * (1 - progress)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
