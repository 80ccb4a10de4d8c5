"""The ViT-bigG tower and the resampler behind it, under the published module names.

Parameters that belong to no layer (positions, queries, the last projection) are only read while
the module that holds them runs: sharded training gathers them for just that time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mmtrain.models.families.qwen_vl.attention import attend, split_heads
from mmtrain.models.families.qwen_vl.configuration import QWenConfig, num_queries, vision_shape

_EPSILON = 1e-6
_NUM_POSITIONS = 256  # learnt, whatever the image's size: a square of 16 x 16
_RESAMPLER_HEAD_WIDTH = 128


def stretched(positions: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Positions [n, channels] of a square, brought to a square of `num_tokens`.

    Bicubic interpolation, as a matrix: its own backward pass is not deterministic on GPUs.
    """
    given = len(positions)
    if given == num_tokens:
        return positions
    source, target = math.isqrt(given), math.isqrt(num_tokens)
    with torch.no_grad():
        each = torch.eye(given, device=positions.device).view(1, given, source, source)
        size = (target, target)
        weights = functional.interpolate(each, size=size, mode="bicubic", align_corners=False)
    return (weights.view(given, num_tokens).T @ positions.float()).to(positions.dtype)


def sine_positions(num_tokens: int, width: int) -> torch.Tensor:
    """The resampler's fixed positions: sines and cosines of column, then of row."""
    side, quarter = math.isqrt(num_tokens), width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    row, column = torch.meshgrid(*[torch.arange(side).double()] * 2, indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], -1).float()


class VisionAttention(nn.Module):
    """Attention among patches; queries, keys and values lie beside each other head by head."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        shape = vision_shape(config)
        self.config = config
        self.is_causal = False
        self.heads = shape.num_attention_heads
        self.in_proj = nn.Linear(shape.hidden_size, 3 * shape.hidden_size)
        self.out_proj = nn.Linear(shape.hidden_size, shape.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[images, patches, channels] to the same."""
        query, key, value = split_heads(self.in_proj(x), self.heads).chunk(3, dim=-1)
        return self.out_proj(attend(self, query, key, value))


class VisionMLP(nn.Module):
    """Two layers with a GELU between."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        shape = vision_shape(config)
        self.c_fc = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.c_proj = nn.Linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[images, patches, channels] to the same."""
        return self.c_proj(functional.gelu(self.c_fc(x)))


class VisionBlock(GradientCheckpointingLayer):
    """One layer of the tower."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        width = vision_shape(config).hidden_size
        self.ln_1 = nn.LayerNorm(width, eps=_EPSILON)
        self.attn = VisionAttention(config)
        self.ln_2 = nn.LayerNorm(width, eps=_EPSILON)
        self.mlp = VisionMLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[images, patches, channels] to the same."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class VisionBlocks(nn.Module):
    """The tower's layers."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        count = vision_shape(config).num_hidden_layers
        self.resblocks = nn.ModuleList(VisionBlock(config) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[images, patches, channels] to the same."""
        for block in self.resblocks:
            x = block(x)
        return x


class CrossAttention(nn.Module):
    """Queries, keys and values from three inputs, with torch's names for the parameters."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.is_causal = False
        # As published, heads of 128 channels; narrower models have one.
        self.heads = max(1, width // _RESAMPLER_HEAD_WIDTH)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[images, queries, channels] from keys and values [images, patches, channels]."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        made = [
            split_heads(functional.linear(x, weight, bias), self.heads)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]
        return self.out_proj(attend(self, *made))


class Resampler(nn.Module):
    """A fixed number of learnt queries that look at the patches once."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        width, tower_width = config.hidden_size, vision_shape(config).hidden_size
        queries = num_queries(config)
        self.pos_embed = nn.Parameter(torch.empty(queries, width), requires_grad=False)
        self.query = nn.Parameter(torch.empty(queries, width))
        same = tower_width == width
        self.kv_proj = nn.Identity() if same else nn.Linear(tower_width, width, bias=False)
        self.attn = CrossAttention(config)
        self.ln_q = nn.LayerNorm(width, eps=_EPSILON)
        self.ln_kv = nn.LayerNorm(width, eps=_EPSILON)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[images, patches, tower's channels] to [images, queries, channels]."""
        seen = self.ln_kv(self.kv_proj(x))
        query = (self.ln_q(self.query) + self.pos_embed).expand(len(x), -1, -1)
        return self.attn(query, seen + stretched(self.pos_embed, x.shape[1]), seen)


class VisionTransformer(nn.Module):
    """From pixels to the features that take the places of image tokens."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        assert config.visual is not None
        shape, patch = vision_shape(config), config.visual["patch_size"]
        tower_width, width = shape.hidden_size, config.hidden_size
        self.conv1 = nn.Conv2d(3, tower_width, kernel_size=patch, stride=patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(_NUM_POSITIONS, tower_width))
        self.ln_pre = nn.LayerNorm(tower_width, eps=_EPSILON)
        self.transformer = VisionBlocks(config)
        self.attn_pool = Resampler(config)
        self.ln_post = nn.LayerNorm(width, eps=_EPSILON)
        self.proj = nn.Parameter(torch.empty(width, width))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[images, 3, height, width] to [images, queries, LLM's channels]."""
        patches = self.conv1(pixels.to(self.proj.dtype)).flatten(2).transpose(1, 2)
        x = patches + stretched(self.positional_embedding, patches.shape[1])
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(self.attn_pool(x)) @ self.proj
