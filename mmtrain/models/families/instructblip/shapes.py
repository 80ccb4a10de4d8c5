"""Configurations, and the module trees built from them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration
from transformers.initialization import no_init_weights

from mmtrain.errors import CheckpointError
from mmtrain.models import configuration
from mmtrain.models.families.instructblip import dropping
from mmtrain.models.families.instructblip.presets import MODEL_TYPES, PRESETS
from mmtrain.models.interface import AttentionShape, ModelOptions
from mmtrain.models.weights import weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig


HEAD = "language_model.lm_head.weight"
_LANGUAGE_MODELS = ("t5", "llama")


def read_config(options: ModelOptions) -> PretrainedConfig:
    """The configuration of a checkpoint folder or of a preset."""
    if options.checkpoint is None:
        config: PretrainedConfig = InstructBlipConfig(
            **deepcopy(dict(PRESETS[str(options.preset)]))
        )
    else:
        folder = Path(options.checkpoint)
        stored = configuration.stored_config(folder, MODEL_TYPES)
        config = configuration.parsed(InstructBlipConfig, stored, folder)
        _refuse_other_language_model(folder, config)
    vision, qformer, text = config.vision_config, config.qformer_config, config.text_config
    parts = {"vision": vision, "qformer": qformer, "llm": text}
    configuration.set_working_precision(config, parts, options)
    configuration.apply_overrides(parts, options)
    qformer.encoder_hidden_size = vision.hidden_size
    if text.model_type == "t5":
        if "activation" in options.overrides.get("llm", {}):
            _follow_activation(text)
        text.tie_word_embeddings = not _has_own_head(options, text)
    _settle_base_dropout(config, options)
    return config


def _refuse_other_language_model(folder: Path, config: PretrainedConfig) -> None:
    found = config.text_config.model_type
    if found not in _LANGUAGE_MODELS:
        raise CheckpointError(
            f"{folder}: its language model is '{found}', not {' or '.join(_LANGUAGE_MODELS)}.",
            "Use a Flan-T5 or Vicuna checkpoint of InstructBLIP.",
        )


def _follow_activation(text: Any) -> None:
    """What T5's configuration says apart from `feed_forward_proj`, after an override changed it.

    Without one it stays as stored: the release computes the exact `gelu`, which transformers
    would not read out of `gated-gelu`.
    """
    gate, _, text.dense_act_fn = text.feed_forward_proj.rpartition("-")
    text.is_gated_act = gate == "gated"


def _has_own_head(options: ModelOptions, text: Any) -> bool:
    """Whether T5's head has its own weights, as Flan-T5's does.

    transformers ties it in every configuration, and unties it when a folder stores it.
    """
    if options.checkpoint is None:
        return not text.scale_decoder_outputs
    return HEAD in weight_files(Path(options.checkpoint))


def _settle_base_dropout(config: PretrainedConfig, options: ModelOptions) -> None:
    vision, qformer, text = config.vision_config, config.qformer_config, config.text_config
    is_t5 = text.model_type == "t5"
    configuration.settle_attention_dropout([vision] if is_t5 else [vision, text], options)
    if options.base_dropout == 0:
        qformer.hidden_dropout_prob = qformer.attention_probs_dropout_prob = 0.0
        if is_t5:
            text.dropout_rate = 0.0


def skeleton(config: Any, trains: bool = True) -> nn.Module:
    """The module tree on the current default device, weights unset.

    Where nothing trains, dropout need not be keyed, and attention stays as fast as it is.
    """
    with no_init_weights():
        model = InstructBlipForConditionalGeneration(config)
        _make_biases_members(model)
    if config.text_config.model_type == "t5":
        _share_embeddings(model.language_model, config.text_config.tie_word_embeddings)
    if trains:
        dropping.install(model)
    return model


def _share_embeddings(llm: Any, with_head: bool) -> None:
    """One embedding for both stacks; without initialisation transformers ties nothing."""
    llm.set_input_embeddings(llm.shared)
    if with_head:
        llm.lm_head.weight = llm.shared.weight


def _make_biases_members(model: Any) -> None:
    """Make the tower's fused projections anew, with their bias from the start.

    transformers adds it after the layer is made: sharded construction would overlook it, and only
    rank 0 would ever read it from a file.
    """
    for layer in model.vision_model.encoder.layers:
        fused = layer.self_attn.qkv
        if fused.bias is not None:
            layer.self_attn.qkv = nn.Linear(fused.in_features, fused.out_features, bias=True)


def attention_shape(config: PretrainedConfig, component: str) -> AttentionShape:
    """The attention shape of `vision`, `qformer` or `llm`; T5's stacks are numbered alike."""
    names = {"vision": "vision_config", "qformer": "qformer_config", "llm": "text_config"}
    part = getattr(config, names[component])
    layers, heads, hidden = part.num_hidden_layers, part.num_attention_heads, part.hidden_size
    layers = max(layers, getattr(part, "num_decoder_layers", None) or 0)
    kv_heads = getattr(part, "num_key_value_heads", None) or heads
    head_dim = getattr(part, "head_dim", None) or hidden // heads
    return AttentionShape(layers, heads, kv_heads, head_dim, hidden)


def image_tokens(config: PretrainedConfig, component: str) -> int:
    """Patches and the class token in the tower; behind it the queries."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + 1 if component in ("vision", "vision_norm") else config.num_query_tokens
