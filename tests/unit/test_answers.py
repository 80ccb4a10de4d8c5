"""Answers of several runs: intervals that hold what they say, paired differences, the page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mmtrain.__main__ import main
from mmtrain.data.shards import ShardFolder
from mmtrain.errors import MmtrainError
from mmtrain.evaluation.uncertainty import interval, is_mean, paired
from mmtrain.report.answers import read_answers


def test_an_interval_holds_the_mean_nineteen_times_of_twenty() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        found = interval((generator.random(80) < 0.7).astype(float).tolist())
        held += found.low <= 0.7 <= found.high
    assert 178 <= held <= 199
    assert interval([1.0] * 5) == interval([1.0] * 9)
    assert is_mean(0.5, [1.0, 0.0]) and not is_mean(0.6, [1.0, 0.0]) and not is_mean(0, [])


def test_a_paired_difference_sees_what_two_intervals_do_not() -> None:
    """Two runs on hard and easy samples: alike but for a few that one gained."""
    first = [float(number % 2) for number in range(200)]
    second = [1.0 if number % 20 == 0 else score for number, score in enumerate(first)]
    apart = paired(first, second)
    assert apart.difference == pytest.approx(0.05) and apart.interval.low > 0
    assert apart.chance < 0.01
    one, other = interval(first), interval(second)
    assert one.high > other.low, "alone, they overlap"
    alike = paired(first, [1 - score for score in first])
    assert alike.difference == 0 and alike.chance > 0.5
    assert paired(first, first).chance == 1


def write_predictions(folder: Path, scores: list[int], first: int = 0) -> Path:
    place = folder / "evaluation" / "val"
    place.mkdir(parents=True)
    lines = [
        {"id": f"digits-{first + n:04d}", "prompt": "Which?", "prediction": f"<b>{score}</b>",
         "target": "1", "score": score}
        for n, score in enumerate(scores)
    ]  # fmt: skip
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (place / "predictions.jsonl").write_text(text)
    return folder


def test_the_page_shows_where_they_differ_first(
    digit_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ShardFolder.open(digit_shards / "val")
    ids = [folder.read(number).id for number in range(6)]
    runs = [tmp_path / "lora", tmp_path / "ia3"]
    for run, scores in zip(runs, ([1, 0, 1, 1, 0, 1], [1, 0, 1, 0, 0, 1]), strict=True):
        write_predictions(run, scores)
        path = run / "evaluation" / "val" / "predictions.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        renamed = [{**line, "id": name} for line, name in zip(lines, ids, strict=True)]
        path.write_text("".join(f"{json.dumps(line)}\n" for line in renamed))
    out = tmp_path / "page.html"
    data = ["--data", str(digit_shards / "val"), "--out", str(out), "--num", "4"]
    assert main(["answers", *map(str, runs), *data]) == 0
    said = capsys.readouterr().out
    assert "lora" in said and "0.6667" in said and "Beside lora" in said and "-0.1667" in said
    page = out.read_text()
    assert page.index(f"<h2>{ids[3]}</h2>") < page.index(f"<h2>{ids[0]}</h2>")
    assert page.count("data:image/jpeg") == 4 and "&lt;b&gt;1&lt;/b&gt;" in page
    assert "<script" not in page and "4 of 6 samples" in page
    assert main(["answers", str(runs[0]), "--out", str(out)]) == 0, "one run, no pictures known"
    assert "data:image" not in out.read_text()


def test_faults_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = write_predictions(tmp_path / "a", [1]), write_predictions(tmp_path / "b", [1], 9)
    with pytest.raises(MmtrainError, match="no predictions there.*Give --split: val"):
        read_answers(one, "test")
    assert main(["answers", str(one), str(other), "--out", str(tmp_path / "x")]) == 2
    assert "answered no sample in common" in capsys.readouterr().err
    (one / "evaluation" / "val" / "predictions.jsonl").write_text('{"id": 3}\n')
    with pytest.raises(MmtrainError, match="damaged"):
        read_answers(one, "val")
