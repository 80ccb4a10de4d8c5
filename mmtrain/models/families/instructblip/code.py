"""What InstructBLIP computes: folders, image features, hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmtrain.models import building
from mmtrain.models.decoding import training_mask
from mmtrain.models.families.instructblip import names, processing, tiny_model
from mmtrain.models.families.instructblip.batches import collate, planned_batch
from mmtrain.models.families.instructblip.encoding import encode_text, pixels
from mmtrain.models.families.instructblip.shapes import attention_shape as attention
from mmtrain.models.families.instructblip.shapes import image_tokens
from mmtrain.models.families.instructblip.shapes import read_config as model_config
from mmtrain.models.families.instructblip.shapes import skeleton
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
    "skeleton",
]
Tensors = Mapping[str, torch.Tensor]


def load(options: ModelOptions, zero3_config: Mapping[str, Any] | None) -> LoadedModel:
    """Build and fill the base; a preset gets keyed random weights."""
    config = model_config(options)
    processor, sources = None, []
    if options.checkpoint is not None:
        processor = read_processor(options, config)
        sources = [(Path(options.checkpoint), names.rename)]
    make = partial(skeleton, trains=options.base_dropout != "stored")
    model = building.build_empty(make, config, options, zero3_config)
    files = building.fill(model, sources, options)
    return LoadedModel(model, processor, config, files)


def read_processor(options: ModelOptions, config: Any) -> processing.Processor:
    """Of a checkpoint folder."""
    return processing.load_processor(Path(str(options.checkpoint)), config)


def image_features(model: Any, batch: Batch) -> ImageFeatures:
    """[images, queries, channels]: what each image says about its instruction."""
    tower, tensors = model.vision_model, batch.tensors
    mask = tensors["instruction_mask"]
    hidden = tower.encoder(inputs_embeds=tower.embeddings(tensors["pixel_values"]))
    hidden = tower.post_layernorm(hidden.last_hidden_state)
    # Under ZeRO-3 this parameter, which no submodule owns, is gathered by being read within
    # DeepSpeed's forward, which then counts it among its own.
    queries = model.query_tokens.expand(len(hidden), -1, -1)
    out = model.qformer(
        input_ids=tensors["instruction_ids"],
        attention_mask=torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1),
        query_embeds=queries,
        encoder_hidden_states=hidden,
    ).last_hidden_state
    return ImageFeatures(model.language_projection(out[:, : queries.shape[1]]))


def decoder(model: Any) -> Any:
    """The language model."""
    return model.language_model


def hidden_states(
    model: Any,
    embeds: torch.Tensor,
    tensors: Tensors,
    features: ImageFeatures,
    shared: SharedPrompts | None = None,
) -> torch.Tensor:
    """At the sequence's positions, or at those of T5's decoder."""
    llm = model.language_model
    if "decoder_input_ids" not in tensors:
        return llm.model(
            inputs_embeds=embeds,
            attention_mask=training_mask(tensors),
            position_ids=tensors.get("position_ids"),
            past_key_values=shared and shared.past,
            use_cache=shared is not None,
        ).last_hidden_state
    mask = tensors["attention_mask"]
    encoded = shared.past if shared else None
    if encoded is None:
        encoded = llm.encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    if shared:
        shared.past = encoded
    hidden = llm.decoder(
        input_ids=tensors["decoder_input_ids"],
        encoder_hidden_states=encoded,
        encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    return hidden * llm.model_dim**-0.5 if llm.config.scale_decoder_outputs else hidden


def generation_inputs(model: Any, tensors: Tensors, features: ImageFeatures) -> dict[str, Any]:
    """Nothing more."""
    return {}


def processor_code(options: ModelOptions) -> ProcessorCode | None:
    """The folder's own."""
    return ProcessorCode(("AutoProcessor",), ("processor = AutoProcessor.from_pretrained(base)",))


def write_tiny(folder: Path, texts: Sequence[str], seed: int, preset: str = "tiny") -> None:
    """A tiny checkpoint: real classes, tokenizers trained on `texts`, a real processor."""
    config = model_config(ModelOptions(None, preset, "fp32", base_dropout="checkpoint"))
    tiny_model.write(skeleton, config, texts, seed, folder)


def save(model: Any, processor: processing.Processor, state: Tensors, folder: Path) -> None:
    """A standard Hugging Face folder with these tensors."""
    building.save_folder(model.config, processor, state, folder)
