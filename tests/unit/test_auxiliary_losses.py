"""A method's further losses: part of backward by their weight, divided and logged like the loss."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmtrain.peft import methods
from mmtrain.resolve import resolve
from mmtrain.training.run import run_training
from tests import tiny
from tests.in_process import one_rank

WIDTH, STEPS = 96, 3
# A scale behind a connector's last layer, and its squares as a loss of every answer token.
DRIFT = f"""
import torch
from pydantic import BaseModel, ConfigDict

from mmtrain.peft.interface import Added


class Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = 0.0


class Drift:
    options = Options
    needs_linears = False
    merges = False
    imports = ()

    def conflicts(self, options, around):
        return ()

    def attach(self, target, options, seed):
        module = target.model.get_submodule("model.multi_modal_projector.linear_2")
        module.drift = torch.nn.Parameter(torch.ones({WIDTH}))
        module.register_forward_hook(lambda module, _, out: out * module.drift)
        target.taps.add_loss(
            "drift", lambda batch: batch["answer_counts"].sum() * module.drift.square().sum()
        )
        name = "model.multi_modal_projector.linear_2.drift"
        return Added((name,), auxiliary={{"drift": options.weight}})

    def export_config(self, target, options, base):
        return {{"peft_type": "DRIFT"}}

    def export_name(self, name, target):
        return name


METHOD = Drift()
"""


@pytest.fixture(scope="module")
def drifts(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, digit_shards: Path
) -> Iterator[dict[tuple[float, int], dict[str, list[float]]]]:
    """(weight, micro-batch) -> the curves of a run."""
    root = tmp_path_factory.mktemp("drift")
    (root / "drift.py").write_text(DRIFT)
    found = {}
    with pytest.MonkeyPatch.context() as patch, one_rank():
        patch.setattr(methods, "__path__", [*methods.__path__, str(root)])
        for weight, micro in ((0.0, 4), (10.0, 4), (10.0, 2)):
            run_dir = root / f"{weight}-{micro}"
            data = tiny.run_data(tiny_checkpoint, digit_shards, run_dir)
            block = {"mode": "peft", "method": "drift", "weight": weight, "lr": 1e-2}
            data["components"] = {"connector": block}
            data["optim"] |= {"micro_batch": micro, "max_steps": STEPS}
            run_training(resolve(data))
            found[weight, micro] = {
                name: tiny.read_metrics(run_dir, f"train/{name}") for name in ("loss", "drift")
            }
    yield found
    sys.modules.pop(f"{methods.__name__}.drift", None)


Curves = dict[tuple[float, int], dict[str, list[float]]]


def test_it_is_logged_apart_and_divided_as_the_loss_is(drifts: Curves) -> None:
    for curves in drifts.values():
        assert len(curves["drift"]) == STEPS and curves["drift"][0] == pytest.approx(WIDTH)
    assert drifts[10.0, 4]["loss"][0] == drifts[0.0, 4]["loss"][0]


def test_its_weight_is_part_of_backward(drifts: Curves) -> None:
    # AdamW's first steps are of the rate's size, whatever the gradient's.
    assert drifts[10.0, 4]["drift"][1] == pytest.approx(WIDTH * 0.99**2, rel=1e-4)
    assert drifts[0.0, 4]["drift"][2] > drifts[10.0, 4]["drift"][2] + 1.0


def test_the_split_of_a_batch_does_not_matter(drifts: Curves) -> None:
    for name in ("loss", "drift"):
        assert drifts[10.0, 2][name] == pytest.approx(drifts[10.0, 4][name], rel=1e-5)
