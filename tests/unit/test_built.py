"""What a library builds otherwise than asked stops the run: precision, device, attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmtrain import plugins
from mmtrain.errors import ConfigError, TrainingError
from mmtrain.models.built import Asked, refuse_other_than
from mmtrain.models.interface import ModelOptions

META = torch.device("meta")


def model_of(family: str, **options: Any) -> torch.nn.Module:
    """A tiny model as its family builds it, without weights."""
    found = plugins.load("family", family)
    preset = next(name for name in found.presets if name.startswith("tiny"))
    with META:
        return found.code.skeleton(
            found.code.model_config(ModelOptions(None, preset=preset, **options))
        )


def fault_of(asked: Asked, model: torch.nn.Module, device: torch.device = META) -> str:
    """What the comparison says; nothing where all is as asked."""
    try:
        refuse_other_than(asked, model, device, device)
    except TrainingError as error:
        return error.fault
    return ""


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", plugins.names("family"))
def test_every_family_is_built_as_asked(family: str, attention: str) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = model_of(family, dtype="bf16", attention=attention)
    finally:
        torch.set_default_dtype(torch.float32)
    assert fault_of(Asked("bf16", attention), model) == ""


def test_a_sublayer_in_another_precision_is_named() -> None:
    model = model_of("llava", dtype="fp32")
    asked = Asked("fp32", "sdpa")
    assert fault_of(asked, model) == ""
    model.lm_head.to(torch.bfloat16)
    fault = fault_of(asked, model)
    assert "model.dtype fp32 was asked for, found torch.bfloat16 in lm_head.weight." in fault


def test_a_shard_in_another_precision_counts_though_its_parameter_does_not() -> None:
    model = model_of("llava", dtype="fp32")
    weight: Any = model.lm_head.weight
    weight.ds_id, weight.ds_tensor = 0, torch.empty(4, dtype=torch.bfloat16, device=META)
    assert "found torch.bfloat16 in lm_head.weight." in fault_of(Asked("fp32", "sdpa"), model)


def test_a_sublayer_on_another_device_is_named() -> None:
    fault = fault_of(Asked("fp32", "sdpa"), model_of("llava", dtype="fp32"), torch.device("cpu"))
    assert "device cpu was asked for, found meta in" in fault and "more" in fault


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_another_attention_in_one_component_is_named(part: str) -> None:
    model = model_of("llava", dtype="fp32")
    getattr(model.config, part)._attn_implementation = "eager"
    fault = fault_of(Asked("fp32", "sdpa"), model)
    assert "model.attention sdpa was asked for, found eager in model." in fault


@pytest.mark.parametrize("family", plugins.names("family"))
def test_flash_attention_is_never_fetched_from_elsewhere(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    with pytest.raises(ConfigError, match="flash_attention_2 needs the package flash-attn"):
        model_of(family, dtype="bf16", attention="flash_attention_2")


def test_keyed_attention_is_what_the_bases_own_dropout_asks_for() -> None:
    model = model_of("instructblip", dtype="fp32", base_dropout="checkpoint")
    assert fault_of(Asked("fp32", "sdpa", "checkpoint"), model) == ""
    assert "found mmtrain_keyed in qformer" in fault_of(Asked("fp32", "sdpa"), model)
