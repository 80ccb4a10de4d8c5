"""Whatever happens to a checkpoint's files or its disk, the run ends with the same adapter."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmtrain.errors import ConfigError, DataError, MmtrainError, Terminated, TrainingError
from mmtrain.files import file_sha256
from mmtrain.tracking.state import TrackingState, load_state
from mmtrain.training import run as training_run
from mmtrain.training import run_folder, session
from mmtrain.training.checkpoint import (
    MOMENTS,
    STATE,
    SUMS,
    WEIGHTS,
    CheckpointFolder,
)
from mmtrain.training.starting import find_resume
from tests import tiny
from tests.distributed.jobs import Interrupted
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
    assert f"checkpoint step-4 is set aside as {tmp_path}/run/checkpoints/damaged-step-4" in log
    assert (tmp_path / "run" / "checkpoints" / "damaged-step-4").is_dir()
    losses = tiny.read_metrics(tmp_path / "run", "train/loss")
    assert len(losses) == 6, "journal lines of steps trained twice must be replaced"


def test_without_any_good_checkpoint_training_starts_again(
    make: Any, cut: Path, whole: str, tmp_path: Path
) -> None:
    run = resumed(make, cut, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-2")
    (tmp_path / "run" / "checkpoints" / "step-4" / STATE).unlink()
    (tmp_path / "run" / "checkpoints" / "step-²").mkdir()
    train(run)
    said = log_of(tmp_path / "run").split("step-4 is not used")[1]
    assert "resuming" not in said
    assert "no checkpoint is good: training starts again from step 0" in said
    assert trained_digest(tmp_path / "run") == whole


def test_pruning_keeps_what_was_written_after_a_fallback(cut: Path, tmp_path: Path) -> None:
    """With `keep: 1` each new checkpoint was removed for the damaged one beyond it."""
    shutil.copytree(cut, tmp_path / "run")
    folder = CheckpointFolder(tmp_path / "run", keep=1)
    (folder.path(4) / WEIGHTS).unlink()
    resume = find_resume(folder, json.loads((folder.path(2) / STATE).read_text())["inputs"])
    assert resume is not None and resume["step"] == 2
    shutil.copytree(folder.path(2), folder.path(3))  # the next one written
    folder._prune(best_step=-1)
    assert folder.steps() == [3]


def with_sums(folder: Path, name: str, data: bytes) -> None:
    """Other contents whose checksum fits."""
    (folder / name).write_bytes(data)
    sums = json.loads((folder / SUMS).read_text())
    (folder / SUMS).write_text(json.dumps(sums | {name: file_sha256(folder / name)}))


def state_with(key: str, value: Any) -> Any:
    def change(folder: Path) -> bytes:
        return json.dumps(json.loads((folder / STATE).read_text()) | {key: value}).encode()

    return change


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        (STATE, lambda folder: b"[]"),
        (STATE, lambda folder: b'{"step": 4}'),
        (STATE, state_with("step", "4")),
        (STATE, state_with("step", 2)),
        (STATE, state_with("inputs", {"base": 1})),
        (STATE, state_with("early_stopping", {})),
        (STATE, state_with("best_metrics", ["val/loss"])),
        (STATE, state_with("stopped_early", "no")),
        (WEIGHTS, lambda folder: b"no safetensors"),
        (MOMENTS, lambda folder: b""),
    ],
)
def test_contents_of_another_shape_are_damage_though_the_sums_fit(
    cut: Path, tmp_path: Path, name: str, contents: Any, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(cut, tmp_path / "run")
    folder = CheckpointFolder(tmp_path / "run", keep=1)
    with_sums(folder.path(4), name, contents(folder.path(4)))
    with caplog.at_level("WARNING", "mmtrain"):
        logging.getLogger("mmtrain").addHandler(caplog.handler)
        assert folder.newest_good() == folder.path(2)
        logging.getLogger("mmtrain").removeHandler(caplog.handler)
    (line,) = caplog.messages
    assert line.startswith("checkpoint step-4 is not used: ") and "\n" not in line


@pytest.mark.parametrize("harm", [lambda data: b"", lambda data: data[:-300] + bytes(300)])
def test_a_journal_that_lost_steps_is_said(
    make: Any, cut: Path, whole: str, tmp_path: Path, harm: Any
) -> None:
    run = resumed(make, cut, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    kept = [line for line in path.read_bytes().splitlines(True) if json.loads(line)["step"] <= 4]
    path.write_bytes(harm(b"".join(kept)))
    train(run)
    assert "of the 4 steps before this start are missing" in log_of(tmp_path / "run")
    assert trained_digest(tmp_path / "run") == whole


def test_a_byte_in_the_journal_that_is_no_text_is_one_error(
    make: Any, cut: Path, tmp_path: Path
) -> None:
    run = resumed(make, cut, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b"train/lr", b"train/\xffr", 1))
    with pytest.raises(DataError, match="not a journal line") as caught:
        train(run)
    assert "\n" not in str(caught.value) and "Remove that line" in str(caught.value)


def test_a_stopped_run_says_so_and_goes_on_later(make: Any, whole: str, tmp_path: Path) -> None:
    def stop(step: int, metrics: dict[str, float]) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    run = make(tmp_path / "run")
    with pytest.raises(Terminated):
        train(run, stop)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", "stopped by SIGTERM")
    train(run)
    assert trained_digest(tmp_path / "run") == whole


def test_what_the_tracker_owes_is_known_before_the_run_counts_as_finished(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in between, the run is either not finished or can still be sent."""
    owed: list[TrackingState | None] = []

    def write_status(run_dir: Path, state: str, **facts: Any) -> None:
        if state == "finished":
            owed.append(load_state(run_dir))
        run_folder.write_status(run_dir, state, **facts)

    monkeypatch.setattr(session, "write_status", write_status)
    monkeypatch.setattr(session, "SENT_WITHIN_S", 0.0)
    nobody_listens = {"uri": f"http://127.0.0.1:{tiny.free_port()}"}
    train(make(tmp_path / "run", tracking=nobody_listens))
    (state,) = owed
    assert state is not None and state.final_status == "FINISHED"
    assert ("adapter", "adapter") in state.artifacts_owed


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
    assert {"base", "data.train", "data.val", "base/config.json", "base/tokenizer.json"} <= set(
        inputs
    )
    with pytest.raises(ConfigError, match="data.val"):
        train(run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, as large as a test asks for by remounting."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no file system could be mounted ({made.stderr.strip()}): run as root")
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
    run = make(folder, validate={"every": 2, "metric": "accuracy"})
    # The answers stay the same, and so the first validation the best.
    run["optim"]["lr"] = run["components"]["connector"]["lr"] = 1e-9

    def damage(step: int, metrics: dict[str, float]) -> None:
        if step == 6:
            path = folder / "checkpoints" / "step-2" / WEIGHTS
            path.write_bytes(flipped(path.read_bytes()))

    train(run, damage)
    assert "best checkpoint step-2 is not exported" in log_of(folder)
    status = json.loads((folder / "status.json").read_text())
    assert status["best_step"] == 6
    assert os.path.getsize(folder / "adapter" / "adapter_model.safetensors") > 0
