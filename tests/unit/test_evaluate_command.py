"""`mmtrain evaluate`: what it takes, and that a kill loses no answer."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmtrain.errors import MmtrainError
from tests import tiny
from tests.in_process import one_rank, train

LORA = {"mode": "peft", "method": "lora", "r": 4, "alpha": 8}


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(autouse=True)
def keep_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmtrain import distributed

    monkeypatch.setattr(distributed, "shut_down", lambda: None)


@pytest.fixture(scope="module")
def runs(
    tiny_checkpoint: Path, digit_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Three runs: two that differ in their rate alone, and one with adapters elsewhere."""
    root = tmp_path_factory.mktemp("runs")
    changed: dict[str, dict[str, Any]] = {
        "slow": {},
        "fast": {"optim": {"lr": 1e-2}},
        "both": {"components": {"vision": LORA, "llm": LORA}},
    }
    for name, sections in changed.items():
        common: dict[str, Any] = {
            "data": {"val": str(digit_shards / "val"), "val_limit": 4},
            "generation": {"max_new_tokens": 1, "batch_size": 2},
            "optim": {"max_steps": 2},
        }
        sections = {key: common.get(key, {}) | value for key, value in sections.items()}
        sections = common | sections
        train(tiny.run_data(tiny_checkpoint, digit_shards, root / name, **sections))
    return {name: root / name for name in changed}


def evaluate(*arguments: str | Path) -> int:
    from mmtrain.commands import evaluate

    parser = argparse.ArgumentParser()
    evaluate.configure(parser)
    return evaluate.run(parser.parse_args([*map(str, arguments), "--limit", "6"]))


def loss_in(folder: Path) -> float:
    return float(json.loads((folder / "metrics.json").read_text())["loss"])


def test_runs_on_one_base_are_evaluated_one_after_another(runs: dict[str, Path]) -> None:
    def losses() -> list[float]:
        return [loss_in(runs[name] / "evaluation" / "val") for name in ("slow", "fast")]

    evaluate(runs["slow"], runs["fast"])
    together = losses()
    evaluate(runs["slow"])
    evaluate(runs["fast"])
    assert losses() == together and together[0] != together[1]
    with pytest.raises(MmtrainError, match="needs a model of its own"):
        evaluate(runs["slow"], runs["both"])


@pytest.mark.parametrize("name", ["slow", "both"])
def test_an_exported_adapter_answers_as_its_run(
    runs: dict[str, Path], digit_shards: Path, tmp_path: Path, name: str
) -> None:
    data = ("--data", digit_shards / "val")
    evaluate(runs[name], *data, "--out", tmp_path / "run")
    copy = tmp_path / "copy"
    copy.mkdir()
    for part in ("run.yaml", "adapter", "full"):
        if (runs[name] / part).is_dir():
            shutil.copytree(runs[name] / part, copy / part)
        elif (runs[name] / part).is_file():
            shutil.copy(runs[name] / part, copy / part)
    for given in (runs[name] / "adapter", copy / "adapter", copy):
        evaluate(given, *data, "--out", tmp_path / "again")
        for file in ("metrics.json", "predictions.jsonl"):
            assert (tmp_path / "again" / file).read_text() == (tmp_path / "run" / file).read_text()


def test_a_base_needs_no_run_file(
    runs: dict[str, Path], tiny_checkpoint: Path, digit_shards: Path, tmp_path: Path
) -> None:
    data = ("model.dtype=fp32", "generation.max_new_tokens=1", "--data", digit_shards / "val")
    evaluate(runs["slow"] / "run.yaml", *data, "--base", "--out", tmp_path / "by-file")
    evaluate(tiny_checkpoint, *data, "--out", tmp_path / "by-folder")
    assert loss_in(tmp_path / "by-folder") == pytest.approx(loss_in(tmp_path / "by-file"), rel=1e-5)
    with pytest.raises(MmtrainError, match="is missing; name a task"):
        evaluate(tiny_checkpoint)
    with pytest.raises(MmtrainError, match="no run folder .*, no adapter/ of one, and no model"):
        evaluate(tmp_path, *data)


def test_a_killed_evaluation_asks_nothing_twice(
    runs: dict[str, Path], digit_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmtrain.evaluation import evaluate as module

    data = ("--data", digit_shards / "val", "--data", digit_shards / "train")
    evaluate(runs["slow"], *data, "--out", tmp_path / "whole")
    honest, asked = module.answer, []

    def until_the_fifth(*given: Any) -> Any:
        asked.append(given[2])
        if len(asked) == 5:  # the second of the other set's three chunks
            raise KeyboardInterrupt
        return honest(*given)

    monkeypatch.setattr(module, "answer", until_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        evaluate(runs["slow"], *data, "--out", tmp_path / "cut")
    (kept,) = tmp_path.glob("cut/*-train/.answered/rank-0.jsonl")
    with kept.open("a") as file:
        file.write('\n{"texts": ["cut in the mid')
    evaluate(runs["slow"], *data, "--out", tmp_path / "cut")
    assert len(asked) == 5 + 2
    for file in tmp_path.glob("whole/*/*"):
        assert (tmp_path / "cut" / file.relative_to(tmp_path / "whole")).read_text() == (
            file.read_text()
        )
    assert not list(tmp_path.rglob(".answered"))


def test_answers_of_other_weights_are_not_taken_up(
    runs: dict[str, Path], digit_shards: Path, tmp_path: Path
) -> None:
    from mmtrain.evaluation.kept import KeptAnswers

    data = ("--data", digit_shards / "val", "--out", tmp_path / "there")
    evaluate(runs["slow"], "--data", digit_shards / "val", "--out", tmp_path / "slow")
    KeptAnswers.open(tmp_path / "there" / ".answered", "answers to something else", 0)
    evaluate(runs["slow"], *data)
    wanted = (tmp_path / "slow" / "predictions.jsonl").read_text()
    assert (tmp_path / "there" / "predictions.jsonl").read_text() == wanted


def test_answers_that_are_cut_are_spoken_of(
    runs: dict[str, Path],
    digit_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from mmtrain import plugins

    templates = plugins.load("task", "digits").templates
    name, honest = next(iter(templates.items()))
    monkeypatch.setitem(templates, name, dataclasses.replace(honest, answer_tokens=9))
    with caplog.at_level("WARNING", logger="mmtrain"):
        evaluate(runs["slow"], "--data", digit_shards / "val", "--out", tmp_path / "there")
    assert "are cut at generation.max_new_tokens 1, and may need 9" in caplog.text
