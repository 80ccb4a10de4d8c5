"""Samples that cannot be trained on, in a run that may leave some out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmtrain.errors import DataError, TrainingError
from tests import tiny
from tests.distributed.jobs import Interrupted
from tests.in_process import one_rank, train
from tests.unit.test_own_data import row, shards, write_rows

NUM_ROWS, LONG = 16, "0 1 2 3 4 5 6 7 8 9 " * 30


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows of which one has an answer that fits no `max_length`."""
    rows = [row(id=f"row-{n}", question=f"Which {n}?", answer="0") for n in range(NUM_ROWS)]
    rows[5]["answer"] = LONG
    raw = write_rows(tmp_path, rows)
    shards("build", "jsonl", "--raw", raw, "--out", tmp_path / "rows", "--val", "0")
    return tmp_path / "rows" / "train"


def run_of(base: Path, shards_folder: Path, out: Path, **data: Any) -> dict[str, Any]:
    """Two epochs, with a validation in the second."""
    data |= {"task": "jsonl", "train": str(shards_folder), "max_length": 64, "workers": 1}
    run = tiny.run_data(base, shards_folder, out)
    run["data"] = data | {"val": str(shards_folder), "val_limit": 2}
    run |= {"validate": {"every": 3}, "checkpoint": {"every_steps": 2}}
    run["optim"] |= {"global_batch": 8, "micro_batch": 4, "max_steps": 4}
    run["components"] = {"llm": {"mode": "peft", "method": "lora", "r": 2}}
    return run | {"generation": {"max_new_tokens": 1}}


@pytest.mark.parametrize("cut", ["order", "balanced"])
def test_a_run_leaves_them_out_counts_them_and_resumes(
    tiny_checkpoint: Path, folder: Path, tmp_path: Path, cut: str
) -> None:
    runs = {
        name: run_of(tiny_checkpoint, folder, tmp_path / name, on_bad_sample="skip", cut=cut)
        for name in ("whole", "cut")
    }

    def stop(step: int, metrics: dict[str, float]) -> None:
        raise Interrupted

    with one_rank():
        train(runs["whole"])
        with pytest.raises(Interrupted):
            train(runs["cut"], stop)
        train(runs["cut"])
    for name in runs:
        assert tiny.read_metrics(tmp_path / name, "train/bad_samples")[-1] == 2, "one per epoch"
    losses = [tiny.read_metrics(tmp_path / name, "train/loss") for name in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    log = (tmp_path / "whole" / "logs" / "rank-0.log").read_text()
    assert "left out of training: sample row-5: " in log and "data.max_length is 64" in log
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in runs]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_without_leave_it_ends_a_run_and_too_many_do_as_well(
    tiny_checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_rank():
        with pytest.raises(DataError, match="row-5"):
            train(run_of(tiny_checkpoint, folder, tmp_path / "stop"))
        strict = run_of(
            tiny_checkpoint, folder, tmp_path / "none", on_bad_sample="skip", max_bad_share=0
        )
        with pytest.raises(TrainingError, match="1 of the .* samples seen were left out, more"):
            train(strict)
        monkeypatch.setattr("mmtrain.training.trainee._BAD_IN_ANY_RUN", 1)
        run = run_of(tiny_checkpoint, folder, tmp_path / "share", on_bad_sample="skip")
        with pytest.raises(TrainingError, match="2 of the .* more than data.max_bad_share 0.01"):
            train(run)
    status = json.loads((tmp_path / "share" / "status.json").read_text())
    assert status["state"] == "failed" and "max_bad_share" in status["reason"]
