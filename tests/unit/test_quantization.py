"""A base whose decoder is in four or eight bits: what is quantised, what trains, who refuses."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtrain import plugins
from mmtrain.assemble import build_model
from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.models.quantization import BYTES, quantised_linears
from mmtrain.planning.census import count
from mmtrain.planning.memory import memory_by_stage
from mmtrain.resolve import model_options, resolve
from mmtrain.training.exporting import export_run
from mmtrain.training.inference import ready_from_argument
from tests import tiny
from tests.distributed.jobs import Interrupted
from tests.in_process import one_rank, train
from tests.soaks import cases

LORA = {"mode": "peft", "method": "lora", "r": 4, "alpha": 8, "dropout": 0.1}
# Its decoder is as wide as stock bitsandbytes asks for on every CPU.
PRESET = "tiny-vicuna"
NEAR = 0.02  # relative, of a first loss: what rounding a random decoder changes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "base"
    plugins.load("family", "instructblip").code.write_tiny(folder, tiny.DIGITS_TEXTS, 0, PRESET)
    return folder


def run_of(base: Path, digits: Path, out: Path, how: str | None, **sections: Any) -> dict[str, Any]:
    """A run file's data; the projection trains in full beside LoRA."""
    model = {"family": "instructblip", "quantization": how}
    sections["model"] = model | sections.get("model", {})
    run = tiny.run_data(base, digits, out, optim={"max_steps": 4}, **sections)
    run["components"] = {"projection": {"mode": "full"}, "llm": LORA}
    return run


def interrupt(step: int, metrics: dict[str, float]) -> None:
    """Ends a run at its first validation, behind a checkpoint."""
    raise Interrupted


@pytest.mark.parametrize(("how", "stored"), [("nf4", torch.uint8), ("int8", torch.int8)])
def test_only_the_decoders_linears_are_quantised(
    base: Path, digit_shards: Path, tmp_path: Path, how: str, stored: torch.dtype
) -> None:
    import bitsandbytes

    config = resolve(run_of(base, digit_shards, tmp_path, how))
    whole = build_model(resolve(run_of(base, digit_shards, tmp_path, None)), None).model
    model = build_model(config, None).model
    wanted = {
        f"language_model.model.layers.{layer}.{place}_proj"
        for layer in range(3)
        for place in (*(f"self_attn.{x}" for x in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    }
    found = quantised_linears(model, model_options(config).quantized)
    assert {name.removesuffix(".base_layer") for name in found} == wanted
    for name, linear in found.items():
        weight, before = linear.weight, whole.get_submodule(name).weight
        assert weight.dtype == stored and not weight.requires_grad
        if how == "nf4":
            back = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            # The widest gap of its sixteen values, of the largest in a block.
            assert (back - before).abs().max() <= 0.16 * before.abs().max()
    others = {n: p for n, p in model.named_parameters() if p.dtype != stored}
    assert {p.dtype for p in others.values()} == {torch.float32}
    same = dict(whole.named_parameters())
    assert all(torch.equal(p, same[name]) for name, p in others.items())


@pytest.mark.parametrize("how", cases(["nf4"], ["nf4", "int8"]))
def test_it_trains_beside_quantised_weights_and_is_read_back(
    base: Path, digit_shards: Path, tmp_path: Path, how: str
) -> None:
    """Cut and gone on bit for bit; the card's lines, of stock libraries, give the same logits."""
    parts = {
        "data": {"val": str(digit_shards / "val"), "val_limit": 2},
        "validate": {"every": 3},
        "checkpoint": {"every_steps": 2},
        "generation": {"max_new_tokens": 1},
    }
    runs = {
        name: run_of(base, digit_shards, tmp_path / name, kind, model={"dtype": "bf16"}, **parts)
        for name, kind in (("run", how), ("whole", None), ("cut", how))
    }
    with one_rank():
        for name in ("run", "whole"):
            train(runs[name])
        with pytest.raises(Interrupted):
            train(runs["cut"], interrupt)
        train(runs["cut"])
        losses = {name: tiny.read_metrics(tmp_path / name, "train/loss") for name in runs}
        assert losses["cut"] == losses["run"] and losses["run"] != losses["whole"]
        assert losses["run"][0] == pytest.approx(losses["whole"][0], rel=NEAR)
        assert losses["run"][-1] < losses["run"][0] - 0.05
        ready = ready_from_argument(str(tmp_path / "run"), [], base=False)
        with pytest.raises(CheckpointError, match="--to peft"):
            export_run(ready, tmp_path / "merged", "merged")
        assert export_run(ready, tmp_path / "out", "peft") is not None
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert f"load_in_{4 if how == 'nf4' else 8}bit=True" in card
    skipped = "['vision_model', 'qformer', 'language_projection', 'language_model.lm_head']"
    assert f"llm_int8_skip_modules={skipped}" in card


def test_whatever_needs_whole_weights_is_refused_at_once(base: Path, digit_shards: Path) -> None:
    run = run_of(base, digit_shards, base.parent / "refused", "nf4")
    run["parallel"]["deepspeed"] = "zero3"
    run["components"]["llm"] = LORA | {"sublayers": ["attn"], "init": "pissa"}
    vera = {"mode": "peft", "method": "peft_library", "tuner": "vera", "sublayers": ["ffn"]}
    run["components"]["llm/ffn"] = vera
    with pytest.raises(ConfigError) as caught:
        resolve(run)
    text = str(caught.value)
    for part in ("llm.init: ", "llm/ffn.method: ", "model.quantization: ZeRO-3", "zero2"):
        assert part in text, text
    run["components"] = {"llm": {"mode": "full"}}
    with pytest.raises(ConfigError, match="weights in nf4 are frozen"):
        resolve(run)


def test_without_the_package_one_line_says_so(
    base: Path, digit_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(run_of(base, digit_shards, tmp_path, "nf4"))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'mmtrain[quantization]'")):
        build_model(config, None)
    assert count(config).quantized_params > 0, "planning needs no package"


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_memory_is_that_of_fewer_bits(how: str) -> None:
    run = {
        "name": "plan",
        "model": {"family": "llava", "preset": "llava-1.5-7b", "quantization": how},
        "components": {"llm": LORA},
    }
    config = resolve(run)
    census = count(config)
    llm = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert census.quantized_params == llm and census.quantized_at_once == 4096 * 11008
    weights = memory_by_stage(config, census, 8)[1].weights
    rest = census.base_params - llm + census.peft_params
    assert weights == pytest.approx(2 * rest + BYTES[how] * llm)


def test_four_bits_take_what_is_said() -> None:
    from bitsandbytes.nn import Params4bit

    weight = Params4bit(torch.randn(1024, 1024), quant_type="nf4").to("cpu")
    state = weight.quant_state
    parts = (weight, state.absmax, state.state2.absmax)
    taken = sum(part.numel() * part.element_size() for part in parts)
    assert taken / 1024**2 == pytest.approx(BYTES["nf4"], rel=1e-3)
