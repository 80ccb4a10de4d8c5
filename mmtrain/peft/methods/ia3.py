"""(IA)^3 through peft: learned scales on a linear's output, or on its input where a block ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from mmtrain.peft import injection
from mmtrain.peft.interface import Added, Surroundings, Target

if TYPE_CHECKING:
    from peft import IA3Config

# Roles of the linear that closes a feed-forward block: what it reads is scaled.
_FEED_FORWARD = ("down", "down_query")


class Ia3Options(BaseModel):
    """A component block with `method: ia3` has no options."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Ia3:
    """The method plug-in."""

    options = Ia3Options
    needs_linears = True
    merges = True
    imports = ()

    def conflicts(self, options: object, around: Surroundings) -> Sequence[str]:
        """It goes wherever there are linears."""
        return ()

    def attach(self, target: Target, options: object, seed: int) -> Added:
        """Scales of one: nothing is drawn."""
        injection.inject(target, self._config(target))
        return Added(injection.added_names(target))

    def _config(self, target: Target) -> IA3Config:
        from peft import IA3Config

        ends = [linear for linear in target.linears if linear.role in _FEED_FORWARD]
        return IA3Config(
            target_modules=target.pattern,
            feedforward_modules=injection.pattern_of(ends) or [],
        )

    def export_config(self, target: Target, options: object, base: str) -> dict[str, object]:
        """adapter_config.json as peft reads it."""
        return injection.export_config(self._config(target), base)

    def export_name(self, name: str, target: Target) -> str:
        """peft's key."""
        return injection.export_name(name, target)

    def merge(self, target: Target) -> None:
        """Scale the base weights, in place."""
        injection.merge(target)


METHOD = Ia3()
