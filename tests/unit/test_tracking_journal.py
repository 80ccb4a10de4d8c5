"""The journal survives what a killed process leaves behind."""

from pathlib import Path

import pytest

from mmtrain.errors import DataError
from mmtrain.tracking.journal import RunJournal, read_from


def _write(path: Path, steps: int) -> RunJournal:
    journal = RunJournal(path)
    for step in range(1, steps + 1):
        journal.append(step, step / 10, {"train/loss": 1.0 / step}, time_s=1000.0 + step)
    return journal


def test_lines_are_on_disk_without_closing(tmp_path: Path) -> None:
    _write(tmp_path / "metrics.jsonl", 3)
    entries = RunJournal.read(tmp_path / "metrics.jsonl")
    assert [entry.step for entry in entries] == [1, 2, 3]
    assert entries[1].metrics == {"train/loss": 0.5} and entries[1].time_s == 1002.0


def test_half_written_last_line_is_skipped_and_then_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, 3).close()
    path.write_bytes(path.read_bytes()[:-10])
    assert [entry.step for entry in RunJournal.read(path)] == [1, 2]
    journal = RunJournal(path)
    journal.append(3, 0.3, {"train/loss": 7.0})
    assert [entry.metrics["train/loss"] for entry in RunJournal.read(path)] == [1.0, 0.5, 7.0]


def test_only_a_half_line_leaves_an_empty_journal(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "ep')
    RunJournal(path)
    assert path.read_bytes() == b""


def test_truncate_removes_steps_beyond_and_appending_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = _write(path, 5)
    assert journal.truncate_after(3) == 2
    assert journal.truncate_after(3) == 0
    journal.append(4, 0.4, {"train/loss": 9.0})
    assert [entry.step for entry in RunJournal.read(path)] == [1, 2, 3, 4]
    assert list(tmp_path.iterdir()) == [path]


def test_not_a_number_survives(tmp_path: Path) -> None:
    journal = RunJournal(tmp_path / "metrics.jsonl")
    journal.append(1, 0.0, {"a": float("nan"), "b": float("inf")})
    metrics = RunJournal.read(tmp_path / "metrics.jsonl")[0].metrics
    assert metrics["a"] != metrics["a"] and metrics["b"] == float("inf")


@pytest.mark.parametrize(
    "line", ["garbage", "[" * 100_000, '{"step": Infinity, "epoch": 0, "time_s": 0, "metrics": {}}']
)
def test_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, 2).close()
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(DataError, match="metrics.jsonl:1: not a journal line"):
        RunJournal.read(path)


def test_reading_in_pieces_gives_every_line_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, 7).close()
    steps, offset = [], 0
    while True:
        entries, offset = read_from(path, offset, max_metrics=3)
        if not entries:
            break
        assert len(entries) <= 3
        steps += [entry.step for entry in entries]
    assert steps == list(range(1, 8)) and offset == path.stat().st_size
