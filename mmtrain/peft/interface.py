"""What a parameter-efficient method is.

A method is one file in `mmtrain/peft/methods/` that exports `METHOD`; its name is the file's
name. It is attached after the base is loaded (transformers leaves parameters that are created
inside a model class which is then loaded as uninitialised memory), and says what it added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel

from mmtrain.models.interface import AttentionShape, Family

if TYPE_CHECKING:
    import torch
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
    label: str = ""  # tells several blocks of one component apart

    @property
    def block_name(self) -> str:
        """Its block in the run file."""
        return f"{self.component}/{self.label}" if self.label else self.component

    @property
    def adapter(self) -> str:
        """The name of what is added."""
        return f"{self.component}-{self.label}" if self.label else self.component


@dataclass(frozen=True)
class Computed:
    """A tensor of an exported adapter that no parameter is: made of some, in fp32 on the host."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    combine: Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Added:
    """What a method did to a model."""

    trained: tuple[str, ...]  # parameters by full name; the base's own may be among them
    # Buffers that belong to the adapter, stored in fp32. What does not train is no parameter:
    # ZeRO-3 leaves buffers whole on every rank, and a resume builds them again from seed and name.
    stored: tuple[str, ...] = ()
    # Whether the adapted model equals the base before the first step; None: not known here.
    starts_at_identity: bool | None = True
    batch_coupled: bool = False  # True exempts the method from split invariance
    auxiliary: Mapping[str, float] = field(default_factory=dict)  # further losses -> weight
    # Key in an exported adapter -> what stands there instead of the parameters it is made of.
    computed: Mapping[str, Computed] = field(default_factory=dict)

    @property
    def copied(self) -> tuple[str, ...]:
        """What trains and is exported as it is."""
        used = {name for one in self.computed.values() for name in one.names}
        return tuple(name for name in self.trained if name not in used)


@dataclass(frozen=True)
class Surroundings:
    """What a run file says of where a method is to go: known before anything is loaded."""

    family: Family
    component: str
    zero_stage: int
    recomputes: bool  # activations, in backward
    quantized: bool  # whether the component's linears are


class Method(Protocol):
    """One PEFT method."""

    options: type[BaseModel]
    needs_linears: bool  # False: the run file names no sublayers, the component may have none
    merges: bool  # whether what it adds can be folded into base weights
    # Modules that make peft know its adapters, for who loads one; None: mmtrain alone reads them.
    imports: tuple[str, ...] | None

    def conflicts(self, options: object, around: Surroundings) -> Sequence[str]:
        """Why it cannot go there; what to do behind each reason."""

    def attach(self, target: Target, options: object, seed: int) -> Added:
        """Add parameters in place, initialised by (seed, module name); on meta, to be counted."""

    def export_config(self, target: Target, options: object, base: str) -> dict[str, object]:
        """The adapter_config.json of the standard PEFT format."""

    def export_name(self, name: str, target: Target) -> str:
        """The key in adapter_model.safetensors of a tensor that was added."""

    def merge(self, target: Target) -> None:
        """Fold what was added into the base weights, in place; an error with the reason if not."""
