"""How many parameters a component block's method adds, counted where they cost nothing."""

from __future__ import annotations

import copy
from typing import Any

import torch

from mmtrain.config.schema import ComponentConfig
from mmtrain.models.interface import Family
from mmtrain.peft.trainable import make_trainable


def num_added(model: Any, family: Family, component: str, **block: Any) -> int:
    """On a copy of a model on the meta device."""
    adapted = copy.deepcopy(model)
    with torch.device("meta"):
        config = ComponentConfig(mode="peft", **block)
        trainable = make_trainable(adapted, family, {component: config}, seed=1)
    return sum(adapted.get_parameter(name).numel() for name in trainable.owner)
