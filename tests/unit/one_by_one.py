"""Logits of stored samples by a model of anybody's; imported where mmtrain must not be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def logits_one_by_one(model: Any, run_dir: Path) -> dict[str, torch.Tensor]:
    """For each sample of `inputs.safetensors`, whose names are row.argument."""
    inputs, found = load_file(run_dir / "inputs.safetensors"), {}
    for row in sorted({name.partition(".")[0] for name in inputs}):
        given = {n.partition(".")[2]: t for n, t in inputs.items() if n.startswith(f"{row}.")}
        if "pixel_values" in given:
            given["pixel_values"] = given["pixel_values"].to(model.dtype)
        for module in model.modules():
            if hasattr(module, "rope_deltas"):  # of the sample before
                module.rope_deltas = None
        with torch.no_grad():
            found[row] = model(**given).logits[0].float().contiguous()
    return found
