"""The masks of keyed dropout, and the two functions that drop by them.

A mask is an integer hash of where an element stands. It is never kept: backward computes it again
from a few integers per row, in one kernel on a GPU, in blocks that fit a core's cache elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

log = logging.getLogger("mmtrain")
_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B - (1 << 32)  # as a signed 32-bit integer
_GOLDEN = 0x9E3779B1 - (1 << 32)
_BLOCK = 1 << 19  # elements: some threads' worth, and little memory
_INTEGER_OF = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class MaskKey(NamedTuple):
    """All that a mask is made of beside its place: nothing of the size of what is dropped."""

    rows: torch.Tensor  # int64 [rows]; where these are packed, [tokens]
    token_index: torch.Tensor | None  # of packed tokens: each one's index in its row
    step: torch.Tensor  # int32 [] on the device: the same tensor in every step
    tokens: torch.Tensor | None  # int32, without a kernel: what these make for each token
    module: int  # 63 bits
    probability: float

    @property
    def module_words(self) -> tuple[int, int]:
        """The module's key as two signed 32-bit integers."""
        return to_int32(self.module), to_int32(self.module >> 32)

    @property
    def threshold(self) -> int:
        """What a hash must reach to keep its element."""
        return to_int32(int(self.probability * 2**32) - 2**31)

    @property
    def scale(self) -> float:
        """Of what is kept."""
        return 1.0 / (1.0 - self.probability)


_NO_GRADIENTS = (None,) * len(MaskKey._fields)


def to_int32(value: int) -> int:
    """The low 32 bits, as a signed integer."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def drop(x: torch.Tensor, key: MaskKey) -> torch.Tensor:
    """Drop elements of [tokens, channels], [rows, tokens, channels] or of attention's four axes."""
    return _Drop.apply(x, *key)


def drop_then_linear(x: torch.Tensor, weight: torch.Tensor, key: MaskKey) -> torch.Tensor:
    """linear(drop(x), weight), which keeps x itself: one tensor, whoever else keeps it too."""
    return _DropThenLinear.apply(x, weight, *key)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(context: object, x: torch.Tensor, *key: object) -> torch.Tensor:
        return mask_of(x, _save(context, x, key))(x)

    @staticmethod
    @once_differentiable
    def backward(context: object, gradient: torch.Tensor) -> object:
        _, key = _saved(context)
        return mask_of(gradient, key)(gradient), *_NO_GRADIENTS


class _DropThenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        context: object, x: torch.Tensor, weight: torch.Tensor, *key: object
    ) -> torch.Tensor:
        # A parameter that is saved is read again in backward: ZeRO-3 has then gathered it anew.
        ready = _save(context, x, key, x, weight)
        return functional.linear(mask_of(x, ready)(x), weight)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> object:
        (x, weight), key = _saved(context)
        mask, of_x, of_weight = mask_of(x, key), None, None
        if context.needs_input_grad[1]:
            of_weight = gradient.flatten(0, -2).t() @ mask(x).flatten(0, -2)
        if context.needs_input_grad[0]:
            of_x = gradient @ weight
            mask(of_x, out=of_x)
        return of_x, of_weight, *_NO_GRADIENTS


def _save(context: Any, x: torch.Tensor, key: Sequence[Any], *tensors: torch.Tensor) -> MaskKey:
    """Keep what backward needs: the step's key too, which is an error if it is another by then."""
    ready = MaskKey(*key)
    if _kernel_for(x) is None:
        ready = ready._replace(tokens=_token_keys(ready, x.shape))
    context.save_for_backward(*tensors, *ready[:4])
    context.numbers = ready[4:]
    return ready


def _saved(context: Any) -> tuple[Sequence[torch.Tensor], MaskKey]:
    saved = context.saved_tensors
    return saved[:-4], MaskKey(*saved[-4:], *context.numbers)


def mask_of(x: torch.Tensor, key: MaskKey) -> Callable[..., torch.Tensor]:
    """(x, out=None) -> what is kept of x, scaled up, for any x of this shape; `out` may be x."""
    assert len(key.rows) == len(x), (key.rows.shape, x.shape)
    kernel = _kernel_for(x)
    return plain_mask(x, key) if kernel is None else partial(kernel, key)


def _kernel_for(x: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    return _kernel() if x.is_cuda and x.dtype != torch.float64 else None


def plain_mask(x: torch.Tensor, key: MaskKey) -> Callable[..., torch.Tensor]:
    """One operator after another, and a byte for each element while the mask is in use."""
    tokens = _token_keys(key, x.shape) if key.tokens is None else key.tokens
    channel = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
    # The first step of `_mix` goes through an exclusive or: here both its sides take it.
    token_parts, channel_parts = _folded(tokens).unsqueeze(-1), _folded(channel * _MIX_1)
    is_kept = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    # A number, no tensor: one from the host would make it wait for the card at every call.
    threshold = key.threshold
    for some_tokens, into in _blocks(token_parts, is_kept):
        hashed = _multiplied_(some_tokens ^ channel_parts)
        # The last step changes the lower halves, which matter where the upper ones are equal: it
        # is then an exclusive or with the threshold's.
        torch.ge(hashed.bitwise_xor_((threshold >> 16) & 0xFFFF), threshold, out=into)
    return partial(_kept_of, is_kept.view(torch.int8).neg_(), key.scale)


def _kept_of(
    bits: torch.Tensor, scale: float, x: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """By an `and` with all bits or none, several times as fast as a choice on a CPU."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    for some, some_bits, into in _blocks(x.contiguous(), bits, out):
        torch.mul(some, scale, out=into)
        into.view(_INTEGER_OF[x.element_size()]).bitwise_and_(some_bits)
    return out


def _blocks(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Tokens of [..., channels], some at a time: what is made of them stays in a cache."""
    like = tensors[-1]
    num_rows = max(1, (like.numel() if like.is_cuda else _BLOCK) // like.shape[-1])
    parts = (one.view(-1, one.shape[-1]).split(num_rows) for one in tensors)
    blocks = list(zip(*parts, strict=True))
    # On meta one block says what all of them hold: each frees what it made.
    return blocks[:1] if like.is_meta else blocks


def _token_keys(key: MaskKey, shape: torch.Size) -> torch.Tensor:
    """int32 [...]: a key for each token, and each head, of activations [..., channels]."""
    low, high = key.module_words
    hashed = _mix((key.rows & 0xFFFFFFFF).to(torch.int32) ^ low)
    hashed = _mix(hashed ^ ((key.rows >> 32) & 0x7FFFFFFF).to(torch.int32) ^ high)
    hashed = _mix(hashed ^ key.step)
    if key.token_index is not None:
        return _mix(hashed ^ (key.token_index.to(torch.int32) * _GOLDEN))
    tokens = torch.arange(shape[-2], dtype=torch.int32, device=hashed.device)
    keys = _mix(hashed[:, None] ^ (tokens * _GOLDEN))
    if len(shape) == 3:
        return keys
    heads = torch.arange(shape[1], dtype=torch.int32, device=hashed.device)
    return _mix(keys[:, None, :] ^ (heads * _MIX_2)[:, None])


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit finaliser on int32 tensors (multiplication wraps; shifts are made logical)."""
    return _folded(_multiplied_(_folded(x)))


def _multiplied_(x: torch.Tensor) -> torch.Tensor:
    """All of it but its first and its last step, in place."""
    x *= _MIX_1
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _MIX_2
    return x


def _folded(x: torch.Tensor) -> torch.Tensor:
    return x ^ (x >> 16).bitwise_and_(0xFFFF)


@cache
def _kernel() -> Callable[..., torch.Tensor] | None:
    """All of it in one kernel; None where there is none, or it computes anything else here."""
    try:
        from mmtrain.models.dropout_kernel import masked as found

        fault = None if _equals_operators(found) else "its masks are not the operators'"
    except Exception as error:  # whatever a compiler raises on a machine that we do not know
        fault = str(error).splitlines()[0] if str(error) else type(error).__name__
    if fault is not None:
        log.warning("dropout takes many kernels instead of one: no working Triton (%s)", fault)
        return None
    return found


def _equals_operators(kernel: Callable[..., torch.Tensor]) -> bool:
    rows = torch.tensor([2**62 + 5, 7, 2**31], device="cuda")
    step = torch.tensor(_MIX_2, dtype=torch.int32, device="cuda")
    index = torch.tensor([0, 9, 2], device="cuda")
    keys = [MaskKey(rows, one, step, None, 2**61 + 2**31 + 3, 0.2) for one in (index, None, None)]
    shapes = [torch.Size(one) for one in ((3, 1500), (3, 2, 1500), (3, 2, 2, 70))]
    return all(
        torch.equal(kernel(key, x), plain_mask(x, key)(x))
        for key, shape in zip(keys, shapes, strict=True)
        for dtype in (torch.float32, torch.bfloat16)
        for x in [torch.linspace(-3, 3, shape.numel(), device="cuda").view(shape).to(dtype)]
    )
