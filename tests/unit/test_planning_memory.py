"""Memory before a run: what one step is said to hold against what torch's allocator gave out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from mmtrain import plugins
from mmtrain.assemble import build_model
from mmtrain.config.schema import RunConfig
from mmtrain.models import decoding
from mmtrain.models.families.qwen2_vl import shapes
from mmtrain.models.interface import BatchSize
from mmtrain.planning.census import Census, ComponentCount, count
from mmtrain.planning.memory import CONTEXT_BYTES, estimate, memory_by_stage
from mmtrain.planning.report import examine
from mmtrain.resolve import resolve

TINY_MODELS = [
    (name, preset)
    for name in plugins.names("family")
    for preset in plugins.load("family", name).presets
    if preset.startswith("tiny")
]
SIZE = BatchSize(samples=2, tokens=160, answer_tokens=20)
# Asked for are 15 %. What differs are masks that a CPU's bidirectional attention leaves out.
TOLERANCE = 0.1
LORA = {"mode": "peft", "method": "lora", "r": 4, "alpha": 8, "dropout": 0.1}
RECOMPUTED = {"parallel": {"activation_checkpointing": True}}
MODEL_OF = {
    "lora": {"dtype": "fp32"},
    "recomputed": {"dtype": "fp32", "attention": "eager"},
}


@pytest.fixture(autouse=True)
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where images have a size of their own: a tiny model cuts the usual ones to 3136 patches."""
    monkeypatch.setattr(shapes, "USUAL_IMAGE_SIDE", 96)


def run_of(name: str, preset: str, components: Mapping[str, Any], **sections: Any) -> RunConfig:
    model = {"family": name, "preset": preset, "dtype": "fp32"} | sections.pop("model", {})
    optim = {"global_batch": SIZE.samples, "micro_batch": SIZE.samples}
    return resolve({"model": model, "components": dict(components), "optim": optim, **sections})


def mixed(name: str, lora: Mapping[str, Any]) -> dict[str, Any]:
    """LoRA wherever it fits, all else in full."""
    family = plugins.load("family", name)
    return {one: lora if one in family.sublayers else {"mode": "full"} for one in family.components}


def allocated_bytes(config: RunConfig) -> int:
    """The most that torch's CPU allocator gave out at once during one step."""
    family, model = plugins.load("family", config.model.family), build_model(config, None).model
    batch = family.code.planned_batch(model.config, SIZE)
    for name in ("attention_mask", "instruction_mask"):
        if name in batch.tensors:
            batch.tensors[name][0, -1] = 0  # rows of one length would need no mask
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        decoding.forward(family, model, batch).answer_loss_sum.backward()
    assert profile.profiler is not None
    found = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def refuse_other_than_measured(estimated: int, config: RunConfig) -> None:
    """On a busy machine the profiler loses events now and then: it may look three times."""
    for _ in range(3):
        measured = allocated_bytes(config)
        if estimated == pytest.approx(measured, rel=TOLERANCE):
            return
    assert estimated == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("kind", ["lora", "recomputed"])
@pytest.mark.parametrize(("name", "preset"), TINY_MODELS)
def test_a_step_holds_what_was_estimated(name: str, preset: str, kind: str) -> None:
    sections = RECOMPUTED if kind == "recomputed" else {}
    config = run_of(name, preset, mixed(name, LORA), model=MODEL_OF[kind], **sections)
    found = count(config, SIZE).activation_bytes
    refuse_other_than_measured(found, config)


@pytest.mark.parametrize(
    ("components", "dtype"),
    [
        ({"llm": LORA | {"layers": "last-1"}}, "fp32"),
        (mixed("llava", LORA | {"dropout": 0.0}), "bf16"),
        ({"connector": {"mode": "full"}, "llm": {"mode": "full"}}, "bf16"),
        ({}, "fp32"),
    ],
    ids=["upper layer", "bf16 without dropout", "in full", "nothing trains"],
)
def test_so_it_is_whatever_trains(components: dict[str, Any], dtype: str) -> None:
    config = run_of("llava", "tiny", components, model={"dtype": dtype})
    found = count(config, SIZE).activation_bytes
    if components:
        refuse_other_than_measured(found, config)
    else:
        assert 0 < found < count(run_of("llava", "tiny", {"llm": LORA}), SIZE).activation_bytes / 3


def test_longer_samples_and_answers_hold_more() -> None:
    config = run_of("llava", "tiny", {"llm": LORA | {"dropout": 0.0}})
    short, long_, answers = (
        count(config, BatchSize(2, tokens, answer)).activation_bytes
        for tokens, answer in ((160, 20), (320, 20), (160, 120))
    )
    assert 1.8 * short < long_ < 2.4 * short
    logits = 2 * 100 * 512 * 4  # of the further answer tokens, in fp32
    assert logits < answers - short < 5 * logits


def test_flash_attention_needs_no_package_here_and_no_mask() -> None:
    sizes = {
        name: count(
            run_of("llava", "tiny", {"llm": LORA}, model={"dtype": "bf16", "attention": name}), SIZE
        ).activation_bytes
        for name in ("flash_attention_2", "sdpa", "eager")
    }
    flash = {"dtype": "bf16", "attention": "flash_attention_2"}
    examine(run_of("llava", "tiny", {"llm": LORA}, model=flash), world_size=1)
    assert sizes["flash_attention_2"] < sizes["sdpa"] < sizes["eager"]


CENSUS = Census(
    {"llm": ComponentCount("full", None, 0, 1000, 0, trainable_params=100)},
    SIZE,
    activation_bytes=5000,
)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_memory_by_stage(dtype: str) -> None:
    """4 bytes of gradient and 12 of optimizer per trained parameter, in whichever precision."""
    config = run_of("llava", "tiny", {"llm": LORA}, model={"dtype": dtype})
    found = memory_by_stage(config, CENSUS, world_size=4)
    bytes_per_weight = {"bf16": 2, "fp32": 4}[dtype]
    weights = 1000 * bytes_per_weight
    # bf16 without ZeRO resolves to stage 1; in fp32 there are then no other weights to keep.
    zero0 = (weights, 400, 300, 0) if dtype == "bf16" else (weights, 400, 800, 0)
    parts = {
        stage: (one.weights, one.gradients, one.optimizer, one.gathered)
        for stage, one in found.items()
    }
    assert parts == {
        0: zero0,
        1: (weights, 400, 300, 0),
        2: (weights, 100, 300, 0),
        3: (weights / 4, 100, 300, weights),
    }
    for one in found.values():
        assert one.activations == 5000 and one.context == CONTEXT_BYTES
        assert one.total == one.allocated + CONTEXT_BYTES == sum(vars(one).values())


def test_the_optimizer_has_its_own_peak() -> None:
    config = run_of("llava", "tiny", {"llm": LORA})
    found = memory_by_stage(config, Census(CENSUS.components, SIZE, activation_bytes=10), 4)
    assert [one.activations for one in found.values()] == [400, 100, 100, 100]


def test_one_call_estimates_a_run() -> None:
    config = run_of("llava", "tiny", {"llm": LORA})
    found = estimate(config, world_size=2, size=SIZE)
    assert found == memory_by_stage(config, count(config, SIZE), world_size=2)
