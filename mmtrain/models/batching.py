"""From examples to padded tensors: what the batches of all families have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mmtrain.models.dropout import stable_hash
from mmtrain.models.interface import Batch, BatchSize, Example
from mmtrain.models.text import IGNORED, prompt_ids

TEXT_ID = 1  # any that is a word's


def pad_ids(rows: Sequence[Sequence[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids (pad id 0: it is masked, its value is never seen) and the attention mask."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[number, where] = torch.tensor(row, dtype=torch.long)
        mask[number, where] = 1
    return ids, mask


def token_rows(examples: Sequence[Example], generating: bool) -> list[Sequence[int]]:
    """Each sample's ids, or those of its prompt alone."""
    return [
        prompt_ids(example.input_ids, example.labels) if generating else example.input_ids
        for example in examples
    ]


def text_tensors(
    examples: Sequence[Example], image_token_id: int, generating: bool = False
) -> dict[str, torch.Tensor]:
    """Ids with their mask and image places, and the key of each row's dropout.

    Padded on the right; prompts, which generation goes on from, on the left.
    """
    side = "left" if generating else "right"
    input_ids, attention_mask = pad_ids(token_rows(examples, generating), side)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "is_image": input_ids == image_token_id,
        "row_keys": torch.tensor([example.key for example in examples]),
    }


def image_keys(examples: Sequence[Example]) -> list[int]:
    """The dropout key of every image, by its sample and its place there."""
    return [
        stable_hash(example.key, number)
        for example in examples
        for number in range(len(example.pixels))
    ]


def image_tensors(examples: Sequence[Example], height: int, width: int) -> dict[str, torch.Tensor]:
    """All images of one size; without any, a blank one that nothing reads."""
    pixels = [image for example in examples for image in example.pixels]
    keys = image_keys(examples)
    if not pixels:
        pixels, keys = [torch.zeros(3, height, width)], [0]
    return {"pixel_values": torch.stack(pixels), "image_keys": torch.tensor(keys)}


def answer_targets(
    examples: Sequence[Example], width: int, shift: int = 1
) -> dict[str, torch.Tensor]:
    """Flat positions whose hidden state predicts an answer token, the token, its row; row counts.

    A decoder-only model predicts the next token (`shift` 1); where labels are a decoder's own,
    whose inputs are shifted already, each position predicts its label (`shift` 0).
    At least one position is returned, with an ignored target, so that the head runs on every
    rank at every micro-step.
    """
    positions, targets, rows = [], [], []
    for row, example in enumerate(examples):
        for index, label in enumerate(example.labels):
            if label != IGNORED and index >= shift and example.weight > 0:
                positions.append(row * width + index - shift)
                targets.append(label)
                rows.append(row)
    counts = torch.bincount(torch.tensor(rows, dtype=torch.long), minlength=len(examples))
    if not positions:
        positions, targets, rows = [0], [IGNORED], [0]
    return {
        "answer_positions": torch.tensor(positions),
        "answer_targets": torch.tensor(targets),
        "answer_rows": torch.tensor(rows),
        "answer_counts": counts,
    }


def make_batch(
    examples: Sequence[Example],
    tensors: Mapping[str, torch.Tensor],
    num_decoder_tokens: int = 0,
    **host: object,
) -> Batch:
    """The batch with its counts; samples of weight zero are in it, but not counted."""
    counts = tensors.get("answer_counts")
    num_answer_tokens = 0 if counts is None else int(counts.sum())
    num_tokens = sum(len(example.input_ids) for example in examples if example.weight > 0)
    ids = [example.id for example in examples]
    return Batch(dict(tensors), ids, num_answer_tokens, num_tokens + num_decoder_tokens, host)


def planned_examples(
    size: BatchSize, image_ids: Sequence[int], pixels: torch.Tensor, extras: Mapping[str, object]
) -> list[Example]:
    """Samples of this size for a decoder-only model: an image, then text that ends in answers."""
    num_text = max(size.tokens - len(image_ids), size.answer_tokens + 1)
    ids = [*image_ids, *[TEXT_ID] * num_text]
    labels = [IGNORED] * (len(ids) - size.answer_tokens) + [TEXT_ID] * size.answer_tokens
    return [
        Example(f"{number}", number, ids, labels, [pixels], extras=extras)
        for number in range(size.samples)
    ]
