"""From a checkpoint folder or a preset to a transformers configuration, the same way everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


def readers() -> dict[Any, str]:
    """`model_type` in config.json -> the family that reads such checkpoints."""
    return {
        model_type: name
        for name in plugins.names("family")
        for model_type in plugins.load("family", name).model_types
    }


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
        reader = readers().get(found)
        remedy = f"Set model.family: {reader}" if reader else "Correct model.family"
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
    _refuse_missing_flash_attention(options.attention)
    for part in (config, *parts.values()):
        part.dtype = _DTYPE_NAMES[options.dtype]
    config._attn_implementation = options.attention


def _refuse_missing_flash_attention(attention: str) -> None:
    """transformers would fetch a kernel from the hub in its place, and run that code."""
    from transformers.utils import is_flash_attn_2_available

    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise ConfigError(
            [
                "model.attention: flash_attention_2 needs the package flash-attn and a GPU, which"
                " are not both here; set model.attention: sdpa"
            ]
        )


def settle_attention_dropout(parts: Iterable[Any], options: ModelOptions) -> None:
    """Turn the attention dropout of these parts off, or refuse to train with it."""
    for part in parts:
        dropped = getattr(part, "attention_dropout", 0.0)
        if options.base_dropout == 0:
            part.attention_dropout = 0.0
        elif options.base_dropout == "checkpoint" and dropped:
            # It falls on attention weights inside fused kernels, which draw from a generator.
            raise CheckpointError(
                f"model.base_dropout: the attention dropout {dropped} of '{part.model_type}' in"
                " this checkpoint cannot be keyed by sample, so a resume would not be exact.",
                "Set model.base_dropout: 0.",
            )


def apply_overrides(parts: Mapping[str, Any], options: ModelOptions) -> None:
    """Change the shapes of components, in place, as `model.overrides` says; all faults at once."""
    problems = []
    for component, changes in options.overrides.items():
        place = f"model.overrides.{component}"
        if component not in parts:
            problems.append(f"{place}: has no shape to change; {nearest(component, parts)}")
            continue
        problems += _change(parts[component], changes, place)
    if problems:
        raise ConfigError(problems)


def _change(part: Any, changes: Mapping[str, Any], place: str) -> list[str]:
    names = {
        key: next((n for n in _OVERRIDES[key] if hasattr(part, n)), None) for key in _OVERRIDES
    }
    unknown = [key for key in changes if names[key] is None]
    if unknown:
        offered = [key for key, name in names.items() if name]
        return [f"{place}.{key}: cannot be changed; {nearest(key, offered)}" for key in unknown]
    if problem := _activation_problem(changes.get("activation")):
        return [f"{place}.activation: {problem}"]
    heads_before = getattr(part, str(names["heads"]))
    follows = getattr(part, str(names["hidden_size"])) // heads_before
    for key, value in changes.items():
        setattr(part, str(names[key]), value)
    width, heads = (getattr(part, str(names[key])) for key in ("hidden_size", "heads"))
    if width % heads:
        return [f"{place}: hidden_size {width} is no multiple of {heads} heads; change one of them"]
    # What other keys say a second time, where it was the same before.
    repeated = {"num_key_value_heads": (heads_before, heads)}
    repeated |= dict.fromkeys(("head_dim", "d_kv"), (follows, width // heads))
    for name, (before, after) in repeated.items():
        if getattr(part, name, None) == before:
            setattr(part, name, after)
    if "layers" in changes and getattr(part, "num_decoder_layers", None) is not None:
        part.num_decoder_layers = changes["layers"]
    return []


def _activation_problem(name: str | None) -> str | None:
    """What is wrong with an activation; T5 writes `gated-` in front of one."""
    from transformers.activations import ACT2FN

    plain = (name or "gelu").removeprefix("gated-")
    return None if plain in ACT2FN else f"no activation '{name}'; {nearest(plain, ACT2FN)}"
