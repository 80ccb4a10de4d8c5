"""ScienceQA: the published format, both papers' prompts, and their evaluators' rules."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from mmtrain.errors import DataError
from mmtrain.tasks.datasets.scienceqa import (
    TASK,
    ScienceQAOptions,
    chosen_letter,
    instructblip_peft,
    kim2023,
    zhou2024,
)
from mmtrain.tasks.interface import ImageBytes, Sample

RAW = Path(__file__).parents[1] / "golden" / "tasks" / "scienceqa" / "raw"
IMAGE = (ImageBytes("png", b""),)
# Where the published files lie on machines that have them.
REAL_DATA = Path(os.environ.get("MMTRAIN_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))


def _read(raw: Path, split: str, images: str = "all") -> list[Sample]:
    return list(TASK.read(raw, split, ScienceQAOptions.model_validate({"images": images})))


def _sample(answer_index: int = 1, images: tuple[ImageBytes, ...] = (), **meta: str) -> Sample:
    choices = ("red", "blue; green", "*none*")
    return Sample(
        id="1",
        images=images,
        question="Which colour?",
        answers=(choices[answer_index],),
        choices=choices,
        meta={**meta, "answer_index": answer_index},
    )


# --- prompts ------------------------------------------------------------------------------------


def test_zhou2024_is_the_printed_form() -> None:
    rendered = zhou2024(_sample())
    assert rendered.turns[0].text == "Which colour? A. red, B. blue; green, C. *none*"
    assert rendered.target == "B"
    assert rendered.candidates == ("A", "B", "C")
    assert rendered.instruction is None


def test_kim2023_keeps_braces_and_drops_four_signs() -> None:
    rendered = kim2023(_sample(hint="Look! #1", lecture="Learn."))
    assert rendered.turns[0].text == (
        "Context: {Look 1 Learn.} Question: {Which colour?} "
        "Options: {(a) red\n(b) blue green\n(c) none\n} Answer:"
    )
    assert rendered.instruction == rendered.turns[0].text
    assert rendered.target == "(b) blue; green", "answers keep their signs"
    assert rendered.candidates == ("(a) red", "(b) blue; green", "(c) *none*")


def test_the_former_name_of_kim2023_still_works() -> None:
    sample, template = _sample(), TASK.templates["instructblip_peft"]
    assert instructblip_peft(sample) == kim2023(sample)
    assert template.mode == "rank" and template.name == "instructblip_peft"
    assert TASK.score([sample], ["(b) blue; green"], template)[1] == [1.0]
    assert TASK.score([sample], ["B"], template)[1] == [0.0]


# --- evaluators ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        (" B\n", "B"),
        ("B. blue", "B"),
        ("The answer is B.", "B"),
        ("Because of light. The answer is B. Done.", "B"),
        ("B.", None),
        ("B) blue", None),
        ("b", None),
        ("blue", None),
        ("(b) blue; green", None),
        ("The answer is B", None),
        ("The answer is A. The answer is B.", None),
        ("F", None),
        ("AB", None),
        ("", None),
    ],
)
def test_letters_that_the_evaluator_reads(prediction: str, letter: str | None) -> None:
    assert chosen_letter(prediction) == letter


def test_each_template_has_its_own_rule() -> None:
    samples = [_sample(1)] * 3
    predictions = ["B", "(b) blue; green", "blue; green"]
    assert TASK.score(samples, predictions, TASK.templates["zhou2024"])[1] == [1.0, 0.0, 0.0]
    assert TASK.score(samples, predictions, TASK.templates["kim2023"])[1] == [0.0, 1.0, 0.0]


def test_accuracy_over_images_is_apart() -> None:
    samples = [_sample(0), _sample(0, IMAGE), _sample(0, IMAGE), _sample(0)]
    metrics, scores = TASK.score(samples, ["A", "A", "B", "A"], TASK.templates["zhou2024"])
    assert scores == [1.0, 1.0, 0.0, 1.0]
    assert metrics == {"accuracy": 0.75, "accuracy_image": 0.5}
    without = TASK.score(samples[:1], ["A"], TASK.templates["zhou2024"])[0]
    assert without == {"accuracy": 1.0}, "no metric without data"


# --- raw files ----------------------------------------------------------------------------------


def test_reads_images_and_text_alike() -> None:
    samples = {sample.id: sample for sample in _read(RAW, "train")}
    assert list(samples) == ["2", "1", "4"], "the order of pid_splits.json"
    assert samples["2"].images == ()
    assert samples["1"].images[0].extension == "png"
    assert samples["1"].images[0].data.startswith(b"\x89PNG")
    assert samples["1"].answers == ("attract",)
    assert samples["1"].meta["hint"] == "Two magnets are placed as shown."
    assert "hint" not in samples["2"].meta


@pytest.mark.parametrize(("images", "ids"), [("all", "214"), ("only", "14"), ("none", "2")])
def test_images_option(images: str, ids: str) -> None:
    assert "".join(sample.id for sample in _read(RAW, "train", images)) == ids


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RAW, tmp_path / "raw"))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"answer": 3}, "problem 2 has answer 3 among 3 choices"),
        ({"answer": -1}, "answer -1"),
        ({"answer": "1"}, "answer '1'"),
        ({"choices": ["a", 1, "b"]}, "problem 2"),
        ({"choices": list("abcdef")}, "6 choices"),
        ({"choices": None}, "wrong type"),
        ({"question": None}, "problem 2"),
    ],
)
def test_unsound_problems_are_named(raw: Path, changes: dict[str, object], fault: str) -> None:
    problems = json.loads((raw / "problems.json").read_text())
    problems["2"].update(changes)
    (raw / "problems.json").write_text(json.dumps(problems))
    with pytest.raises(DataError, match=fault):
        _read(raw, "train")


def test_faults_of_the_download_are_named(raw: Path) -> None:
    with pytest.raises(DataError, match="no split 'dev'"):
        _read(raw, "dev")
    (raw / "pid_splits.json").write_text('{"train": ["77"]}')
    with pytest.raises(DataError, match="problem 77"):
        _read(raw, "train")
    (raw / "problems.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        _read(raw, "train")
    (raw / "problems.json").unlink()
    with pytest.raises(DataError, match="problems.json, pid_splits.json and images/"):
        _read(raw, "train")


def test_raw_names_cannot_leave_the_folder(raw: Path) -> None:
    problems = json.loads((raw / "problems.json").read_text())
    problems["1"]["image"] = "../../../../secret.png"
    (raw / "problems.json").write_text(json.dumps(problems))
    (raw.parent / "secret.png").write_bytes(b"secret")
    with pytest.raises(DataError, match="missing.*images/train/1/secret.png"):
        _read(raw, "train")


def test_published_splits(tmp_path: Path) -> None:
    published = REAL_DATA / "scienceqa" / "pid_splits.json"
    if not published.is_file():
        pytest.skip(f"the published pid_splits.json is not at {published}")
    splits = json.loads(published.read_text())
    problems = {
        problem_id: {
            "question": f"Q{problem_id}",
            "choices": ["x", "y"],
            "answer": 0,
            "image": None,
        }
        for problem_id in splits["trainval"] + splits["test"]
    }
    shutil.copy(published, tmp_path)
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    ids = {split: [sample.id for sample in _read(tmp_path, split)] for split in TASK.splits}
    assert {split: len(found) for split, found in ids.items()} == {
        "train": 12726,
        "val": 4241,
        "test": 4241,
    }
    assert ids["train"] == splits["train"]
    assert len(set().union(*ids.values())) == 21208
