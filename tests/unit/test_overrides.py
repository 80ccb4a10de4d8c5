"""Other shapes than the checkpoint's: what fits is loaded, the rest is listed, none is silent."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmtrain.assemble import build_model
from mmtrain.config.schema import ComponentConfig
from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.models import decoding
from mmtrain.models.interface import ModelOptions
from mmtrain.peft.trainable import Trainable, make_trainable
from mmtrain.resolve import resolve
from mmtrain.training.export import class_for_others, loading_snippet
from tests.unit.llava_material import FAMILY, example, image


def options(folder: Path, overrides: dict[str, Any], allow_reinit: bool = False) -> ModelOptions:
    return ModelOptions(
        str(folder), None, dtype="fp32", overrides=overrides, allow_reinit=allow_reinit
    )


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path) -> dict[str, torch.Tensor]:
    return dict(FAMILY.code.load(options(tiny_checkpoint, {}), None).model.named_parameters())


def test_fewer_layers_need_nothing_new(
    tiny_checkpoint: Path, base: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "mmtrain"):
        loaded = FAMILY.code.load(options(tiny_checkpoint, {"llm": {"layers": 2}}), None)
    found = dict(loaded.model.named_parameters())
    assert len(found) == len(base) - 2 * 9
    assert all(torch.equal(found[name], base[name]) for name in found)
    assert "18 surplus: model.language_model.layers.2." in caplog.text


def test_what_does_not_fit_is_listed(tiny_checkpoint: Path) -> None:
    wider = {"llm": {"intermediate_size": 128, "layers": 5}, "vision": {"activation": "gelu"}}
    with pytest.raises(CheckpointError) as caught:
        FAMILY.code.load(options(tiny_checkpoint, wider), None)
    text = str(caught.value)
    assert "9 missing: model.language_model.layers.4." in text
    assert "12 wrong shape: model.language_model.layers.0.mlp.down_proj.weight is [96, 256]" in text
    assert "[96, 128] in model.overrides" in text and "model.allow_reinit: true" in text
    assert "\n" not in text


def test_allowed_it_is_initialised_by_name_and_seed(
    tiny_checkpoint: Path, base: dict[str, torch.Tensor]
) -> None:
    changes = {"llm": {"intermediate_size": 128, "heads": 8}}
    loads = [FAMILY.code.load(options(tiny_checkpoint, changes, True), None) for _ in range(2)]
    first, second = (dict(one.model.named_parameters()) for one in loads)
    assert all(torch.equal(first[name], second[name]) for name in first)
    kept = {name for name in first if first[name].shape == base[name].shape}
    fresh = set(first) - kept
    assert len(fresh) == 12 and all(".mlp." in name for name in fresh)
    assert all(torch.equal(first[name], base[name]) for name in kept)
    assert len({float(first[name].detach().std()) for name in fresh}) == 12, "initialised alike"
    processor = loads[0].processor
    batch = FAMILY.code.collate([example(processor, "a", "Which?", "5", [image(1)])], processor)
    assert torch.isfinite(decoding.forward(FAMILY, loads[0].model, batch).answer_loss_sum)


def test_random_weights_that_nothing_trains_are_named(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = options(tiny_checkpoint, {"llm": {"layers": 5}}, True)
    lora = ComponentConfig(**{"mode": "peft", "method": "lora"})
    with caplog.at_level(logging.WARNING, "mmtrain"):
        make_trainable(FAMILY.code.load(changed, None).model, FAMILY, {"llm": lora}, seed=1)
    assert "9 tensors were initialised afresh and stay frozen" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mmtrain"):
        full = {"llm": ComponentConfig(mode="full")}
        make_trainable(FAMILY.code.load(changed, None).model, FAMILY, full, seed=1)
    assert "stay frozen" not in caplog.text


def test_the_model_card_says_the_shapes(tiny_checkpoint: Path) -> None:
    shapes = {"llm": {"layers": 2}, "vision": {"heads": 2}}
    run = {"model": {"family": "llava", "checkpoint": str(tiny_checkpoint), "overrides": shapes}}
    config = resolve(run)
    base_class = class_for_others(config, build_model(config, None, trains=False))
    snippet = loading_snippet(config, Trainable({}, (), ()), base_class, nn.Module())
    found: dict[str, Any] = {}
    exec(snippet, found)
    assert len(found["model"].model.language_model.layers) == 2
    assert found["model"].config.vision_config.num_attention_heads == 2


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"llm": {"heads": 7}}, "hidden_size 96 is no multiple of 7 heads"),
    "activation": ({"llm": {"activation": "gelo"}}, "no activation 'gelo'; did you mean 'gelu'"),
    "component": ({"conector": {"layers": 1}}, "model.overrides.conector: has no shape"),
    "several": (
        {"llm": {"heads": 5}, "vision": {"heads": 3}},
        "2 problems.*no multiple of 5.*no multiple of 3",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_impossible_shapes(tiny_checkpoint: Path, fault: str) -> None:
    changes, message = FAULTS[fault]
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        FAMILY.code.load(options(tiny_checkpoint, changes), None)


def test_the_run_file_names_them(tiny_checkpoint: Path) -> None:
    model = {"family": "llava", "checkpoint": str(tiny_checkpoint)}
    shapes = {"vision": {"layers": 2}, "llm": {"activation": "gelu"}}
    run = {"model": {**model, "overrides": shapes, "allow_reinit": True}}
    assert resolve(run).model.overrides["llm"].activation == "gelu"
    with pytest.raises(ConfigError, match="model.overrides.llm.depth: unknown key"):
        resolve({"model": {**model, "overrides": {"llm": {"depth": 2}}}})
    with pytest.raises(ConfigError, match="allow_reinit"):
        resolve({"model": {**model, "allow_reinit": True}})
