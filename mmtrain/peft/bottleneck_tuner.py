"""Bottleneck adapters as a tuner of the peft library, which has none.

A bottleneck is up(act(down(dropout(x)))). Serial, it stands before a linear (x + bottleneck(x) is
what the linear reads) or behind it (y + bottleneck(y) is what it gives); parallel, it is added to
what the linear gives and reads what the linear reads. `register` makes peft's own loading find it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import nn

NAME = "BOTTLENECK"
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}
FORMS = ("before", "behind", "parallel")


@dataclass
class BottleneckConfig(PeftConfig):
    """What adapter_config.json says."""

    target_modules: str | list[str] | None = None
    behind_modules: str = ""  # pattern of those that a serial bottleneck stands behind
    size: int = 64
    activation: str = "tanh"
    scaling: float = 1.0
    dropout: float = 0.0
    parallel: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = getattr(PeftType, NAME)

    def form_of(self, module_name: str) -> str:
        """Where the bottleneck of a linear stands."""
        if self.parallel:
            return "parallel"
        return "behind" if re.fullmatch(self.behind_modules, module_name) else "before"


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A linear with bottlenecks by adapter name."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_form", "bottleneck_scaling")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, form: str
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.bottleneck_act = nn.ModuleDict()
        self.bottleneck_scaling: dict[str, float] = {}
        self.bottleneck_form: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, config, form)

    def update_layer(self, adapter_name: str, config: BottleneckConfig, form: str) -> None:
        """Add one bottleneck, N(0, 0.02) in both matrices."""
        linear: Any = self.get_base_layer()
        reads = linear.out_features if form == "behind" else linear.in_features
        gives = linear.in_features if form == "before" else linear.out_features
        self.bottleneck_down[adapter_name] = nn.Linear(reads, config.size, bias=False)
        self.bottleneck_up[adapter_name] = nn.Linear(config.size, gives, bias=False)
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.bottleneck_act[adapter_name] = ACTIVATIONS[config.activation]()
        self.bottleneck_scaling[adapter_name] = config.scaling
        self.bottleneck_form[adapter_name] = form
        for part in (self.bottleneck_down, self.bottleneck_up):
            for weight in part[adapter_name].parameters():
                nn.init.normal_(weight, std=0.02)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        active = [name for name in self.active_adapters if name in self.bottleneck_down]
        if self.disable_adapters:
            active = []
        by_form = {
            form: [name for name in active if self.bottleneck_form[name] == form] for form in FORMS
        }
        reads = x
        for name in by_form["before"]:
            reads = reads + self._bottleneck(name, reads)
        gives = self.base_layer(reads, *args, **kwargs)
        for name in by_form["behind"]:
            gives = gives + self._bottleneck(name, gives)
        for name in by_form["parallel"]:
            gives = gives + self._bottleneck(name, x)
        return gives

    def _bottleneck(self, name: str, x: torch.Tensor) -> torch.Tensor:
        down: Any = self.bottleneck_down[name]
        up = self.bottleneck_up[name]
        dropped = self.bottleneck_dropout[name](x.to(down.weight.dtype))
        narrow = self.bottleneck_act[name](down(dropped))
        return (up(narrow) * self.bottleneck_scaling[name]).to(x.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not defined: a non-linear function is no part of a matrix."""
        raise TypeError("not merged: a bottleneck has an activation between its two matrices")


class BottleneckModel(BaseTuner):
    """peft's tuner."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        form = peft_config.form_of(current_key)
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config, form)
            return
        if not isinstance(target, nn.Linear):
            raise ValueError(f"{current_key} is a {type(target).__name__}, not a linear layer")
        layer = BottleneckLayer(target, adapter_name, peft_config, form)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def register() -> None:
    """Make peft know the tuner: its list of types is closed, so a member is put in by hand."""
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    type.__setattr__(PeftType, NAME, member)
    register_peft_method(name=NAME.lower(), config_cls=BottleneckConfig, model_cls=BottleneckModel)


register()
