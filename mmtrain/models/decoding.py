"""One path from a batch to its loss, and one to its answers, for every family.

A family says how images become features, what embeds tokens, what runs over the embeddings and
which head reads them. The order of these, where prompts of a method go, which attention mask is
made, the loss and generation are here.

Shapes: r rows (samples), t tokens, c channels, a answer tokens; a trailing `_rtc` says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as functional

from mmtrain.distributed import gathered, spans_ranks
from mmtrain.models.dropout import scope_of
from mmtrain.models.interface import Batch, Example, Family, ForwardResult, ImageFeatures, Processor
from mmtrain.models.taps import taps_of
from mmtrain.models.text import IGNORED

Tensors = Mapping[str, torch.Tensor]


def forward(
    family: Family, model: Any, batch: Batch, features: ImageFeatures | None = None
) -> ForwardResult:
    """The loss of one batch; `features` where its images went through the tower already."""
    hidden_rtc, tensors = hidden_states(family, model, batch, features)
    result = answer_loss(hidden_rtc, family.code.decoder(model).get_output_embeddings(), tensors)
    return replace(result, auxiliary=taps_of(model).auxiliary_losses(tensors))


def hidden_states(
    family: Family, model: object, batch: Batch, features: ImageFeatures | None = None
) -> tuple[torch.Tensor, Tensors]:
    """What the head reads, and the batch's tensors as they are behind inserted prompts."""
    _key_rows(family, model, batch.tensors)
    features = features or family.code.image_features(model, batch)
    embeds_rtc, tensors = embed(family, model, batch.tensors, features)
    return family.code.hidden_states(model, embeds_rtc, tensors, features), tensors


def _key_rows(family: Family, model: Any, tensors: Tensors) -> None:
    """Say which sample or image each row of a component's activations belongs to."""
    scope = scope_of(model)
    for component, (keys, *place) in family.row_keys.items():
        if place:
            scope.set_packed_rows(component, tensors[keys], tensors[place[0]])
        else:
            scope.set_rows(component, tensors[keys])


def generate(
    family: Family,
    model: Any,
    processor: Processor,
    examples: Sequence[Example],
    settings: object,
    features: ImageFeatures | None = None,
) -> list[str]:
    """Answers to the prompts of `examples`, all in one batch with a KV cache.

    Ranks stay in step while any is unfinished, if the model is spread over them.
    """
    device = next(model.parameters()).device
    code, decoder = family.code, family.code.decoder(model)
    batch = code.collate(examples, processor, generating=True).to(device)
    # No forward of DeepSpeed's runs here that would gather what the model itself owns.
    with torch.no_grad(), gathered(model.parameters(recurse=False)):
        features = features or code.image_features(model, batch)
        embeds_rtc, tensors = embed(family, model, batch.tensors, features)
        out = decoder.generate(
            inputs_embeds=embeds_rtc,
            attention_mask=tensors["attention_mask"],
            **code.generation_inputs(model, tensors, features),
            generation_config=_generation_config(settings, processor),
            synced_gpus=spans_ranks(next(model.parameters())),
        )
    texts = processor.tokenizer.batch_decode(out, skip_special_tokens=True)
    return [text.strip() for text in texts]


def embed(
    family: Family, model: Any, tensors: Tensors, features: ImageFeatures
) -> tuple[torch.Tensor, Tensors]:
    """Token embeddings with image features in the places of image tokens, prompts before them."""
    is_image = tensors["is_image"]
    # The image token may lie outside an unpadded vocabulary: it is never looked up.
    table = family.code.decoder(model).get_input_embeddings()
    embeds_rtc = table(tensors["input_ids"].masked_fill(is_image, 0))
    seen = features.tokens.to(embeds_rtc.dtype)
    embeds_rtc = embeds_rtc.masked_scatter(is_image.unsqueeze(-1), seen)
    prompts = taps_of(model).prompts()
    if prompts is None:
        return embeds_rtc, tensors
    return _behind_prompts(prompts.to(embeds_rtc.dtype), embeds_rtc, tensors)


def _behind_prompts(
    prompts_tc: torch.Tensor, embeds_rtc: torch.Tensor, tensors: Tensors
) -> tuple[torch.Tensor, Tensors]:
    """Every row behind the same prompts; all that counts a row's tokens is moved along."""
    rows, width, _ = embeds_rtc.shape
    count = len(prompts_tc)
    moved = dict(tensors)
    ones = tensors["attention_mask"].new_ones(rows, count)
    moved["attention_mask"] = torch.cat([ones, tensors["attention_mask"]], dim=1)
    moved["is_image"] = functional.pad(tensors["is_image"], (count, 0))
    if "position_ids" in tensors:
        first = torch.arange(count, device=embeds_rtc.device).expand(
            *tensors["position_ids"].shape[:-1], count
        )
        moved["position_ids"] = torch.cat([first, tensors["position_ids"] + count], dim=-1)
    if "answer_positions" in tensors and "decoder_input_ids" not in tensors:
        row = tensors["answer_positions"] // width
        moved["answer_positions"] = tensors["answer_positions"] + (row + 1) * count
    return torch.cat([prompts_tc.expand(rows, -1, -1), embeds_rtc], dim=1), moved


def training_mask(tensors: Tensors) -> torch.Tensor | None:
    """The mask of causal attention over rows padded on the right: none.

    No token sees padding behind it, so the flash kernel can run, and nobody waits for the device
    to learn whether there is any. Prompts of generation are padded on the left and need theirs.
    """
    return None if "answer_positions" in tensors else tensors["attention_mask"]


def answer_loss(hidden_rtc: torch.Tensor, head: Any, tensors: Tensors) -> ForwardResult:
    """Sums of cross entropy over answer tokens, in fp32; the head runs only where labels are."""
    rows, _, channels = hidden_rtc.shape
    picked_ac = hidden_rtc.reshape(-1, channels).index_select(0, tensors["answer_positions"])
    losses_a = functional.cross_entropy(
        head(picked_ac).float(), tensors["answer_targets"], reduction="none", ignore_index=IGNORED
    )
    per_sample = losses_a.new_zeros(rows).index_add(0, tensors["answer_rows"], losses_a)
    return ForwardResult(losses_a.sum(), per_sample, tensors["answer_counts"])


def _generation_config(settings: Any, processor: Processor) -> object:
    """Greedy or beam search, as the run file says."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens or None,
        num_beams=settings.num_beams,
        length_penalty=settings.length_penalty if settings.num_beams > 1 else None,
        repetition_penalty=settings.repetition_penalty,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(processor.stop_ids),
        pad_token_id=processor.stop_ids[0],
    )
