"""Examples -> one padded batch; pictures are rows of their own, each with its instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmtrain.models.answers import answer_targets
from mmtrain.models.building import pad_ids
from mmtrain.models.dropout import stable_hash
from mmtrain.models.interface import Batch, Example
from mmtrain.models.text import IGNORED


def collate(examples: Sequence[Example], processor: Any) -> Batch:
    """Right-pad; a batch without any picture carries a blank one that nothing reads."""
    input_ids, attention_mask = pad_ids([example.input_ids for example in examples], "right")
    tensors = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "row_keys": torch.tensor([example.key for example in examples]),
        **_pictures(examples, processor),
    }
    counted = [example for example in examples if example.weight > 0]
    num_tokens = sum(len(example.input_ids) for example in counted)
    start = processor.decoder_start_token_id
    if start is None:
        targets = answer_targets(examples, input_ids.shape[1])
    else:
        shifted = [[start, *example.labels[:-1]] for example in examples]
        tensors["decoder_input_ids"], _ = pad_ids(shifted, "right")
        targets = answer_targets(examples, tensors["decoder_input_ids"].shape[1], shift=0)
        num_tokens += sum(len(example.labels) for example in counted)
    num_answer_tokens = int((targets["answer_targets"] != IGNORED).sum())
    ids = [example.id for example in examples]
    return Batch({**tensors, **targets}, ids, num_answer_tokens, num_tokens)


def _pictures(examples: Sequence[Example], processor: Any) -> dict[str, torch.Tensor]:
    pixels = [picture for example in examples for picture in example.pixels]
    owners = [(one, number) for one in examples for number in range(len(one.pixels))]
    keys = [stable_hash(example.key, number) for example, number in owners]
    instructions = [example.extras["instruction_ids"] for example, _ in owners]
    if not pixels:
        size = processor.image_processor.size
        pixels, keys = [torch.zeros(3, size["height"], size["width"])], [0]
        instructions = [examples[0].extras["instruction_ids"]]
    instruction_ids, instruction_mask = pad_ids(instructions, "right")
    return {
        "pixel_values": torch.stack(list(pixels)),
        "picture_keys": torch.tensor(keys),
        "instruction_ids": instruction_ids,
        "instruction_mask": instruction_mask,
    }
