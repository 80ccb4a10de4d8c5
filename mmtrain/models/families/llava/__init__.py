"""LLaVA-1.5 and ShareGPT4V: CLIP ViT-L/14-336, a two-layer projector, Vicuna.

The conversation is vicuna_v1, the turn behind an image is stripped and images are padded to
squares, as the published models were trained; written folders make transformers do the same.
LLaVA's own code leaves out of the loss what it cannot cut (its `tokenization mismatch`: an empty
answer, or `ASSISTANT:` inside a question); here the loss falls on such an answer and its end, too.

Folders are those of transformers, or of LLaVA's own code. A `tokenizer.model` without
tokenizer.json is cut as sentencepiece cuts it, and as `legacy` in tokenizer_config.json says:
`false` puts no space before the text behind `</s>`. Where nothing is said it is `true`, as for the
published code.
"""

from __future__ import annotations

from mmtrain.models.families.llava.shapes import MODEL_TYPES, PRESETS
from mmtrain.models.interface import Family, Tap

_LLM_LAYER = r"model\.language_model\.layers\.(?P<layer>\d+)"
_CLIP_LAYER = r"model\.vision_tower\.encoder\.layers\.(?P<layer>\d+)"
_PROJECTOR = "model.multi_modal_projector"

FAMILY = Family(
    module=f"{__name__}.code",
    presets=PRESETS,
    model_types=MODEL_TYPES,
    own_options=("vision_tower",),
    default_max_length=2048,
    components={
        "vision": (r"model\.vision_tower\..*",),
        "connector": (r"model\.multi_modal_projector\..*",),
        "llm": (r"model\.language_model\..*", r"lm_head\..*"),
    },
    sublayers={
        "llm": {
            "attn": {role: rf"{_LLM_LAYER}\.self_attn\.{role}_proj" for role in "qkvo"},
            "mlp": {role: rf"{_LLM_LAYER}\.mlp\.{role}_proj" for role in ("gate", "up", "down")},
        },
        "vision": {
            "attn": {role: rf"{_CLIP_LAYER}\.self_attn\.{role}_proj" for role in "qkv"}
            | {"o": rf"{_CLIP_LAYER}\.self_attn\.out_proj"},
            "mlp": {"up": rf"{_CLIP_LAYER}\.mlp\.fc1", "down": rf"{_CLIP_LAYER}\.mlp\.fc2"},
        },
    },
    # As the study of four methods on LLaVA placed it.
    default_roles={
        "ia3": {
            "llm": {"attn": ("k", "v"), "mlp": ("down",)},
            "vision": {"attn": ("k", "v"), "mlp": ("down",)},
        },
    },
    row_keys={"vision": ("image_keys",), "connector": ("image_keys",), "llm": ("row_keys",)},
    taps={
        "vision_tokens": Tap(_PROJECTOR, "input"),
        "connector_output": Tap(_PROJECTOR, "output"),
    },
)
