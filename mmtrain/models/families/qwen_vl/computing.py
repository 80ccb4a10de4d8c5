"""Loss and generation. Tower, resampler and LLM run once each, whatever a batch holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmtrain.models.answers import answer_loss
from mmtrain.models.batching import pad_ids
from mmtrain.models.building import generate_from_embeddings
from mmtrain.models.dropout import scope_of
from mmtrain.models.families.qwen_vl.encoding import collate
from mmtrain.models.families.qwen_vl.processing import Processor
from mmtrain.models.interface import Batch, Example, ForwardResult
from mmtrain.models.text import prompt_ids


def forward(model: Any, batch: Batch) -> ForwardResult:
    """The loss of one batch."""
    tensors = batch.tensors
    scope = scope_of(model)
    scope.set_rows("vision", tensors["image_keys"])
    scope.set_rows("llm", tensors["row_keys"])
    embeds = embed(model, tensors["input_ids"], tensors["is_image"], tensors["pixel_values"])
    hidden = model.transformer(embeds, tensors["attention_mask"])
    return answer_loss(hidden, model.lm_head, tensors, batch.num_answer_tokens)


def embed(
    model: Any, input_ids: torch.Tensor, is_image: torch.Tensor, pixel_values: torch.Tensor
) -> torch.Tensor:
    """Token embeddings with the features of images in their places."""
    embeds = model.transformer.wte(input_ids.masked_fill(is_image, 0))
    features = model.transformer.visual(pixel_values)
    return embeds.masked_scatter(is_image.unsqueeze(-1), features.flatten(0, 1))


def generate(
    model: Any, processor: Processor, examples: Sequence[Example], settings: Any
) -> list[str]:
    """Answers, all prompts in one left-padded batch with a KV cache."""
    prompts = [prompt_ids(example.input_ids, example.labels) for example in examples]
    input_ids, attention_mask = pad_ids(prompts, "left")
    device = next(model.parameters()).device
    pixels = collate(examples, processor).tensors["pixel_values"].to(device)
    is_image = (input_ids == processor.image_token_id).to(device)
    with torch.no_grad():
        embeds = embed(model, input_ids.to(device), is_image, pixels)
    return generate_from_embeddings(
        model,
        processor.tokenizer,
        embeds,
        attention_mask.to(device),
        settings,
        # As published, the prompt chooses the rotary base for all that is cached.
        row_lengths=attention_mask.sum(-1).to(device),
    )
