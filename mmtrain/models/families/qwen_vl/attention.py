"""Attention as options.attention names it, for decoder, tower and resampler."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[rows, tokens, channels] to [rows, heads, tokens, channels of a head]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention over [rows, heads, tokens, channels], back as [rows, tokens, channels].

    `module.is_causal` says what a missing mask means.
    """
    name = module.config._attn_implementation
    chosen = ALL_ATTENTION_FUNCTIONS.get_interface(name, _explicit)
    scaling = query.shape[-1] ** -0.5
    found, _ = chosen(
        module, query, key, value, mask, scaling=scaling, dropout=0.0, is_causal=module.is_causal
    )
    return found.flatten(2)


def _explicit(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`eager`: the whole table of weights, softmax in fp32. Its masks are there and additive."""
    scores = query @ key.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).transpose(1, 2), weights
