"""Faults a user meets first, through the real command: one line, a non-zero code, no traceback."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from mmtrain.__main__ import main
from tests import tiny


def fault_line(*arguments: str) -> str:
    """The one line on stderr of a command that must fail."""
    result = tiny.run_cli(*arguments, check=False)
    assert result.returncode != 0, result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    return lines[0]


def run_file(tmp_path: Path, checkpoint: Path, digits: Path, **sections: Any) -> str:
    """A run file of tiny parts."""
    data = tiny.run_data(checkpoint, digits, tmp_path / "run", **sections)
    return str(tiny.write_run(tmp_path, data))


def test_training_shards_that_are_not_there(
    tiny_checkpoint: Path, digit_shards: Path, tmp_path: Path
) -> None:
    data = {"train": str(tmp_path / "no-shards")}
    line = fault_line("train", run_file(tmp_path, tiny_checkpoint, digit_shards, data=data))
    assert "no-shards" in line and "mmtrain shards build" in line
    assert not (tmp_path / "run" / "plot.png").exists()


def test_a_checkpoint_folder_that_holds_no_model(digit_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = fault_line("train", run_file(tmp_path, tmp_path / "empty", digit_shards))
    assert str(tmp_path / "empty") in line and "Hugging Face format" in line


def test_a_busy_port(tiny_checkpoint: Path, digit_shards: Path, tmp_path: Path) -> None:
    file = run_file(tmp_path, tiny_checkpoint, digit_shards)
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        line = fault_line("launch", file, "--ranks", "2", "--master-port", port)
    assert f"port {port} is busy" in line and "--master-port" in line


def test_images_that_cannot_be_read(
    tiny_checkpoint: Path, digit_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: each is found before anything is loaded."""
    file = run_file(tmp_path, tiny_checkpoint, digit_shards)
    (tmp_path / "page.jpg").write_text("<html>not an image</html>")
    for path, told in (
        (tmp_path / "page.jpg", "no image that can be read here. Give an intact JPEG"),
        (tmp_path / "none.png", "there is no such file. Correct the path."),
        (tmp_path, "there is no such file. Correct the path."),
        (Path("/dev/zero"), "there is no such file. Correct the path."),
    ):
        assert main(["predict", file, "--image", str(path), "What is it?"]) == 2
        assert capsys.readouterr().err.startswith(f"error: --image {path}: {told}")


def test_evaluating_what_is_no_run(tmp_path: Path) -> None:
    line = fault_line("evaluate", str(tmp_path))
    assert str(tmp_path) in line and "Give a run folder" in line
