"""Published sizes of InstructBLIP, to the unit, on the meta device."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import cycle
from typing import Any

import pytest
import torch

from mmtrain.config.schema import ComponentConfig
from mmtrain.errors import ConfigError
from mmtrain.models.interface import ModelOptions
from mmtrain.peft.placement import component_of, select
from mmtrain.peft.trainable import weight_shapes
from tests.unit.added_parameters import num_added
from tests.unit.instructblip_material import FAMILY

T5_XL, VICUNA = "instructblip-flan-t5-xl", "instructblip-vicuna-7b"


@cache
def meta_model(preset: str) -> Any:
    config = FAMILY.code.model_config(ModelOptions(None, preset))
    with torch.device("meta"):
        return FAMILY.code.skeleton(config)


# preset, component, sublayers -> parameters per unit of rank
PER_RANK = [
    (T5_XL, "qformer", ["self_attn"], 36_864),
    (T5_XL, "qformer", ["cross_attn"], 44_544),
    (T5_XL, "qformer", ["ffn"], 184_320),
    (T5_XL, "qformer", ["self_attn", "cross_attn", "ffn"], 265_728),
    (T5_XL, "llm", ["attn"], 589_824),
    (T5_XL, "llm", ["encoder_attn", "decoder_attn", "cross_attn"], 589_824),
    (T5_XL, "llm", ["ffn"], 1_032_192),
    (T5_XL, "llm", ["encoder_ffn", "decoder_ffn"], 1_032_192),
    (T5_XL, "llm", ["attn", "ffn"], 1_622_016),
    (VICUNA, "llm", ["attn"], 524_288),
    (VICUNA, "llm", ["ffn"], 1_449_984),
    (VICUNA, "llm", ["attn", "ffn"], 1_974_272),
]


# Attaching takes a second: each placement once, the ranks by turns.
@pytest.mark.parametrize(("case", "rank"), zip(PER_RANK, cycle([1, 8])))
def test_lora_counts(case: tuple[str, str, list[str], int], rank: int) -> None:
    preset, component, sublayers, wanted = case
    block = {"method": "lora", "sublayers": sublayers, "r": rank}
    assert num_added(meta_model(preset), FAMILY, component, **block) == wanted * rank


def test_keys_and_outputs_can_be_selected() -> None:
    shapes = weight_shapes(meta_model(T5_XL))
    block = ComponentConfig(
        mode="peft", method="lora", sublayers={"self_attn": ["k", "o"], "cross_attn": ["k"]}
    )
    chosen, _ = select(FAMILY, "qformer", block, shapes)
    assert Counter(one.name.rsplit(".", 1)[1] for one in chosen) == {"key": 12 + 6, "dense": 12}


def test_parts_of_t5_are_no_parts_of_vicuna() -> None:
    block = ComponentConfig(mode="peft", method="lora", sublayers=["attn", "cross_attn"])
    with pytest.raises(ConfigError, match="cross_attn selects no module"):
        select(FAMILY, "llm", block, weight_shapes(meta_model(VICUNA)))


SIZES = {
    T5_XL: {
        "vision": 985_949_440,
        "vision_norm": 2_816,
        "query_tokens": 24_576,
        "qformer": 185_660_160,
        "projection": 1_574_912,
        "llm": 2_849_757_184,  # Flan-T5-XL as published, its head untied
    },
    VICUNA: {"projection": 3_149_824, "llm": 6_738_423_808},
    "instructblip-flan-t5-xxl": {"projection": 3_149_824, "llm": 11_135_332_352},
    "instructblip-vicuna-13b": {"llm": 13_015_874_560},
}


@pytest.mark.parametrize("preset", SIZES)
def test_component_sizes(preset: str) -> None:
    sizes: Counter[str] = Counter()
    for name, parameter in meta_model(preset).named_parameters():
        sizes[component_of(FAMILY, name)] += parameter.numel()
    assert {component: sizes[component] for component in SIZES[preset]} == SIZES[preset]


def test_images_in_tokens() -> None:
    config = FAMILY.code.model_config(ModelOptions(None, T5_XL))
    found = {name: FAMILY.code.image_tokens(config, name) for name in ("vision", "qformer", "llm")}
    assert found == {"vision": 257, "qformer": 32, "llm": 32}


def test_overrides_reach_what_follows_from_them() -> None:
    changes: dict[str, dict[str, Any]] = {
        "vision": {"hidden_size": 704, "heads": 8},
        "llm": {"layers": 4, "heads": 16, "activation": "gated-silu"},
    }
    config = FAMILY.code.model_config(ModelOptions(None, T5_XL, overrides=changes))
    assert config.qformer_config.encoder_hidden_size == 704
    text = config.text_config
    assert (text.num_decoder_layers, text.d_kv, text.dense_act_fn) == (4, 128, "silu")
    assert text.is_gated_act
    with torch.device("meta"):
        model = FAMILY.code.skeleton(config)
    crossing = model.qformer.encoder.layer[0].crossattention.attention
    assert crossing.key.in_features == 704
    assert len(model.language_model.decoder.block) == 4


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ("gelu", True)),
        ({"layers": 4}, ("gelu", True)),
        ({"activation": "gated-gelu"}, ("gelu", True)),
        ({"activation": "gated-gelu_new"}, ("gelu_new", True)),
        ({"activation": "relu"}, ("relu", False)),
    ],
)
def test_t5_computes_the_published_activation_unless_overridden(
    changes: dict[str, Any], wanted: tuple[str, bool]
) -> None:
    config = FAMILY.code.model_config(ModelOptions(None, T5_XL, overrides={"llm": changes}))
    assert (config.text_config.dense_act_fn, config.text_config.is_gated_act) == wanted
