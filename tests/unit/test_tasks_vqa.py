"""Questions about pictures as published: splits, answers, what is left out and why, faults."""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_shards import command
from mmtrain import plugins
from mmtrain.data.shards import ShardFolder
from mmtrain.errors import DataError
from mmtrain.tasks.interface import Dropped, ImageBytes, Sample
from tests.fuzz import examples

GOLDEN = Path(__file__).parents[1] / "golden" / "tasks"
NAMES = ("iconqa", "vizwiz", "okvqa", "aokvqa", "ocrvqa", "vqav2", "textvqa")
# The file of the train split that holds the rows.
FILES = {
    "iconqa": "problems.json",
    "vizwiz": "Annotations/train.json",
    "okvqa": "mscoco_train2014_annotations.json",
    "aokvqa": "aokvqa_v1p0_train.json",
    "ocrvqa": "dataset.json",
    "vqav2": "v2_mscoco_train2014_annotations.json",
    "textvqa": "TextVQA_0.5.1_train.json",
}


def read(name: str, split: str, raw: Path | None = None, **options: object) -> list[Any]:
    task = plugins.load("task", name)
    chosen = task.build_options.model_validate(options)
    return list(task.read(raw or GOLDEN / name / "raw", split, chosen))


def samples(name: str, split: str = "train", **options: object) -> dict[str, Sample]:
    found = read(name, split, **options)
    return {one.id: one for one in found if isinstance(one, Sample)}


def left_out(
    name: str, split: str = "train", raw: Path | None = None
) -> dict[str, tuple[str, str]]:
    found = [one for one in read(name, split, raw) if isinstance(one, Dropped)]
    return {one.id: (one.reason.partition(". ")[0], one.detail) for one in found}


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(GOLDEN / name / "raw", tmp_path / "raw"))


def change(path: Path, changed: Callable[[Any], object]) -> None:
    """Rewrite a JSON file with what `changed` does to it."""
    content = json.loads(path.read_text("utf-8-sig"))
    changed(content)
    path.write_text(json.dumps(content))


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("okvqa", {"train": "516065 816295 2197715 516066", "val": "2971475 3397635"}),
        (
            "vqav2",
            {
                "train": "458752000 458752001 262146000 262146001",
                "val": "262148000 262148001",
            },
        ),
        ("textvqa", {"train": "0 1 2 3", "val": "34602 34603"}),
        (
            "aokvqa",
            {
                "train": "22MexNkBPpdZGX6sxbxVBH 2Aq5RiEn7eyfWjEbpuYy4N 2A3VcAGZPHYSEZzFnCfBYB",
                "val": "22jbM6gDxdaMaunuzgrsBB 22wrgNkVuqdmWmdaNQyHkC",
            },
        ),
        (
            "ocrvqa",
            {
                "train": "761183272-1 761183272-2 761183272-3 761183272-4 876120958-1",
                "val": "1107030579-1 1107030579-2",
                "test": "811862259-1 811862259-2",
            },
        ),
        ("iconqa", {"train": "11 10", "val": "13", "test": "14"}),
    ],
)
def test_official_splits_in_the_order_of_their_files(name: str, ids: dict[str, str]) -> None:
    """Among them files with a byte order mark and with CRLF."""
    task = plugins.load("task", name)
    assert task.splits == tuple(ids)
    assert {split: " ".join(samples(name, split)) for split in ids} == ids


@pytest.mark.parametrize("name", NAMES)
def test_the_description_says_when_val_plays_test(name: str) -> None:
    task = plugins.load("task", name)
    assert "test" in task.splits or "test" in task.description


def test_ten_answers_are_kept_with_the_most_frequent_one_first() -> None:
    dessert = samples("okvqa")["816295"]
    assert dessert.answers[0] == "flan"
    assert sorted(dessert.answers) == sorted(
        ["crème brûlée"] * 3 + ["flan"] * 4 + ["custard"] * 2 + ["pudding"]
    )
    assert dessert.meta["first_answer"] == "crème brûlée"
    assert dessert.meta["question_type"] == "four" and dessert.meta["image_id"] == 81629
    disagreeing = samples("okvqa")["2197715"]
    assert len(set(disagreeing.answers)) == 10 and disagreeing.answers[0] == "a day"
    # Nobody's answer may be the target; the empty one still counts among the ten.
    umbrella = samples("okvqa")["516066"]
    assert umbrella.meta["first_answer"] == "umbrella" and umbrella.answers.count("") == 1


def test_iconqa_has_three_kinds() -> None:
    text = samples("iconqa")["10"]
    assert text.choices == ("turn", "slide", "flip") and text.answers == ("flip",)
    assert text.meta["answer_index"] == 2 and len(text.images) == 1
    pictured = samples("iconqa", kind="choose_img")["20"]
    assert pictured.choices == ("A", "B") and pictured.answers == ("B",)
    raw = GOLDEN / "iconqa" / "raw" / "iconqa" / "train" / "choose_img" / "20"
    assert pictured.images == tuple(
        ImageBytes("png", (raw / name).read_bytes())
        for name in ("image.png", "choice_0.png", "choice_1.png")
    )
    blank = samples("iconqa", kind="fill_in_blank")["30"]
    assert blank.choices == () and blank.answers == ("7",)
    for split in ("val", "test"):
        assert len(samples("iconqa", split, kind="choose_img")) == 1
        assert len(samples("iconqa", split, kind="fill_in_blank")) == 1


def test_aokvqa_has_choices_and_direct_answers() -> None:
    cab = samples("aokvqa")["22MexNkBPpdZGX6sxbxVBH"]
    assert cab.answers == ("cab",) and cab.choices == ("skateboarder", "train", "delivery", "cab")
    direct = cab.meta["direct_answers"]
    assert isinstance(direct, list) and len(direct) == 10
    # Two choices that read the same: the published number decides.
    assert samples("aokvqa")["2A3VcAGZPHYSEZzFnCfBYB"].meta["answer_index"] == 1


def test_pictures_may_lie_in_another_folder(tmp_path: Path, copy: Callable[[str], Path]) -> None:
    raw = copy("okvqa")
    shutil.move(raw / "train2014", tmp_path / "coco" / "train2014")
    assert all(isinstance(one, Dropped) for one in read("okvqa", "train", raw))
    found = read("okvqa", "train", raw, image_folder=tmp_path / "coco")
    assert sum(isinstance(one, Sample) for one in found) == 4


def test_vizwiz_files_may_lie_beside_the_pictures(copy: Callable[[str], Path]) -> None:
    raw = copy("vizwiz")
    shutil.move(raw / "Annotations" / "train.json", raw / "train.json")
    assert read("vizwiz", "train", raw) == read("vizwiz", "train")


# --- what is left out -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        (
            "okvqa",
            {
                "999990": ("its picture is not there", "train2014/COCO_train2014_000000099999.jpg"),
                "516069": ("its question has no annotation", ""),
            },
        ),
        (
            "vqav2",
            {
                "524286000": (
                    "its picture is not there",
                    "train2014/COCO_train2014_000000524286.jpg",
                )
            },
        ),
        (
            "vizwiz",
            {
                "VizWiz_train_00000004.jpg": (
                    "its picture is not there",
                    "train/VizWiz_train_00000004.jpg",
                )
            },
        ),
        ("textvqa", {"4": ("its picture is not there", "train_images/ffffffffffffffff.jpg")}),
        (
            "aokvqa",
            {"2BLgCzqBMEFoJ8ovmb9dSa": ("its picture is not there", "train2017/000000999999.jpg")},
        ),
        (
            "ocrvqa",
            {
                "60799110-1": ("its picture is not there", "images/60799110.jpg"),
                "1623439671": ("its questions and answers are no pairs", ""),
            },
        ),
        ("iconqa", {"12": ("its picture is not there", "iconqa/train/choose_txt/12/image.png")}),
    ],
)
def test_what_is_left_out_is_told_by_name(name: str, dropped: dict[str, tuple[str, str]]) -> None:
    assert left_out(name) == dropped


# Where the first row of the train split stands: the key of its list, if it has one, and its place.
ROWS: dict[str, tuple[str | None, str | int]] = {
    "iconqa": (None, "10"),
    "vizwiz": (None, 0),
    "okvqa": ("annotations", 0),
    "aokvqa": (None, 0),
    "ocrvqa": (None, "761183272"),
    "vqav2": ("annotations", 0),
    "textvqa": ("data", 0),
}


def change_row(name: str, raw: Path, changed: Callable[[Any], object]) -> None:
    key, place = ROWS[name]

    def replace(content: Any) -> None:
        rows = content if key is None else content[key]
        rows[place] = changed(rows[place])

    change(raw / FILES[name], replace)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("iconqa", {"answer": 3}, "its answer is none of its choices"),
        ("iconqa", {"answer": 26, "choices": ["a"] * 27}, "its answer is none of its choices"),
        ("iconqa", {"answer": -1}, "its answer is no number"),
        ("iconqa", {"answer": "²"}, "its answer is no number"),
        ("iconqa", {"choices": None}, "its choices are no texts"),
        ("iconqa", {"question": " "}, "its question is no text"),
        ("vizwiz", {"answers": []}, "its answers are no texts"),
        ("vizwiz", {"answers": [{"answer": 3}]}, "its answers are no texts"),
        ("vizwiz", {"answers": [{"answer": ""}] * 10}, "its answers are no texts"),
        ("vizwiz", {"answers": "no"}, "its answers are no texts"),
        ("vizwiz", {"image": None}, "its image is no text"),
        ("vizwiz", {"image": "../../../secret.jpg"}, "its picture lies outside of the folder"),
        ("vizwiz", {"image": "/etc/hostname"}, "its picture is not there"),
        ("okvqa", {"image_id": "51606"}, "its image_id is no number"),
        ("okvqa", {"image_id": True}, "its image_id is no number"),
        ("okvqa", {"answers": None}, "its answers are no texts"),
        ("vqav2", {"image_id": -1}, "its image_id is no number"),
        ("vqav2", {"question_id": 7}, "its question is no text"),
        ("aokvqa", {"correct_choice_idx": 4}, "its right choice is none of its choices"),
        ("aokvqa", {"correct_choice_idx": None}, "its correct_choice_idx is no number"),
        ("aokvqa", {"direct_answers": [1]}, "its direct_answers are no texts"),
        ("ocrvqa", {"questions": None}, "its questions and answers are no pairs"),
        ("ocrvqa", {"split": 4}, "its split is none of 1, 2 and 3"),
        ("ocrvqa", {"imageURL": None}, "its imageURL is no text"),
        ("ocrvqa", {"answers": [None] * 4}, "its answer is no text"),
        ("textvqa", {"image_id": 5}, "its image_id is no text"),
        ("textvqa", {"image_id": "../../../secret"}, "its picture lies outside of the folder"),
    ],
)
def test_rows_that_are_none_say_why(
    name: str, changes: dict[str, Any], reason: str, copy: Callable[[str], Path]
) -> None:
    raw = copy(name)
    (raw.parent / "secret.jpg").write_bytes(b"secret")
    known = left_out(name)
    change_row(name, raw, lambda row: {**row, **changes})
    found = left_out(name, raw=raw)
    assert {why for key, (why, _) in found.items() if key not in known} >= {reason}


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_is_no_object_is_left_out(name: str, copy: Callable[[str], Path]) -> None:
    raw = copy(name)
    change_row(name, raw, lambda row: [row])
    reasons = [why for why, _ in left_out(name, raw=raw).values()]
    assert "it is no object with fields" in reasons


# --- faults of the download -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named_with_the_remedy(name: str, copy: Callable[[str], Path]) -> None:
    raw = copy(name)
    (raw / FILES[name]).unlink()
    with pytest.raises(DataError, match=f"has no file .*{Path(FILES[name]).name}.*give --raw"):
        read(name, "train", raw)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", [b"{", b"[", b"[{]", b"7", b"", b"\xff\xfe[]", b'{"a": 1'])
def test_a_damaged_file_is_named(name: str, content: bytes, copy: Callable[[str], Path]) -> None:
    raw = copy(name)
    (raw / FILES[name]).write_bytes(content)
    with pytest.raises(DataError, match=Path(FILES[name]).name.replace(".", r"\.")):
        read(name, "train", raw)


def test_iconqa_needs_both_files_of_one_download(copy: Callable[[str], Path]) -> None:
    raw = copy("iconqa")
    change(raw / "pid_splits.json", lambda content: content.update(choose_txt_train=["77"]))
    with pytest.raises(DataError, match="problem 77 of .*pid_splits.json' is not in problems.json"):
        read("iconqa", "train", raw)
    change(raw / "pid_splits.json", lambda content: content.pop("choose_txt_train"))
    with pytest.raises(DataError, match="no list 'choose_txt_train'"):
        read("iconqa", "train", raw)


def test_names_in_iconqa_lead_nowhere_else(copy: Callable[[str], Path]) -> None:
    raw = copy("iconqa")
    (raw.parent / "secret").mkdir()
    shutil.copy(raw / "iconqa/train/choose_txt/10/image.png", raw.parent / "secret" / "image.png")
    name = "../../../../secret"
    change(raw / "problems.json", lambda content: content.update({name: content["10"]}))
    change(raw / "pid_splits.json", lambda content: content.update(choose_txt_train=[name]))
    assert left_out("iconqa", raw=raw)[name][0] == "its picture lies outside of the folder"


@pytest.mark.parametrize("name", NAMES)
def test_damage_anywhere_is_an_error_or_a_sample(name: str, copy: Callable[[str], Path]) -> None:
    """Cut off, bits turned over, a piece put elsewhere, a value of another type."""
    raw = copy(name)
    path = raw / FILES[name]
    whole, draw = path.read_bytes(), random.Random(name)
    for _ in range(examples(30)):
        at, to = draw.randrange(len(whole)), draw.randrange(len(whole))
        path.write_bytes(
            draw.choice(
                [
                    whole[:at],
                    whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :],
                    whole[:at] + whole[to : to + 9] + whole[at:],
                    re.sub(rb'"[^"]*"(?=,)', draw.choice([b"null", b"1.5", b"[]", b"{}"]), whole),
                ]
            )
        )
        try:
            found = read(name, "train", raw)
        except DataError:
            continue
        assert all(isinstance(one, (Sample, Dropped)) for one in found)


# --- from raw files to shards ---------------------------------------------------------------------


def test_shards_are_built_and_say_what_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    raw, out = GOLDEN / "okvqa" / "raw", tmp_path / "okvqa"
    build = ["build", "okvqa", "--raw", str(raw), "--out", str(out)]
    with pytest.raises(DataError, match="2 of 6 raw samples cannot be built"):
        command.run(parser.parse_args(build))
    command.run(parser.parse_args([*build, "--drop", "40%"]))
    said = capsys.readouterr().out
    assert "left out 1 of 6: its picture is not there" in said
    assert "999990 (train2014/COCO_train2014_000000099999.jpg)" in said
    folder = ShardFolder.open(out / "train")
    assert [folder.read(n).id for n in range(len(folder))] == list(samples("okvqa"))
    command.run(parser.parse_args([*build, "--drop", "40%", "--limit", "2", "--overwrite"]))
    assert len(ShardFolder.open(out / "train")) == 2
