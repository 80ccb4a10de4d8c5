"""The base's own dropout, as it was trained with, keyed by sample instead of drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from mmtrain.models.dropout import (
    DropoutScope,
    KeyedAttentionDropout,
    KeyedDropout,
    scope_of,
)

KEYED_ATTENTION = "mmtrain_keyed"


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float = 1.0,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, its probabilities dropped by the module's keyed dropout."""
    scores = query @ key.transpose(-1, -2) * scaling
    for term in (position_bias, attention_mask):
        if term is not None:
            scores = scores + term
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    out = module.keyed_dropout(weights) @ value
    return out.transpose(1, 2).contiguous(), weights


AttentionInterface.register(KEYED_ATTENTION, attend)
AttentionMaskInterface.register(KEYED_ATTENTION, eager_mask)


def install(model: nn.Module) -> None:
    """Put keyed dropout in the place of every dropout that the configuration leaves on."""
    scope = scope_of(model)
    for name, module in list(model.named_modules()):
        component = "qformer" if name.startswith("qformer.") else "llm"
        if isinstance(module, nn.Dropout) and module.p > 0:
            parent, _, leaf = name.rpartition(".")
            keyed = KeyedDropout(module.p, name, component, scope)
            setattr(model.get_submodule(parent), leaf, keyed)
        elif probability := _attention_dropout(module):
            _key_attention(module, probability, name, component, scope)


def _attention_dropout(module: Any) -> float:
    """The dropout on a module's attention probabilities, if it is an attention that has one."""
    kind = type(module).__name__
    if kind == "InstructBlipQFormerMultiHeadAttention":
        return float(module.attention_dropout)
    return float(module.dropout) if kind == "T5Attention" else 0.0


def _key_attention(
    module: Any, probability: float, name: str, component: str, scope: DropoutScope
) -> None:
    module.keyed_dropout = KeyedAttentionDropout(probability, name, component, scope)
    module.config._attn_implementation = KEYED_ATTENTION
