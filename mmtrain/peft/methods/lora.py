"""LoRA through peft: W x + (alpha / r) B A dropout(x)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from mmtrain.peft.interface import Placement

if TYPE_CHECKING:
    import torch
    from torch import nn


class LoraOptions(BaseModel):
    """Options of a component block with `method: lora`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(16, ge=1, description="rank")
    alpha: float = Field(32, gt=0, description="scaling is alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")


class Lora:
    """The method plug-in."""

    options = LoraOptions
    starts_at_identity = True
    batch_coupled = False

    def attach(self, model: nn.Module, placement: Placement, options: Any, seed: int) -> None:
        """Inject one adapter named after the component; A is keyed, B is zero."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        from mmtrain.models.dropout import KeyedDropout, scope_of

        name = placement.component
        config = LoraConfig(
            r=options.r,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            bias="none",
            target_modules=placement.pattern,
            init_lora_weights=False,  # initialised below, keyed by module name
        )
        with warnings.catch_warnings():
            # One adapter per component is how several components are adapted.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(config, model, adapter_name=name)
        for module_name, layer in model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            # peft activates only the adapter injected last; each layer carries exactly one.
            layer.set_adapter(list(layer.lora_A.keys()))
            if name not in layer.lora_A:
                continue
            _initialise(layer.lora_A[name], layer.lora_B[name], seed, module_name)
            setattr(layer, "forward", partial(_forward, layer, name))
            setattr(layer.lora_A[name], "forward", partial(_narrow, layer.lora_A[name]))
            layer.lora_dropout[name] = KeyedDropout(
                options.dropout, module_name, name, scope_of(model)
            )

    def owns(self, parameter_name: str, component: str) -> bool:
        """Whether a parameter is this component's A or B."""
        return parameter_name.endswith(
            (f".lora_A.{component}.weight", f".lora_B.{component}.weight")
        )

    def count(self, shapes: Mapping[str, tuple[int, int]], options: Any) -> int:
        """r (in + out) per module."""
        return sum(options.r * (out + into) for out, into in shapes.values())

    def export_config(self, placement: Placement, options: Any, base: str) -> dict[str, Any]:
        """adapter_config.json as peft reads it."""
        return {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": base,
            "r": options.r,
            "lora_alpha": options.alpha,
            "lora_dropout": options.dropout,
            "bias": "none",
            "target_modules": placement.pattern,
            "inference_mode": True,
        }

    def export_name(self, parameter_name: str, component: str) -> str:
        """peft's key: its wrapper's prefix, without the adapter's name."""
        return "base_model.model." + parameter_name.replace(f".{component}.weight", ".weight")

    def merge(self, model: nn.Module, component: str) -> None:
        """Fold the adapter into the base weights, in place."""
        from peft.tuners.lora import LoraLayer

        for layer in model.modules():
            if isinstance(layer, LoraLayer) and component in layer.lora_A:
                layer.merge(adapter_names=[component])


def _forward(layer: Any, name: str, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """peft's sum, scaled where it is narrow and added in place: two passes over the output less.

    The branches are still called as modules: under ZeRO-3 their weights arrive by module hooks.
    What a merged or a switched-off adapter means, peft's own forward knows.
    """
    if layer.merged or layer.disable_adapters:
        return type(layer).forward(layer, x, *args, **kwargs)
    out = layer.base_layer(x, *args, **kwargs)
    narrow = layer.lora_A[name](x, dropout=layer.lora_dropout[name])
    added = layer.lora_B[name](narrow * layer.scaling[name])
    return out.add_(added) if _is_plain(layer.base_layer) else out + added


def _narrow(linear: Any, x: torch.Tensor, dropout: Any = None) -> torch.Tensor:
    """A's own forward; with its dropout as one function, of which backward keeps x alone.

    peft's forward drops first and gives none. By name: DeepSpeed's hooks look at all else.
    """
    if dropout is None:
        return type(linear).forward(linear, x)
    return dropout.then_linear(x, linear.weight)


def _is_plain(layer: Any) -> bool:
    """Whether a layer's output is its own, and its backward pass does not read it."""
    from torch import nn

    return type(layer) is nn.Linear


def _initialise(a: Any, b: Any, seed: int, module_name: str) -> None:
    """Kaiming-uniform A from a generator of its own, zero B."""
    import torch

    from mmtrain.models.dropout import stable_hash

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(stable_hash("lora", seed, module_name))
        weight = torch.empty(a.weight.shape)
        torch.nn.init.kaiming_uniform_(weight, a=5**0.5)
        a.weight.copy_(weight)
        b.weight.zero_()


METHOD = Lora()
