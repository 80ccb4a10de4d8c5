"""What a parameter-efficient method is.

A method is one file in `mmtrain/peft/methods/` that exports `METHOD`; its name is the file's
name. It is attached after the base is loaded (transformers leaves parameters that are created
inside a model class which is then loaded as uninitialised memory).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Placement:
    """Where a method goes: the modules a component block selected, by full name."""

    component: str
    module_names: tuple[str, ...]
    pattern: str  # one anchored regex that matches exactly these modules, for exported adapters


class Method(Protocol):
    """One PEFT method."""

    options: type[BaseModel]
    starts_at_identity: bool  # the adapted model equals the base before the first step
    batch_coupled: bool  # True exempts the method from split invariance

    def attach(self, model: torch.nn.Module, placement: Placement, options: Any, seed: int) -> None:
        """Add the method's parameters in place, initialised by (seed, module name)."""

    def owns(self, parameter_name: str, component: str) -> bool:
        """Whether a parameter of the adapted model belongs to this method on this component."""

    def count(self, shapes: Mapping[str, tuple[int, int]], options: Any) -> int:
        """Parameters the method adds to modules of these (out, in) shapes."""

    def export_config(self, placement: Placement, options: Any, base: str) -> dict[str, Any]:
        """The adapter_config.json of the standard PEFT format."""

    def merge(self, model: torch.nn.Module, component: str) -> None:
        """Fold the method's parameters into the base weights, in place."""

    def export_name(self, parameter_name: str, component: str) -> str:
        """The parameter's key in adapter_model.safetensors."""
