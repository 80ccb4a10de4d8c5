"""A run's folder says truly what became of the run, and belongs to one process at a time."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtrain.config.schema import RunConfig
from mmtrain.distributed import World
from mmtrain.errors import ConfigError, LaunchError, MmtrainError, Terminated
from mmtrain.resolve import resolve
from mmtrain.training.run_folder import (
    InUse,
    check_inputs,
    ended_as,
    exclusive,
    note_failure,
    read_status,
    write_failure,
    write_status,
)
from mmtrain.training.session import Session, open_folder
from tests import tiny

RUN: dict[str, Any] = {
    "name": "folder",
    "model": {"family": "llava", "preset": "tiny"},
    "components": {"llm": {"mode": "peft", "method": "lora", "r": 2}},
    "data": {"task": "digits", "train": "shards"},
    "optim": {"max_steps": 2},
}


def config_in(folder: Path, **changed: Any) -> RunConfig:
    return resolve({**RUN, "output_dir": str(folder), **changed})


def fail(run_dir: Path, rank: int, error: BaseException) -> None:
    """What a rank writes down as it ends."""
    Session(config_in(run_dir), World(rank, 2, torch.device("cpu")), run_dir).fail(error)


def test_a_refused_second_start_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with ExitStack() as held:
        open_folder(config_in(folder), held)
        before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        again = config_in(folder, parallel={"deepspeed": "zero2"})  # may differ in a resume
        with pytest.raises(InUse, match="by another process"):
            open_folder(again, ExitStack())
        assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with ExitStack() as held:
        open_folder(again, held)
    assert "zero2" in (folder / "run.yaml").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "3",
        "{}",
        '{"state": "finished"}',
        '{"state": "finished", "metrics": [], "best_step": 2}',
        '{"state": "finished", "metrics": {"val/loss": "low"}, "best_step": 2}',
        '{"state": "finished", "metrics": {}, "best_step": "last"}',
        '{"state": ["running"]}',
        '{"state": "paused"}',
        '{"state"',
    ],
)
def test_a_status_of_another_shape_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(MmtrainError, match="status.json: says nothing usable") as caught:
        open_folder(config_in(tmp_path), ExitStack())
    assert "\n" not in str(caught.value) and "Remove it" in str(caught.value)


def test_the_first_failure_is_the_cause(tmp_path: Path) -> None:
    write_status(tmp_path, "running")
    fail(tmp_path, 1, ValueError("no such sample"))
    fail(tmp_path, 0, RuntimeError("Connection closed by peer"))
    assert read_status(tmp_path)["reason"] == "rank 1: ValueError: no such sample"
    write_status(tmp_path, "finished", metrics={}, best_step=2)
    fail(tmp_path, 1, RuntimeError("Connection closed by peer"))
    assert read_status(tmp_path)["state"] == "finished"
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_a_folder_of_another_host_is_not_written_to(tmp_path: Path) -> None:
    assert not write_failure(tmp_path, "rank 8 of another host")
    note_failure(tmp_path / "nowhere", "the launcher's")
    assert not list(tmp_path.iterdir())


def test_the_launcher_names_the_cause_of_a_stop(tmp_path: Path) -> None:
    write_status(tmp_path, "running")
    with exclusive(tmp_path):
        note_failure(tmp_path, "a second start was refused")
        assert read_status(tmp_path)["state"] == "running" and ended_as(tmp_path) is None
    assert ended_as(tmp_path) == "KILLED"
    fail(tmp_path, 0, Terminated())
    assert read_status(tmp_path)["reason"] == "stopped by SIGTERM"
    note_failure(tmp_path, "rank 1 was killed")
    note_failure(tmp_path, "the connection was lost")
    assert read_status(tmp_path)["reason"] == "rank 1 was killed"
    assert ended_as(tmp_path) == "FAILED"


def test_a_launch_whose_ranks_were_killed_says_so_in_the_folder(tmp_path: Path) -> None:
    """A python that dies of SIGKILL where it should become a rank."""
    python = tmp_path / "python"
    killed = 'case "$*" in "-P -m mmtrain train --verify-base "*) kill -9 $$;; esac'
    python.write_text(f'#!/bin/sh\n{killed}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    write_status(tmp_path, "running")
    run = tiny.write_run(tmp_path, {**RUN, "output_dir": str(tmp_path)})
    options = ("--ranks", "2", "--python", str(python), "--verify-base")
    result = tiny.run_cli("launch", str(run), *options, check=False)
    assert result.returncode == LaunchError.exit_code, result.stderr
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed" and "was killed by signal 9" in status["reason"], status


def test_changed_added_and_removed_files_of_the_base_are_named() -> None:
    stored = {"base": "a" * 64, "base/config.json": "b" * 64, "base/tokenizer.json": "c" * 64}
    check_inputs(stored, stored)
    now = {"base": "a" * 64, "base/config.json": "d" * 64, "base/added_tokens.json": "e" * 64}
    with pytest.raises(ConfigError) as caught:
        check_inputs(stored, now)
    found = [problem.partition(":")[0] for problem in caught.value.problems[:-1]]
    assert found == ["base/config.json", "base/tokenizer.json", "base/added_tokens.json"]
    check_inputs({"base": "a" * 64}, now)  # a checkpoint that knows no small files
