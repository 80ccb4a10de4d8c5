"""Freeze everything, attach what the run file asks for, and prove that exactly that trains."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmtrain import plugins
from mmtrain.config.schema import ComponentConfig
from mmtrain.models.interface import Family
from mmtrain.models.weights import FRESH
from mmtrain.peft.interface import Placement
from mmtrain.peft.placement import select, select_parameters

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("mmtrain")


@dataclass(frozen=True)
class Attachment:
    """One method on one component."""

    component: str
    method_name: str
    method: Any
    options: Any
    placement: Placement


@dataclass(frozen=True)
class Trainable:
    """What trains: every parameter's component, and how adapters were attached."""

    owner: dict[str, str]
    attachments: tuple[Attachment, ...]
    full_components: tuple[str, ...]

    def adapter_parameters(self, attachment: Attachment) -> list[str]:
        """The trained parameters of one attachment."""
        return [name for name in self.owner if attachment.method.owns(name, attachment.component)]

    def full_parameters(self, component: str) -> list[str]:
        """The trained base parameters of a component."""
        adapted = {name for a in self.attachments for name in self.adapter_parameters(a)}
        return [n for n, owner in self.owner.items() if owner == component and n not in adapted]


def make_trainable(
    model: nn.Module, family: Family, components: Mapping[str, ComponentConfig], seed: int
) -> Trainable:
    """Attach every method and set `requires_grad`, for exactly the declared parameters."""
    base_names = [name for name, _ in model.named_parameters()]
    module_names = [name for name, _ in model.named_modules()]
    declared: dict[str, str] = {}
    for component, block in components.items():
        if block.mode == "full":
            names = select_parameters(family, component, block, base_names)
            declared.update(dict.fromkeys(names, component))
    attachments = tuple(
        _attach(model, select(family, component, block, module_names), block, seed)
        for component, block in components.items()
        if block.mode == "peft"
    )
    # Order by the model, not by the run file: every rank and every resume sees the same order.
    owner = {}
    for name, parameter in model.named_parameters():
        owners = [a.component for a in attachments if a.method.owns(name, a.component)]
        if owners or name in declared:
            owner[name] = owners[0] if owners else declared[name]
        parameter.requires_grad_(name in owner)
    _prove_complete(model, set(base_names), set(declared), set(owner))
    _warn_of_frozen_noise(model)
    full = tuple(c for c, block in components.items() if block.mode == "full")
    return Trainable(owner, attachments, full)


def _attach(
    model: nn.Module, placement: Placement, block: ComponentConfig, seed: int
) -> Attachment:
    method = plugins.load("method", str(block.method))
    options = method.options.model_validate(block.method_options)
    method.attach(model, placement, options, seed)
    return Attachment(placement.component, str(block.method), method, options, placement)


def _prove_complete(
    model: nn.Module, base: set[str], declared: set[str], trained: set[str]
) -> None:
    """Nothing declared was lost, and nothing that a method added was left frozen."""
    assert declared <= trained, f"declared but not trained: {sorted(declared - trained)[:5]}"
    names = {name for name, _ in model.named_parameters()}
    added = {name for name in names - base if ".base_layer." not in name}
    assert added <= trained, f"added but frozen: {sorted(added - trained)[:5]}"


def _warn_of_frozen_noise(model: nn.Module) -> None:
    """Weights that `allow_reinit` drew at random and that nothing trains."""
    frozen = [
        name
        for name, parameter in model.named_parameters()
        if getattr(parameter, FRESH, False) and not parameter.requires_grad
    ]
    if frozen:
        log.warning(
            "%d tensors were initialised afresh and stay frozen, as %s: random weights that nothing"
            " trains; give their component mode 'full'",
            len(frozen),
            frozen[0],
        )
