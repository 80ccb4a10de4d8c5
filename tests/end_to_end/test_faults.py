"""Faults as they happen to real runs: the command, its exit code, what it says, what it leaves."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtrain.errors import TrainingError
from mmtrain.training.checkpoint import CheckpointFolder
from tests import tiny
from tests.in_process import one_rank, train, trained_digest

KILLED_AT_STEP, NUM_STEPS = 6, 20


def last_step(run_dir: Path) -> int:
    """The step of the journal's last complete line."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return -1
    return int(json.loads(lines[-1])["step"]) if lines else -1


def kill_at(processes: list[subprocess.Popen[str]], run_dir: Path, step: int) -> int:
    """Rank 1 stops answering when the journal reaches `step`; the step that rank 0 then reached.

    Rank 0, in a collective that never ends, is told to end, as by a launcher; rank 1 gets kill -9.
    """
    deadline_s = time.monotonic() + 300
    while last_step(run_dir) < step:
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        assert time.monotonic() < deadline_s, "the run did not get there"
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGSTOP)
    time.sleep(1.0)  # most of the time rank 0 waits by then; it must end in order wherever it is
    processes[0].terminate()
    processes[0].communicate(timeout=60)
    processes[1].kill()
    processes[1].communicate(timeout=60)
    assert [process.returncode for process in processes] == [143, -signal.SIGKILL]
    return last_step(run_dir)


def test_kill_in_mid_epoch_and_the_same_command_again(
    tiny_checkpoint: Path, digit_shards: Path, tmp_path: Path
) -> None:
    """Under a ZeRO-3 that really shards: the stock file keeps tensors this small whole."""
    zero3 = json.loads((tiny.REPOSITORY / "ds_configs" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(zero3))
    files, runs = {}, {}
    for name in ("whole", "killed", "alone"):
        runs[name] = tiny.run_data(
            tiny_checkpoint,
            digit_shards,
            tmp_path / name,
            data={"val": str(digit_shards / "val"), "val_limit": 3},
            validate={"every": 7},
            generation={"max_new_tokens": 3, "batch_size": 2},
            optim={"max_steps": NUM_STEPS, "warmup_steps": 3},
            checkpoint={"every_steps": 4},
            parallel={"deepspeed": str(tmp_path / "zero3.json")},
        )
        files[name] = tiny.write_run(tmp_path, runs[name])
    tiny.wait_ranks(tiny.start_ranks(["mmtrain", "train", str(files["whole"])], 2))
    killed = ["mmtrain", "train", str(files["killed"])]
    reached = kill_at(tiny.start_ranks(killed, 2), tmp_path / "killed", KILLED_AT_STEP)
    assert KILLED_AT_STEP <= reached < NUM_STEPS, "killed too late to prove anything"
    status = json.loads((tmp_path / "killed" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", "stopped by SIGTERM")
    tiny.wait_ranks(tiny.start_ranks(killed, 2))
    log = (tmp_path / "killed" / "logs" / "rank-0.log").read_text()
    assert "resuming after step" in log
    assert trained_digest(tmp_path / "killed") == trained_digest(tmp_path / "whole")
    with one_rank():
        train({**runs["alone"], "parallel": {"deepspeed": "zero1", "threads": 1}})
    losses = {name: tiny.read_metrics(tmp_path / name, "train/loss") for name in files}
    assert losses["killed"] == losses["whole"] and len(losses["whole"]) == NUM_STEPS
    # Contract: within 1e-5 over 20 steps, whatever the stage and the number of ranks.
    assert losses["whole"][:20] == pytest.approx(losses["alone"][:20], rel=1e-5)


@pytest.fixture(scope="module")
def scienceqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mixed/train`: every third sample (3, 6, …) without image; `text/train`: all of them."""
    root = tmp_path_factory.mktemp("scienceqa")
    raw = tiny.write_scienceqa_raw(root / "raw")
    for name, images in (("mixed", "all"), ("text", "none")):
        command = ["shards", "build", "scienceqa", "--raw", str(raw), "--out", str(root / name)]
        tiny.run_cli(*command, "--split", "train", "--set", f"images={images}")
    return root


def scienceqa_run(
    base: Path, shards: Path, output_dir: Path, components: dict[str, Any]
) -> dict[str, Any]:
    data = {"task": "scienceqa", "train": str(shards / "train"), "limit": 8}
    run = tiny.run_data(base, shards, output_dir, data=data)
    return {**run, "components": components}


def test_nan_stops_every_rank_before_the_step_and_names_the_samples(
    tiny_checkpoint: Path, scienceqa: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint, base)
    tensors = load_file(base / "model.safetensors")
    name = "multi_modal_projector.linear_2.weight"
    tensors[name][5, 7] = torch.inf
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    components = {"llm": {"mode": "peft", "method": "lora", "r": 2}}
    run = scienceqa_run(base, scienceqa / "mixed", tmp_path / "run", components)
    path = tiny.write_run(tmp_path, run)
    processes = tiny.start_ranks(["mmtrain", "train", str(path)], 2)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [TrainingError.exit_code] * 2, outputs
    for output in outputs:
        assert "Traceback" not in output
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert "NaN or infinite" in line and "No step was taken" in line
        named = {word.strip(",.;") for word in line.split("samples on ")[1].split()}
        with_image = {"1", "2", "4", "5", "7", "8"}
        assert with_image <= named and not {"3", "6"} & named, line
        assert "rank 0:" in line and "rank 1:" in line
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "NaN" in status["reason"]


@pytest.mark.parametrize("component", ["vision", "connector"])
def test_a_component_without_gradient_stops_at_step_one(
    tiny_checkpoint: Path, scienceqa: Path, tmp_path: Path, component: str
) -> None:
    """Without images a blank one runs through tower and connector, and nothing reads it."""
    components = {
        component: {"mode": "full"},
        "llm": {"mode": "peft", "method": "lora", "r": 2},
    }
    run = scienceqa_run(tiny_checkpoint, scienceqa / "text", tmp_path / "run", components)
    with one_rank(), pytest.raises(TrainingError, match=f"no gradient reaches {component}\\."):
        train(run)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint (540 KB) and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no file system could be mounted ({made.stderr.strip()}): run as root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_one_error_and_the_checkpoint_before_is_intact(
    tiny_checkpoint: Path, digit_shards: Path, small_disk: Path, tmp_path: Path
) -> None:
    run = tiny.run_data(
        tiny_checkpoint, digit_shards, small_disk / "run", checkpoint={"every_steps": 2}
    )
    path = tiny.write_run(tmp_path, run)
    result = tiny.run_cli("train", str(path), check=False)
    assert result.returncode == TrainingError.exit_code, result.stderr
    printed = result.stdout + result.stderr
    assert "Traceback" not in printed and "Logging error" not in printed
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "checkpoint of step 4 could not be written" in line
    assert "No space left on device" in line and "run the same command again" in line
    folder = CheckpointFolder(small_disk / "run", 2)
    assert folder.steps() == [2] and folder.newest_good() == folder.path(2)
    assert not list(folder.folder.glob(".*"))
