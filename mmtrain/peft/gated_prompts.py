"""Learned tokens that an attention also looks at, through a softmax and a gate of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class GatedPrompts(nn.Module):
    """gate * o(softmax(q K' / sqrt(d)) V'), where K' and V' are the attention's of these tokens."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(tokens, width))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, attention: Any, hidden_rtc: torch.Tensor, rotation: Any) -> torch.Tensor:
        """What an attention's output gets more; the tokens have no position, queries theirs."""
        rows, _, _ = hidden_rtc.shape
        # A row of its own for each: whatever adapts these linears drops by row.
        prompts = self.prompts.expand(rows, -1, -1)
        query = _rotated(_heads(attention, "q", hidden_rtc), *rotation)
        key, value = _heads(attention, "k", prompts), _heads(attention, "v", prompts)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * attention.head_dim**-0.5
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        seen = (self.gate * weights @ value).transpose(1, 2).flatten(2)
        return attention.o_proj(seen)


def _heads(attention: Any, role: str, x_rtc: torch.Tensor) -> torch.Tensor:
    """[rows, heads, tokens, channels]; looked up by name, so that adapted linears are found."""
    projected = getattr(attention, f"{role}_proj")(x_rtc)
    heads = projected.unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{role}_norm", None)
    return (heads if norm is None else norm(heads)).transpose(1, 2)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def look_at(attention: nn.Module, prompts: GatedPrompts) -> None:
    """Have an attention add what it sees of the prompts to what it gives."""

    def with_prompts(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        attended, *rest = out
        return attended + prompts(module, hidden, kwargs["position_embeddings"]), *rest

    attention.register_forward_hook(with_prompts, with_kwargs=True)
