"""MaPLe on a Q-Former: learned words, renewed in the first layers, and queries coupled to them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from mmtrain.errors import ConfigError, MmtrainError
from mmtrain.peft import injection
from mmtrain.peft.interface import Added, Surroundings, Target

_STD = 0.02


class MapleOptions(BaseModel):
    """Options of a component block with `method: maple`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int = Field(2, ge=1, description="learned words of each layer")
    depth: int = Field(9, ge=1, description="first layers that have their own")


class Maple:
    """The method plug-in."""

    options = MapleOptions
    needs_linears = False
    merges = False
    imports = None

    def conflicts(self, options: object, around: Surroundings) -> Sequence[str]:
        """It couples what a Q-Former reads of words and asks of pictures."""
        if around.component != "qformer":
            return ("method: 'maple' couples words and queries of a Q-Former; use qformer",)
        return ()

    def attach(self, target: Target, options: Any, seed: int) -> Added:
        """Words N(0, 0.02) as in the original; each coupling a linear of its own."""
        from torch import nn

        from mmtrain.peft.deep_prompts import CoupledPrompts, put_around

        shape = target.attention
        assert shape is not None
        place = f"components.{target.block_name}"
        if len(target.blocks) != shape.layers:
            raise ConfigError([f"{place}.layers: 'maple' says 'depth' instead; leave it out"])
        if options.depth > shape.layers:
            raise ConfigError(
                [f"{place}.depth: got {options.depth}; there are {shape.layers} layers"]
            )
        prompts = CoupledPrompts(options.depth, options.tokens, shape.hidden)
        prompts.to(next(target.model.parameters()).dtype)
        module_name = f"maple_{target.adapter}"
        normal = partial(nn.init.normal_, std=_STD)
        for name, parameter in prompts.named_parameters():
            draw = nn.init.zeros_ if name.endswith("bias") else normal
            injection.fill(parameter, draw, "maple", seed, target.adapter, name)
        target.model.add_module(module_name, prompts)
        layers = [target.model.get_submodule(name) for (name,) in target.blocks.values()]
        put_around(layers, prompts, options.tokens)
        names = (f"{module_name}.{name}" for name, _ in prompts.named_parameters())
        return Added(tuple(names), starts_at_identity=False)

    def export_config(self, target: Target, options: Any, base: str) -> dict[str, object]:
        """Read by mmtrain alone: peft has no such tuner."""
        return {
            "peft_type": "MAPLE",
            "base_model_name_or_path": base,
            "tokens": options.tokens,
            "depth": options.depth,
        }

    def export_name(self, name: str, target: Target) -> str:
        """The name in the model."""
        return name

    def merge(self, target: Target) -> None:
        """Not defined."""
        raise MmtrainError(
            "MaPLe's tokens cannot be folded into matrices: they are words beside the others.",
            "Use the adapter folder of the run.",
        )


METHOD = Maple()
