"""Published shapes of Qwen2-VL 7B, Qwen2.5-VL 7B and Qwen3-VL 8B, and a tiny model of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# model_type -> how transformers' classes of that generation begin
CLASSES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
_TOKENS = dict(
    image_token_id=151655,
    video_token_id=151656,
    vision_start_token_id=151652,
    vision_end_token_id=151653,
    tie_word_embeddings=False,
)
_QWEN2_7B = dict(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_window_layers=28,
    use_sliding_window=False,
    rms_norm_eps=1e-6,
    rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
)
_PATCHES = dict(patch_size=14, spatial_merge_size=2, temporal_patch_size=2, in_channels=3)

_TINY_TOKENS = {**_TOKENS, "image_token_id": 511}
_TINY_PATCHES = {**_PATCHES, "patch_size": 4}
_TINY_TEXT = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
)
_TINY_QWEN2 = dict(
    _TINY_TEXT,
    bos_token_id=None,
    eos_token_id=None,
    rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3]),
)

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "qwen2-vl-7b": dict(
        model_type="qwen2_vl",
        text_config=dict(_QWEN2_7B, max_position_embeddings=32768),
        vision_config=dict(
            _PATCHES,
            depth=32,
            embed_dim=1280,
            num_heads=16,
            mlp_ratio=4,
            hidden_act="quick_gelu",
            hidden_size=3584,
        ),
        **_TOKENS,
    ),
    "qwen2.5-vl-7b": dict(
        model_type="qwen2_5_vl",
        text_config=dict(_QWEN2_7B, max_position_embeddings=128000),
        vision_config=dict(
            _PATCHES,
            depth=32,
            hidden_size=1280,
            intermediate_size=3420,
            num_heads=16,
            hidden_act="silu",
            out_hidden_size=3584,
            window_size=112,
            fullatt_block_indexes=[7, 15, 23, 31],
            tokens_per_second=2,
        ),
        **_TOKENS,
    ),
    "qwen3-vl-8b": dict(
        model_type="qwen3_vl",
        text_config=dict(
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=262144,
            rms_norm_eps=1e-6,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=5e6,
                mrope_section=[24, 20, 20],
                mrope_interleaved=True,
            ),
        ),
        vision_config=dict(
            _PATCHES,
            patch_size=16,
            depth=27,
            hidden_size=1152,
            intermediate_size=4304,
            num_heads=16,
            hidden_act="gelu_pytorch_tanh",
            out_hidden_size=4096,
            num_position_embeddings=2304,
            deepstack_visual_indexes=[8, 16, 24],
        ),
        **_TOKENS,
    ),
    "tiny": dict(
        model_type="qwen2_vl",
        text_config=_TINY_QWEN2,
        vision_config=dict(
            _TINY_PATCHES,
            depth=3,
            embed_dim=64,
            num_heads=4,
            mlp_ratio=2,
            hidden_size=64,
        ),
        **_TINY_TOKENS,
    ),
    # An image of 32 x 32 has 4 x 4 merged tokens, in four windows of 2 x 2.
    "tiny-2.5": dict(
        model_type="qwen2_5_vl",
        text_config=_TINY_QWEN2,
        vision_config=dict(
            _TINY_PATCHES,
            depth=3,
            hidden_size=64,
            intermediate_size=96,
            num_heads=4,
            out_hidden_size=64,
            window_size=16,
            fullatt_block_indexes=[2],
        ),
        **_TINY_TOKENS,
    ),
    "tiny-3": dict(
        model_type="qwen3_vl",
        text_config=dict(
            _TINY_TEXT,
            head_dim=16,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=5e6,
                mrope_section=[4, 2, 2],
                mrope_interleaved=True,
            ),
        ),
        vision_config=dict(
            _TINY_PATCHES,
            depth=3,
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            out_hidden_size=64,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0, 1],
        ),
        **_TINY_TOKENS,
    ),
}
