"""The Qwen-7B decoder with its tower, under the published module names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmtrain.models.families.qwen_vl.attention import attend, split_heads
from mmtrain.models.families.qwen_vl.configuration import QWenConfig
from mmtrain.models.families.qwen_vl.lengths import Positions, tables
from mmtrain.models.families.qwen_vl.visual import VisionTransformer


class RMSNorm(nn.Module):
    """Scaled to a mean square of one, in fp32."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of [rows, tokens, channels]."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return wide.to(x.dtype) * self.weight


class QWenAttention(nn.Module):
    """Causal attention with one fused projection for queries, keys and values."""

    def __init__(self, config: QWenConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.is_causal = True
        width = config.hidden_size
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width, bias=not config.no_bias)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        positions: Positions,
        past_key_values: Any = None,
    ) -> torch.Tensor:
        """[rows, tokens, channels] to the same."""
        heads = self.config.num_attention_heads
        query, key, value = (split_heads(one, heads) for one in self.c_attn(x).chunk(3, dim=-1))
        query, key = positions.rotated(query), positions.rotated(key)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer)
        return self.c_proj(attend(self, positions.scaled(query), key, value, mask))


class QWenMLP(nn.Module):
    """w1 goes up, w2 is the gate, c_proj goes down."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size // 2
        self.w1 = nn.Linear(width, inner, bias=not config.no_bias)
        self.w2 = nn.Linear(width, inner, bias=not config.no_bias)
        self.c_proj = nn.Linear(inner, width, bias=not config.no_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, tokens, channels] to the same."""
        return self.c_proj(self.w1(x) * functional.silu(self.w2(x)))


class QWenBlock(GradientCheckpointingLayer):
    """One layer."""

    def __init__(self, config: QWenConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        positions: Positions,
        past_key_values: object = None,
    ) -> torch.Tensor:
        """[rows, tokens, channels] to the same."""
        given = {"positions": positions, "past_key_values": past_key_values}
        x = x + self.attn(self.ln_1(x), mask, **given)
        return x + self.mlp(self.ln_2(x))


class QWenModel(nn.Module):
    """Embeddings, layers and the tower; the layers run on embeddings that are already mixed."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(QWenBlock(config, n) for n in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.visual = VisionTransformer(config)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        row_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Last hidden states. `attention_mask` covers the cached tokens, too; none: no padding.

        `row_lengths` are the lengths that choose the rotary base, usually those of the mask; with
        a cache they must stay what they were when its keys were turned.
        """
        rows, num_new, _ = inputs_embeds.shape
        seen = attention_mask
        if seen is None:
            seen = torch.ones(rows, num_new, dtype=torch.long, device=inputs_embeds.device)
        num_tokens = seen.shape[1]
        if position_ids is None:
            position_ids = (seen.long().cumsum(-1) - 1).clamp(min=0)
        if row_lengths is None:
            row_lengths = seen.sum(-1)
        positions = tables(self.config, position_ids[:, -num_new:], num_tokens, row_lengths)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        x = inputs_embeds
        for block in self.h:
            # By keyword: DeepSpeed's hooks look for tensors in what is given by position.
            x = block(x, mask, positions=positions, past_key_values=past_key_values)
        return self.ln_f(x)


class QWenLMHeadModel(PreTrainedModel, GenerationMixin):
    """The whole model, as transformers wants one: to generate, save and checkpoint activations."""

    config: QWenConfig
    config_class = QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QWenBlock", "VisionBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        return self.transformer.wte

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool = False,
        row_lengths: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        **_: object,
    ) -> CausalLMOutputWithPast:
        """Logits of the last `logits_to_keep` tokens (0: of all) from ids of text or embeddings."""
        if inputs_embeds is None:
            inputs_embeds = self.transformer.wte(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if attention_mask is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            shape = inputs_embeds.shape[0], past + inputs_embeds.shape[1]
            attention_mask = torch.ones(shape, dtype=torch.long, device=inputs_embeds.device)
        hidden = self.transformer(
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values=past_key_values,
            row_lengths=row_lengths,
        )
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
