"""Bottleneck adapters: x + up(act(down(x))) before a linear or behind it, or beside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmtrain.errors import MmtrainError
from mmtrain.peft import injection
from mmtrain.peft.interface import Added, Linear, Surroundings, Target

if TYPE_CHECKING:
    from mmtrain.peft.bottleneck_tuner import BottleneckConfig

# Roles of a linear that closes a sublayer: what it gives is adapted, not what it reads.
_CLOSING = ("o", "down", "down_query")
_STD = 0.02


class BottleneckOptions(BaseModel):
    """Options of a component block with `method: bottleneck`; defaults as LLM-Adapters has them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(64, ge=1, description="width of the bottleneck")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on what the bottleneck reads")
    activation: Literal["tanh", "relu", "gelu"] = Field("tanh", description="between the matrices")
    scaling: float = Field(1.0, gt=0, description="factor on what the bottleneck gives")
    form: Literal["serial", "parallel"] = Field(
        "serial", description="serial: before or behind the linear; parallel: beside it"
    )
    init: Literal["normal", "identity"] = Field(
        "normal", description="normal: N(0, 0.02) in both matrices; identity: zero in the second"
    )


class Bottleneck:
    """The method plug-in."""

    options = BottleneckOptions
    needs_linears = True
    merges = False
    imports = ("mmtrain.peft.bottleneck_tuner",)

    def conflicts(self, options: object, around: Surroundings) -> Sequence[str]:
        """It goes wherever there are linears."""
        return ()

    def attach(self, target: Target, options: Any, seed: int) -> Added:
        """Wrap the linears; both matrices keyed by seed and module name."""
        from torch import nn

        from mmtrain.models.dropout import KeyedDropout, scope_of

        name, scope = target.adapter, scope_of(target.model)
        starts_at_identity = options.init == "identity"
        draw = partial(nn.init.normal_, std=_STD)
        for linear, layer in injection.inject(target, _config(target, options)):
            layer.bottleneck_dropout[name] = KeyedDropout(
                options.dropout, linear.name, target.component, scope
            )
            down, up = layer.bottleneck_down[name].weight, layer.bottleneck_up[name].weight
            injection.fill(down, draw, "bottleneck", "down", seed, linear.name)
            of_up = nn.init.zeros_ if starts_at_identity else draw
            injection.fill(up, of_up, "bottleneck", "up", seed, linear.name)
        return Added(injection.added_names(target), starts_at_identity=starts_at_identity)

    def export_config(self, target: Target, options: object, base: str) -> dict[str, object]:
        """adapter_config.json as our tuner reads it."""
        return injection.export_config(_config(target, options), base)

    def export_name(self, name: str, target: Target) -> str:
        """peft's key."""
        return injection.export_name(name, target)

    def merge(self, target: Target) -> None:
        """Not defined."""
        raise MmtrainError(
            "a bottleneck cannot be folded into a matrix: an activation lies in it.",
            "Use the adapter folder of the run.",
        )


def _config(target: Target, options: Any) -> BottleneckConfig:
    from mmtrain.peft.bottleneck_tuner import BottleneckConfig

    return BottleneckConfig(
        target_modules=target.pattern,
        behind_modules=injection.pattern_of(filter(_closes, target.linears)),
        size=options.size,
        activation=options.activation,
        scaling=options.scaling,
        dropout=options.dropout,
        parallel=options.form == "parallel",
    )


def _closes(linear: Linear) -> bool:
    return linear.role in _CLOSING


METHOD = Bottleneck()
