"""What InstructBLIP computes: folders, image features, hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmtrain.models import building, text
from mmtrain.models.decoding import training_mask
from mmtrain.models.dropout import DropoutScope
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
_IMAGE_COMPONENTS = ("vision", "vision_norm", "qformer", "projection")


def load(options: ModelOptions, zero3_config: Mapping[str, Any] | None) -> LoadedModel:
    """Build and fill the base; a preset gets keyed random weights."""
    config = model_config(options)
    processor, sources = None, []
    if options.checkpoint is not None:
        folder = Path(options.checkpoint)
        processor, sources = processing.load_processor(folder, config), [(folder, names.rename)]
    make = partial(skeleton, trains=options.base_dropout != "stored")
    model = building.build_empty(make, config, options.dtype, zero3_config)
    files = building.fill(model, sources, options)
    return LoadedModel(model, processor, config, files)


def key_dropout(scope: DropoutScope, tensors: Tensors) -> None:
    """Rows before the language model are images."""
    for component in _IMAGE_COMPONENTS:
        scope.set_rows(component, tensors["image_keys"])
    scope.set_rows("llm", tensors["row_keys"])


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


def embedding(model: Any) -> nn.Module:
    """The table of token embeddings; T5's stacks share it."""
    return model.language_model.get_input_embeddings()


def head(model: Any) -> nn.Module:
    """From hidden states to logits."""
    return model.language_model.lm_head


def hidden_states(
    model: Any, embeds: torch.Tensor, tensors: Tensors, features: ImageFeatures
) -> torch.Tensor:
    """At the sequence's positions, or at those of T5's decoder."""
    llm = model.language_model
    if "decoder_input_ids" not in tensors:
        return llm.model(
            inputs_embeds=embeds, attention_mask=training_mask(tensors), use_cache=False
        ).last_hidden_state
    mask = tensors["attention_mask"]
    encoded = llm.encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    hidden = llm.decoder(
        input_ids=tensors["decoder_input_ids"],
        encoder_hidden_states=encoded,
        encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    return hidden * llm.model_dim**-0.5 if llm.config.scale_decoder_outputs else hidden


def generation_inputs(
    model: Any, embeds: torch.Tensor, tensors: Tensors, features: ImageFeatures
) -> tuple[Any, dict[str, Any]]:
    """Embedded prompts; T5's encoder reads them."""
    given = {"inputs_embeds": embeds, "attention_mask": tensors["attention_mask"]}
    return model.language_model, given


def stop_tokens(processor: processing.Processor) -> dict[str, Any]:
    """The tokenizer's."""
    return text.stop_tokens(processor.tokenizer)


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
