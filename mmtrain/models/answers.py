"""The loss, computed only where labels are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as functional

from mmtrain.models.interface import Example, ForwardResult
from mmtrain.models.text import IGNORED


def answer_targets(
    examples: Sequence[Example], width: int, shift: int = 1
) -> dict[str, torch.Tensor]:
    """Flat positions whose hidden state predicts an answer token, the token, and its row.

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
    if not positions:
        positions, targets, rows = [0], [IGNORED], [0]
    return {
        "answer_positions": torch.tensor(positions),
        "answer_targets": torch.tensor(targets),
        "answer_rows": torch.tensor(rows),
    }


def answer_loss(
    hidden: torch.Tensor, head: Callable, batch: dict[str, torch.Tensor], num_answer_tokens: int
) -> ForwardResult:
    """Sums of cross entropy over answer tokens, in fp32."""
    rows, _, width = hidden.shape
    picked = hidden.reshape(-1, width).index_select(0, batch["answer_positions"])
    logits = head(picked).float()
    token_loss = functional.cross_entropy(
        logits, batch["answer_targets"], reduction="none", ignore_index=IGNORED
    )
    per_sample = token_loss.new_zeros(rows).index_add(0, batch["answer_rows"], token_loss)
    return ForwardResult(token_loss.sum(), num_answer_tokens, per_sample)
