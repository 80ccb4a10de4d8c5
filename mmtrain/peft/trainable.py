"""Freeze everything, attach what the run file asks for, and prove that exactly that trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmtrain import plugins
from mmtrain.config.schema import ComponentConfig
from mmtrain.models.interface import Family
from mmtrain.peft.interface import Placement
from mmtrain.peft.placement import select, select_parameters

if TYPE_CHECKING:
    from torch import nn


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
    owner: dict[str, str] = {}
    for component, block in components.items():
        if block.mode == "full":
            for name in select_parameters(family, component, block, base_names):
                owner[name] = component
    attachments = []
    for component, block in components.items():
        if block.mode == "peft":
            method = plugins.load("method", str(block.method))
            options = method.options.model_validate(block.method_options)
            placement = select(family, component, block, module_names)
            method.attach(model, placement, options, seed)
            attachments.append(
                Attachment(component, str(block.method), method, options, placement)
            )
    for name, parameter in model.named_parameters():
        for attachment in attachments:
            if attachment.method.owns(name, attachment.component):
                owner[name] = attachment.component
        parameter.requires_grad_(name in owner)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(owner), f"trained but not declared: {sorted(trained ^ set(owner))[:5]}"
    new = {name for name, _ in model.named_parameters()} - set(base_names)
    renamed = {name for name in new if ".base_layer." in name}
    assert new - renamed <= trained, f"added but frozen: {sorted(new - renamed - trained)[:5]}"
    full = tuple(c for c, block in components.items() if block.mode == "full")
    # Order by the model, not by the run file: every rank and every resume sees the same order.
    ordered = {name: owner[name] for name, _ in model.named_parameters() if name in owner}
    return Trainable(ordered, tuple(attachments), full)
