"""lmms-eval over two ranks: each answers its own questions, and the answers stay what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmtrain.training.inference import ready_from_argument
from tests import tiny
from tests.distributed.lmms_program import BATCH, LIMIT
from tests.in_process import one_rank
from tests.unit.llava_material import write_lively
from tests.unit.lmms_material import evaluated, written_shards

TASKS = ("mmtrain_digits_multiple_choice", "mmtrain_scienceqa_kim2023")


def test_two_ranks_give_the_answers_of_one(
    digit_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task speaks, one ranks two choices or three: ranks make different numbers of forwards."""
    shards = written_shards(tmp_path / "shards", digit_shards)
    monkeypatch.setenv("MMTRAIN_SHARDS", str(shards))
    science = {
        "task": "scienceqa",
        "template": "kim2023",
        "val": str(shards / "scienceqa" / "test"),
    }
    base, answer = write_lively(tmp_path), {"max_new_tokens": 6}
    places = (base, shards / "digits", tmp_path / "run")
    run = tiny.write_run(tmp_path, tiny.run_data(*places, data=science, generation=answer))
    out = tmp_path / "found.json"
    program = ["tests.distributed.lmms_program", str(out), f"run={run},base=true", *TASKS]
    tiny.wait_ranks(tiny.start_ranks(program, 2))
    found = json.loads(out.read_text())
    with one_rank():
        ready = ready_from_argument(str(run), [f"generation.batch_size={BATCH}"], base=True)
        for task in TASKS:
            folder = shards / task.split("_")[1] / "test"
            answers, metrics = evaluated(ready, folder, LIMIT, tmp_path / task)
            assert found[task] == [answers, metrics["accuracy"]]
    assert len(set(found[TASKS[0]][0])) > 1
