"""config.json of Qwen-VL-Chat: its own keys, its limits, and what an override touches.

Annotations are evaluated here, unlike elsewhere: transformers checks values by them.
"""

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.models import configuration
from mmtrain.models.families.qwen_vl.presets import MODEL_TYPES, PRESETS
from mmtrain.models.interface import AttentionShape, ModelOptions

USUAL_QUERIES = 256  # of the resampler, where config.json does not say
# What the published code could do and no published Qwen-VL does.
_ONLY = {"rotary_pct": 1.0, "scale_attn_weights": True, "tie_word_embeddings": False}
_VISUAL_KEYS = (
    "heads image_size image_start_id layers mlp_ratio output_dim patch_size width".split()
)


@strict
class QWenConfig(PreTrainedConfig):
    """The published keys. `intermediate_size` counts both halves of the gated MLP."""

    model_type = "qwen"
    attribute_map = {"head_dim": "kv_channels"}

    visual: dict[str, Any] | None = None
    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    layer_norm_epsilon: float = 1e-6
    max_position_embeddings: int = 8192
    seq_length: int = 2048
    rotary_emb_base: int | float = 10000
    rotary_pct: float = 1.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    no_bias: bool = True
    scale_attn_weights: bool = True
    attn_dropout_prob: float = 0.0
    emb_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False


def read_config(options: ModelOptions) -> QWenConfig:
    """The configuration of a checkpoint folder or of a preset, with all that `options` changes."""
    if options.checkpoint is None:
        config = QWenConfig(**copy.deepcopy(dict(PRESETS[str(options.preset)])))
    else:
        config = _stored(Path(options.checkpoint))
    configuration.set_working_precision(config, {}, options)
    _override(config, options)
    _settle_dropout(config, options)
    return config


def _stored(folder: Path) -> QWenConfig:
    stored = configuration.stored_config(folder, MODEL_TYPES)
    # It names code beside the published weights, which is neither run nor written here.
    stored.pop("auto_map", None)
    visual = stored.get("visual")
    if not isinstance(visual, dict):
        raise CheckpointError(
            f"{folder}/config.json: has no 'visual' part: a Qwen of text alone, or of sound.",
            "Give a checkpoint of Qwen-VL or Qwen-VL-Chat.",
        )
    config = configuration.parsed(QWenConfig, stored, folder)
    problems = [
        (
            f"visual.{key} is {visual[key]!r}, not a number"
            if key in visual
            else f"visual.{key} is missing"
        )
        for key in _VISUAL_KEYS
        if not isinstance(visual.get(key), (int, float))
    ]
    problems = problems or _problems(config)
    if problems:
        raise CheckpointError(
            f"{folder}/config.json: does not add up: {'; '.join(problems)}.", "Copy it again."
        )
    return config


def _problems(config: QWenConfig) -> list[str]:
    """What this model tree cannot be, each with the value seen."""
    assert config.visual is not None
    visual = SimpleNamespace(**config.visual)
    found = [
        f"{key} is {getattr(config, key)!r}, only {wanted!r} is known"
        for key, wanted in _ONLY.items()
        if getattr(config, key) != wanted
    ]
    pairs = (
        ("kv_channels x heads", config.kv_channels * config.num_attention_heads),
        ("visual.output_dim", visual.output_dim),
    )
    found += [
        f"{name} is {value}, hidden_size {config.hidden_size}"
        for name, value in pairs
        if value != config.hidden_size
    ]
    multiples = (
        ("visual.width", visual.width, visual.heads),
        ("visual.image_size", visual.image_size, visual.patch_size),
        ("intermediate_size", config.intermediate_size, 2),
        ("kv_channels", config.kv_channels, 2),
        ("hidden_size", config.hidden_size, 4),
    )
    found += [
        f"{n} {whole} is no multiple of {part}" for n, whole, part in multiples if whole % part
    ]
    queries = num_queries(config)
    if math.isqrt(queries) ** 2 != queries:
        found.append(f"visual.n_queries {queries} is no square")
    return found


def _override(config: QWenConfig, options: ModelOptions) -> None:
    """Change shapes, and what hangs on them: the resampler writes as wide as the LLM reads."""
    if not options.overrides:
        return
    assert config.visual is not None
    visual = config.visual
    before = vision_shape(config)
    vision = SimpleNamespace(**vars(before))
    configuration.apply_overrides({"llm": config, "vision": vision}, options)
    visual.update(
        width=vision.hidden_size,
        layers=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        output_dim=config.hidden_size,
    )
    if vars(vision) != vars(before):
        # Rounded up by a hair: the published code cuts width x ratio to an integer.
        ratio = vision.intermediate_size / vision.hidden_size
        visual["mlp_ratio"] = math.nextafter(ratio, math.inf)
    problems = _problems(config)
    if problems:
        raise ConfigError(f"model.overrides: {problem}" for problem in problems)


def _settle_dropout(config: QWenConfig, options: ModelOptions) -> None:
    """Turn the base's own dropout off, or refuse to train with it."""
    if options.base_dropout == 0:
        config.attn_dropout_prob = config.emb_dropout_prob = 0.0
    elif options.base_dropout == "checkpoint" and (
        config.attn_dropout_prob or config.emb_dropout_prob
    ):
        # On attention weights it falls inside fused kernels, which draw from a generator.
        raise CheckpointError(
            "model.base_dropout: this checkpoint's dropout cannot be keyed by sample, so a resume"
            " would not be exact.",
            "Set model.base_dropout: 0.",
        )


def vision_shape(config: QWenConfig) -> SimpleNamespace:
    """The tower's shape under the usual names."""
    assert config.visual is not None
    visual = config.visual
    return SimpleNamespace(
        hidden_size=visual["width"],
        num_hidden_layers=visual["layers"],
        num_attention_heads=visual["heads"],
        intermediate_size=int(visual["width"] * visual["mlp_ratio"]),
    )


def attention_shape(config: QWenConfig, component: str) -> AttentionShape:
    """The attention shape of `llm` or `vision`."""
    part: Any = config if component == "llm" else vision_shape(config)
    heads, hidden = part.num_attention_heads, part.hidden_size
    return AttentionShape(part.num_hidden_layers, heads, heads, hidden // heads, hidden)


def num_queries(config: QWenConfig) -> int:
    """Features that one image makes, whatever its patches."""
    assert config.visual is not None
    return int(config.visual.get("n_queries", USUAL_QUERIES))


def image_tokens(config: QWenConfig, component: str) -> int:
    """Patches in the tower, the resampler's queries in the LLM."""
    assert config.visual is not None
    patches = (config.visual["image_size"] // config.visual["patch_size"]) ** 2
    return int(patches) if component == "vision" else num_queries(config)
