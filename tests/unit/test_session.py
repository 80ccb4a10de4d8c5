"""What a run writes down of itself, and what it does when it cannot."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtrain.distributed import World
from mmtrain.errors import MmtrainError, Terminated, TrainingError
from mmtrain.main_rank import worded
from mmtrain.tracking.journal import RunJournal
from mmtrain.training.recorder import Recorder
from mmtrain.training.run_folder import read_status, write_status
from mmtrain.training.session import Session, set_up_logging
from tests import tiny
from tests.in_process import one_rank, train
from tests.unit.test_run_folder import config_in


class Ended(Recorder):
    """Remembers what the tracker is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def end(self, status: Any, artifacts: Any = ()) -> None:
        self.told.append(status)


@pytest.mark.parametrize("error", [Terminated(), KeyboardInterrupt()])
def test_a_finished_run_stays_finished(tmp_path: Path, error: BaseException) -> None:
    """Stopped while its last results were sent."""
    write_status(tmp_path, "finished", metrics={}, best_step=1, step=1)
    session = Session(config_in(tmp_path), World(0, 1, torch.device("cpu")), tmp_path)
    session.recorder = recorder = Ended()
    session.fail(error)
    assert read_status(tmp_path)["state"] == "finished" and not recorder.told


def test_reasons_tell_no_secret_and_are_one_short_line() -> None:
    reason = worded(RuntimeError("at http://u:hunter2@host \x1b[31m" + "y" * 5000))
    assert "hunter2" not in reason and "\x1b" not in reason and len(reason) < 1300


def test_a_status_without_end_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("[" * 100_000)
    with pytest.raises(MmtrainError, match="says nothing usable about the run"):
        read_status(tmp_path)


def test_a_log_that_cannot_be_opened_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(MmtrainError, match=r"logs/rank-0.log: cannot be written"):
        set_up_logging(tmp_path, 0)


def test_a_journal_that_cannot_be_written_stops_the_run(
    tiny_checkpoint: Path, digit_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every rank, at the step after: rank 0 alone knows, and the others must not wait for it."""
    honest = RunJournal.append

    def full(self: RunJournal, step: int, *given: Any) -> None:
        if step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(self, step, *given)

    monkeypatch.setattr(RunJournal, "append", full)
    run = tiny.run_data(tiny_checkpoint, digit_shards, tmp_path / "run")
    with one_rank(), pytest.raises(TrainingError, match="journal could not be written .*No space"):
        train(run)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "journal" in status["reason"]
    assert tiny.read_metrics(tmp_path / "run", "train/loss")[1:] == []
