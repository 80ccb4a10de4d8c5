"""The base's own dropout, as it was trained with, keyed by sample instead of drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from mmtrain.models.dropout import (
    KEYED_ATTENTION,
    DropoutScope,
    KeyedAttentionDropout,
    KeyedDropout,
    scope_of,
)


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


class StackDropout(nn.Module):
    """T5 drops both a stack's input and what its last norm makes, by one module: two masks.

    Which of them is told by the number of the call within one forward of the stack. Activation
    checkpointing repeats layers, which lie between the two, and neither of the calls.
    """

    def __init__(self, at_input: KeyedDropout, at_output: KeyedDropout) -> None:
        super().__init__()
        self.at_input = at_input
        self.at_output = at_output
        self.num_calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop as the first or the second end of the stack."""
        assert self.num_calls < 2, "a stack drops twice in a forward"
        dropped = (self.at_output if self.num_calls else self.at_input)(x)
        self.num_calls += 1
        return dropped


def _start_counting(stack: Any, _: Any) -> None:
    stack.dropout.num_calls = 0


def install(model: nn.Module) -> None:
    """Put keyed dropout in the place of every dropout that the configuration leaves on."""
    scope = scope_of(model)
    for name, module in list(model.named_modules()):
        component = "qformer" if name.startswith("qformer.") else "llm"
        if isinstance(module, nn.Dropout) and module.p > 0:
            parent_name, _, leaf = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            if type(parent).__name__ == "T5Stack":
                _key_stack(parent, module.p, name, component, scope)
            else:
                setattr(parent, leaf, KeyedDropout(module.p, name, component, scope))
        elif probability := _attention_dropout(module):
            _key_attention(module, probability, name, component, scope)


def _key_stack(
    stack: Any, probability: float, name: str, component: str, scope: DropoutScope
) -> None:
    stack.dropout = StackDropout(
        KeyedDropout(probability, f"{name}.at_input", component, scope),
        KeyedDropout(probability, f"{name}.at_output", component, scope),
    )
    # Not left to the last call: an interrupted forward has none.
    stack.register_forward_pre_hook(_start_counting)


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
