"""PiSSA and OLoRA: they start at a part of the weight, and the model at its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from mmtrain.assemble import Assembled, build_model
from mmtrain.config.schema import RunConfig
from mmtrain.errors import ConfigError
from mmtrain.models import decoding
from mmtrain.models.interface import BatchSize
from mmtrain.planning.report import examine
from mmtrain.resolve import resolve
from mmtrain.training.export import export_trained, merged_state

SIZE = BatchSize(samples=2, tokens=40, answer_tokens=4)
RANK = 4
STARTS = ("pissa", "olora")


def run_of(**options: Any) -> RunConfig:
    block = {"mode": "peft", "method": "lora", "r": RANK, **options}
    model = {"family": "llava", "preset": "tiny", "dtype": "fp32"}
    optim = {"global_batch": SIZE.samples, "micro_batch": SIZE.samples}
    return resolve({"model": model, "components": {"llm": block}, "optim": optim})


def moved(**options: Any) -> tuple[RunConfig, Assembled]:
    """As after training: every matrix elsewhere than it began."""
    config = run_of(**options)
    assembled = build_model(config, None)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in assembled.trained_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return config, assembled


def loss(model: Any, assembled: Assembled) -> torch.Tensor:
    batch = assembled.family.code.planned_batch(assembled.model.config, SIZE)
    with torch.no_grad():
        return decoding.forward(assembled.family, model, batch).per_sample_loss


@pytest.mark.parametrize("init", STARTS)
def test_the_model_starts_at_its_base_and_the_base_stays(init: str) -> None:
    base, assembled = build_model(run_of(), None), build_model(run_of(init=init), None)
    assert torch.equal(loss(assembled.model, assembled), loss(base.model, base))
    weights = dict(base.model.named_parameters())
    for name, parameter in assembled.model.named_parameters():
        if ".base_layer." in name:
            assert torch.equal(parameter, weights[name]), name
    again = build_model(run_of(init=init), None).trained_parameters()
    assert all(torch.equal(again[n], p) for n, p in assembled.trained_parameters().items())


@pytest.mark.parametrize("init", STARTS)
def test_the_start_is_the_part_of_the_weight_that_peft_takes(init: str) -> None:
    torch.manual_seed(0)
    assembled = build_model(run_of(init=init, sublayers=["attn"]), None)
    peft_init = {"pissa": "pissa", "olora": "olora"}[init]
    base = build_model(run_of(), None).model
    config = LoraConfig(
        r=RANK, lora_alpha=32, target_modules=".*q_proj", init_lora_weights=peft_init
    )
    plain = torch.nn.Module()
    layers = {}
    for name, module in base.named_modules():
        if name.endswith("language_model.layers.0.self_attn.q_proj"):
            linear = torch.nn.Linear(*module.base_layer.weight.T.shape, bias=False)
            linear.weight.data = module.base_layer.weight.data.clone()
            plain.q_proj = linear
            layers["wanted"] = name
    adapted = get_peft_model(plain, config).base_model.model.q_proj
    ours = assembled.model.get_submodule(layers["wanted"])
    products = [
        one.lora_B[name].weight @ one.lora_A[name].weight
        for one, name in ((ours, "llm"), (adapted, "default"))
    ]
    torch.testing.assert_close(*products, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", STARTS)
def test_the_export_is_a_lora_of_twice_the_rank(init: str, rslora: bool, tmp_path: Path) -> None:
    config, assembled = moved(init=init, rslora=rslora, rank_pattern={"mlp": 2})
    wanted = loss(assembled.model, assembled)
    trained = {n: p.detach() for n, p in assembled.trained_parameters().items()}
    save_file(trained, tmp_path / "trainable.safetensors")
    export_trained(tmp_path, tmp_path, config, assembled)
    folder = tmp_path / "adapter"
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["r"] == 2 * RANK and "init_lora_weights" not in settings
    tensors = load_file(folder / "adapter_model.safetensors")
    assert not any("start" in name for name in tensors)
    plain = resolve({"model": {"family": "llava", "preset": "tiny", "dtype": "fp32"}})
    read = PeftModel.from_pretrained(
        build_model(plain, None).model, str(folder), autocast_adapter_dtype=False
    )
    torch.testing.assert_close(loss(read.get_base_model(), assembled), wanted)


@pytest.mark.parametrize("init", STARTS)
def test_merged_it_gives_the_same_and_unmerged_too(init: str) -> None:
    _, assembled = moved(init=init)
    wanted = loss(assembled.model, assembled)
    for attachment in assembled.trainable.attachments:
        attachment.method.merge(attachment.target)
        torch.testing.assert_close(loss(assembled.model, assembled), wanted)
        for module in assembled.model.modules():
            if hasattr(module, "unmerge"):
                module.unmerge()
    torch.testing.assert_close(loss(assembled.model, assembled), wanted)
    base = build_model(
        resolve({"model": {"family": "llava", "preset": "tiny", "dtype": "fp32"}}), None
    )
    base.model.load_state_dict(merged_state(assembled.model, assembled.trainable), strict=False)
    torch.testing.assert_close(loss(base.model, base), wanted)


def test_not_with_dora() -> None:
    with pytest.raises(ConfigError, match="dora: starts at the base's norms"):
        examine(run_of(init="pissa", dora=True), world_size=1)
