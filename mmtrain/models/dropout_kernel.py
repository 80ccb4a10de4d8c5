"""Keyed dropout on a GPU in one pass: the integers of `dropout_mask.py`, never written to memory.

As separate operators one mask takes some twenty passes over int32 tensors of the activation's
size, and its keys as many small kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmtrain.models.dropout_mask import MaskKey

_BLOCK = 1024
_MIX_1 = tl.constexpr(0x7FEB352D)
_MIX_2 = tl.constexpr(0x846CA68B - (1 << 32))
_GOLDEN = tl.constexpr(0x9E3779B1 - (1 << 32))


@triton.jit
def _mix(x):
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _MIX_1
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _MIX_2
    return x ^ ((x >> 16) & 0xFFFF)


# Else each of these numbers that is a multiple of 16, or one, would compile a kernel of its own.
@triton.jit(do_not_specialize=["module_low", "module_high", "threshold", "num_heads", "num_tokens"])
def _keep_or_zero(
    x,
    out,
    rows,
    token_index,
    step,
    module_low,
    module_high,
    threshold,
    scale,
    num_heads,
    num_tokens,
    width,
    IS_PACKED: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0)
    if IS_PACKED:
        row = place
        token = tl.load(token_index + place).to(tl.int32)
    else:
        row = place // num_tokens // num_heads
        token = place % num_tokens
    row_key = tl.load(rows + row)
    key = _mix(row_key.to(tl.int32) ^ module_low)
    key = _mix(key ^ ((row_key >> 32) & 0x7FFFFFFF).to(tl.int32) ^ module_high)
    key = _mix(key ^ tl.load(step))
    key = _mix(key ^ (token * _GOLDEN))
    if HAS_HEADS:
        key = _mix(key ^ (place // num_tokens % num_heads * _MIX_2))
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < width
    at = place.to(tl.int64) * width + channel
    value = tl.load(x + at, mask=inside).to(tl.float32) * scale
    value = tl.where(_mix(key ^ (channel * _MIX_1)) >= threshold, value, 0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def masked(key: MaskKey, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """What `dropout_mask.plain_mask` computes, to the bit."""
    x = x.contiguous()
    out = torch.empty_like(x) if out is None else out
    assert out.is_contiguous()
    width = x.shape[-1]
    block = min(_BLOCK, triton.next_power_of_2(width))
    grid = (x.numel() // max(width, 1), triton.cdiv(width, block))
    if x.numel():
        _keep_or_zero[grid](
            x,
            out,
            key.rows.contiguous(),
            key.rows if key.token_index is None else key.token_index.contiguous(),
            key.step,
            *key.module_words,
            key.threshold,
            key.scale,
            x.shape[1] if x.dim() == 4 else 1,
            x.shape[-2],
            width,
            IS_PACKED=key.token_index is not None,
            HAS_HEADS=x.dim() == 4,
            BLOCK=block,
        )
    return out
