"""Keyed dropout on a GPU in one pass: the integers of `dropout.py`, never written to memory.

As separate operators one mask takes some twenty passes over int32 tensors of the activation's
size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024
_MIX_1 = tl.constexpr(0x7FEB352D)
_MIX_2 = tl.constexpr(0x846CA68B - (1 << 32))


@triton.jit
def _keep_or_zero(x, keys, out, width, threshold, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < width
    bits = tl.load(keys + row) ^ (channel * _MIX_1)
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    bits = bits * _MIX_1
    bits = bits ^ ((bits >> 15) & 0x1FFFF)
    bits = bits * _MIX_2
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    value = tl.load(x + row * width + channel, mask=inside).to(tl.float32) * scale
    value = tl.where(bits >= threshold, value, 0.0)
    tl.store(out + row * width + channel, value.to(out.dtype.element_ty), mask=inside)


def masked(x: torch.Tensor, keys: torch.Tensor, threshold: int, scale: float) -> torch.Tensor:
    """What `dropout.masked_plainly` computes, to the bit."""
    x, keys = x.contiguous(), keys.contiguous()
    out = torch.empty_like(x)
    grid = (keys.numel(), triton.cdiv(x.shape[-1], _BLOCK))
    _keep_or_zero[grid](x, keys, out, x.shape[-1], threshold, scale, BLOCK=_BLOCK)
    return out
