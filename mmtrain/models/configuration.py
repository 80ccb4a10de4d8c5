"""From a checkpoint folder or a preset to a transformers configuration, the same way everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtrain import plugins
from mmtrain.errors import CheckpointError, ConfigError, nearest
from mmtrain.models.interface import ModelOptions

_DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
# Keys of `model.overrides` -> what the configurations of different models call them.
_OVERRIDES = {
    "hidden_size": ("hidden_size", "d_model", "embed_dim", "width"),
    "layers": ("num_hidden_layers", "num_layers", "depth"),
    "heads": ("num_attention_heads", "num_heads"),
    "intermediate_size": ("intermediate_size", "d_ff"),
    "activation": ("hidden_act", "hidden_activation", "feed_forward_proj"),
}
OVERRIDE_KEYS = tuple(_OVERRIDES)


def stored_config(folder: Path, model_types: tuple[str, ...]) -> dict[str, Any]:
    """config.json of a checkpoint of this family; another family's is an error that names it."""
    from mmtrain.models.weights import read_json

    if not folder.is_dir():
        raise CheckpointError(
            f"model.checkpoint: {folder} is no folder.",
            "Download the model there, or correct the path.",
        )
    stored = read_json(folder / "config.json")
    found = stored.get("model_type")
    if found not in model_types:
        wanted = " or ".join(f"'{name}'" for name in model_types)
        readers = [
            name
            for name in plugins.names("family")
            if found in plugins.load("family", name).model_types
        ]
        remedy = f"Set model.family: {readers[0]}" if readers else "Correct model.family"
        raise CheckpointError(
            f"{folder}: is a '{found}' checkpoint, not {wanted}.",
            f"{remedy}, or correct model.checkpoint.",
        )
    return stored


def parsed(config_class: Any, stored: Mapping[str, Any], folder: Path) -> Any:
    """config.json as transformers understands it."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return config_class(**stored)
    except (StrictDataclassError, TypeError, ValueError) as error:
        fault = " ".join(str(error).split())
        kind = config_class.model_type
        raise CheckpointError(
            f"{folder}/config.json: not a configuration of '{kind}' ({fault}).", "Copy it again."
        ) from error


def set_working_precision(config: Any, parts: Mapping[str, Any], options: ModelOptions) -> None:
    """Precision and attention. Parts obey their own stored dtype before any default."""
    for part in (config, *parts.values()):
        part.dtype = _DTYPE_NAMES[options.dtype]
    config._attn_implementation = options.attention


def apply_overrides(parts: Mapping[str, Any], options: ModelOptions) -> None:
    """Change the shapes of components, in place, as `model.overrides` says."""
    problems = []
    for component, changes in options.overrides.items():
        place = f"model.overrides.{component}"
        if component not in parts:
            problems.append(f"{place}: has no shape of its own; {nearest(component, parts)}")
            continue
        for key, value in changes.items():
            known = [name for name in _OVERRIDES.get(key, ()) if hasattr(parts[component], name)]
            if not known:
                offered = [one for one in _OVERRIDES if _has_any(parts[component], _OVERRIDES[one])]
                problems.append(f"{place}.{key}: cannot be changed; {nearest(key, offered)}")
                continue
            setattr(parts[component], known[0], value)
            # Vicuna keeps its key-value heads apart; T5 its decoder's depth.
            twin = {"heads": "num_key_value_heads", "layers": "num_decoder_layers"}.get(key)
            if twin and getattr(parts[component], twin, None) is not None:
                setattr(parts[component], twin, value)
    if problems:
        raise ConfigError(problems)


def _has_any(part: Any, names: tuple[str, ...]) -> bool:
    return any(hasattr(part, name) for name in names)
