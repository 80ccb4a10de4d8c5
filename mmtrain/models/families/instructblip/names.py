"""Where everything lies in the module tree, and what published folders call it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mmtrain.models.interface import DefaultRoles, SublayerMap

COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "vision": (r"vision_model\.(?!post_layernorm\.).*",),
    "vision_norm": (r"vision_model\.post_layernorm\..*",),
    "query_tokens": (r"query_tokens",),
    "qformer": (r"qformer\..*",),
    "projection": (r"language_projection\..*",),
    "llm": (r"language_model\..*",),
}

# What comes before the language model has a row for every image.
_IMAGES = ("vision", "vision_norm", "qformer", "projection")
ROW_KEYS = dict.fromkeys(_IMAGES, ("image_keys",)) | {"llm": ("row_keys",)}

_VISION_LAYER = r"vision_model\.encoder\.layers\.(?P<layer>\d+)"
_QFORMER_LAYER = r"qformer\.encoder\.layer\.(?P<layer>\d+)"
_T5_BLOCK = r"language_model\.{stack}\.block\.(?P<layer>\d+)\.layer\.\d+"
_LLM_LAYER = r"language_model\.(?:model\.layers|(?:encoder|decoder)\.block)\.(?P<layer>\d+)"
_T5_FFN = {"gate": "wi_0", "up": "wi(?:_1)?", "down": "wo"}


def _t5_attention(stack: str, attention: str) -> dict[str, str]:
    block = _T5_BLOCK.replace("{stack}", stack)
    return {role: rf"{block}\.{attention}\.{role}" for role in "qkvo"}


def _t5_ffn(stack: str) -> dict[str, str]:
    block = _T5_BLOCK.replace("{stack}", stack)
    return {role: rf"{block}\.DenseReluDense\.{name}" for role, name in _T5_FFN.items()}


def _bert_attention(attention: str) -> dict[str, str]:
    inputs = {"q": "query", "k": "key", "v": "value"}
    inner = rf"{_QFORMER_LAYER}\.{attention}"
    return {role: rf"{inner}\.attention\.{name}" for role, name in inputs.items()} | {
        "o": rf"{inner}\.output\.dense"
    }


_ANY_T5_ATTENTION = r"layer\.\d+\.(?:SelfAttention|EncDecAttention)"
SUBLAYERS: SublayerMap = {
    "vision": {
        "attn": {
            "qkv": rf"{_VISION_LAYER}\.self_attn\.qkv",
            "o": rf"{_VISION_LAYER}\.self_attn\.projection",
        },
        "mlp": {"up": rf"{_VISION_LAYER}\.mlp\.fc1", "down": rf"{_VISION_LAYER}\.mlp\.fc2"},
    },
    "qformer": {
        "self_attn": _bert_attention("attention"),
        "cross_attn": _bert_attention("crossattention"),
        # The text branch, and the queries' own.
        "ffn": {
            "up": rf"{_QFORMER_LAYER}\.intermediate\.dense",
            "down": rf"{_QFORMER_LAYER}\.output\.dense",
            "up_query": rf"{_QFORMER_LAYER}\.intermediate_query\.dense",
            "down_query": rf"{_QFORMER_LAYER}\.output_query\.dense",
        },
    },
    "llm": {
        "attn": {
            role: rf"{_LLM_LAYER}\.(?:self_attn\.{role}_proj|{_ANY_T5_ATTENTION}\.{role})"
            for role in "qkvo"
        },
        "ffn": {
            role: rf"{_LLM_LAYER}\.(?:mlp\.{role}_proj|layer\.\d+\.DenseReluDense\.{name})"
            for role, name in _T5_FFN.items()
        },
        # T5 only, by part:
        "encoder_attn": _t5_attention("encoder", "SelfAttention"),
        "decoder_attn": _t5_attention("decoder", "SelfAttention"),
        "cross_attn": _t5_attention("decoder", "EncDecAttention"),
        "encoder_ffn": _t5_ffn("encoder"),
        "decoder_ffn": _t5_ffn("decoder"),
    },
}
_QUERY_AND_VALUE = ("q", "v")
_LLM_ATTENTIONS = ("attn", "encoder_attn", "decoder_attn", "cross_attn")
# The published fine-tuning code adapts only these where it names an attention.
DEFAULT_ROLES: DefaultRoles = {
    "lora": {
        "qformer": {"self_attn": _QUERY_AND_VALUE},
        "llm": {sublayer: _QUERY_AND_VALUE for sublayer in _LLM_ATTENTIONS},
    },
    "petal": {"qformer": dict.fromkeys(("self_attn", "cross_attn"), ("q", "k", "v")) | {"ffn": ()}},
    # As peft places it in T5.
    "ia3": {
        "vision": {"attn": ("o",), "mlp": ("down",)},
        "qformer": {
            "self_attn": ("k", "v"),
            "cross_attn": ("k", "v"),
            "ffn": ("down", "down_query"),
        },
        "llm": dict.fromkeys(_LLM_ATTENTIONS, ("k", "v"))
        | dict.fromkeys(("ffn", "encoder_ffn", "decoder_ffn"), ("down",)),
    },
}

# Buffers of older versions, and a bias of T5's first cross-attention that nothing ever reads.
_NOT_WEIGHTS = re.compile(
    r"\.(position_ids|inv_freq|EncDecAttention\.relative_attention_bias\.weight)$"
)


def rename(stored: str) -> str | None:
    """A stored tensor's name in the module tree: its own; None for what is no weight."""
    return None if _NOT_WEIGHTS.search(stored) else stored
