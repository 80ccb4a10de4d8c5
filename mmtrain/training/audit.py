"""The checks of the first step: what should train, trains."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mmtrain.errors import TrainingError


def component_gradient_norms(
    squared_norms: Mapping[str, float], owner: Mapping[str, str]
) -> dict[str, float]:
    """Gradient norm per component from squared norms per parameter."""
    sums: dict[str, float] = {}
    for name, squared in squared_norms.items():
        sums[owner[name]] = sums.get(owner[name], 0.0) + squared
    return {component: math.sqrt(total) for component, total in sums.items()}


def refuse_dead_components(norms: Mapping[str, float]) -> None:
    """A component that should train but receives no gradient is an error, by name."""
    dead = sorted(component for component, norm in norms.items() if norm == 0.0)
    if dead:
        raise TrainingError(
            f"step 1 audit: no gradient reaches {', '.join(dead)}.",
            "Check that the data uses it (pictures for vision and connector), or freeze it.",
        )


def refuse_bad_loss(bad_ids_per_rank: list[list[str]]) -> None:
    """NaN or Inf anywhere stops every rank before the step, naming the samples."""
    found = [(rank, ids) for rank, ids in enumerate(bad_ids_per_rank) if ids]
    if found:
        named = "; ".join(f"rank {rank}: {', '.join(ids[:8])}" for rank, ids in found)
        raise TrainingError(
            f"the loss is NaN or infinite for samples on {named}. No step was taken.",
            "Look at these samples, lower optim.lr, or train in fp32.",
        )
