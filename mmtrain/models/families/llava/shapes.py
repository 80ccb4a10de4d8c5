"""Published shapes, and the tiny model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


MODEL_TYPES = ("llava", "llava_llama", "share4v")
CLIP_L_336: dict[str, object] = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)
_TINY_VISION: dict[str, object] = dict(
    model_type="clip_vision_model",
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
    projection_dim=64,
)


def _vicuna(
    hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int = 32000
) -> dict[str, object]:
    return dict(
        model_type="llama",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


def _preset(
    text: dict[str, object], vision: dict[str, object], image_token: int = 32000
) -> dict[str, object]:
    return dict(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "llava-1.5-7b": _preset(_vicuna(4096, 11008, 32, 32), CLIP_L_336),
    "llava-1.5-13b": _preset(_vicuna(5120, 13824, 40, 40), CLIP_L_336),
    # LLaVA-1.5-7B's shape; its tower was tuned, too.
    "sharegpt4v-7b": _preset(_vicuna(4096, 11008, 32, 32), CLIP_L_336),
    "tiny": _preset(_vicuna(96, 256, 4, 4, vocabulary=512), _TINY_VISION, image_token=4),
}


def tokens_per_image(config: PretrainedConfig) -> int:
    """Features one image contributes to the sequence: patches, and the class token if kept."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return patches + (config.vision_feature_select_strategy != "default")
