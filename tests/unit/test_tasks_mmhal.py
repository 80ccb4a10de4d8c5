"""MMHAL-Bench's published file: types by place, two kinds of picture names, what is left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmtrain.tasks.datasets.mmhal import TASK, TYPES
from mmtrain.tasks.interface import Dropped, Sample
from mmtrain.tasks.published import PictureOptions

RAW = Path(__file__).parents[1] / "golden" / "tasks" / "mmhal" / "raw"


def read(raw: Path, images: Path | None = None) -> list[Sample | Dropped]:
    return list(TASK.read(raw, "test", PictureOptions(image_folder=images)))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RAW, tmp_path / "raw"))


def change(raw: Path, number: int, **fields: Any) -> None:
    path = raw / "response_template.json"
    rows = json.loads(path.read_text())
    rows[number].update(fields)
    path.write_text(json.dumps(rows))


def test_samples_hold_what_a_judge_needs(raw: Path) -> None:
    samples = [one for one in read(raw) if isinstance(one, Sample)]
    assert len(samples) == 9 and samples[0].id == "mmhal-00"
    assert [one.meta["question_type"] for one in samples] == [*TYPES, TYPES[0]]
    assert samples[5].meta["image_content"] == "Umbrella, Person, Street"
    assert samples[3].images[0].extension == "png", "called by its image_id"
    assert samples[7].images[0].extension == "jpg", "beside the file"


def test_a_type_that_is_not_named_is_known_by_its_place(raw: Path) -> None:
    change(raw, 4, question_type="")
    change(raw, 6, question_type="other")
    kinds = [one.meta["question_type"] for one in read(raw) if isinstance(one, Sample)]
    assert (kinds[4], kinds[6]) == ("relation", "other")


def test_what_cannot_be_a_sample_is_told(raw: Path, tmp_path: Path) -> None:
    (raw / "images" / "1002_o.jpg").unlink()
    (raw / "images" / "1004_o.jpg").write_bytes(b"no picture")
    change(raw, 5, image_content="Umbrella")
    change(raw, 6, gt_answer=" ")
    change(raw, 1, image_src="https://pictures.example/..")
    dropped = {one.id: one for one in read(raw) if isinstance(one, Dropped)}
    reasons = {name: one.reason for name, one in dropped.items()}
    assert reasons.keys() == {"1", "2", "4", "5", "6"}
    assert "its picture is not there" in reasons["2"] and dropped["2"].detail == "1002_o.jpg"
    assert "damaged" in reasons["4"] and "image_content is no list" in reasons["5"]
    assert "gt_answer is no text" in reasons["6"] and "not there" in reasons["1"]
    kept = [one for one in read(raw) if isinstance(one, Sample)]
    assert kept[-1].meta["question_type"] == TYPES[0], "places count, not what is left"
    elsewhere = tmp_path / "elsewhere"
    shutil.move(raw / "images", elsewhere)
    assert isinstance(read(raw, elsewhere)[0], Sample)


def test_without_a_judge_only_silence_is_known() -> None:
    samples = [one for one in read(RAW) if isinstance(one, Sample)][:4]
    template = TASK.templates["plain"]
    metrics, each = TASK.score(samples, ["wrong", " ", "The left one is longer.", ""], template)
    assert metrics == {"answered": 0.5} and each == [1, 0, 1, 0]
