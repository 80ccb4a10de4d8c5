"""Learned tokens beside the queries and the words of a Q-Former, renewed in its first layers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class CoupledPrompts(nn.Module):
    """Per layer, tokens for the words, and what a linear makes of them for the queries."""

    def __init__(self, depth: int, tokens: int, width: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(depth, tokens, width))
        self.couplings = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, layer: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[rows, tokens, channels] before the queries, and behind the words."""
        words = self.prompts[layer]
        queries = self.couplings[layer](words)
        return queries.expand(rows, -1, -1), words.expand(rows, -1, -1)


def put_around(layers: Sequence[nn.Module], prompts: CoupledPrompts, tokens: int) -> None:
    """Have a stack's layers see them: each of the first ones its own, all others what came of them.

    Behind the last layer nobody sees that they were there.
    """
    depth = len(prompts.couplings)

    def enter(number: int) -> Any:
        names = list(inspect.signature(layers[number].forward).parameters)

        def with_prompts(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = dict(zip(names, args)) | kwargs
            hidden = given["hidden_states"]
            if number < depth:
                before, behind = prompts(number, len(hidden))
                inner = hidden if number == 0 else hidden[:, tokens:-tokens]
                given["hidden_states"] = torch.cat([before, inner, behind], dim=1)
            given["attention_mask"] = _widened(given.get("attention_mask"), tokens)
            given["query_length"] = given["query_length"] + tokens
            return (), given

        return with_prompts

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(enter(number), with_kwargs=True)
    layers[-1].register_forward_hook(lambda _, __, out: out[:, tokens:-tokens])


def _widened(mask: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """A mask [rows, keys] or [rows, 1, queries, keys]: everybody sees the tokens at both ends."""
    if mask is None:
        return None
    if mask.dim() == 2:  # flash attention's
        return functional.pad(mask, (tokens, tokens), value=1)
    seen = True if mask.dtype == torch.bool else 0.0
    mask = functional.pad(mask, (tokens, tokens), value=seen)
    # What a prompt itself sees is what the last row of its side sees: all rows are alike here.
    return mask[:, :, :1].expand(-1, -1, mask.shape[2] + 2 * tokens, -1)
