"""Dropout whose mask is a function of what is dropped, never of a generator.

Each element's fate is an integer hash of (seed, module, step, sample, token, channel): the same
sample meets the same mask on any rank, in any micro-batch, after any resume.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

log = logging.getLogger("mmtrain")
_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B - (1 << 32)  # as a signed 32-bit integer
_GOLDEN = 0x9E3779B1 - (1 << 32)
KEYED_ATTENTION = "mmtrain_keyed"  # the attention implementation that drops by key


def stable_hash(*parts: Any) -> int:
    """63 bits that depend on the parts' text alone."""
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit finaliser on int32 tensors (multiplication wraps; shifts are made logical)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _MIX_1
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _MIX_2
    return x ^ ((x >> 16) & 0xFFFF)


def _to_int32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


class DropoutScope:
    """What the masks of one run are keyed by: its seed, the step, and the rows in flight."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.step = 0
        self._row_keys: dict[str, torch.Tensor] = {}
        self._packed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def set_rows(self, component: str, row_keys: torch.Tensor) -> None:
        """Say which sample (or image) each row of a component's activations belongs to."""
        self._row_keys[component] = row_keys

    def set_packed_rows(
        self, component: str, row_keys: torch.Tensor, token_index: torch.Tensor
    ) -> None:
        """Say the same of activations [tokens, channels]: each token's row and index in its row."""
        self._packed[component] = (row_keys, token_index)

    def token_keys(self, component: str, module_key: int, num_tokens: int) -> torch.Tensor:
        """int32 [rows, tokens]: one key per row and (unpadded, right-padded) token index."""
        row_hash = self._row_hash(self._row_keys[component], module_key)
        tokens = torch.arange(num_tokens, dtype=torch.int32, device=row_hash.device)
        return _mix(row_hash[:, None] ^ (tokens * _GOLDEN)[None, :])

    def packed_keys(self, component: str, module_key: int) -> torch.Tensor:
        """int32 [tokens]: the keys of packed rows, equal to those of the same rows padded."""
        rows, token_index = self._packed[component]
        return _mix(self._row_hash(rows, module_key) ^ (token_index.to(torch.int32) * _GOLDEN))

    def _row_hash(self, rows: torch.Tensor, module_key: int) -> torch.Tensor:
        low, high = rows & 0xFFFFFFFF, (rows >> 32) & 0x7FFFFFFF
        row_hash = _mix(low.to(torch.int64).to(torch.int32) ^ _to_int32(module_key))
        row_hash = _mix(row_hash ^ high.to(torch.int32) ^ _to_int32(module_key >> 32))
        return _mix(row_hash ^ _to_int32(stable_hash(self.seed, self.step)))


def scope_of(model: nn.Module) -> DropoutScope:
    """The model's dropout scope, made on first use."""
    scope = model.__dict__.get("dropout_scope")
    if scope is None:
        scope = model.__dict__["dropout_scope"] = DropoutScope(seed=0)
    return scope


class KeyedDropout(nn.Module):
    """Inverted dropout with a keyed mask on activations [rows, tokens, channels].

    Where rows are packed one after another, these are [tokens, channels].
    """

    def __init__(self, probability: float, module_name: str, component: str, scope: DropoutScope):
        super().__init__()
        self.p = probability
        self.component = component
        self.module_key = stable_hash("dropout", module_name)
        self._scope = [scope]  # in a list: the scope is no part of the module tree

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop while training; identity otherwise."""
        if not self.training or self.p == 0.0:
            return x
        scope = self._scope[0]
        if x.dim() == 2:
            keys = scope.packed_keys(self.component, self.module_key)
        else:
            keys = scope.token_keys(self.component, self.module_key, x.shape[1])
        assert keys.shape == x.shape[:-1], (keys.shape, x.shape)
        return drop(x, keys, self.p)


class KeyedAttentionDropout(nn.Module):
    """The same on attention probabilities [rows, heads, queries, keys].

    Its channels are the positions attended to; padding on the right changes no mask.
    """

    def __init__(self, probability: float, module_name: str, component: str, scope: DropoutScope):
        super().__init__()
        self.p = probability
        self.component = component
        self.module_key = stable_hash("attention dropout", module_name)
        self._scope = [scope]

    def forward(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Drop while training; identity otherwise."""
        if not self.training or self.p == 0.0:
            return probabilities
        _, heads, queries, _ = probabilities.shape
        keys = self._scope[0].token_keys(self.component, self.module_key, queries)
        head = torch.arange(heads, dtype=torch.int32, device=keys.device) * _MIX_2
        return drop(probabilities, _mix(keys[:, None, :] ^ head[None, :, None]), self.p)


def drop(x: torch.Tensor, keys: torch.Tensor, probability: float) -> torch.Tensor:
    """Drop elements of the last dimension by (key, index); what stays is scaled up."""
    threshold = _to_int32(int(probability * 2**32) - 2**31)
    return _Drop.apply(x, keys, threshold, 1.0 / (1.0 - probability))


class _Drop(torch.autograd.Function):
    """Backward computes the mask again from its keys, which is cheaper than to keep it."""

    @staticmethod
    def forward(
        context: Any, x: torch.Tensor, keys: torch.Tensor, threshold: int, scale: float
    ) -> torch.Tensor:
        context.save_for_backward(keys)
        context.threshold, context.scale = threshold, scale
        return _masked(x, keys, threshold, scale)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        (keys,) = context.saved_tensors
        return _masked(gradients[0], keys, context.threshold, context.scale), None, None, None


def _masked(x: torch.Tensor, keys: torch.Tensor, threshold: int, scale: float) -> torch.Tensor:
    kernel = _kernel() if x.is_cuda and x.dtype != torch.float64 else None
    return (kernel or masked_plainly)(x, keys, threshold, scale)


def masked_plainly(
    x: torch.Tensor, keys: torch.Tensor, threshold: int, scale: float
) -> torch.Tensor:
    """One operator after another."""
    channel = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device) * _MIX_1
    bits = _mix(keys[..., None] ^ channel)
    # A number, no tensor: one from the host would make it wait for the card at every call.
    return torch.where(bits >= threshold, x * scale, 0.0)


@cache
def _kernel() -> Callable[..., torch.Tensor] | None:
    """All of it in one kernel; None where there is none, or it computes anything else here."""
    try:
        from mmtrain.models.dropout_kernel import masked

        fault = None if _equals_operators(masked) else "its masks are not the operators'"
    except Exception as error:  # whatever a compiler raises on a machine that we do not know
        fault = str(error).splitlines()[0] if str(error) else type(error).__name__
    if fault is not None:
        log.warning("dropout takes many kernels instead of one: no working Triton (%s)", fault)
        return None
    return masked


def _equals_operators(kernel: Callable[..., torch.Tensor]) -> bool:
    keys = torch.tensor([_MIX_2, -5, 2**31 - 1], dtype=torch.int32, device="cuda")
    x = torch.linspace(-3.0, 3.0, 3 * 1500, device="cuda").reshape(3, 1500)
    return all(
        torch.equal(kernel(one, keys, -5, 1.25), masked_plainly(one, keys, -5, 1.25))
        for one in (x, x.bfloat16())
    )
