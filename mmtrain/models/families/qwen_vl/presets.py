"""Published shape, and a tiny model's; no torch here, so that listing families is instant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODEL_TYPES = ("qwen",)
_QWEN_VL_CHAT = dict(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=22016,
    num_hidden_layers=32,
    num_attention_heads=32,
    kv_channels=128,
    seq_length=2048,
    visual=dict(
        heads=16,
        image_size=448,
        image_start_id=151857,
        layers=48,
        mlp_ratio=4.9231,
        output_dim=4096,
        patch_size=14,
        width=1664,
    ),
)
_TINY = dict(
    vocab_size=704,
    hidden_size=96,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    kv_channels=24,
    seq_length=2048,
    visual=dict(
        heads=4,
        image_size=32,
        image_start_id=662,
        layers=2,
        mlp_ratio=2.0,
        output_dim=96,
        patch_size=4,
        width=64,
        n_queries=16,
    ),
)

PRESETS: Mapping[str, Mapping[str, Any]] = {"qwen-vl-chat": _QWEN_VL_CHAT, "tiny": _TINY}
