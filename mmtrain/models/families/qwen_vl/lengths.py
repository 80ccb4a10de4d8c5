"""Positions and lengths: rotary angles, and the two rules for texts longer than in training.

Beyond `seq_length` tokens the base of the rotary angles grows with the length (dynamic NTK), and
queries are scaled by the logarithm of their position. Both depend on a row's own length and
positions, never on its padding or on the rows beside it. The published code leaves both out while
its modules are in training mode; here training sees what evaluation and generation see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_MOST_DOUBLINGS = 16


@dataclass(frozen=True)
class Positions:
    """Tables [rows, 1, tokens, channels of a head] in fp32."""

    cosine: torch.Tensor
    sine: torch.Tensor
    query_scale: torch.Tensor | None  # [rows, 1, tokens, 1]; None: all ones

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Queries or keys, turned by their positions."""
        wide = x.float()
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return (wide * self.cosine + turned * self.sine).to(x.dtype)

    def scaled(self, query: torch.Tensor) -> torch.Tensor:
        """Queries, scaled where they lie beyond the length of training."""
        return query if self.query_scale is None else query * self.query_scale.to(query.dtype)


def tables(
    config: PretrainedConfig, position_ids: torch.Tensor, num_tokens: int, row_lengths: torch.Tensor
) -> Positions:
    """The tables of some tokens of rows that hold up to `num_tokens`, padding included.

    They are computed at every forward, in fp32: buffers would be cast along with the weights.
    """
    beyond = num_tokens > config.seq_length
    dim = config.kv_channels
    base = torch.full((1,), float(config.rotary_emb_base), device=position_ids.device)
    if beyond and config.use_dynamic_ntk:
        alpha = ntk_alpha(row_lengths, config.seq_length).double()
        base = (config.rotary_emb_base * alpha ** (dim / (dim - 2))).float()
    exponents = torch.arange(0, dim, 2, device=position_ids.device).float() / dim
    frequencies = 1.0 / base[:, None] ** exponents
    angles = position_ids[..., None].float() * frequencies[:, None]
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    scale = None
    if beyond and config.use_logn_attn:
        scale = logn_scale(position_ids, config.seq_length)[:, None, :, None]
    return Positions(angles.cos(), angles.sin(), scale)


def ntk_alpha(lengths: torch.Tensor, seq_length: int) -> torch.Tensor:
    """1 up to `seq_length`, 3 up to twice as much, then 7, 15, …

    As published, 2 ^ ceil(log2(length / seq_length) + 1) - 1 and at least 1; counted in integers,
    so that exact multiples fall on the same side everywhere.
    """
    steps = torch.arange(_MOST_DOUBLINGS, device=lengths.device)
    doublings = (lengths[:, None] > seq_length * 2**steps).sum(-1)
    return 2 ** (doublings + 1) - 1


def logn_scale(position_ids: torch.Tensor, seq_length: int) -> torch.Tensor:
    """log of the number of tokens seen, to the base `seq_length`; at least 1."""
    seen = (position_ids + 1).float()
    return (seen.log() / math.log(seq_length)).clamp(min=1.0)
