"""What a parameter-efficient method is.

A method is one file in `mmtrain/peft/methods/` that exports `METHOD`; its name is the file's
name. It is attached after the base is loaded (transformers leaves parameters that are created
inside a model class which is then loaded as uninitialised memory), and says what it added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel

from mmtrain.models.interface import AttentionShape

if TYPE_CHECKING:
    from torch import nn

    from mmtrain.models.taps import OfferedTaps


@dataclass(frozen=True)
class Linear:
    """One linear layer that a component block selected."""

    name: str
    sublayer: str  # of several that hold it, the first that was asked for
    role: str
    layer: int | None  # None outside of numbered blocks
    shape: tuple[int, ...]  # (out, in) of the whole weight, also where ZeRO-3 left a piece of it


@dataclass(frozen=True)
class Target:
    """All that a method may know of where it goes."""

    component: str
    model: nn.Module
    parameters: tuple[str, ...] = ()  # the component's own, by full name
    linears: tuple[Linear, ...] = ()  # those selected; none where the method needs none
    pattern: str = ""  # one anchored regex that matches exactly these, for exported adapters
    # layer number -> names of its blocks, of the layers asked for (T5 has two of each number)
    blocks: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    attention: AttentionShape | None = None
    taps: OfferedTaps | None = None


@dataclass(frozen=True)
class Added:
    """What a method did to a model."""

    trained: tuple[str, ...]  # parameters by full name; the base's own may be among them
    # Buffers that belong to the adapter, stored in fp32. What does not train is no parameter:
    # ZeRO-3 leaves buffers whole on every rank, and a resume builds them again from seed and name.
    stored: tuple[str, ...] = ()
    starts_at_identity: bool = True  # the adapted model equals the base before the first step
    batch_coupled: bool = False  # True exempts the method from split invariance
    auxiliary: Mapping[str, float] = field(default_factory=dict)  # further losses -> weight


class Method(Protocol):
    """One PEFT method."""

    options: type[BaseModel]
    needs_linears: bool  # False: the run file names no sublayers, the component may have none

    def attach(self, target: Target, options: Any, seed: int) -> Added:
        """Add parameters in place, initialised by (seed, module name); on meta, to be counted."""

    def export_config(self, target: Target, options: Any, base: str) -> dict[str, Any]:
        """The adapter_config.json of the standard PEFT format."""

    def export_name(self, name: str, target: Target) -> str:
        """The key in adapter_model.safetensors of a tensor that was added."""

    def merge(self, target: Target) -> None:
        """Fold what was added into the base weights, in place."""
