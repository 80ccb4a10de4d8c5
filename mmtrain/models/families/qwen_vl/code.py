"""What Qwen-VL computes: folders, image features, hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from mmtrain.distributed import full_shape, write_parameter
from mmtrain.models import building
from mmtrain.models.decoding import training_mask
from mmtrain.models.families.qwen_vl import processing, tiny_model
from mmtrain.models.families.qwen_vl.configuration import attention_shape as attention
from mmtrain.models.families.qwen_vl.configuration import image_tokens
from mmtrain.models.families.qwen_vl.configuration import read_config as model_config
from mmtrain.models.families.qwen_vl.decoder import QWenLMHeadModel
from mmtrain.models.families.qwen_vl.encoding import collate, encode_text, pixels, planned_batch
from mmtrain.models.families.qwen_vl.processing import Processor
from mmtrain.models.families.qwen_vl.visual import sine_positions
from mmtrain.models.interface import (
    Batch,
    ImageFeatures,
    LoadedModel,
    ModelOptions,
    ProcessorCode,
    SharedPrompts,
)

__all__ = [
    "attention",
    "collate",
    "encode_text",
    "image_tokens",
    "model_config",
    "pixels",
    "planned_batch",
]
Tensors = Mapping[str, torch.Tensor]


def skeleton(config: Any) -> nn.Module:
    """The module tree on the current default device, weights unset."""
    with no_init_weights():
        return QWenLMHeadModel(config)


def load(options: ModelOptions, zero3_config: Mapping[str, Any] | None) -> LoadedModel:
    """Build and fill the base; a preset gets keyed random weights."""
    config = model_config(options)
    processor, sources = None, []
    if options.checkpoint is not None:
        processor = read_processor(options, config)
        sources = [(Path(options.checkpoint), weight_name)]
    model = building.build_empty(skeleton, config, options, zero3_config)
    files = building.fill(model, sources, options)
    if not files or options.allow_reinit:
        set_fixed_positions(model)
    return LoadedModel(model, processor, config, files, standard_folder=False)


def read_processor(options: ModelOptions, config: Any) -> processing.Processor:
    """Of a checkpoint folder."""
    folder = Path(str(options.checkpoint))
    return processing.load_processor(folder, config, options.grounding_tokens)


def weight_name(stored: str) -> str:
    """The module tree has the published names."""
    return stored


def set_fixed_positions(model: Any) -> None:
    """Give the resampler its positions, which are computed, where none were stored."""
    parameter = model.transformer.visual.attn_pool.pos_embed
    write_parameter(parameter, sine_positions(*full_shape(parameter)))


def image_features(model: Any, batch: Batch) -> ImageFeatures:
    """[images, queries, channels] behind the resampler."""
    return ImageFeatures(model.transformer.visual(batch.tensors["pixel_values"]))


def decoder(model: Any) -> Any:
    """The whole model: it takes embeddings, too."""
    return model


def hidden_states(
    model: Any,
    embeds: torch.Tensor,
    tensors: Tensors,
    features: ImageFeatures,
    shared: SharedPrompts | None = None,
) -> torch.Tensor:
    """The decoder's last hidden states; its rotary base goes by the rows' own lengths.

    Of shared prompts, it stays what the first answers made it.
    """
    lengths = (shared.tensors if shared else tensors)["attention_mask"].sum(-1)
    return model.transformer(
        embeds,
        training_mask(tensors),
        tensors.get("position_ids"),
        past_key_values=shared and shared.past,
        row_lengths=lengths,
    )


def generation_inputs(model: Any, tensors: Tensors, features: ImageFeatures) -> dict[str, Any]:
    """As published, prompts choose the rotary base for all that is cached."""
    return {"row_lengths": tensors["attention_mask"].sum(-1)}


def processor_code(options: ModelOptions) -> ProcessorCode | None:
    """transformers has no class for these folders."""
    return None


def write_tiny(folder: Path, texts: Sequence[str], seed: int, preset: str = "tiny") -> None:
    """A tiny checkpoint in the published layout, its tokenizer trained on `texts`."""
    config = model_config(ModelOptions(None, preset=preset, dtype="fp32"))
    tiny_model.write(skeleton, set_fixed_positions, config, texts, seed, folder)


def save(model: Any, processor: Processor, state: Tensors, folder: Path) -> None:
    """The published layout, with weights as safetensors."""
    building.save_folder(model.config, processor, state, folder)
