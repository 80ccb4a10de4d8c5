"""Runs scored by the installed lmms-eval: the answers and metrics of `mmtrain evaluate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mmtrain import plugins
from mmtrain.commands import evaluate
from mmtrain.errors import ConfigError, MmtrainError
from mmtrain.lmms import TASK_FILES
from mmtrain.training.inference import Ready, ready_from_argument
from tests import tiny
from tests.in_process import one_rank, train
from tests.unit.llava_material import write_lively

LIMIT, BATCH = 7, 3
IA3 = {"llm": {"mode": "peft", "method": "ia3", "lr": 0.5, "sublayers": ["attn", "mlp"]}}
TASKS = {"lora": "mmtrain_digits_multiple_choice", "ia3": "mmtrain_scienceqa_kim2023"}


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module")
def shards(digit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `shards build TASK --out shards/TASK` fills it."""
    root = tmp_path_factory.mktemp("shards")
    (root / "digits").symlink_to(digit_shards)
    raw = tiny.write_scienceqa_raw(root / "raw")
    built = ("--out", str(root / "scienceqa"), "--split", "train")
    tiny.run_cli("shards", "build", "scienceqa", "--raw", str(raw), *built)
    (root / "scienceqa" / "test").symlink_to(root / "scienceqa" / "train")
    return root


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA that speaks, and (IA)3 whose template ranks; on a base that says all sorts of things."""
    root = tmp_path_factory.mktemp("runs")
    science = {"task": "scienceqa", "template": "kim2023", "limit": 24}
    science["train"] = str(shards / "scienceqa" / "train")
    base = write_lively(root / "base")
    sections: dict[str, dict[str, Any]] = {
        "lora": {"generation": {"max_new_tokens": 6}},
        "ia3": {"components": IA3, "data": science},
    }
    for name, changed in sections.items():
        steps = {"max_steps": 3, "lr": 2e-2}
        train(tiny.run_data(base, shards / "digits", root / name, optim=steps, **changed))
    return {name: root / name for name in sections}


def evaluated(run: Path, folder: Path, out: Path) -> tuple[list[str], dict[str, float]]:
    """What `mmtrain evaluate` keeps: the answers, the metrics."""
    parser = argparse.ArgumentParser()
    evaluate.configure(parser)
    asked = ["--data", str(folder), "--limit", str(LIMIT), "--out", str(out)]
    ready = ready_from_argument(str(run), [f"generation.batch_size={BATCH}"], base=False)
    evaluate.evaluate_all(parser.parse_args([str(run), *asked]), ready)
    lines = (out / "predictions.jsonl").read_text().splitlines()
    answers = [json.loads(line)["prediction"] for line in lines]
    return answers, json.loads((out / "metrics.json").read_text())


def scored(run: Path, *tasks: Any, **given: Any) -> Any:
    """What lmms-eval finds, by its own evaluator and registry."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASK_FILES), include_defaults=False)
    arguments = f"run={run}" + given.pop("arguments", "")
    given = {"batch_size": BATCH, "limit": LIMIT, **given}
    return simple_evaluate(
        "mmtrain", model_args=arguments, tasks=list(tasks), task_manager=manager, **given
    )


@pytest.mark.parametrize("method", TASKS)
def test_answers_and_metrics_are_those_of_evaluate(
    runs: dict[str, Path],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    monkeypatch.setenv("MMTRAIN_SHARDS", str(shards))
    task, run = TASKS[method], runs[method]
    folder = shards / task.split("_")[1] / "test"
    answers, metrics = evaluated(run, folder, tmp_path)
    found = scored(run, task)
    logged = sorted(found["samples"][task], key=lambda one: one["doc_id"])
    assert [one["filtered_resps"][0] for one in logged] == answers
    for name in set(metrics) - {"loss"}:
        assert found["results"][task][f"{name},none"] == metrics[name]
    untrained = scored(run, task, arguments=",base=true")["samples"][task]
    print(answers, [one["filtered_resps"][0] for one in untrained], metrics)
    assert answers != [one["filtered_resps"][0] for one in untrained] and len(set(answers)) > 1
