"""Any other tuner of the installed peft library that adapts linear layers, by its name there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mmtrain.errors import ConfigError, nearest
from mmtrain.peft import injection
from mmtrain.peft.interface import Added, Surroundings, Target

if TYPE_CHECKING:
    from peft import PeftConfig

# Tuners of peft that are not run here, and why.
_REFUSED = {
    "lora": "use method lora",
    "ia3": "use method ia3",
    "adalora": "it moves ranks between steps, which a resume would not repeat",
    "xlora": "it mixes adapters that were trained before",
    "poly": "it needs a task's number with every sample",
    "shadow": "it runs a second model",
    "trainable_tokens": "it adapts embeddings, not linear layers",
    "ln_tuning": "it trains norms, not linear layers",
}
# What the run file's own grammar says, or what would not be keyed.
_OURS = frozenset(
    "target_modules exclude_modules layers_to_transform layers_pattern modules_to_save"
    " inference_mode base_model_name_or_path peft_type task_type revision auto_mapping peft_version"
    " save_projection rank_pattern alpha_pattern".split()
)


class PeftLibraryOptions(BaseModel):
    """Options of a component block with `method: peft_library`; all others are the tuner's own."""

    model_config = ConfigDict(frozen=True, extra="allow")

    tuner: str = Field(description="peft's name of it in small letters: vera, loha, hra, …")

    @model_validator(mode="after")
    def _known_to_peft(self) -> PeftLibraryOptions:
        known = _config_classes()
        if self.tuner in _REFUSED:
            raise ValueError(f"'{self.tuner}' is not run here: {_REFUSED[self.tuner]}")
        if self.tuner not in known:
            raise ValueError(f"peft has no tuner '{self.tuner}'; {nearest(self.tuner, known)}")
        fields = {one.name for one in dataclasses.fields(known[self.tuner])} - _OURS
        for key in self.model_extra or {}:
            if key not in fields:
                raise ValueError(f"'{self.tuner}' has no '{key}'; {nearest(key, fields)}")
        return self


class PeftLibrary:
    """The method plug-in."""

    options = PeftLibraryOptions
    needs_linears = True
    merges = True
    imports = ()

    def conflicts(self, options: object, around: Surroundings) -> Sequence[str]:
        """How a tuner reads base weights is its own affair."""
        if around.zero_stage == 3:
            return ("method: 'peft_library' needs whole base weights, use zero2 or lower",)
        if around.quantized:
            return (
                "method: 'peft_library' needs whole base weights, leave model.quantization out",
            )
        return ()

    def attach(self, target: Target, options: Any, seed: int) -> Added:
        """Inject under a generator keyed by seed and adapter; dropout keyed as everywhere."""
        config = _config(target, options)
        layers = injection.inject(target, config, seed=seed)
        for linear, layer in layers:
            injection.key_dropout(target, linear, layer)
        _refuse_unkeyed_dropout(target, options, [layer for _, layer in layers])
        # Whether it starts at the base is known to the tuner alone.
        return Added(injection.added_names(target), starts_at_identity=None)

    def export_config(self, target: Target, options: Any, base: str) -> dict[str, object]:
        """adapter_config.json as peft reads it."""
        return injection.export_config(_config(target, options), base)

    def export_name(self, name: str, target: Target) -> str:
        """peft's key."""
        return injection.export_name(name, target)

    def merge(self, target: Target) -> None:
        """As peft does."""
        injection.merge(target)


def _config_classes() -> dict[str, Any]:
    """By small name: tuners that are put into layers, not prompts."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    return {
        str(one.value).lower(): PEFT_TYPE_TO_CONFIG_MAPPING[one]
        for one, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if issubclass(tuner, BaseTuner) and one in PEFT_TYPE_TO_CONFIG_MAPPING
    }


def _config(target: Target, options: Any) -> PeftConfig:
    config_class = _config_classes()[options.tuner]
    own = dict(options.model_extra or {})
    if any(field.name == "save_projection" for field in dataclasses.fields(config_class)):
        own["save_projection"] = False  # drawn again from its own key
    try:
        return config_class(target_modules=target.pattern, **own)
    except (TypeError, ValueError) as fault:
        raise ConfigError([f"components.{target.component}: {options.tuner}: {fault}"]) from fault


def _refuse_unkeyed_dropout(target: Target, options: Any, layers: Sequence[Any]) -> None:
    """Dropout that a tuner draws by itself would differ after a resume."""
    from mmtrain.models.dropout import KeyedDropout

    asked = [
        key for key, value in (options.model_extra or {}).items() if "dropout" in key and value
    ]
    keyed = any(isinstance(part, KeyedDropout) for layer in layers for part in layer.modules())
    if asked and not keyed:
        raise ConfigError(
            [
                f"components.{target.component}.{key}: '{options.tuner}' draws it from torch's own"
                " generator, which a resume would not repeat; leave it out"
                for key in asked
            ]
        )


METHOD = PeftLibrary()
