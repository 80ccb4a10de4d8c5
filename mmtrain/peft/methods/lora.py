"""LoRA through peft: W x + (alpha / r) B A dropout(x)."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from mmtrain.peft.interface import Added, Target

if TYPE_CHECKING:
    import torch


class LoraOptions(BaseModel):
    """Options of a component block with `method: lora`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(16, ge=1, description="rank")
    alpha: float = Field(32, gt=0, description="scaling is alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")


class Lora:
    """The method plug-in."""

    options = LoraOptions
    needs_linears = True

    def attach(self, target: Target, options: Any, seed: int) -> Added:
        """Inject one adapter named after the component; A is keyed, B is zero."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        from mmtrain.models.dropout import KeyedDropout, scope_of

        model, name = target.model, target.component
        config = LoraConfig(
            r=options.r,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            bias="none",
            target_modules=target.pattern,
            init_lora_weights=False,  # initialised below, keyed by module name
        )
        with warnings.catch_warnings():
            # One adapter per component is how several components are adapted.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(config, model, adapter_name=name)
        for other in model.modules():
            if isinstance(other, LoraLayer):
                # peft activates only the adapter injected last; each layer carries exactly one.
                other.set_adapter(list(other.lora_A.keys()))
        for module_name, layer in _layers(target):
            _initialise(layer.lora_A[name], layer.lora_B[name], seed, module_name)
            setattr(layer, "forward", partial(_forward, layer, name))
            setattr(layer.lora_A[name], "forward", partial(_narrow, layer.lora_A[name]))
            layer.lora_dropout[name] = KeyedDropout(
                options.dropout, module_name, name, scope_of(model)
            )
        parts = (f"{n}.lora_{part}.{name}.weight" for n, _ in _layers(target) for part in "AB")
        return Added(tuple(parts))

    def export_config(self, target: Target, options: Any, base: str) -> dict[str, Any]:
        """adapter_config.json as peft reads it."""
        return {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": base,
            "r": options.r,
            "lora_alpha": options.alpha,
            "lora_dropout": options.dropout,
            "bias": "none",
            "target_modules": target.pattern,
            "inference_mode": True,
        }

    def export_name(self, name: str, target: Target) -> str:
        """peft's key: its wrapper's prefix, without the adapter's name."""
        return "base_model.model." + name.replace(f".{target.component}.weight", ".weight")

    def merge(self, target: Target) -> None:
        """Fold the adapter into the base weights, in place."""
        for _, layer in _layers(target):
            layer.merge(adapter_names=[target.component])


def _layers(target: Target) -> list[tuple[str, Any]]:
    """What stands in the place of each selected linear."""
    return [(linear.name, target.model.get_submodule(linear.name)) for linear in target.linears]


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
