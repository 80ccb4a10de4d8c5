"""Configurations of the three generations: which classes and shapes, what an override touches."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.models import configuration
from mmtrain.models.families.qwen2_vl.presets import CLASSES, PRESETS
from mmtrain.models.interface import AttentionShape, ModelOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig


log = logging.getLogger("mmtrain")
# Lists of vision blocks by number, which a change of depth must respect.
_BLOCK_LISTS = ("fullatt_block_indexes", "deepstack_visual_indexes")
USUAL_IMAGE_SIDE = 448


def transformers_class(model_type: str, suffix: str) -> Any:
    """The class of a generation, e.g. `Qwen2VL` + `Config`."""
    import transformers

    return getattr(transformers, f"{CLASSES[model_type]}{suffix}")


def read_config(options: ModelOptions) -> PretrainedConfig:
    """The configuration of a checkpoint folder or of a preset, with all that `options` changes."""
    if options.checkpoint is None:
        # The classes write into the dictionaries that they are given.
        preset = copy.deepcopy(dict(PRESETS[str(options.preset)]))
        config = transformers_class(preset["model_type"], "Config")(**preset)
    else:
        folder = Path(options.checkpoint)
        stored = configuration.stored_config(folder, tuple(CLASSES))
        config_class = transformers_class(stored["model_type"], "Config")
        config = configuration.parsed(config_class, stored, folder)
    parts = {"llm": config.text_config, "vision": config.vision_config}
    configuration.set_working_precision(config, parts, options)
    if options.overrides:
        _override(config, parts, options)
    problems = _problems(config)
    if problems and options.overrides:
        raise ConfigError(f"model.overrides: {problem}" for problem in problems)
    if problems:
        raise CheckpointError(
            f"{options.checkpoint or options.preset}: its configuration does not add up:"
            f" {'; '.join(problems)}.",
            "Copy config.json again.",
        )
    configuration.settle_attention_dropout([config.text_config], options)
    return config


def _override(config: PretrainedConfig, parts: Mapping[str, object], options: ModelOptions) -> None:
    """Change shapes, and what hangs on them: the merger's output, and lists by layer."""
    text, vision = config.text_config, config.vision_config
    if config.model_type == "qwen2_vl":
        # This tower calls its width embed_dim, and its merger's output hidden_size.
        vision.hidden_size = vision.embed_dim
        configuration.apply_overrides(parts, options)
        vision.embed_dim, vision.hidden_size = vision.hidden_size, text.hidden_size
    else:
        configuration.apply_overrides(parts, options)
        vision.out_hidden_size = text.hidden_size
    if hasattr(text, "layer_types"):
        layers = text.num_hidden_layers
        text.layer_types = (text.layer_types + text.layer_types[-1:] * layers)[:layers]
    for name in (one for one in _BLOCK_LISTS if hasattr(vision, one)):
        found = list(getattr(vision, name))
        kept = [number for number in found if number < vision.depth]
        if kept != found:
            log.warning("model.overrides: %d vision blocks, so %s is %s", vision.depth, name, kept)
            setattr(vision, name, kept)
    _share_out_rotary(text, attention_shape(config, "llm").head_dim)


def _share_out_rotary(text: Any, head_dim: int) -> None:
    """Time, height and width keep their shares of a head's channels."""
    found = text.rope_parameters.get("mrope_section")
    if found and 2 * sum(found) != head_dim:
        _, height, width = (one * (head_dim // 2) // sum(found) for one in found)
        kept = [head_dim // 2 - height - width, height, width]
        log.warning("model.overrides: %d channels per head, so mrope_section is %s", head_dim, kept)
        text.rope_parameters["mrope_section"] = kept


def _problems(config: PretrainedConfig) -> list[str]:
    """Why the shapes do not fit each other; transformers would fail in the first forward."""
    problems = []
    llm, vision = attention_shape(config, "llm"), attention_shape(config, "vision")
    sections = config.text_config.rope_parameters.get("mrope_section")
    if sections and 2 * sum(sections) != llm.head_dim:
        problems.append(
            f"llm has {llm.head_dim} channels per head, its rotary sections {sections} need"
            f" {2 * sum(sections)}; keep hidden_size / heads"
        )
    if vision.hidden % vision.heads or vision.head_dim % 4:
        problems.append(
            f"vision has {vision.heads} heads on {vision.hidden} channels; channels per head must"
            " be a multiple of 4"
        )
    if llm.heads % llm.kv_heads:
        problems.append(f"llm has {llm.heads} heads and {llm.kv_heads} key-value heads")
    deep = len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    if deep > llm.layers:
        problems.append(
            f"{deep} vision blocks feed the first layers of the llm, which has {llm.layers};"
            f" give at least {deep} layers"
        )
    return problems


def attention_shape(config: PretrainedConfig, component: str) -> AttentionShape:
    """The attention shape of `llm` or `vision`."""
    if component == "vision":
        vision = config.vision_config
        width = vision.embed_dim if config.model_type == "qwen2_vl" else vision.hidden_size
        heads = vision.num_heads
        return AttentionShape(vision.depth, heads, heads, width // heads, width)
    text = config.text_config
    heads = text.num_attention_heads
    # Only Qwen3's says how wide a head is.
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return AttentionShape(
        text.num_hidden_layers, heads, text.num_key_value_heads, head_dim, text.hidden_size
    )


def image_tokens(config: PretrainedConfig, component: str) -> int:
    """Patches (vision) or merged tokens (llm) of a square image of the usual size."""
    vision = config.vision_config
    merged = (USUAL_IMAGE_SIDE // (vision.patch_size * vision.spatial_merge_size)) ** 2
    return merged * vision.spatial_merge_size**2 if component == "vision" else merged
