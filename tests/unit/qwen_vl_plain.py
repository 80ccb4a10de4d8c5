"""Qwen-VL once more, plainly, from its state dict: what the family's model is compared with.

One sample at a time, head by head, without padding or cache; rotary angles as complex numbers, the
resampler as torch's own attention, lengths by the published formulas.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn

Tensors = Mapping[str, torch.Tensor]


def linear(tensors: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    """A layer by its name, with its bias if it has one."""
    out = x @ tensors[f"{name}.weight"].T
    return out + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else out


def layer_norm(tensors: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1, then the layer's own scale and shift."""
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    return normed * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def rms_norm(tensors: Tensors, name: str, x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Mean square 1, then the layer's own scale."""
    return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * tensors[f"{name}.weight"]


def interpolated(table: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of a square, interpolated to a square of `count`."""
    old, new = math.isqrt(len(table)), math.isqrt(count)
    if old == new:
        return table
    image = table.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    image = functional.interpolate(image, size=(new, new), mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).reshape(count, -1)


def image_features(tensors: Tensors, config: Mapping[str, Any], pixels: torch.Tensor) -> Any:
    """[queries, hidden] of one image."""
    tower = {
        name.removeprefix("transformer.visual."): value
        for name, value in tensors.items()
        if name.startswith("transformer.visual.")
    }
    visual = config["visual"]
    patches = functional.conv2d(pixels[None], tower["conv1.weight"], stride=visual["patch_size"])
    x = patches[0].flatten(1).T
    x = x + interpolated(tower["positional_embedding"], len(x))
    x = layer_norm(tower, "ln_pre", x)
    for number in range(visual["layers"]):
        block = f"transformer.resblocks.{number}"
        attended = tower_attention(tower, f"{block}.attn", layer_norm(tower, f"{block}.ln_1", x))
        x = x + attended(visual["heads"])
        inner = linear(tower, f"{block}.mlp.c_fc", layer_norm(tower, f"{block}.ln_2", x))
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        x = x + linear(tower, f"{block}.mlp.c_proj", inner)
    return layer_norm(tower, "ln_post", resampled(tower, x)) @ tower["proj"]


def tower_attention(tower: Tensors, name: str, x: torch.Tensor) -> Any:
    """Every head has its query, key and value rows beside each other in the fused projection."""
    fused = linear(tower, f"{name}.in_proj", x)

    def attended(heads: int) -> torch.Tensor:
        outputs = []
        for mine in fused.chunk(heads, dim=-1):
            query, key, value = mine.split(mine.shape[-1] // 3, dim=-1)
            weights = torch.softmax(query @ key.T / math.sqrt(query.shape[-1]), dim=-1)
            outputs.append(weights @ value)
        return linear(tower, f"{name}.out_proj", torch.cat(outputs, dim=-1))

    return attended


def resampled(tower: Tensors, x: torch.Tensor) -> torch.Tensor:
    """The queries' look at the patches, by torch's own multi-head attention."""
    width = len(tower["attn_pool.ln_q.weight"])
    attention = nn.MultiheadAttention(width, max(1, width // 128), batch_first=True)
    prefix = "attn_pool.attn."
    attention.load_state_dict(
        {n.removeprefix(prefix): value for n, value in tower.items() if n.startswith(prefix)}
    )
    keys = layer_norm(tower, "attn_pool.ln_kv", linear(tower, "attn_pool.kv_proj", x))
    queries = layer_norm(tower, "attn_pool.ln_q", tower["attn_pool.query"])
    fixed = tower["attn_pool.pos_embed"]
    keyed = keys + interpolated(fixed, len(keys))
    with torch.no_grad():
        out, _ = attention((queries + fixed)[None], keyed[None], keys[None])
    return out[0]


def turned(x: torch.Tensor, base: float) -> torch.Tensor:
    """[tokens, channels] of a head: channel i and its partner half a head on, as one number."""
    half = x.shape[-1] // 2
    numbers = torch.complex(x[:, :half], x[:, half:])
    angles = [
        [cmath.exp(1j * position * base ** (-i / half)) for i in range(half)]
        for position in range(len(x))
    ]
    numbers = numbers * torch.tensor(angles, dtype=torch.complex64)
    return torch.cat([numbers.real, numbers.imag], dim=-1)


def rotary_base(config: Mapping[str, Any], length: int) -> float:
    """The base for a text of this length."""
    context = math.log(length / config["seq_length"], 2) + 1
    alpha = max(2 ** math.ceil(context) - 1, 1)
    dim = config["kv_channels"]
    return config["rotary_emb_base"] * alpha ** (dim / (dim - 2))


def query_factors(config: Mapping[str, Any], count: int) -> torch.Tensor:
    """One number per token: the logarithm of its place, beyond the length of training."""
    limit = config["seq_length"]
    factors = [math.log(n, limit) if n > limit else 1.0 for n in range(1, count + 1)]
    return torch.tensor(factors)[:, None]


def logits(
    tensors: Tensors,
    config: Mapping[str, Any],
    ids: Sequence[int],
    images: Sequence[torch.Tensor] = (),
    prompt_length: int | None = None,
) -> torch.Tensor:
    """[tokens, vocabulary] of one sample.

    A cache keeps the rotary base that the prompt chose: `prompt_length`, else the whole length.
    """
    base = rotary_base(config, prompt_length or len(ids))
    x = embedded(tensors, config, ids, images)
    for number in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{number}"
        epsilon = config["layer_norm_epsilon"]
        seen = rms_norm(tensors, f"{layer}.ln_1", x, epsilon)
        x = x + causal_attention(tensors, config, f"{layer}.attn", seen, base)
        seen = rms_norm(tensors, f"{layer}.ln_2", x, epsilon)
        gate = linear(tensors, f"{layer}.mlp.w2", seen)
        inner = linear(tensors, f"{layer}.mlp.w1", seen) * gate * torch.sigmoid(gate)
        x = x + linear(tensors, f"{layer}.mlp.c_proj", inner)
    x = rms_norm(tensors, "transformer.ln_f", x, config["layer_norm_epsilon"])
    return linear(tensors, "lm_head", x)


def embedded(
    tensors: Tensors,
    config: Mapping[str, Any],
    ids: Sequence[int],
    images: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Token embeddings, overwritten between <img> and </img>, as the published code does."""
    x = tensors["transformer.wte.weight"][torch.tensor(ids)].clone()
    start = config["visual"]["image_start_id"]
    opened = [place for place, token in enumerate(ids) if token == start]
    closed = [place for place, token in enumerate(ids) if token == start + 1]
    for first, last, pixels in zip(opened, closed, images, strict=True):
        x[first + 1 : last] = image_features(tensors, config, pixels)
    return x


def causal_attention(
    tensors: Tensors, config: Mapping[str, Any], name: str, x: torch.Tensor, base: float
) -> torch.Tensor:
    """Head by head, with the whole table of weights."""
    size, count = config["kv_channels"], len(x)
    query, key, value = linear(tensors, f"{name}.c_attn", x).chunk(3, dim=-1)
    future = torch.ones(count, count, dtype=torch.bool).triu(1)
    outputs = []
    for head in range(config["num_attention_heads"]):
        mine = slice(head * size, (head + 1) * size)
        asked = turned(query[:, mine], base) * query_factors(config, count)
        scores = asked @ turned(key[:, mine], base).T / math.sqrt(size)
        outputs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ value[:, mine])
    return linear(tensors, f"{name}.c_proj", torch.cat(outputs, dim=-1))
