"""MME and POPE: the published files, their evaluators' rules, and scores counted by hand."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from mmtrain.errors import DataError
from mmtrain.tasks.datasets import mme, pope
from mmtrain.tasks.interface import Dropped, Sample, Task
from mmtrain.tasks.templates import own

GOLDEN = Path(__file__).parents[1] / "golden" / "tasks"
# Where the published files lie on machines that have them.
REAL_DATA = Path(os.environ.get("MMTRAIN_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
MME_SIZES = {
    **{name: 60 for name in ("existence", "count", "position", "color")},
    **{"posters": 294, "celebrity": 340, "scene": 400, "landmark": 400, "artwork": 400, "OCR": 40},
    **{"commonsense_reasoning": 140, "numerical_calculation": 40},
    **{"text_translation": 40, "code_reasoning": 40},
}
# The published file of random objects has 1,410 questions to be denied, the others 1,500.
POPE_SIZES = {"adversarial": 3000, "popular": 3000, "random": 2910}


def _read(task: Task, raw: Path, **options: str) -> tuple[list[Sample], list[Dropped]]:
    found = list(task.read(raw, "test", task.build_options.model_validate(options)))
    dropped = [one for one in found if isinstance(one, Dropped)]
    return [one for one in found if isinstance(one, Sample)], dropped


def _score(task: Task, samples: list[Sample], said: list[str]) -> dict[str, float]:
    return task.score(samples, said, task.templates["plain"])[0]


def _picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (1, 1)).save(path)


# --- MME ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("Yes", "yes"),
        ("yes, it is", "yes"),
        ("No.", "no"),
        (" NO", "no"),
        ("not", "no"),
        ("eyes", "yes"),
        ("A no", "no"),
        ("It is no kettle", None),
        ("The answer is yes", None),
        ("", None),
    ],
)
def test_mme_reads_the_first_four_characters(prediction: str, answer: str | None) -> None:
    assert mme.said(prediction) == answer


def _mme_sample(sub_task: str, picture: str, answer: str) -> Sample:
    meta = {"sub_task": sub_task, "picture": picture}
    return Sample(f"{sub_task}/{picture}/{answer}", (), (), "?", (answer,), mme.CHOICES, meta)


def test_mme_points_counted_by_hand() -> None:
    samples = [
        _mme_sample("color", picture, answer) for picture in "ab" for answer in ("Yes", "No")
    ]
    samples += [_mme_sample("code_reasoning", "a", answer) for answer in ("Yes", "No")]
    said = ["Yes", "No", "Yes", "yes", "no idea", "No"]
    # color: 3 of 4 right, 1 of 2 pictures; code: 1 of 2, no picture.
    assert _score(mme.TASK, samples, said) == {
        "accuracy": pytest.approx(4 / 6),
        "accuracy_plus": pytest.approx(1 / 3),
        "color": 125.0,
        "code_reasoning": 50.0,
        "perception": 125.0,
        "cognition": 50.0,
        "overall": 175.0,
    }
    perception_alone = _score(mme.TASK, samples[:4], said[:4])
    assert perception_alone["overall"] == 125.0 and "cognition" not in perception_alone


def test_a_letter_is_scored_where_the_run_files_template_wants_one() -> None:
    samples = [_mme_sample("color", "a", answer) for answer in ("Yes", "No")]
    letters = own("{question}\n{lettered_choices}", "{letter}", "generate")
    assert mme.TASK.score(samples, ["A", "b."], letters)[0]["color"] == 200.0
    assert mme.TASK.score(samples, ["Yes", "No"], letters)[0]["color"] == 0.0
    words = own("Well? {question}", "{answer}", "generate")
    assert mme.TASK.score(samples, ["Yes, I think", "No"], words)[0]["color"] == 200.0


@pytest.fixture(scope="module")
def published_mme(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """The published questions, with a picture of one pixel in place of each."""
    files = [REAL_DATA / "mme" / f"{name}.txt" for name in MME_SIZES]
    if not all(file.is_file() for file in files):
        pytest.skip(f"the published MME files are not at {REAL_DATA / 'mme'}")
    raw = tmp_path_factory.mktemp("mme")
    for file in files:
        shutil.copy(file, raw)
        for line in file.read_text(encoding="utf-8").splitlines():
            _picture(raw / file.stem / line.split("\t")[0])
    samples, dropped = _read(mme.TASK, raw)
    assert dropped == []
    return samples


def test_published_mme_questions(published_mme: list[Sample]) -> None:
    assert len(published_mme) == 2374
    assert Counter(sample.meta["sub_task"] for sample in published_mme) == MME_SIZES
    assert len({sample.id for sample in published_mme}) == 2374
    asked = Counter((one.meta["sub_task"], one.meta["picture"]) for one in published_mme)
    assert set(asked.values()) == {2}
    assert all("Please" not in _mme_prompt(sample) for sample in published_mme)


def _mme_prompt(sample: Sample) -> str:
    return mme.TASK.templates["liu2023"](sample).turns[0].text


def test_published_mme_scores(published_mme: list[Sample]) -> None:
    perfect = _score(mme.TASK, published_mme, [sample.answers[0] for sample in published_mme])
    assert (perfect["perception"], perfect["cognition"], perfect["overall"]) == (2000, 800, 2800)
    assert perfect["accuracy"] == perfect["accuracy_plus"] == 1
    # Half of the questions want yes, one about each picture.
    yes = _score(mme.TASK, published_mme, ["Yes"] * len(published_mme))
    assert (yes["perception"], yes["cognition"], yes["accuracy_plus"]) == (500, 200, 0)
    silent = _score(mme.TASK, published_mme, ["I cannot see it"] * len(published_mme))
    assert silent["overall"] == silent["accuracy"] == 0


def test_published_mme_at_random(published_mme: list[Sample]) -> None:
    """Half of the questions and a quarter of the pairs: 75 of 200 points in each sub-task."""
    overalls = []
    for seed in range(40):
        said = [
            ("Yes", "No")[sha256(f"{seed} {one.id}".encode()).digest()[0] % 2]
            for one in published_mme
        ]
        overalls.append(_score(mme.TASK, published_mme, said)["overall"])
    # A draw deviates by some 50 points, the mean of 40 by 8.
    assert sum(overalls) / len(overalls) == pytest.approx(14 * 75, abs=40)
    assert max(overalls) < 1400


def test_mme_names_what_is_missing(tmp_path: Path) -> None:
    raw = Path(shutil.copytree(GOLDEN / "mme" / "raw", tmp_path / "raw"))
    samples, dropped = _read(mme.TASK, raw)
    assert len(samples) == 28
    assert {one.id: one.detail for one in dropped} == {
        "position.txt, line 4": "000000000103.jpg\\tIs the kettle right of the cup?"
        " Please answer yes or no.\\tmaybe",
        "color.txt, line 3": "000000000999.jpg",
    }
    assert [sample.answers[0] for sample in samples] == ["Yes", "No"] * 14
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in mme.SUB_TASKS:
        shutil.move(raw / name, elsewhere / name)
    assert _read(mme.TASK, raw)[0] == []
    assert _read(mme.TASK, raw, image_folder=str(elsewhere))[0] == samples
    lines = (raw / "OCR.txt").read_text().splitlines(keepends=True)
    (raw / "OCR.txt").write_text(lines[0])
    assert "OCR/0001.jpg/2" in {
        one.id for one in _read(mme.TASK, raw, image_folder=str(elsewhere))[1]
    }
    (raw / "OCR.txt").write_text("\n")
    with pytest.raises(DataError, match="OCR.txt' holds no question"):
        _read(mme.TASK, raw)
    (raw / "OCR.txt").unlink()
    with pytest.raises(DataError, match="needs OCR.txt in"):
        _read(mme.TASK, raw)


# --- POPE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("yes", "yes"),
        ("No", "no"),
        ("No, there is no dog.", "no"),
        ("There is not", "no"),
        ("I see a dog. There is no cat.", "yes"),
        ("Nothing", "yes"),
        ("NO", "yes"),
        ("", "yes"),
    ],
)
def test_pope_reads_no_in_the_first_sentence(prediction: str, answer: str) -> None:
    assert pope.said(prediction) == answer


def _pope_samples(answers: str) -> list[Sample]:
    labels = {"y": "yes", "n": "no"}
    return [
        Sample(str(number), (), (), "?", (labels[one],), pope.CHOICES)
        for number, one in enumerate(answers)
    ]


def test_pope_scores_counted_by_hand() -> None:
    samples = _pope_samples("yyynnnnn")
    said = ["yes", "Yes.", "no", "yes", "no", "No", "not", "no"]
    assert _score(pope.TASK, samples, said) == {
        "accuracy": 0.75,
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
        "yes_ratio": 0.375,
    }
    assert _score(pope.TASK, samples[3:], ["no"] * 5) == {"accuracy": 1.0, "yes_ratio": 0.0}
    letters = own("{question}", "{letter}", "generate")
    assert pope.TASK.score(samples, list("AAABBBBB"), letters)[0]["f1"] == 1.0


@pytest.mark.parametrize("kind", POPE_SIZES)
def test_published_pope_questions(kind: str, tmp_path: Path) -> None:
    published = REAL_DATA / "pope" / f"coco_pope_{kind}.jsonl"
    if not published.is_file():
        pytest.skip(f"the published POPE file is not at {published}")
    shutil.copy(published, tmp_path)
    every = {"kind": kind, "image_folder": str(tmp_path / "pictures")}
    for dropped in _read(pope.TASK, tmp_path, **every)[1]:
        _picture(tmp_path / "pictures" / dropped.detail)
    samples, dropped_now = _read(pope.TASK, tmp_path, **every)
    assert dropped_now == []
    assert len(samples) == len({sample.id for sample in samples}) == POPE_SIZES[kind]
    answers = [sample.answers[0] for sample in samples]
    assert answers.count("yes") == 1500
    perfect = _score(pope.TASK, samples, answers)
    assert perfect == {
        **dict.fromkeys(("accuracy", "precision", "recall", "f1"), 1.0),
        "yes_ratio": 1500 / len(samples),
    }
    share = 1500 / len(samples)
    assert _score(pope.TASK, samples, ["Yes"] * len(samples)) == {
        **dict.fromkeys(("accuracy", "precision"), share),
        **{"recall": 1.0, "f1": pytest.approx(2 * share / (share + 1)), "yes_ratio": 1.0},
    }
    said = [("yes", "no")[sha256(one.id.encode()).digest()[0] % 2] for one in samples]
    at_random = _score(pope.TASK, samples, said)
    # Over four deviations of a coin thrown for each question.
    assert at_random["accuracy"] == pytest.approx(0.5, abs=0.04)
    assert at_random["recall"] == pytest.approx(0.5, abs=0.06)
    assert at_random["precision"] == pytest.approx(share, abs=0.06)
    assert at_random["yes_ratio"] == pytest.approx(0.5, abs=0.04)


def test_pope_names_what_is_missing(tmp_path: Path) -> None:
    raw = Path(shutil.copytree(GOLDEN / "pope" / "raw", tmp_path / "raw"))
    samples, dropped = _read(pope.TASK, raw)
    assert [sample.id for sample in samples] == [f"adversarial-{n}" for n in (1, 2, 3, 4)]
    assert dropped[0].detail == "COCO_val2014_000000000009.jpg"
    assert "lacks question_id, image, text or label" in dropped[1].reason
    assert len(_read(pope.TASK, raw, kind="popular")[0]) == 4
    (raw / "coco_pope_random.jsonl").unlink()
    with pytest.raises(DataError, match="no file coco_pope_random.json or coco_pope_random.jsonl"):
        _read(pope.TASK, raw, kind="random")
