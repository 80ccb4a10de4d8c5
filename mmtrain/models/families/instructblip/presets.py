"""Published shapes and their tiny models; no torch here, so that listing families is instant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODEL_TYPES = ("instructblip",)
_EVA_G = dict(
    hidden_size=1408,
    intermediate_size=6144,
    num_hidden_layers=39,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
    attention_dropout=0.0,
    qkv_bias=True,
)
# BERT's vocabulary and one token more, which the first training stages used.
_QFORMER = dict(
    vocab_size=30523,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    max_position_embeddings=512,
    cross_attention_frequency=2,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
)
_TINY_VISION = _EVA_G | dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
)
_TINY_QFORMER = _QFORMER | dict(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=128,
)


def _flan_t5(hidden: int, intermediate: int, heads: int, **others: object) -> dict[str, object]:
    return dict(
        model_type="t5",
        d_model=hidden,
        d_ff=intermediate,
        d_kv=64,
        num_heads=heads,
        num_layers=24,
        num_decoder_layers=24,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
        dense_act_fn="gelu",  # the release: exact, where Flan-T5 itself approximates
        dropout_rate=0.1,
        tie_word_embeddings=False,  # the head has weights of its own
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    ) | dict(others)


def _vicuna(hidden: int, intermediate: int, layers: int, heads: int, **others: object) -> dict:
    return dict(
        model_type="llama",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=32001,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
    ) | dict(others)


def _preset(text: dict[str, object], image_token: int, **others: object) -> dict[str, object]:
    return dict(
        vision_config=_EVA_G,
        qformer_config=_QFORMER,
        text_config=text,
        num_query_tokens=32,
        image_token_index=image_token,
    ) | dict(others)


def _tiny(text: dict[str, object]) -> dict[str, object]:
    return _preset(
        text,
        image_token=4,
        vision_config=_TINY_VISION,
        qformer_config=_TINY_QFORMER,
        num_query_tokens=8,
    )


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "instructblip-flan-t5-xl": _preset(_flan_t5(2048, 5120, 32), 32100),
    "instructblip-flan-t5-xxl": _preset(_flan_t5(4096, 10240, 64), 32100),
    "instructblip-vicuna-7b": _preset(_vicuna(4096, 11008, 32, 32), 32000),
    "instructblip-vicuna-13b": _preset(_vicuna(5120, 13824, 40, 40), 32000),
    "tiny": _tiny(
        _flan_t5(64, 128, 4, d_kv=16, num_layers=2, num_decoder_layers=2, vocab_size=512)
    ),
    "tiny-vicuna": _tiny(_vicuna(64, 192, 3, 4, vocab_size=512)),
}
