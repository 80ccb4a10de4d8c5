"""A run's trained model, for Python that asks it: what the card of its adapter shows."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from mmtrain.assemble import build_model
from mmtrain.config.load import load_run_file
from mmtrain.models.interface import Processor
from mmtrain.training.trained import exported_files, load_trained


def trained_model(
    run_dir: str, base: str, vision_tower: str | None = None
) -> tuple[nn.Module, Processor]:
    """The base with what the run exported, in one process; ready to answer.

    Where the base lies is said apart: paths in a run file hold in the folder it was started from.
    """
    folder = Path(run_dir)
    places = {"init_from": None, "model.checkpoint": base, "model.vision_tower": vision_tower}
    overrides = [f"{key}={json.dumps(place)}" for key, place in places.items()]
    config = load_run_file(folder / "run.yaml", overrides)
    assembled = build_model(config, None, trains=False)
    load_trained(assembled, exported_files(folder / "adapter"), f"{folder}: no longer fits")
    return assembled.model.eval().requires_grad_(False), assembled.processor
