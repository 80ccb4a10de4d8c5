"""Whatever happens to a checkpoint's files or its disk, the run ends with the same adapter."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmtrain.errors import ConfigError, MmtrainError, TrainingError
from mmtrain.training import run as training_run
from mmtrain.training.checkpoint import MOMENTS, STATE, SUMS, WEIGHTS, CheckpointFolder
from tests import tiny
from tests.distributed.walk import Interrupted
from tests.in_process import one_rank, train, trained_digest

FILES = [WEIGHTS, MOMENTS, STATE, SUMS]


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture(scope="module")
def sections(digit_shards: Path) -> dict[str, Any]:
    """Saves after steps 2, 4 and 6 of 6; validates after 5 and 6."""
    return {
        "name": "faulty",
        "data": {"val": str(digit_shards / "val"), "val_limit": 2},
        "validate": {"every": 5},
        "checkpoint": {"every_steps": 2, "keep": 3},
        "generation": {"max_new_tokens": 1, "batch_size": 2},
    }


@pytest.fixture(scope="module")
def make(tiny_checkpoint: Path, digit_shards: Path, sections: dict[str, Any]) -> Any:
    def run_in(folder: Path, **changed: Any) -> dict[str, Any]:
        return tiny.run_data(tiny_checkpoint, digit_shards, folder, **{**sections, **changed})

    return run_in


def interrupt_at(step: int) -> Any:
    def on_validation(reached: int, metrics: dict[str, float]) -> None:
        if reached == step:
            raise Interrupted

    return on_validation


@pytest.fixture(scope="module")
def whole(make: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(make(folder))
    return trained_digest(folder)


@pytest.fixture(scope="module")
def cut(make: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended in step 5: checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    with pytest.raises(Interrupted):
        train(make(folder), interrupt_at(5))
    assert CheckpointFolder(folder, 3).steps() == [4, 2]
    return folder


def truncated(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def log_of(folder: Path) -> str:
    return (folder / "logs" / "rank-0.log").read_text()


def resumed(make: Any, cut: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(cut, folder)
    return make(folder)


@pytest.mark.parametrize("harm", [truncated, flipped])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_costs_two_steps_and_nothing_else(
    make: Any, cut: Path, whole: str, tmp_path: Path, name: str, harm: Any
) -> None:
    run = resumed(make, cut, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-4" / name
    path.write_bytes(harm(path.read_bytes()))
    train(run)
    log = log_of(tmp_path / "run")
    assert "checkpoint step-4 is not used: " in log and "resuming after step 2" in log
    reason = next(line for line in log.splitlines() if "step-4 is not used" in line)
    assert "does not match its checksum" in reason or "not readable" in reason
    assert name in reason or name == SUMS  # a flipped checksum accuses the file it is of
    assert trained_digest(tmp_path / "run") == whole
    losses = tiny.read_metrics(tmp_path / "run", "train/loss")
    assert len(losses) == 6, "journal lines of steps trained twice must be replaced"


def test_without_any_good_checkpoint_training_starts_again(
    make: Any, cut: Path, whole: str, tmp_path: Path
) -> None:
    run = resumed(make, cut, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-2")
    (tmp_path / "run" / "checkpoints" / "step-4" / STATE).unlink()
    train(run)
    assert "resuming" not in log_of(tmp_path / "run").split("step-4 is not used")[1]
    assert trained_digest(tmp_path / "run") == whole


def test_what_a_killed_save_left_is_no_checkpoint(
    make: Any, cut: Path, whole: str, tmp_path: Path
) -> None:
    run = resumed(make, cut, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-4").rename(folder / ".step-6.writing")
    train(run)
    assert trained_digest(tmp_path / "run") == whole
    assert not list(folder.glob(".*")) and CheckpointFolder(tmp_path / "run", 3).steps()[0] == 6


def test_a_finished_run_returns_at_once(
    make: Any, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = resumed(make, cut, tmp_path / "run")
    wanted = train(run)

    def never(*_: Any) -> None:
        raise AssertionError("a finished run was built again")

    monkeypatch.setattr(training_run, "build_model", never)
    assert train(run) == wanted and wanted


def test_another_run_in_the_same_folder_is_refused_with_the_difference(
    make: Any, cut: Path, tmp_path: Path
) -> None:
    resumed(make, cut, tmp_path / "run")
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*"))
    other = make(tmp_path / "run", optim={"lr": 1e-4, "global_batch": 8, "micro_batch": 4})
    with pytest.raises(ConfigError, match=r"optim.lr.*0.005.*0.0001") as caught:
        train(other)
    assert "choose another name or output_dir" in str(caught.value)
    after = sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*"))
    assert after == before


def test_the_same_run_may_be_laid_out_otherwise(make: Any, cut: Path, tmp_path: Path) -> None:
    run = resumed(make, cut, tmp_path / "run")
    run["parallel"] = {"deepspeed": "zero2", "threads": 1}
    run["optim"] = {**run["optim"], "micro_batch": 2}
    train(run)
    assert "resuming after step 4" in log_of(tmp_path / "run")


def test_changed_shards_are_refused(
    make: Any, cut: Path, tmp_path: Path, digit_shards: Path
) -> None:
    run = resumed(make, cut, tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(digit_shards / "val", other)
    run["data"] = {**run["data"], "val": str(other)}
    state = tmp_path / "run" / "checkpoints" / "step-4" / STATE
    inputs = json.loads(state.read_text())["inputs"]
    assert set(inputs) == {"base", "data.train", "data.val"}
    with pytest.raises(ConfigError, match="data.val"):
        train(run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, as large as a test asks for by remounting."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=True)
    yield folder
    logging.getLogger("mmtrain").handlers.clear()
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take every free byte."""
    path = folder / "filler"
    with open(path, "wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while file.write(b"\0" * size):
                    pass
            except OSError:
                continue
    return path


def test_a_full_disk_keeps_what_was_saved_and_says_so(
    make: Any, whole: str, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make(small_disk / "run")

    def fill_at(step: int, metrics: dict[str, float]) -> None:
        fill(small_disk)

    with pytest.raises(TrainingError, match="No space left on device") as caught:
        train(run, fill_at)
    assert "Earlier checkpoints are intact" in str(caught.value)
    folder = CheckpointFolder(small_disk / "run", 3)
    assert folder.steps() == [4, 2] and folder.newest_good() == folder.path(4)
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err + printed.out
    (small_disk / "filler").unlink()
    train(run)
    assert trained_digest(small_disk / "run") == whole


def test_a_folder_without_rights_is_one_error(make: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MmtrainError, match="cannot be written"):
        train(make(tmp_path / "file" / "run"))


def test_a_damaged_best_checkpoint_is_not_exported(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best checkpoint is damaged on disk while training goes on to the end."""
    folder = tmp_path / "run"
    run = make(folder, validate={"every": 2, "metric": "loss"})
    run["optim"] = {**run["optim"], "lr": 10.0}  # the first validation stays the best

    def damage(step: int, metrics: dict[str, float]) -> None:
        if step == 6:
            path = folder / "checkpoints" / "step-2" / WEIGHTS
            path.write_bytes(flipped(path.read_bytes()))

    train(run, damage)
    assert "best checkpoint step-2 is not exported" in log_of(folder)
    status = json.loads((folder / "status.json").read_text())
    assert status["best_step"] == 6
    assert os.path.getsize(folder / "adapter" / "adapter_model.safetensors") > 0
