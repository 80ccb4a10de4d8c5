"""Images -> query outputs -> language model: training's forward, and generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmtrain.distributed import gathered
from mmtrain.models.answers import answer_loss
from mmtrain.models.batching import pad_ids
from mmtrain.models.building import generate_from_embeddings
from mmtrain.models.dropout import scope_of
from mmtrain.models.families.instructblip.batches import collate
from mmtrain.models.interface import Batch, Example, ForwardResult
from mmtrain.models.text import prompt_ids

_IMAGE_COMPONENTS = ("vision", "vision_norm", "qformer", "projection")


def forward(model: Any, batch: Batch) -> ForwardResult:
    """Tower, norm, Q-Former, projection and LLM once each, whatever the batch holds."""
    tensors = batch.tensors
    scope = scope_of(model)
    for component in _IMAGE_COMPONENTS:
        scope.set_rows(component, tensors["image_keys"])
    scope.set_rows("llm", tensors["row_keys"])
    embeds = embed(model, tensors["input_ids"], tensors)
    hidden = hidden_states(model.language_model, embeds, tensors)
    return answer_loss(hidden, model.language_model.lm_head, tensors, batch.num_answer_tokens)


def hidden_states(llm: Any, embeds: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the head reads: at the sequence's positions, or at those of T5's decoder."""
    mask = tensors["attention_mask"]
    if "decoder_input_ids" not in tensors:
        return llm.model(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False
        ).last_hidden_state
    encoded = llm.encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    hidden = llm.decoder(
        input_ids=tensors["decoder_input_ids"],
        encoder_hidden_states=encoded,
        encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    return hidden * llm.model_dim**-0.5 if llm.config.scale_decoder_outputs else hidden


def embed(model: Any, input_ids: torch.Tensor, images: dict[str, torch.Tensor]) -> torch.Tensor:
    """Token embeddings with projected query outputs in the places of image tokens."""
    is_image = input_ids == model.config.image_token_id
    # The image token may lie outside an unpadded vocabulary: it is never looked up.
    embeds = model.language_model.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
    features = image_features(model, images).to(embeds.dtype)
    return embeds.masked_scatter(is_image.unsqueeze(-1), features)


def image_features(model: Any, images: dict[str, torch.Tensor]) -> torch.Tensor:
    """[images, queries, LLM width]: what each image says about its instruction."""
    tower, mask = model.vision_model, images["instruction_mask"]
    hidden = tower.encoder(inputs_embeds=tower.embeddings(images["pixel_values"]))
    hidden = tower.post_layernorm(hidden.last_hidden_state)
    # Under ZeRO-3 this parameter, which no submodule owns, is gathered by being read within
    # DeepSpeed's forward, which then counts it among its own.
    queries = model.query_tokens.expand(len(hidden), -1, -1)
    out = model.qformer(
        input_ids=images["instruction_ids"],
        attention_mask=torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1),
        query_embeds=queries,
        encoder_hidden_states=hidden,
    ).last_hidden_state
    return model.language_projection(out[:, : queries.shape[1]])


def generate(model: Any, processor: Any, examples: Sequence[Example], settings: Any) -> list[str]:
    """Answers, all prompts in one batch with a KV cache; a decoder's prompts are padded left."""
    if processor.decoder_start_token_id is None:
        prompts = [prompt_ids(example.input_ids, example.labels) for example in examples]
        input_ids, attention_mask = pad_ids(prompts, "left")
    else:
        input_ids, attention_mask = pad_ids([one.input_ids for one in examples], "right")
    device = next(model.parameters()).device
    images = collate(examples, processor).to(device).tensors
    # No forward of DeepSpeed's runs here that would gather the queries.
    with torch.no_grad(), gathered([model.query_tokens]):
        embeds = embed(model, input_ids.to(device), images)
    return generate_from_embeddings(
        model.language_model, processor.tokenizer, embeds, attention_mask.to(device), settings
    )
