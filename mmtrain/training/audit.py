"""The checks of the first step: what should train, trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
            "Check that the data uses it (images for vision and connector), or freeze it.",
        )


def refuse_bad_loss(bad_ids_per_rank: Sequence[Sequence[str]]) -> None:
    """NaN or Inf anywhere stops every rank before the step, naming the samples."""
    raise TrainingError(
        f"the loss is NaN or infinite for samples on {_named(bad_ids_per_rank)}."
        " No step was taken.",
        "Look at these samples, lower optim.lr, or train in fp32.",
    )


def refuse_bad_gradients(
    squared_norms: Mapping[str, float],
    owner: Mapping[str, str],
    ids_per_rank: Sequence[Sequence[str]],
) -> None:
    """A finite loss may have a gradient that is not: every rank stops before the step."""
    bad = [name for name, squared in squared_norms.items() if not math.isfinite(squared)]
    # All finite: only the sum of the squares is beyond fp32, and with it Adam's second moment.
    bad = bad or [max(squared_norms, key=lambda name: squared_norms[name])]
    components = ", ".join(sorted({owner[name] for name in bad}))
    raise TrainingError(
        f"the gradient of {components} is NaN or infinite ({len(bad)} of {len(squared_norms)}"
        f" parameters, e.g. {bad[0]}), the loss is not; the step's samples are on"
        f" {_named(ids_per_rank)}. No step was taken.",
        "Look at these samples, lower optim.lr, or train in fp32.",
    )


def _named(ids_per_rank: Sequence[Sequence[str]]) -> str:
    """Samples by rank, as many as a person reads."""
    return "; ".join(
        f"rank {rank}: {', '.join(ids[:8])}" + (f" and {len(ids) - 8} more" if ids[8:] else "")
        for rank, ids in enumerate(ids_per_rank)
        if ids
    )
