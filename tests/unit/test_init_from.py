"""Training that starts from trained weights: those and no others, or one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.resolve import resolve
from mmtrain.training.exporting import export_run
from mmtrain.training.inference import ready_from_argument
from tests import tiny
from tests.distributed.jobs import Interrupted
from tests.in_process import one_rank, train
from tests.unit.judged import RATE, judge_digits

UNMOVED = 1e-30  # a rate that changes no weight
LORA = {"mode": "peft", "method": "lora", "r": 4, "alpha": 8}
SEVERAL = {"vision": LORA, "llm": LORA, "connector": {"mode": "full"}}


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module")
def make(tiny_checkpoint: Path, digit_shards: Path) -> Any:
    def run_in(folder: Path, **changed: Any) -> dict[str, Any]:
        sections = {
            "data": {"val": str(digit_shards / "val"), "val_limit": 4},
            "validate": {"every": 2},
            "generation": {"max_new_tokens": 1, "batch_size": 4},
        }
        return tiny.run_data(tiny_checkpoint, digit_shards, folder, **{**sections, **changed})

    return run_in


@pytest.fixture(scope="module")
def first(make: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best step is the fourth of six."""
    folder = tmp_path_factory.mktemp("first") / "run"
    with pytest.MonkeyPatch.context() as patch:
        judge_digits(patch, [0.5, 0.25, 0.75])
        train(make(folder, validate={"every": 2, "metric": RATE.name}))
    assert json.loads((folder / "status.json").read_text())["best_step"] == 4
    return folder


@pytest.fixture(scope="module")
def several(make: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two adapters and a component trained in full."""
    folder = tmp_path_factory.mktemp("several") / "run"
    train(make(folder, components=SEVERAL, optim={"max_steps": 2}))
    return folder


def unmoved(make: Any, folder: Path, init_from: Path, **changed: Any) -> dict[str, Any]:
    """One step from given weights that leaves them as they are."""
    run = make(folder, init_from=str(init_from), **changed)
    run["optim"] |= {"lr": UNMOVED, "max_steps": 1}
    run["components"] = {name: block | {"lr": UNMOVED} for name, block in run["components"].items()}
    return run


@pytest.mark.parametrize("source", [".", "adapter"])
def test_it_starts_where_the_best_checkpoint_was(
    make: Any, first: Path, tmp_path: Path, source: str
) -> None:
    train(unmoved(make, tmp_path / "run", first / source))
    losses = tiny.read_metrics(first, "val/loss")
    assert tiny.read_metrics(tmp_path / "run", "val/loss") == [losses[1]] and losses[1] != losses[2]
    for name in ("adapter/adapter_model.safetensors", "full/connector.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (first / name).read_bytes()


def test_several_adapters_lie_in_folders_of_their_own(
    make: Any, several: Path, tmp_path: Path
) -> None:
    train(unmoved(make, tmp_path / "run", several / "adapter", components=SEVERAL))
    assert tiny.read_metrics(tmp_path / "run", "val/loss") == tiny.read_metrics(several, "val/loss")


def test_a_resume_goes_on_from_its_own_checkpoint_and_wants_the_same_start(
    make: Any, first: Path, tmp_path: Path
) -> None:
    for name in ("adapter", "full"):
        shutil.copytree(first / name, tmp_path / name)
    runs = {
        name: make(tmp_path / name, init_from=str(tmp_path / "adapter"))
        for name in ("cut", "whole")
    }

    def interrupt(step: int, metrics: dict[str, float]) -> None:
        if step == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(runs["cut"], interrupt)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    stored, tensors = file.read_bytes(), load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file)
    with pytest.raises(ConfigError, match=r"init_from: has changed since the checkpoint"):
        train(runs["cut"])
    file.write_bytes(stored)
    for run in runs.values():
        train(run)
    losses = [tiny.read_metrics(tmp_path / name, "train/loss") for name in runs]
    assert losses[0] == losses[1]
    log = (tmp_path / "cut" / "logs" / "rank-0.log").read_text()
    assert "starting from the trained weights of" in log and "resuming after step 2" in log
    assert "not from init_from" in log


def test_all_that_does_not_fit_is_one_error(make: Any, first: Path, tmp_path: Path) -> None:
    components = {"vision": {"mode": "full"}, "llm": LORA | {"sublayers": ["attn"], "r": 2}}
    run = make(tmp_path / "run", init_from=str(first), components=components)
    run["components"] = components
    with pytest.raises(ConfigError, match="does not fit; train the same components") as caught:
        train(run)
    problems = caught.value.problems
    kinds = ("is there, but this run does not train it", "in this run", "is not there")
    found = {kind: [text for text in problems if text.endswith(kind)] for kind in kinds}
    assert sum(map(len, found.values())) == len(problems) and all(found.values()), problems
    assert any("q_proj.lora_A.llm.weight: is 4x" in text for text in found["in this run"])
    assert any("multi_modal_projector" in text for text in found[kinds[0]])
    assert any("vision_tower" in text for text in found["is not there"])
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_without_weights_is_known_at_once(make: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    own = tmp_path / "run"
    own.mkdir()
    (own / "run.yaml").write_text("")
    for given, told in (
        (tmp_path / "nowhere", "there is no folder"),
        (tmp_path / "empty", "has no run.yaml and no adapter_model.safetensors"),
        (own, "is this run's own folder"),
    ):
        with pytest.raises(ConfigError) as caught:
            resolve(make(own, init_from=str(given)))
        (problem,) = caught.value.problems
        assert problem.startswith("init_from: ") and told in problem


def test_a_damaged_adapter_is_one_error(make: Any, first: Path, tmp_path: Path) -> None:
    for name in ("adapter", "full"):
        shutil.copytree(first / name, tmp_path / name)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        train(make(tmp_path / "run", init_from=str(tmp_path / "adapter")))
    assert "\n" not in str(caught.value) and "export it again" in str(caught.value)


def test_another_method_starts_on_what_was_folded_into_the_base(
    make: Any, first: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    ia3 = {"llm": {"mode": "peft", "method": "ia3", "sublayers": ["attn", "mlp"]}}
    with pytest.raises(ConfigError, match=r"fold it into the base \(mmtrain export\)"):
        train(unmoved(make, tmp_path / "refused", first, components=ia3))
    export_run(ready_from_argument(str(first), [], base=False), tmp_path / "folded", "merged")
    model = {"checkpoint": str(tmp_path / "folded")}
    run = unmoved(make, tmp_path / "run", first, model=model, components=ia3)
    del run["init_from"]
    train(run)
    (found,) = tiny.read_metrics(tmp_path / "run", "val/loss")
    assert found == pytest.approx(tiny.read_metrics(first, "val/loss")[1], rel=1e-5)
