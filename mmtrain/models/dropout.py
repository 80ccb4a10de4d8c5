"""Dropout whose mask is a function of what is dropped, never of a generator.

Each element's fate is an integer hash of (seed, module, step, sample, token, channel): the same
sample meets the same mask on any rank, in any micro-batch, after any resume.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B - (1 << 32)  # as a signed 32-bit integer
_GOLDEN = 0x9E3779B1 - (1 << 32)


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

    def set_rows(self, component: str, row_keys: torch.Tensor) -> None:
        """Say which sample (or picture) each row of a component's activations belongs to."""
        self._row_keys[component] = row_keys

    def token_keys(self, component: str, module_key: int, num_tokens: int) -> torch.Tensor:
        """int32 [rows, tokens]: one key per row and (unpadded, right-padded) token index."""
        rows = self._row_keys[component]
        low, high = rows & 0xFFFFFFFF, (rows >> 32) & 0x7FFFFFFF
        row_hash = _mix(low.to(torch.int64).to(torch.int32) ^ _to_int32(module_key))
        row_hash = _mix(row_hash ^ high.to(torch.int32) ^ _to_int32(module_key >> 32))
        row_hash = _mix(row_hash ^ _to_int32(stable_hash(self.seed, self.step)))
        tokens = torch.arange(num_tokens, dtype=torch.int32, device=rows.device)
        return _mix(row_hash[:, None] ^ (tokens * _GOLDEN)[None, :])


def scope_of(model: nn.Module) -> DropoutScope:
    """The model's dropout scope, made on first use."""
    scope = model.__dict__.get("dropout_scope")
    if scope is None:
        scope = model.__dict__["dropout_scope"] = DropoutScope(seed=0)
    return scope


class KeyedDropout(nn.Module):
    """Inverted dropout with a keyed mask on activations [rows, tokens, channels]."""

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
        rows, tokens, channels = x.shape
        keys = self._scope[0].token_keys(self.component, self.module_key, tokens)
        assert keys.shape == (rows, tokens), (keys.shape, x.shape)
        channel = torch.arange(channels, dtype=torch.int32, device=x.device) * _MIX_1
        bits = _mix(keys[:, :, None] ^ channel)
        threshold = _to_int32(int(self.p * 2**32) - 2**31)
        return torch.where(bits >= threshold, x / (1.0 - self.p), torch.zeros((), dtype=x.dtype))
