"""The benchmarks of shards and of ranking run, compare like with like, and keep what they found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import data, ranking
from tests.in_process import one_rank


def test_shards_beside_webdataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data.json"
    data.main(["--samples", "24", "--windows", "1", "--per-window", "3", "--out", str(out)])
    record = json.loads(out.read_text())
    rows = record["windows"]
    assert len(rows) == 7 and all(list(row) == ["mmtrain", "webdataset"] for row in rows.values())
    assert all(one > 0 for row in rows.values() for values in row.values() for one in values)
    for name, row in rows.items():
        better = row["mmtrain"][0] / row["webdataset"][0]
        better = 1 / better if name == data.RESUMING else better
        assert record["times_better"][name]["median"] == pytest.approx(better)
        assert f"| {name} |" in out.with_suffix(".md").read_text()


def test_tensors_that_differ_end_the_benchmark(tmp_path: Path) -> None:
    data.write_ours(tmp_path / "shards", list(data.samples(2)))
    _, squeezing = data.processors()["InstructBLIP"]
    data.check_equal(tmp_path / "shards", "instructblip", squeezing, 2)
    with pytest.raises(RuntimeError, match="the tensors of sample 0 differ"):
        data.check_equal(tmp_path / "shards", "llava", squeezing, 2)  # which pads


def test_ranking_beside_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = {**ranking.MODELS["LLaVA-1.5"]["vision_config"], "image_size": 56}
    model = {**ranking.MODELS["LLaVA-1.5"], "vision_config": tower}
    monkeypatch.setitem(ranking.MODELS, "LLaVA-1.5", model)
    out = tmp_path / "ranking.json"
    with one_rank():
        ranking.main(
            ["--models", "LLaVA-1.5", "--questions", "3", "--windows", "1", "--out", str(out)]
        )
    found = json.loads(out.read_text())["questions_per_s"]["LLaVA-1.5"]
    assert set(found) == {"one by one", "tower once", "mmtrain"}
    assert all(one > 0 for values in found.values() for one in values)
    assert "| LLaVA-1.5 |" in out.with_suffix(".md").read_text()
