"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images at their own resolution, and positions in three
dimensions; the vision merger is the connector.

Which generation a checkpoint is of, its `model_type` says.
"""

from __future__ import annotations

from mmtrain.models.families.qwen2_vl.presets import CLASSES, PRESETS
from mmtrain.models.interface import Family, Tap

_LLM_LAYER = r"model\.language_model\.layers\.(?P<layer>\d+)"
_VISION_BLOCK = r"model\.visual\.blocks\.(?P<layer>\d+)"
_MERGER = "model.visual.merger"

FAMILY = Family(
    module=f"{__name__}.code",
    presets=PRESETS,
    model_types=tuple(CLASSES),
    own_options=("max_pixels",),
    # An image of a million pixels makes about 1300 tokens; the rest is for the text.
    default_max_length=2048,
    components={
        "vision": (r"model\.visual\.(?!merger\.|deepstack_merger_list\.).*",),
        "connector": (r"model\.visual\.(merger|deepstack_merger_list)\..*",),
        "llm": (r"model\.language_model\..*", r"lm_head\..*"),
    },
    sublayers={
        "llm": {
            "attn": {role: rf"{_LLM_LAYER}\.self_attn\.{role}_proj" for role in "qkvo"},
            "mlp": {role: rf"{_LLM_LAYER}\.mlp\.{role}_proj" for role in ("gate", "up", "down")},
        },
        "vision": {
            "attn": {"qkv": rf"{_VISION_BLOCK}\.attn\.qkv", "o": rf"{_VISION_BLOCK}\.attn\.proj"},
            "mlp": {
                "gate": rf"{_VISION_BLOCK}\.mlp\.gate_proj",
                "up": rf"{_VISION_BLOCK}\.mlp\.(?:fc1|up_proj|linear_fc1)",
                "down": rf"{_VISION_BLOCK}\.mlp\.(?:fc2|down_proj|linear_fc2)",
            },
        },
    },
    default_roles={
        "ia3": {
            "llm": {"attn": ("k", "v"), "mlp": ("down",)},
            "vision": {"attn": ("o",), "mlp": ("down",)},
        },
    },
    row_keys={"vision": ("patch_keys", "patch_index"), "llm": ("row_keys",)},
    taps={"vision_tokens": Tap(_MERGER, "input"), "connector_output": Tap(_MERGER, "output")},
)
