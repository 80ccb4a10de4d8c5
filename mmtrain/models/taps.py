"""Where a method may listen to a family's forward, change what passes, or put prompts first.

A tap is a module's input or output that the family names. What listens gets the tensor and may
return another in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmtrain.errors import ConfigError, nearest
from mmtrain.models.interface import Tap

Listener = Callable[[torch.Tensor], "torch.Tensor | None"]
Loss = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


class Taps:
    """The taps of one model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._prompts: list[nn.Module] = []
        self._losses: dict[str, Loss] = {}

    def listen(self, tap: Tap, listener: Listener) -> None:
        """Call `listener` with what passes at a tap in every forward."""
        module = self._model.get_submodule(tap.module)
        if tap.end == "output":
            module.register_forward_hook(lambda _, inputs, output: listener(output))
        else:
            module.register_forward_pre_hook(lambda _, inputs: _replaced(listener, inputs))

    def insert_prompts(self, prompts: nn.Module) -> None:
        """Put what `prompts()` gives [tokens, channels] before every row of the language model."""
        self._prompts.append(prompts)

    def add_loss(self, name: str, loss: Loss) -> None:
        """Have `loss` called with the batch's tensors (`answer_targets`, …) at a forward's end."""
        assert name not in self._losses, name
        self._losses[name] = loss

    def prompts(self) -> torch.Tensor | None:
        """The embeddings before every row; None where there are none."""
        return torch.cat([one() for one in self._prompts]) if self._prompts else None

    def auxiliary_losses(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """By name."""
        return {name: loss(tensors) for name, loss in self._losses.items()}


@dataclass(frozen=True)
class OfferedTaps:
    """One model's taps under the names that its family gives them: what a method sees."""

    taps: Taps
    places: Mapping[str, Tap]

    def listen(self, name: str, listener: Listener) -> None:
        """Hear, or replace, what passes there."""
        if name not in self.places:
            fault = f"the method listens to '{name}', which this family does not show;"
            raise ConfigError([f"components: {fault} {nearest(name, self.places)}"])
        self.taps.listen(self.places[name], listener)

    def insert_prompts(self, prompts: nn.Module) -> None:
        """Put what `prompts()` gives [tokens, channels] before every row."""
        self.taps.insert_prompts(prompts)

    def add_loss(self, name: str, loss: Loss) -> None:
        """A further loss of every forward."""
        self.taps.add_loss(name, loss)


def _replaced(listener: Listener, inputs: tuple[Any, ...]) -> tuple[object, ...] | None:
    found = listener(inputs[0])
    return None if found is None else (found, *inputs[1:])


def taps_of(model: nn.Module) -> Taps:
    """The model's taps, made on first use."""
    taps = model.__dict__.get("taps")
    if taps is None:
        taps = model.__dict__["taps"] = Taps(model)
    return taps
