"""A user's own pictures and texts: what becomes a sample, what is left out, who validates."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data_shards import command
from mmtrain import plugins
from mmtrain.data.codec import decode_sample, encode_sample
from mmtrain.data.shards import ShardFolder
from mmtrain.errors import ConfigError, DataError
from mmtrain.tasks import templates
from mmtrain.tasks.interface import Dropped, ImageBytes, Sample, Turn
from mmtrain.tasks.json_rows import read_rows

GOLDEN = Path(__file__).parents[1] / "golden" / "tasks"


def shards(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def read(name: str, raw: Path, split: str, **options: object) -> list[Sample | Dropped]:
    task = plugins.load("task", name)
    return list(task.read(raw, split, task.build_options.model_validate(options)))


def write_rows(folder: Path, rows: list[Any], name: str = "data.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def picture(path: Path, colour: object = "red", size: tuple[int, int] = (6, 4)) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path.name


def row(**changes: object) -> dict[str, object]:
    return {"question": "Which?", "answer": "red"} | changes


# --- rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "answers", "index"),
    [
        ({"answer": "red"}, ("red",), None),
        ({"answer": ["red", "crimson"]}, ("red", "crimson"), None),
        ({"answer": 8}, ("8",), None),
        ({"answer": "green", "choices": ["red", "green"]}, ("green",), None),
        ({"answer": "B", "choices": ["red", "green"]}, ("green",), 1),
        ({"answer": 1, "choices": ["red", "green"]}, ("green",), 1),
        # Texts before numbers and letters: what reads like a choice is that choice.
        ({"answer": 1, "choices": ["3", "1"]}, ("1",), None),
        ({"answer": "A", "choices": ["B", "A"]}, ("A",), None),
        # Whole numbers of a column with gaps.
        ({"answer": 3.0}, ("3",), None),
        ({"answer": 2.5}, ("2.5",), None),
    ],
)
def test_an_answer_is_a_text_or_names_a_choice(
    tmp_path: Path, changes: dict[str, Any], answers: tuple[str, ...], index: int | None
) -> None:
    raw = write_rows(tmp_path, [row(**changes)])
    (sample,) = read("jsonl", raw, "train", val=0)
    assert isinstance(sample, Sample)
    assert (sample.answers, sample.meta.get("answer_index")) == (answers, index)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image": "gone.png"}, "its picture is not there"),
        ({"image": "../secret.png"}, "its picture lies outside of the folder"),
        ({"image": "/etc/hostname"}, "its picture lies outside of the folder"),
        ({"image": "https://example.org/a.png"}, "its picture is an address"),
        ({"image": "text.png"}, "its picture is damaged, or none"),
        ({"image": 7}, "its picture is neither a name nor bytes"),
        ({"image": "long" * 100 + ".png"}, "its picture is not there"),
        ({"answer": float("nan")}, "its answers are not all texts"),
        ({"answer": "AB", "choices": ["red", "green"]}, "its answer is none of its choices"),
        ({"question": None}, "its question is no text"),
        ({"answer": ""}, "its answers are not all texts"),
        ({"answer": None}, "it has no answer"),
        ({"answer": "blue", "choices": ["red", "green"]}, "its answer is none of its choices"),
        ({"answer": "C", "choices": ["red", "green"]}, "its answer is none of its choices"),
    ],
)
def test_a_row_that_is_no_sample_says_why(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    raw = write_rows(tmp_path, [row(), row(id="bad", **changes)])
    dropped = [one for one in read("jsonl", raw, "train", val=0) if isinstance(one, Dropped)]
    assert [one.id for one in dropped] == ["bad"]
    assert dropped[0].reason.startswith(reason)


def test_other_columns_by_name_and_what_is_left_is_kept(tmp_path: Path) -> None:
    picture(tmp_path / "img" / "a.png")
    raw = write_rows(
        tmp_path, [{"file": "a.png", "prompt": "What?", "label": "cat", "hint": "furry", "n": 3}]
    )
    columns = {"image": "file", "question": "prompt", "answer": "label"}
    options = {**columns, "val": 0, "image_folder": tmp_path / "img"}
    (sample,) = read("jsonl", raw, "train", **options)
    assert isinstance(sample, Sample) and len(sample.images) == 1
    assert sample.meta == {"hint": "furry", "n": 3}
    with pytest.raises(DataError, match="no column 'question'.*--set question=COLUMN, of file, pr"):
        read("jsonl", raw, "train")
    # Without a word, these would train on texts alone.
    with pytest.raises(DataError, match="no column 'image', and 'file' looks like pictures"):
        read("jsonl", raw, "train", question="prompt", answer="label")
    with pytest.raises(DataError, match="no column 'fille'"):
        read("jsonl", raw, "train", **{**options, "image": "fille"})


def test_repeated_ids_are_told_apart(tmp_path: Path) -> None:
    names = ["a", "a", "a-2", "a"]
    rows = [row(id=name, question=f"Which {n}?") for n, name in enumerate(names)]
    found = read("jsonl", write_rows(tmp_path, rows), "train", val=0)
    assert [one.id for one in found] == ["a", "a-2", "a-2-2", "a-3"]


@pytest.mark.parametrize("content", ["[1, {", "[1 2]", "[1,]", "[", '[{"a": 1}'])
def test_a_damaged_list_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(DataError, match="entry"):
        list(read_rows(path))


def test_lists_and_lines_of_any_make_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte order mark, CRLF, empty lines, entries longer than what is read at once."""
    monkeypatch.setattr("mmtrain.tasks.json_rows._CHUNK_CHARACTERS", 3)
    rows = [{"a": "ü, ]" * 9}, 12345, "x", [1, [2]], {"b": {"c": None}}]
    for text in (json.dumps(rows), json.dumps(rows, indent=2), " [ 1,2 ] ", "[]"):
        (tmp_path / "rows.json").write_text(f"\ufeff{text}")
        assert [value for _, value in read_rows(tmp_path / "rows.json")] == json.loads(text)
    lines = "\r\n\r\n".join(json.dumps(one) for one in rows if isinstance(one, dict))
    (tmp_path / "rows.jsonl").write_bytes(f"\ufeff{lines}\r\n".encode())
    assert [value for _, value in read_rows(tmp_path / "rows.jsonl")] == [rows[0], rows[4]]
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(DataError, match="line 2: not valid JSON"):
        list(read_rows(tmp_path / "rows.jsonl"))


# --- splits -----------------------------------------------------------------------------------


def many_rows(folder: Path, num: int) -> list[dict[str, object]]:
    """Two questions about each of many pictures, one of which has two names."""
    rows = []
    for number in range(num):
        name = picture(folder / f"{number}.png", (number % 256, number // 256, 0))
        rows += [row(image=name, question=f"{number} a"), row(image=name, question=f"{number} b")]
    shutil.copy(folder / "0.png", folder / "copy.png")
    return [*rows, row(image="copy.png", question="0 c"), row(image=["1.png", "2.png"])]


def sides(raw: Path, **options: object) -> dict[str, set[bytes]]:
    """The pictures of each split."""
    return {
        split: {
            image.data for sample in read("jsonl", raw, split, **options) for image in _of(sample)
        }
        for split in ("train", "val")
    }


def _of(sample: Sample | Dropped) -> tuple[ImageBytes, ...]:
    assert isinstance(sample, Sample)
    return sample.images


def test_no_picture_is_in_both_splits_and_the_share_is_kept(tmp_path: Path) -> None:
    rows = many_rows(tmp_path, 200)
    found = sides(write_rows(tmp_path, rows), val="20%")
    assert not found["train"] & found["val"]
    assert len(found["train"] | found["val"]) == 200 and 20 <= len(found["val"]) <= 60
    other = sides(write_rows(tmp_path, rows), val="20%", split_seed=1)
    assert other["val"] != found["val"]
    # In another order, and beside new ones, every picture stays where it was.
    picture(tmp_path / "new.png", (1, 2, 3))
    again = sides(write_rows(tmp_path, [row(image="new.png"), *reversed(rows)]), val="20%")
    assert found["val"] <= again["val"] and found["train"] <= again["train"]


def test_few_pictures_still_give_both_splits(tmp_path: Path) -> None:
    raw = write_rows(tmp_path, many_rows(tmp_path, 4))
    for share in ("0.1%", "99%"):
        found = sides(raw, val=share)
        assert found["train"] and found["val"]
    assert not read("jsonl", raw, "val", val=0)
    picture(tmp_path / "alone.png")
    alone = write_rows(tmp_path, [row(image="alone.png")] * 2)
    assert not read("jsonl", alone, "val", val="99%") and read("jsonl", alone, "train", val="99%")


# --- conversations ------------------------------------------------------------------------------


def test_pictures_stand_before_the_turns_that_name_them() -> None:
    raw = GOLDEN / "llava_json" / "raw"
    (sample,) = [one for one in read("llava_json", raw, "train", val=0) if one.id == "001"]
    assert isinstance(sample, Sample)
    assert [(turn.role, turn.text, turn.images) for turn in sample.turns] == [
        ("user", "Compare.", 1),
        ("assistant", "It is green.", 0),
        ("user", "And this?", 1),
        ("assistant", "Blue.", 0),
    ]
    assert decode_sample(list(encode_sample(sample, "key"))) == sample
    with pytest.raises(DataError, match="more images than it has"):
        more = Sample("a", (), (Turn("user", "?", 1), Turn("assistant", "!")))
        decode_sample(list(encode_sample(more, "key")))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "it has no conversations"),
        ({"conversations": [{"from": "gpt", "value": "a"}] * 2}, "human and gpt do not take turns"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "human and gpt do not take turns"),
        ({"conversations": [{"from": "system", "value": "a"}]}, "a turn is not from human or gpt"),
        ({"conversations": [{"from": "human"}]}, "a turn is not from human or gpt"),
        ({"image": "a.png", "conversations": "<image><image>"}, "it has another number of <image>"),
        ({"image": "b.png", "conversations": "<image>"}, "its picture is not there"),
        ({"image": 3, "conversations": "a"}, "its picture is no name"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<image>"}]},
         "an answer holds <image>"),
    ],
)  # fmt: skip
def test_a_conversation_that_is_none_says_why(
    tmp_path: Path, record: dict[str, Any], reason: str
) -> None:
    picture(tmp_path / "a.png")
    if isinstance(said := record.get("conversations"), str):
        turns = [{"from": "human", "value": said}, {"from": "gpt", "value": "yes"}]
        record = {**record, "conversations": turns}
    (dropped,) = read("llava_json", write_rows(tmp_path, [record]), "train", val=0)
    assert isinstance(dropped, Dropped) and dropped.reason.startswith(reason)


# --- folders of Hugging Face --------------------------------------------------------------------


def test_parquet_with_pictures_inside(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    inside = {"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}
    (tmp_path / "a.png").unlink()
    records = [row(image=inside, question=f"{n}?", kind="x") for n in range(3)]
    for split, part in (("train", records[:2]), ("validation", records[2:])):
        table = pyarrow.Table.from_pylist(part)
        pyarrow.parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    train, val = (read("hf_folder", tmp_path, split) for split in ("train", "val"))
    assert [one.question for one in train if isinstance(one, Sample)] == ["0?", "1?"]
    assert isinstance(val[0], Sample) and val[0].images == (ImageBytes("png", inside["bytes"]),)
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="no intact parquet file"):
        read("hf_folder", tmp_path, "train")


def test_pictures_with_metadata_or_labels_of_one_folder(tmp_path: Path) -> None:
    names = [picture(tmp_path / "some" / f"{n}.png", (n, 0, 0)) for n in range(8)]
    found = [read("hf_folder", tmp_path, split, val="30%") for split in ("train", "val", "test")]
    assert found[0] and found[1] and not found[2]
    assert len(found[0]) + len(found[1]) == 8
    write_rows(tmp_path / "some", [row(file_name=name) for name in names], "metadata.jsonl")
    first, *_ = read("hf_folder", tmp_path, "train", val=0)
    assert isinstance(first, Sample) and first.answers == ("red",) and len(first.images) == 1


def test_labels_that_sound_like_splits_are_labels_where_pictures_say_so(tmp_path: Path) -> None:
    for label in ("car", "bus"):
        picture(tmp_path / label / "test_01.png", (len(label), 0, 0))
    found = read("hf_folder", tmp_path, "train", val=0)
    assert {one.answers for one in found if isinstance(one, Sample)} == {("car",), ("bus",)}
    picture(tmp_path / "train" / "1.png")
    with pytest.raises(DataError, match="some files are in train, val or test, 2 are in none"):
        read("hf_folder", tmp_path, "train")
    shutil.rmtree(tmp_path / "car")
    shutil.rmtree(tmp_path / "bus")
    with pytest.raises(DataError, match="no folder says what is in train/1.png"):
        read("hf_folder", tmp_path, "train")


def test_more_choices_than_letters(tmp_path: Path) -> None:
    for number in range(27):
        picture(tmp_path / f"label{number:02d}" / "a.png", (number, 0, 0))
    found = read("hf_folder", tmp_path, "train", val=0)
    assert isinstance(found[26], Sample)
    assert templates.letters(found[26]) == templates.plain(found[26])
    with pytest.raises(KeyError, match="letter"):
        templates.own("{question}", "{letter}", "generate")(found[26])


# --- the command --------------------------------------------------------------------------------


def test_shards_are_built_bad_rows_are_counted_and_bounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = many_rows(tmp_path / "pictures", 30)
    cut = tmp_path / "pictures" / "cut.png"
    Image.effect_noise((64, 64), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:-200])
    rows += [row(image="gone.png"), row(image="lost.png"), row(image="cut.png")]
    raw, out = write_rows(tmp_path, rows), tmp_path / "shards"
    build = ("build", "jsonl", "--raw", raw, "--images", tmp_path / "pictures", "--out", out)
    with pytest.raises(
        DataError, match=r"2 of \d+ raw .*not there.*gone.png\), .*lost.png.*--drop"
    ):
        shards(*build, "--val", "10%", "--split", "train")
    assert not (out / "train").exists()
    with pytest.raises(DataError, match="3 of"):
        shards(*build, "--val", "0", "--drop", "1%")
    capsys.readouterr()
    assert shards(*build, "--val", "0", "--drop", "10%") == 0
    said = capsys.readouterr().out
    assert "left out 2 of 65: its picture is not there" in said
    assert "left out 1 of 65: training would refuse it. line-65" in said
    assert f"{out / 'val'}: the raw files have no such samples" in said
    assert len(ShardFolder.open(out / "train")) == 62
    assert shards("verify", out) == 0
    capsys.readouterr()
    assert shards(*build, "--val", "0", "--drop", "10%") == 0, "reused, and told again"
    assert "reused" in (said := capsys.readouterr().out) and "left out 2 of 65" in said
    with pytest.raises(DataError, match="was built from other files or options"):
        shards(*build, "--val", "0", "--split", "train")
    with pytest.raises(ConfigError, match="unknown option 'image_folder'"):
        shards("build", "digits", "--out", tmp_path / "digits", "--images", tmp_path)
