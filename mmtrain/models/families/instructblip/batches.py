"""Examples -> one padded batch; images are rows of their own, each with its instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mmtrain.models import batching
from mmtrain.models.families.instructblip.processing import Processor
from mmtrain.models.interface import Batch, BatchSize, Example

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def collate(examples: Sequence[Example], processor: Processor, generating: bool = False) -> Batch:
    """A batch without any image carries a blank one that nothing reads.

    What T5's encoder reads holds no answer: it is the same when generating.
    """
    start, token_id = processor.decoder_start_token_id, processor.image_token_id
    tensors = batching.text_tensors(examples, token_id, generating and start is None)
    tensors |= _images(examples, processor)
    if generating:
        return batching.make_batch(examples, tensors)
    if start is None:
        tensors |= batching.answer_targets(examples, tensors["input_ids"].shape[1])
        return batching.make_batch(examples, tensors)
    shifted = [[start, *example.labels[:-1]] for example in examples]
    tensors["decoder_input_ids"], _ = batching.pad_ids(shifted, "right")
    tensors |= batching.answer_targets(examples, tensors["decoder_input_ids"].shape[1], shift=0)
    num_decoder_tokens = sum(len(example.labels) for example in examples if example.weight > 0)
    return batching.make_batch(examples, tensors, num_decoder_tokens)


def planned_batch(config: PretrainedConfig, size: BatchSize) -> Batch:
    """A batch of this size, to measure what it costs; its prompt is the instruction, too."""
    side, text = config.vision_config.image_size, config.text_config
    image = [config.image_token_id] * config.num_query_tokens
    start = 0 if text.model_type == "t5" else None
    num_words = min(size.tokens, config.qformer_config.max_position_embeddings)
    extras = {"instruction_ids": [batching.TEXT_ID] * num_words}
    examples = batching.planned_examples(size, image, torch.zeros(3, side, side), extras)
    if start is not None:
        answer = [batching.TEXT_ID] * size.answer_tokens
        examples = [replace(one, labels=answer) for one in examples]
    facts = Processor(None, config.image_token_id, side, len(image), 0, start, (), ())
    return collate(examples, facts)


def _images(examples: Sequence[Example], processor: Processor) -> dict[str, torch.Tensor]:
    """An image's row carries its sample's instruction; the blank one's row that of the first."""
    side = processor.image_size
    owners = [one for one in examples for _ in one.pixels] or examples[:1]
    instructions = [example.extras["instruction_ids"] for example in owners]
    instruction_ids, instruction_mask = batching.pad_ids(instructions, "right")
    return {
        **batching.image_tensors(examples, side, side),
        "instruction_ids": instruction_ids,
        "instruction_mask": instruction_mask,
    }
