"""Flickr30k, TextCaps and VL-RewardBench: the published formats, odd rows, targets and scores."""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_shards import command
from mmtrain.data.shards import ShardFolder
from mmtrain.errors import DataError
from mmtrain.tasks import captions
from mmtrain.tasks.datasets import flickr30k, textcaps, vl_rewardbench
from mmtrain.tasks.interface import Dropped, Sample, Task
from mmtrain.tasks.templates import own

GOLDEN = Path(__file__).parents[1] / "golden" / "tasks"


def _read(
    task: Task, raw: Path, split: str = "train", **options: object
) -> tuple[list[Sample], list[Dropped]]:
    found = list(task.read(raw, split, task.build_options.model_validate(options)))
    dropped = [one for one in found if isinstance(one, Dropped)]
    return [one for one in found if isinstance(one, Sample)], dropped


@pytest.fixture
def flickr(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "flickr30k" / "raw", tmp_path / "flickr30k"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "textcaps" / "raw", tmp_path / "textcaps"))


# --- reading ------------------------------------------------------------------------------------


def test_training_has_a_sample_for_each_caption_the_others_one_for_each_photo(flickr: Path) -> None:
    train, dropped = _read(flickr30k.TASK, flickr)
    assert [sample.id for sample in train] == [
        f"{photo}-{number}" for photo in (1000092, 1000102, 1000103) for number in (1, 2)
    ]
    first, second = train[:2]
    assert first.answers == second.answers[::-1], "the others of a photo stay answers"
    assert train[4].answers[0] == "Four workers in hard hats stand on a machine."
    assert [(one.id, one.detail) for one in dropped] == [
        ("1000108", "1000108.jpg"),
        ("1000109", ""),
    ]
    assert "no picture or no caption" in dropped[1].reason
    by_photo, _ = _read(flickr30k.TASK, flickr, rows="pictures")
    assert [sample.id for sample in by_photo] == ["1000092", "1000102", "1000103"]
    for split, ids in {"val": [1000104, 1000105], "test": [1000106, 1000107]}.items():
        samples, none = _read(flickr30k.TASK, flickr, split)
        assert [int(sample.id) for sample in samples] == ids and not none
        assert all(len(sample.answers) == 2 for sample in samples)


def test_files_of_lavis_give_the_same_samples(flickr: Path) -> None:
    karpathy = {split: _read(flickr30k.TASK, flickr, split)[0] for split in flickr30k.TASK.splits}
    (flickr / flickr30k.KARPATHY).unlink()
    for split in karpathy:
        rows: list[dict[str, object]] = []
        for photo, said in _answers_by_photo(karpathy[split]).items():
            image = f"flickr30k-images/{photo}.jpg"
            # Training files have a row for each caption, the others a list for each photo.
            each = [{"image": image, "caption": one} for one in said]
            rows += each if split == "train" else [{"image": image, "caption": said}]
        (flickr / f"flickr30k_{split}.json").write_text(json.dumps(rows))
        assert _read(flickr30k.TASK, flickr, split) == (karpathy[split], [])
    (flickr / "flickr30k_val.json").write_text('[{"caption": "x"}, {"image": "a.jpg"}, 3]')
    _, dropped = _read(flickr30k.TASK, flickr, "val")
    assert [one.id for one in dropped] == ["row-1", "row-3", "a"]


def _answers_by_photo(samples: list[Sample]) -> dict[str, list[str]]:
    by_photo: dict[str, list[str]] = {}
    for sample in samples:
        by_photo.setdefault(sample.id.split("-")[0], list(sample.answers))
    return by_photo


def test_faults_of_the_download_are_named(flickr: Path, texts: Path) -> None:
    (flickr / flickr30k.KARPATHY).write_text('{"images": 3}')
    with pytest.raises(DataError, match="no list 'images'"):
        _read(flickr30k.TASK, flickr)
    (flickr / flickr30k.KARPATHY).write_text("[]")
    with pytest.raises(DataError, match="holds no JSON object"):
        _read(flickr30k.TASK, flickr)
    (flickr / flickr30k.KARPATHY).unlink()
    with pytest.raises(DataError, match="dataset_flickr30k.json or flickr30k_train.json"):
        _read(flickr30k.TASK, flickr)
    (texts / "TextCaps_0.1_train.json").write_text('{"data": {}}')
    with pytest.raises(DataError, match="no list 'data'"):
        _read(textcaps.TASK, texts)
    (texts / "TextCaps_0.1_train.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        _read(textcaps.TASK, texts)
    (texts / "TextCaps_0.1_train.json").unlink()
    with pytest.raises(DataError, match="not readable"):
        _read(textcaps.TASK, texts)


def test_rows_that_are_none_are_dropped_and_named(flickr: Path, texts: Path) -> None:
    images = [3, {"split": "train"}, {"filename": "x.jpg", "split": "train", "sentences": [1]}]
    images.append({"filename": "y.jpg", "split": "teSt", "sentences": [{"raw": "A cat."}]})
    (flickr / flickr30k.KARPATHY).write_text(json.dumps({"images": images}))
    samples, dropped = _read(flickr30k.TASK, flickr)
    assert not samples and [one.id for one in dropped] == ["row-1", "row-2", "x", "row-4"]
    assert "its split is none of" in dropped[-1].reason, "told once, with the largest split"
    assert "a caption is no text" in dropped[2].reason, "and not one caption less in silence"
    assert _read(flickr30k.TASK, flickr, "test") == ([], [])
    (texts / "TextCaps_0.1_val.json").write_text('{"data": [3, {"image_id": "x"}]}')
    samples, dropped = _read(textcaps.TASK, texts, "val")
    assert not samples and [one.id for one in dropped] == ["row-1", "x"]


def test_textcaps_groups_the_rows_of_a_picture(texts: Path) -> None:
    train, dropped = _read(textcaps.TASK, texts)
    assert len(train) == 6 and not dropped
    assert train[1].answers[0] == "A Nokia phone next to a T-shirt that says 'GO'."
    val, dropped = _read(textcaps.TASK, texts, "val")
    assert [sample.id for sample in val] == ["100a59f9c99cb8d3", "1012acdda8c4e8f0"]
    assert val[0].answers == ("A book called Tea for Two.", "The book's cover is blue.")
    assert [one.detail for one in dropped] == ["10dddddddddddddd.jpg"]
    file = texts / "TextCaps_0.1_val.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for row in content["data"]:
        del row["reference_strs"]
    file.write_text(json.dumps(content))
    assert _read(textcaps.TASK, texts, "val")[0] == val, "each row's own caption serves, too"


def test_no_name_leads_out_of_the_folder(flickr: Path, texts: Path) -> None:
    shutil.copy(flickr / "flickr30k-images" / "1000092.jpg", flickr / "secret.jpg")
    rows = [{"image": "../secret.jpg", "caption": "x"}]
    (flickr / flickr30k.KARPATHY).unlink()
    (flickr / "flickr30k_train.json").write_text(json.dumps(rows))
    assert _read(flickr30k.TASK, flickr)[0] == []
    (texts / "secret.jpg").write_bytes(b"")
    row = {"image_id": "../secret", "caption_str": "x"}
    (texts / "TextCaps_0.1_val.json").write_text(json.dumps({"data": [row]}))
    assert _read(textcaps.TASK, texts, "val")[0] == []


def test_shards_build_counts_what_is_left_out(
    flickr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = flickr / "flickr30k-images"
    elsewhere = shutil.move(pictures, tmp_path / "elsewhere")
    parser = argparse.ArgumentParser()
    command.configure(parser)
    arguments = ["build", "flickr30k", "--raw", str(flickr), "--images", str(elsewhere)]
    arguments += ["--out", str(tmp_path / "shards")]
    with pytest.raises(DataError, match="2 of 8 raw samples cannot be built"):
        command.run(parser.parse_args(arguments))
    assert command.run(parser.parse_args([*arguments, "--drop", "30%"])) == 0
    assert "1000108 (1000108.jpg)" in capsys.readouterr().out
    folder = ShardFolder.open(tmp_path / "shards" / "train")
    assert len(folder) == 6 and folder.read(0).images[0].extension == "jpg"
    assert folder.manifest.build_options == {"rows": "captions"}


# --- asking and scoring -------------------------------------------------------------------------


def test_each_caption_draws_one_of_the_ten_prompts_by_its_id() -> None:
    drawn = Counter(
        captions.zhou2024(Sample(f"{number}", answers=("x",))).turns[0].text
        for number in range(2000)
    )
    assert set(drawn) == set(captions.PROMPTS) and len(drawn) == 10
    assert min(drawn.values()) > 150
    sample = Sample("1000092-1", answers=("A  Dog.",))
    assert captions.zhou2024(sample) == captions.zhou2024(sample)
    assert captions.zhou2024(sample).target == "A  Dog."


def test_wang2024_cleans_its_target() -> None:
    caption = 'Two dogs, "Rex" & (Max): play;  run!\n' + "on " * 60
    sample = Sample("1", answers=(caption,))
    target = flickr30k.TASK.templates["wang2024"](sample).target
    assert target.startswith("two dogs, rex & max play run on on")
    assert len(target.split()) == 50
    prompts = {
        task.templates["wang2024"](sample).turns[0].text for task in (flickr30k.TASK, textcaps.TASK)
    }
    assert prompts == {"write a description for the photo", "a photo of"}


def _captioned(*answers: tuple[str, ...]) -> list[Sample]:
    return [Sample(str(number), answers=each) for number, each in enumerate(answers)]


SAMPLES = _captioned(
    ("A red dog runs.", "The dog is fast."),
    ("Two cats sleep.", "Cats on a bed."),
    ("A bus stops.",),
)


def _scores(template: str, said: list[str]) -> Mapping[str, float]:
    return flickr30k.TASK.score(SAMPLES, said, flickr30k.TASK.templates[template])[0]


def test_cider_counts_penn_words_and_cider_d_what_white_space_cuts() -> None:
    spelled = ["a red DOG runs", "two cats sleep!", "a bus stops"]
    exact = [sample.answers[0] for sample in SAMPLES]
    assert _scores("plain", spelled)["cider"] == pytest.approx(_scores("plain", exact)["cider"])
    assert _scores("plain", spelled)["cider_d"] < _scores("plain", exact)["cider_d"]
    # wang2024 compares cleaned captions with cleaned answers.
    clean = [captions.cleaned(one) for one in exact]
    assert _scores("wang2024", clean)["cider_d"] > _scores("plain", clean)["cider_d"]
    assert _scores("plain", exact)["rouge_l"] > _scores("plain", ["", "x", "y"])["rouge_l"] == 0


def test_a_template_of_the_run_file_is_scored_against_what_it_wants() -> None:
    template = own("Caption:", "It shows: {answer}", "generate")
    said = [f"It shows: {sample.answers[0]}" for sample in SAMPLES]
    wanted, each = flickr30k.TASK.score(SAMPLES, said, template)
    plain = flickr30k.TASK.score(SAMPLES, [sample.answers[0] for sample in SAMPLES], template)[0]
    assert wanted["cider"] > plain["cider"] > 0
    assert sum(each) / len(each) == pytest.approx(wanted["cider"])


# --- VL-RewardBench -----------------------------------------------------------------------------


def _rewards(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    file = tmp_path / "test-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def _row(number: int, **changes: object) -> dict[str, Any]:
    image = (GOLDEN / "mme" / "raw" / "OCR" / "0001.jpg").read_bytes()
    return {
        "id": f"q{number}",
        "query": f"Query {number}?",
        "response": ["good", "bad"],
        "human_ranking": [0, 1],
        "image": {"bytes": image, "path": None},
        **changes,
    }


def test_a_fifth_validates_by_seed(tmp_path: Path) -> None:
    raw = _rewards(tmp_path, [_row(number) for number in range(1250)])
    drawn = {}
    for seed in (0, 1):
        train, _ = _read(vl_rewardbench.TASK, raw, "train", split_seed=seed)
        val, _ = _read(vl_rewardbench.TASK, raw.parent, "val", split_seed=seed)
        assert (len(train), len(val)) == (1000, 250)
        assert len({sample.id for sample in train + val}) == 1250
        drawn[seed] = {sample.id for sample in val}
    assert 20 < len(drawn[0] & drawn[1]) < 90, "50 of 250 are expected in both"


def test_the_preferred_response_is_the_target(tmp_path: Path) -> None:
    rows = [
        _row(0),
        _row(1, human_ranking=[1, 0]),
        _row(2, human_ranking=[0, 0]),
        _row(3, image=None),
        _row(4, response=["one"]),
        _row(5, response=[" ", "bad"]),
        _row(0, query="Again?"),
    ]
    raw = _rewards(tmp_path, rows)
    found = [_read(vl_rewardbench.TASK, raw, split) for split in ("train", "val")]
    samples = {one.id: one for kept, _ in found for one in kept}
    assert {name: one.answers for name, one in samples.items()} == {
        "q0": ("good",),
        "q1": ("bad",),
        "q0-2": ("good",),
    }
    assert samples["q1"].meta == {"rejected": "good"}
    assert samples["q1"].images[0].extension == "jpg"
    reasons = {one.id: one.reason for _, left_out in found for one in left_out}
    assert set(reasons) == {"q2", "q3", "q4", "q5"}
    assert "prefers neither" in reasons["q2"] and "no picture" in reasons["q3"]


def test_files_that_are_no_such_thing_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no parquet file"):
        _read(vl_rewardbench.TASK, tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="no intact parquet file"):
        _read(vl_rewardbench.TASK, tmp_path)
    query = pyarrow.array([b"\xeeno text"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"query": query}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no intact parquet file.*invalid continuation byte"):
        _read(vl_rewardbench.TASK, tmp_path)
    (tmp_path / "a.parquet").unlink()
    whole = (GOLDEN / "vl_rewardbench" / "raw" / "test-00000-of-00001.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:1116] + b"\x10" + whole[1117:])
    with pytest.raises(DataError, match="0 of 12 rows can be read"):
        _read(vl_rewardbench.TASK, tmp_path)
    raw = _rewards(tmp_path, [{"question": "?"}] * 3)
    samples, dropped = _read(vl_rewardbench.TASK, raw)
    assert not samples and len(dropped) == 2, "a fifth of three is one"


def test_reward_scores_are_the_overlap_with_the_target() -> None:
    samples = [Sample("1", answers=("a red dog",)), Sample("2", answers=("two cats sleep",))]
    template = vl_rewardbench.TASK.templates["alghamdi2025"]
    metrics, each = vl_rewardbench.TASK.score(samples, ["A red dog.", "nothing"], template)
    assert each == [1.0, 0.0]
    assert metrics["rouge_l"] == 0.5 and metrics["bleu_1"] > 0
