"""Several data sets in one run: who comes how often, in one order for all, with metrics apart."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmtrain.assemble import build_sources
from mmtrain.commands import evaluate
from mmtrain.config.load import load_run_file
from mmtrain.data.mixture import Mixture
from mmtrain.data.order import epoch_order
from mmtrain.data.plan import Layout, Planner
from mmtrain.errors import ConfigError
from mmtrain.resolve import resolve
from mmtrain.tasks.choice import tasks_of
from mmtrain.tasks.interface import validation_metrics
from mmtrain.training.inference import ready_from_argument
from tests import tiny
from tests.distributed.jobs import Interrupted
from tests.in_process import one_rank, train, trained_digest
from tests.unit.test_own_data import row, shards, write_rows

SEED = 7


def test_one_data_set_has_the_order_that_it_has_alone() -> None:
    for epoch in range(3):
        found = Mixture((100,), (1.0,)).order(SEED, epoch)
        assert found.tolist() == epoch_order(100, SEED, epoch).tolist()


def test_whole_passes_hold_all_and_the_rest_goes_round() -> None:
    mixture = Mixture((10, 7, 3), (2.0, 0.3, 1.5))
    assert mixture.num_samples == 20 + 2 + 4
    counts: Counter[int] = Counter()
    for epoch in range(7):
        order = mixture.order(SEED, epoch)
        assert len(order) == mixture.num_samples
        counts.update(order.tolist())
        assert Counter(order[order < 10].tolist()) == dict.fromkeys(range(10), 2)
    # Two of seven in each of seven epochs, and one of three beside the whole pass.
    assert [counts[number] for number in range(10, 17)] == [2] * 7
    assert sorted(counts[number] for number in range(17, 20)) == [9, 9, 10]
    assert not np.array_equal(mixture.order(SEED, 0), mixture.order(SEED + 1, 0))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_same_samples_whatever_the_ranks(world_size: int) -> None:
    mixture = Mixture((40, 24), (0.5, 2.0))
    layout = Layout(world_size, 0, 2, 8)
    planner = Planner(mixture.num_samples, layout, SEED, mixture=mixture)
    seen = [
        index
        for position in range(planner.steps_per_epoch)
        for step in planner.plan(position).bins
        for one in step
        for index in one
        if index >= 0
    ]
    assert seen == mixture.order(SEED, 0).tolist()


def mixed_run(root: Path, base: Path, digits: Path, name: str, **sections: Any) -> dict[str, Any]:
    """Digits, and twice as often a table of texts."""
    if not (root / "texts").exists():
        rows = [row(id=f"digits-{n:04d}", question=f"Which {n}?", answer="0") for n in range(40)]
        raw = write_rows(root, rows)
        shards("build", "jsonl", "--raw", raw, "--out", root / "texts", "--val", "20%")
    texts = {"task": "jsonl", "template": {"prompt": "{question} Say it."}, "weight": 2}
    texts |= {split: str(root / "texts" / split) for split in ("train", "val")}
    images = {"task": "digits", "name": "images"}
    images |= {split: str(digits / split) for split in ("train", "val")}
    run = tiny.run_data(base, digits, root / name, **sections)
    # The same shards, asked in other words.
    again = texts | {"name": "again", "template": "plain", "val": None, "weight": 0.5}
    run["data"] = {"mix": [images, texts, again], "limit": 10, "val_limit": 3, "workers": 1}
    return run


@pytest.fixture(scope="module")
def mixed(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, digit_shards: Path
) -> Path:
    """A folder with a run, `whole`, and the same one that was cut and went on, `cut`."""
    root = tmp_path_factory.mktemp("mixed")
    sections = {
        "optim": {"max_steps": 5, "epochs": None, "global_batch": 4},
        "validate": {"every": 3, "metric": "jsonl/accuracy"},
        "checkpoint": {"every_steps": 2},
        "generation": {"max_new_tokens": 1, "batch_size": 2},
    }

    def stop(step: int, metrics: dict[str, float]) -> None:
        raise Interrupted

    with one_rank():
        for name in ("whole", "cut"):
            run = mixed_run(root, tiny_checkpoint, digit_shards, name, **sections)
            if name == "cut":
                with pytest.raises(Interrupted):
                    train(run, stop)
            train(run)
    return root


def test_a_mixed_run_validates_each_set_and_resumes(mixed: Path) -> None:
    losses = [tiny.read_metrics(mixed / name, "train/loss") for name in ("whole", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    assert trained_digest(mixed / "cut") == trained_digest(mixed / "whole")
    status = json.loads((mixed / "whole" / "status.json").read_text())
    declared = validation_metrics(tasks_of(load_run_file(mixed / "whole" / "run.yaml")))
    assert set(status["metrics"]) == {name for name in declared if "/again/" not in name}
    tokens = {"images": 2 * 3, "jsonl": 2 * 3}  # of three answers each, a digit and an end
    each = {name: status["metrics"][f"val/{name}/loss"] for name in tokens}
    mean = sum(each[name] * tokens[name] for name in tokens) / sum(tokens.values())
    assert status["metrics"]["val/loss"] == pytest.approx(mean, rel=1e-6)
    kept = (mixed / "whole" / "evaluation" / "val-jsonl" / "predictions.jsonl").read_text()
    assert "Say it." in kept and len(kept.splitlines()) == 3


def test_it_is_evaluated_on_each_set_and_on_others_at_every_checkpoint(
    mixed: Path, digit_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    evaluate.configure(parser)
    several = ["--data", str(digit_shards / "test"), "--data", str(mixed / "texts" / "val")]
    with one_rank():
        ready = ready_from_argument(str(mixed / "cut"), [], base=False)
        for data in ([], several[:2]):
            evaluate.evaluate_all(parser.parse_args(["cut", "--limit", "2", *data]), ready)
        parts = build_sources(ready.config, ready.assembled, "train")
        asked = parser.parse_args(["cut", "--limit", "2", "--every-checkpoint", *several])
        scored = evaluate.evaluate_all(asked, ready)
    assert {name: (part.prefix, part.template.name) for name, part in parts.items()} == {
        "images": ("images/", "multiple_choice"),
        "jsonl": ("jsonl/", "own_template"),
        "again": ("again/", "plain"),
    }
    found = [(one.who, one.label) for one in scored if "texts" in one.label]
    assert found[-2:] == [("cut step 4", "texts-val"), ("cut step 5", "texts-val")]
    assert (mixed / "cut" / "evaluation" / "texts-val-step-5" / "metrics.json").is_file()
    evaluate.print_table(scored)
    said = capsys.readouterr().out
    assert said.count("cut step 5") == 3 and "texts-val accuracy" in said and "95 %)" in said
    for label in ("val-images", "val-jsonl", "test"):
        assert f"2 predictions in {mixed / 'cut' / 'evaluation' / label}" in said


def test_what_is_wrong_with_a_mix_is_told_at_once(
    tiny_checkpoint: Path, digit_shards: Path, tmp_path: Path
) -> None:
    run = mixed_run(tmp_path, tiny_checkpoint, digit_shards, "run")
    good = json.loads(json.dumps(run))
    run["data"]["mix"][0]["task"] = "digit"
    run["data"]["mix"][1]["template"] = "lettres"
    with pytest.raises(ConfigError) as caught:
        resolve(run)
    text = str(caught.value)
    assert "data.mix[0].task: unknown task 'digit'; did you mean 'digits'" in text
    assert "data.mix[1].template: 'jsonl' has no template 'lettres'; did you mean" in text
    with pytest.raises(ConfigError, match="gives no 'again/loss'"):
        resolve({**good, "validate": {"metric": "again/loss"}})
    wrong = {
        "'mix' has its own task": {"task": "digits"},
        "two parts of 'mix' have one name": {"mix": [good["data"]["mix"][0]] * 2},
    }
    for fault, changes in wrong.items():
        with pytest.raises(ConfigError, match=fault):
            resolve({**good, "data": good["data"] | changes})
    with pytest.raises(ConfigError, match="gives no 'accuracy'; did you mean '.*accuracy'"):
        resolve({**good, "validate": {"metric": "accuracy"}})
    with pytest.raises(ConfigError, match="give 'task', or several in 'mix'"):
        resolve({**good, "data": {"train": "somewhere"}})
