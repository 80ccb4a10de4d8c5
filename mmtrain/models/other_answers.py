"""Further answers to prompts that ran already: only what is new of each row runs again.

The first batch runs whole and leaves its keys and values, or what its encoder gave. Each batch
behind it brings the tokens of its rows from where they differ, with the last before them, whose
hidden state predicts the first. In rows that are shorter than others, and where the first answers
stood, what is cached is masked; positions go on from each row's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mmtrain.models.interface import Example, Family, ImageFeatures, SharedPrompts
from mmtrain.models.text import IGNORED

Tensors = Mapping[str, torch.Tensor]


def shared_prompts(
    answered: Sequence[Sequence[Example]], image_token_id: int
) -> SharedPrompts | None:
    """For batches of the same rows with other answers; None where long answers moved an image.

    Texts that had to be cut lose the more of the prompt, the longer the answer is.
    """
    starts = []
    for examples in zip(*answered, strict=True):
        start = _start(examples)
        if start is None or any(image_token_id in one.input_ids[start:] for one in examples):
            return None
        starts.append(start)
    return SharedPrompts(starts)


def _start(examples: Sequence[Example]) -> int | None:
    """The last token that all have in common before any answer begins."""
    first = examples[0].input_ids
    if any(len(one.labels) != len(one.input_ids) for one in examples):  # labels are a decoder's own
        return len(first) if all(one.input_ids == first for one in examples) else None
    common = min(_same(first, one.input_ids) for one in examples)
    asked = min(_first_label(one.labels) for one in examples)
    return max(0, min(common, asked) - 1)


def _same(first: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(first, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(other)))


def _first_label(labels: Sequence[int]) -> int:
    return next((at for at, label in enumerate(labels) if label != IGNORED), len(labels))


def prepare(shared: SharedPrompts, tensors: Tensors) -> None:
    """Before the first batch runs."""
    from transformers import DynamicCache

    shared.tensors = tensors
    if "decoder_input_ids" not in tensors:
        shared.past = DynamicCache()


def hidden_states(
    family: Family, model: Any, tensors: Tensors, shared: SharedPrompts
) -> tuple[torch.Tensor, Tensors]:
    """What the head reads of the new tokens, and the tensors that say which they are."""
    none = ImageFeatures(torch.empty(0))
    table = family.code.decoder(model).get_input_embeddings()
    if "decoder_input_ids" in tensors:
        moved = {**tensors, "attention_mask": shared.tensors["attention_mask"]}
        return family.code.hidden_states(model, none.tokens, moved, none, shared), moved
    moved = _moved(tensors, shared)
    embeds_rtc = table(moved["input_ids"])
    num_cached = shared.past.get_seq_length()
    hidden_rtc = family.code.hidden_states(model, embeds_rtc, moved, none, shared)
    shared.past.crop(num_cached - shared.past.get_seq_length())
    return hidden_rtc, moved


def _moved(tensors: Tensors, shared: SharedPrompts) -> dict[str, torch.Tensor]:
    """The batch's tensors of each row from its start on."""
    ids_rt, before = tensors["input_ids"], shared.tensors["attention_mask"]
    device, (_, width), num_cached = ids_rt.device, ids_rt.shape, before.shape[1]
    starts_r1 = torch.tensor(shared.starts, device=device)[:, None]
    # Prompts of a method, which stand before every row.
    inserted = num_cached - shared.tensors["input_ids"].shape[1]
    new = torch.arange(width - min(shared.starts), device=device)
    places_rt = starts_r1 + new
    mask_rt = torch.nn.functional.pad(tensors["attention_mask"], (0, len(new)))
    mask_rt = mask_rt.gather(1, places_rt)
    cached_rt = (torch.arange(num_cached, device=device) < starts_r1 + inserted).to(mask_rt.dtype)
    columns_a = tensors["answer_positions"] % width
    rows_a = tensors["answer_positions"] // width
    new_columns_a = (columns_a - starts_r1[rows_a, 0]).clamp(min=0)
    return {
        **tensors,
        "input_ids": ids_rt.gather(1, places_rt.clamp(max=width - 1)),
        "is_image": torch.zeros_like(mask_rt, dtype=torch.bool),
        "attention_mask": mask_rt,
        "cached_mask": torch.cat([cached_rt, mask_rt], dim=1),
        "position_ids": _positions(shared.tensors, starts_r1 + inserted) + new,
        "answer_positions": rows_a * len(new) + new_columns_a,
    }


def _positions(first: Tensors, starts_r1: torch.Tensor) -> torch.Tensor:
    """[..., rows, 1]: of the rows' first new tokens, behind which there is text alone."""
    if "position_ids" not in first:
        return starts_r1
    known = first["position_ids"]
    return known.gather(-1, starts_r1.expand(*known.shape[:-1], 1))
