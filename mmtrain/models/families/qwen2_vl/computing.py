"""Forward and generation: tower, merger and LLM once each, whatever a batch holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmtrain.distributed import spans_ranks
from mmtrain.models.answers import answer_loss
from mmtrain.models.batching import pad_ids
from mmtrain.models.building import generation_config
from mmtrain.models.dropout import scope_of
from mmtrain.models.families.qwen2_vl.batches import image_tensors, padded_positions
from mmtrain.models.families.qwen2_vl.processing import Processor
from mmtrain.models.families.qwen2_vl.tower_plan import plan
from mmtrain.models.interface import Batch, Example, ForwardResult
from mmtrain.models.text import prompt_ids


def forward(model: Any, batch: Batch) -> ForwardResult:
    """The loss of one batch."""
    tensors = batch.tensors
    scope = scope_of(model)
    scope.set_packed_rows("vision", tensors["patch_keys"], tensors["patch_index"])
    scope.set_rows("llm", tensors["row_keys"])
    hidden = hidden_states(model, batch)
    return answer_loss(hidden, model.lm_head, tensors, batch.num_answer_tokens)


def hidden_states(model: Any, batch: Batch) -> torch.Tensor:
    """The LLM's last hidden states [rows, tokens, channels]."""
    inner, tensors, grid = model.model, batch.tensors, batch.host["grid"]
    pixels = tensors["pixel_values"]
    seen = inner.visual(pixels, grid_thw=grid, **plan(inner.visual, grid, pixels.device))
    # A blank image's features are computed and dropped, so that gradients run everywhere.
    read = tensors["feature_index"]
    is_image = tensors["input_ids"] == model.config.image_token_id
    embeds = inner.language_model.embed_tokens(tensors["input_ids"].masked_fill(is_image, 0))
    features = seen.pooler_output.index_select(0, read).to(embeds.dtype)
    embeds = embeds.masked_scatter(is_image.unsqueeze(-1), features)
    # Qwen3's LLM also adds features of earlier vision blocks to its first layers.
    deep = [one.index_select(0, read) for one in seen.get("deepstack_features") or ()]
    more = {"visual_pos_masks": is_image, "deepstack_visual_embeds": deep} if deep else {}
    return inner.language_model(
        inputs_embeds=embeds,
        attention_mask=tensors["attention_mask"],
        position_ids=tensors["position_ids"],
        use_cache=False,
        **more,
    ).last_hidden_state


def add_deep_features(
    hidden: torch.Tensor, is_image: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """Qwen3's sum at the places of images; indexing by a mask would wait for the GPU to count."""
    source = features.to(hidden.dtype)
    return hidden + torch.zeros_like(hidden).masked_scatter(is_image.unsqueeze(-1), source)


def generate(
    model: Any, processor: Processor, examples: Sequence[Example], settings: Any
) -> list[str]:
    """Answers, all prompts in one left-padded batch with a KV cache.

    Positions are given, so the model neither computes them nor keeps any from call to call; each
    new token follows the last position of its row.
    """
    prompts = [prompt_ids(example.input_ids, example.labels) for example in examples]
    input_ids, attention_mask = pad_ids(prompts, "left")
    in_text = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    in_image = padded_positions(examples, prompts, processor, attention_mask)
    device = next(model.parameters()).device
    images, grid = image_tensors(examples, processor)
    pixels, planned = images["pixel_values"].to(device), plan(model.model.visual, grid, device)
    with torch.no_grad():
        seen = model.model.get_image_features(pixels, grid, **planned)
        out = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            position_ids=torch.cat([in_text[None], in_image]).to(device),
            mm_encoder_outputs={"image": seen} if images["feature_index"].numel() else {},
            generation_config=generation_config(
                settings,
                eos_token_id=list(processor.stop_ids),
                pad_token_id=processor.stop_ids[0],  # only masked positions hold it
            ),
            synced_gpus=spans_ranks(next(model.parameters())),
        )
    answers = processor.tokenizer.batch_decode(
        out[:, input_ids.shape[1] :], skip_special_tokens=True
    )
    return [answer.strip() for answer in answers]
