"""Schedules in closed form, and the groups they act on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mmtrain.config.schema import ComponentConfig, OptimConfig
from mmtrain.training.optim import learning_rate, parameter_groups, total_steps, warmup_steps

PEAK = 1e-3


def rates(total: int, per_epoch: int = 10, peak: float = PEAK, **values: Any) -> list[float]:
    optim = OptimConfig(**{"lr": PEAK, **values})
    return [learning_rate(peak, step, total, per_epoch, optim) for step in range(total)]


def test_cosine_falls_from_the_peak_to_nothing() -> None:
    wanted = [PEAK * 0.5 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
    assert rates(20) == pytest.approx(wanted)


def test_linear_falls_evenly() -> None:
    assert rates(4, schedule="linear") == pytest.approx(
        [PEAK, 0.75 * PEAK, 0.5 * PEAK, 0.25 * PEAK]
    )


def test_constant_stays() -> None:
    assert rates(5, schedule="constant") == [PEAK] * 5


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("start", [0.0, 2e-4])
def test_warm_up_climbs_to_the_peak_and_is_never_idle(schedule: str, start: float) -> None:
    found = rates(10, schedule=schedule, warmup_steps=4, warmup_start_lr=start)
    climbing = [start + (PEAK - start) * step / 4 for step in (1, 2, 3, 4)]
    assert found[:4] == pytest.approx(climbing)
    assert found[4] == pytest.approx(PEAK)
    after = rates(6, schedule=schedule)
    assert found[4:] == pytest.approx(after)


def test_warm_up_ratio_is_rounded_up() -> None:
    assert warmup_steps(OptimConfig(warmup_ratio=0.03), 100) == 3
    assert warmup_steps(OptimConfig(warmup_ratio=0.03), 101) == 4
    assert warmup_steps(OptimConfig(), 100) == 0
    assert warmup_steps(OptimConfig(warmup_steps=50), 20) == 20
    assert rates(20, warmup_steps=50)[-1] == pytest.approx(PEAK)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_min_lr_is_where_it_ends(schedule: str) -> None:
    found = rates(1000, schedule=schedule, min_lr=1e-4)
    assert found[0] == pytest.approx(PEAK)
    assert found[-1] == pytest.approx(1e-4, rel=0.02)
    assert min(found) >= 1e-4 and found == sorted(found, reverse=True)
    middle = rates(1000, schedule=schedule)[500] * 0.9 + 1e-4
    assert found[500] == pytest.approx(middle)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_epoch_unit_changes_between_epochs_only(schedule: str) -> None:
    found = rates(30, per_epoch=10, schedule=schedule, schedule_unit="epoch")
    by_step = rates(3, per_epoch=10, schedule=schedule)  # as if an epoch were one step
    assert found == pytest.approx([rate for rate in by_step for _ in range(10)])


def test_epoch_unit_after_warm_up() -> None:
    found = rates(20, per_epoch=10, schedule="linear", schedule_unit="epoch", warmup_steps=4)
    assert found[3:10] == pytest.approx([PEAK] * 7)
    assert found[10:] == pytest.approx([PEAK * (1 - 6 / 16)] * 10)


def test_a_component_follows_the_same_curve_from_its_own_peak() -> None:
    values: dict[str, Any] = {"warmup_steps": 3, "warmup_start_lr": 1e-5, "min_lr": 1e-4}
    usual, own = rates(12, **values), rates(12, peak=2e-5, **values)
    assert own == pytest.approx([rate * 0.02 for rate in usual])


def test_total_steps() -> None:
    assert total_steps(OptimConfig(), 7) == 7
    assert total_steps(OptimConfig(epochs=3), 7) == 21
    assert total_steps(OptimConfig(max_steps=5), 7) == 5


def test_groups_by_component_and_decay() -> None:
    parameters = {
        name: torch.nn.Parameter(torch.zeros(*shape))
        for name, shape in {
            "connector.weight": (2, 2),
            "connector.bias": (2,),
            "llm.lora_A.weight": (2, 2),
            "llm.norm": (2,),
        }.items()
    }
    owner = {name: name.split(".")[0] for name in parameters}
    components = {
        "connector": ComponentConfig(mode="full", lr=2e-5, weight_decay=0.2),
        "llm": ComponentConfig(mode="peft", method="lora"),
    }
    optim = OptimConfig(lr=PEAK, weight_decay=0.1)
    groups = parameter_groups(parameters, owner, components, optim)
    names = {id(parameter): name for name, parameter in parameters.items()}
    found = {
        names[id(parameter)]: (group["lr"], group["peak_lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    assert found == {
        "connector.weight": (2e-5, 2e-5, 0.2),
        "connector.bias": (2e-5, 2e-5, 0.0),
        "llm.lora_A.weight": (PEAK, PEAK, 0.1),
        "llm.norm": (PEAK, PEAK, 0.0),
    }
    assert sum(len(group["params"]) for group in groups) == len(parameters)
