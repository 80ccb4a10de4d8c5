"""Qwen-VL and Qwen-VL-Chat of 2023, built here: transformers has never had them.

ViT-bigG, a resampler that makes 256 features of any image, and the Qwen-7B decoder, all under
the names of the published weights, with its fused projections kept. The token embeddings and the
head are components of their own, because the released fine-tuning code trains them in full; the
resampler's fixed positions are one because it trains nothing there: `full` on the connector leaves
them as they are. `full` on the LLM is its layers and last norm.

Text stays text, whatever it spells, where the original makes control tokens of `<ref>`, `<box>`,
`<quad>`, their ends and all others. `model.grounding_tokens: true` makes control tokens of these
six, and of no others, in questions and answers: for grounding data.
"""

from __future__ import annotations

from mmtrain.models.families.qwen_vl.presets import MODEL_TYPES, PRESETS
from mmtrain.models.interface import Family, Tap

_LLM_LAYER = r"transformer\.h\.(?P<layer>\d+)"
_VISION_BLOCK = r"transformer\.visual\.transformer\.resblocks\.(?P<layer>\d+)"
_RESAMPLER = "transformer.visual.attn_pool"

FAMILY = Family(
    module=f"{__name__}.code",
    presets=PRESETS,
    model_types=MODEL_TYPES,
    own_options=("grounding_tokens",),
    default_max_length=2048,  # beyond it the base extrapolates
    components={
        "vision": (r"transformer\.visual\.(?!attn_pool\.|ln_post\.|proj$).*",),
        "connector": (
            r"transformer\.visual\.attn_pool\.(?!pos_embed$).*",
            r"transformer\.visual\.(ln_post\..*|proj)",
        ),
        "connector_positions": (r"transformer\.visual\.attn_pool\.pos_embed",),
        "llm": (r"transformer\.(h|ln_f)\..*",),
        "embeddings": (r"transformer\.wte\..*",),
        "head": (r"lm_head\..*",),
    },
    sublayers={
        "llm": {
            "attn": {"qkv": rf"{_LLM_LAYER}\.attn\.c_attn", "o": rf"{_LLM_LAYER}\.attn\.c_proj"},
            "mlp": {
                "gate": rf"{_LLM_LAYER}\.mlp\.w2",
                "up": rf"{_LLM_LAYER}\.mlp\.w1",
                "down": rf"{_LLM_LAYER}\.mlp\.c_proj",
            },
        },
        "vision": {
            "attn": {
                "qkv": rf"{_VISION_BLOCK}\.attn\.in_proj",
                "o": rf"{_VISION_BLOCK}\.attn\.out_proj",
            },
            "mlp": {
                "up": rf"{_VISION_BLOCK}\.mlp\.c_fc",
                "down": rf"{_VISION_BLOCK}\.mlp\.c_proj",
            },
        },
    },
    # As the released fine-tuning code and the study of four methods placed them.
    default_roles={
        "lora": {"llm": {"attn": ("qkv", "o"), "mlp": ("gate", "up")}},
        "bottleneck": {"llm": {"attn": ("o",), "mlp": ("gate", "up")}},
        "ia3": {
            "llm": {"attn": ("o",), "mlp": ("down",)},
            "vision": {"attn": ("o",), "mlp": ("down",)},
        },
    },
    row_keys={"vision": ("image_keys",), "llm": ("row_keys",)},
    taps={
        "vision_tokens": Tap(_RESAMPLER, "input"),
        "connector_output": Tap("transformer.visual", "output"),
    },
)
