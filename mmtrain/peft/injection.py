"""Putting tuners of the peft library where a target says, and what peft calls their tensors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from mmtrain.peft.interface import Linear, Target

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

_PREFIX = "base_model.model."


def inject(target: Target, config: PeftConfig, seed: int = 0) -> list[tuple[Linear, Any]]:
    """Wrap the selected linears by one adapter that has the target's name; linear, wrapper.

    What peft draws, it draws from a generator of its own, keyed by seed and adapter.
    """
    import torch
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import PeftType

    from mmtrain.models.dropout import stable_hash

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # One adapter per component is how several components are adapted.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        torch.manual_seed(stable_hash("peft", seed, target.adapter))
        # As `inject_adapter_in_model`, which refuses tuners that keep state for all their layers.
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)](target.model, config, target.adapter)
    for layer in target.model.modules():
        if isinstance(layer, BaseTunerLayer):
            # peft activates only the adapter injected last; each layer carries exactly one.
            layer.set_adapter(_adapters_of(layer))
    return wrapped(target)


def wrapped(target: Target) -> list[tuple[Linear, Any]]:
    """What stands in the place of each selected linear."""
    return [(linear, target.model.get_submodule(linear.name)) for linear in target.linears]


def _adapters_of(layer: Any) -> list[str]:
    return sorted({key for name in layer.adapter_layer_names for key in getattr(layer, name)})


def key_dropout(target: Target, linear: Linear, layer: Any) -> None:
    """Keyed masks in the place of peft's dropout modules."""
    from torch import nn

    from mmtrain.models.dropout import KeyedDropout, scope_of

    scope = scope_of(target.model)
    found = [(name, one) for name, one in layer.named_modules() if type(one) is nn.Dropout]
    for name, one in found:
        if name.startswith("base_layer."):
            continue
        owner, _, leaf = name.rpartition(".")
        keyed = KeyedDropout(one.p, linear.name, target.component, scope)
        layer.get_submodule(owner).add_module(leaf, keyed)


def fill(
    parameter: torch.nn.Parameter, initialise: Callable[[torch.Tensor], object], *key: object
) -> None:
    """Initialise from a generator of its own: in what order parameters are made is all one."""
    import torch

    from mmtrain.models.dropout import stable_hash

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(stable_hash(*key))
        weight = torch.empty(parameter.shape)
        initialise(weight)
        parameter.copy_(weight)


def added_names(target: Target) -> tuple[str, ...]:
    """Parameters of the target's adapter, by full name."""
    return tuple(
        f"{linear.name}.{name}"
        for linear, layer in wrapped(target)
        for name, _ in layer.named_parameters()
        if not name.startswith("base_layer.")
    )


def export_name(name: str, target: Target) -> str:
    """peft's key: its wrapper's prefix, without the adapter's name."""
    return _PREFIX + re.sub(rf"\.{re.escape(target.adapter)}(?=(\.weight)?$)", "", name)


def export_config(config: PeftConfig, base: str) -> dict[str, object]:
    """adapter_config.json of an adapter that is only read from now on."""
    settings = config.to_dict()
    settings |= {"base_model_name_or_path": base, "inference_mode": True, "task_type": None}
    return {key: _plain(value) for key, value in settings.items()}


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else value


def merge(target: Target) -> None:
    """Fold the adapter into the base weights, in place, as peft does."""
    for _, layer in wrapped(target):
        layer.merge(adapter_names=[target.adapter])


def pattern_of(linears: Iterable[Linear]) -> str:
    """An anchored pattern of these, of the same kinds in any layer."""
    kinds = {re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(one.name)) for one in linears}
    return f"^(?:{'|'.join(sorted(kinds))})$" if kinds else ""
