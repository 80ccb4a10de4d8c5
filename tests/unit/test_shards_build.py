"""`mmtrain shards`: the command, and a writer that leaves all or nothing."""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from data_shards import command
from data_shards.build import build_split
from data_shards.publish import published
from data_shards.reading import Recipe
from data_shards.writer import ShardWriter
from mmtrain.data.codec import encode_sample
from mmtrain.data.shards import ShardFolder
from mmtrain.errors import ConfigError, DataError, MmtrainError
from mmtrain.tasks.datasets import digits, scienceqa
from mmtrain.tasks.interface import ImageBytes, Sample

# Three samples without images, one after the other.
PINNED_SHA256 = "3863dcdda35a5a09d87fc6d82889adc75e37b1c3776683d392ae7150b594d5ea"
RAW = Path(__file__).parents[1] / "golden" / "tasks" / "scienceqa" / "raw"


def _shards(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RAW, tmp_path / "raw"))


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- build --------------------------------------------------------------------------------------


def test_builds_every_split_and_verifies(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert _shards("build", "scienceqa", "--raw", raw, "--out", out, "--samples-per-shard", 2) == 0
    assert sorted(path.name for path in out.iterdir()) == ["test", "train", "val"]
    train = ShardFolder.open(out / "train")
    assert [train.read(i).id for i in range(len(train))] == ["2", "1", "4"]
    assert [shard.samples for shard in train.manifest.shards] == [2, 1]
    assert train.manifest.build_options == {"images": "all"}
    assert "3 samples, 2 shard(s)" in capsys.readouterr().out
    assert _shards("verify", out) == 0
    assert capsys.readouterr().out.count("ok") == 3


def test_same_input_gives_the_same_bytes(raw: Path, tmp_path: Path) -> None:
    arguments = ("build", "scienceqa", "--raw", raw, "--split", "train")
    for out in (tmp_path / "a", tmp_path / "b"):
        _shards(*arguments, "--out", out)
        os.utime(raw / "problems.json")  # another time stamp, the same content
    first, second = _bytes(tmp_path / "a" / "train"), _bytes(tmp_path / "b" / "train")
    assert first.pop("source.json") != second.pop("source.json")
    assert first == second


def test_identical_folder_is_reused_and_a_different_one_is_not(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ("build", "scienceqa", "--raw", raw, "--out", tmp_path / "o", "--split", "train")
    _shards(*arguments)
    manifest = tmp_path / "o" / "train" / "manifest.json"
    written = manifest.stat().st_ino
    capsys.readouterr()
    _shards(*arguments)
    assert "reused" in capsys.readouterr().out
    assert manifest.stat().st_ino == written
    for changed in (("--set", "images=only"), ("--limit", 2), ("--seed", 1)):
        with pytest.raises(DataError, match="other files or options"):
            _shards(*arguments, *changed)
    (raw / "problems.json").write_text((raw / "problems.json").read_text() + "\n")
    with pytest.raises(DataError, match="--overwrite"):
        _shards(*arguments)
    _shards(*arguments, "--overwrite")
    assert "written" in capsys.readouterr().out
    assert manifest.stat().st_ino != written


def test_damaged_folder_is_not_reused(raw: Path, tmp_path: Path) -> None:
    arguments = ("build", "scienceqa", "--raw", raw, "--out", tmp_path, "--split", "train")
    _shards(*arguments)
    (tmp_path / "train" / "shard-000000.tar").write_bytes(b"")
    with pytest.raises(DataError, match="--overwrite"):
        _shards(*arguments)
    _shards(*arguments, "--overwrite")
    assert _shards("verify", tmp_path / "train") == 0


def test_limit_draws_by_seed_and_keeps_the_order(tmp_path: Path) -> None:
    drawn = {}
    for seed in (0, 1):
        out = tmp_path / str(seed)
        _shards("build", "digits", "--out", out, "--split", "val", "--limit", 20, "--seed", seed)
        folder = ShardFolder.open(out / "val")
        assert (folder.manifest.limit, folder.manifest.seed) == (20, seed)
        drawn[seed] = [folder.read(i).id for i in range(len(folder))]
    everything = [sample.id for sample in digits.TASK.read(None, "val", digits.DigitsOptions())]
    assert len(drawn[0]) == 20 and drawn[0] != drawn[1]
    assert drawn[0] == [sample_id for sample_id in everything if sample_id in drawn[0]]


def test_wrong_options_are_reported_together(tmp_path: Path) -> None:
    settings = [part for text in ("domian=x", "domain=y", "z") for part in ("--set", text)]
    with pytest.raises(ConfigError) as caught:
        _shards("build", "digits", "--out", tmp_path, *settings)
    assert len(caught.value.problems) == 3
    assert "did you mean 'domain'" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["build", "digit", "--out", "o"], "did you mean 'digits'"),
        (["build", "digits", "--out", "o", "--split", "trian"], "did you mean 'train'"),
        (["build", "digits", "--out", "o", "--raw", "."], "leave --raw out"),
        (["build", "scienceqa", "--out", "o"], "as --raw"),
        (["build", "scienceqa", "--out", "o", "--raw", "nowhere"], "no --raw"),
        (["build", "scienceqa", "--out", "o", "--raw", "."], "problems.json"),
        (["verify", "nowhere"], "no folder"),
        (["verify", "."], "holds no shards"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MmtrainError, match=fault):
        _shards(*arguments)


def test_missing_images_are_named_before_anything_is_written(raw: Path, tmp_path: Path) -> None:
    (raw / "images" / "train" / "4" / "image.png").unlink()
    out = tmp_path / "out"
    with pytest.raises(DataError, match="1 of 2 images are missing, first .*4/image.png"):
        _shards("build", "scienceqa", "--raw", raw, "--out", out, "--split", "train")
    assert list(out.iterdir()) == []


def test_truncated_image_stops_the_build_with_its_name(raw: Path, tmp_path: Path) -> None:
    image = raw / "images" / "train" / "4" / "image.png"
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(DataError, match="sample '4'"):
        _shards("build", "scienceqa", "--raw", raw, "--out", tmp_path / "o", "--split", "train")
    assert list((tmp_path / "o").iterdir()) == []


def test_split_without_samples(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample for split 'test'"):
        _shards(
            *("build", "scienceqa", "--raw", raw, "--out", tmp_path / "o"),
            *("--split", "test", "--set", "images=only"),
        )


def test_two_builds_do_not_share_a_folder(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another build"):
            _shards("build", "digits", "--out", tmp_path)
    finally:
        os.close(descriptor)


# --- verify -------------------------------------------------------------------------------------


def test_verify_fails_with_every_problem(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    _shards("build", "scienceqa", "--raw", raw, "--out", tmp_path / "o", "--samples-per-shard", 1)
    train = tmp_path / "o" / "train"
    (train / "shard-000000.tar").unlink()
    (train / "shard-000002.tar").write_bytes(b"<html>")
    (tmp_path / "o" / "val" / "manifest.json").unlink()
    assert _shards("verify", tmp_path / "o") != 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if not line.startswith("error: ")] == []
    for name in ("shard-000000.tar", "shard-000002.tar", "manifest.json"):
        assert sum(name in line for line in lines) == 1
    assert len(lines) == 3


# --- writer -------------------------------------------------------------------------------------


def test_unsound_samples_are_refused_with_their_names(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, samples_per_shard=2)
    one = Sample("a", answers=("yes",))
    for sample in (
        one,
        one,
        replace(one, id="b", choices=("no",)),
        replace(one, id="c", answers=()),
    ):
        writer.add(sample)
    writer.add(replace(one, id="d", question=None))  # type: ignore[arg-type]
    with pytest.raises(DataError) as caught:
        writer.finish("digits", "train", 0, None, {})
    assert "4 of 5 samples cannot be trained on" in str(caught.value)
    assert str(tmp_path) not in str(caught.value), "a folder that is gone"
    for fault in (
        "two samples have the id 'a', the first in shard-000000.tar",
        "'shard-000001.tar': sample 'b': its answer 'yes' is none of its 1 choices",
        "sample 'c' has no answer",
        "'question' is null, not a text",
    ):
        assert fault in str(caught.value)
    assert not (tmp_path / "manifest.json").exists()


def test_forbidden_image_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'000000000.0.gif' is not allowed"):
        ShardWriter(tmp_path).add(Sample("a", images=(ImageBytes("gif", b"GIF89a"),)))


def test_webdataset_writes_and_the_bytes_tell_no_place_or_time(tmp_path: Path) -> None:
    import webdataset

    samples = [Sample(str(number), question="q", answers=("a",)) for number in range(3)]
    writer = ShardWriter(tmp_path)
    for sample in samples:
        writer.add(sample)
    manifest = writer.finish("digits", "train", 0, None, {})
    data = (tmp_path / "shard-000000.tar").read_bytes()
    # As webdataset's own writer makes it, and pinned: no version of it may change our data.
    file = io.BytesIO()
    with webdataset.TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar:
        for number, sample in enumerate(samples):
            (member,) = encode_sample(sample, f"{number:09d}")
            tar.write({"__key__": f"{number:09d}", "json": member[1]})
    assert data == file.getvalue()
    assert manifest.shards[0].sha256 == sha256(data).hexdigest() == PINNED_SHA256


def test_interrupted_build_leaves_the_old_folder(tmp_path: Path) -> None:
    final = tmp_path / "train"
    with published(final) as partial:
        (partial / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with published(final) as partial:
            (partial / "file").write_text("new")
            raise KeyboardInterrupt
    assert (final / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_leftover_of_a_killed_build_is_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".train.partial"
    leftover.mkdir()
    (leftover / "shard-000000.tar").write_text("half")
    with published(tmp_path / "train") as partial:
        assert list(partial.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_no_space_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No space left.*free space"):
        with published(tmp_path / "train"):
            with open("/dev/full", "w") as full:  # the kernel's own full disk
                full.write("x" * 10_000)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_met_once(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: nothing but our line on the terminal."""
    program = (
        "import resource, signal, sys\n"
        "from mmtrain.__main__ import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        f"sys.exit(main(['shards', 'build', 'digits', '--out', {str(tmp_path)!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == DataError.exit_code
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: cannot write") and "File too large; free space" in line
    assert list(tmp_path.iterdir()) == []


def test_raw_file_that_vanishes_is_blamed_on_the_raw_folder(raw: Path, tmp_path: Path) -> None:
    recipe = Recipe("scienceqa", "train", raw, scienceqa.ScienceQAOptions())

    def vanish(written: int, looked_at: int, expected: int) -> None:
        # After the check that all images are there, before sample "4" is read.
        (raw / "images" / "train" / "4" / "image.png").unlink(missing_ok=True)

    with pytest.raises(DataError, match="cannot read .*image.png.*--raw"):
        build_split(recipe, tmp_path / "o", progress=vanish)
    assert not (tmp_path / "o").exists()


def test_source_file_names_the_raw_files(raw: Path, tmp_path: Path) -> None:
    _shards("build", "scienceqa", "--raw", raw, "--out", tmp_path / "o", "--split", "val")
    source = json.loads((tmp_path / "o" / "val" / "source.json").read_text())
    assert source.keys() == {*("raw_files", "reader", "samples_per_shard", "droppable", "left_out")}
    assert str(tmp_path) not in json.dumps(source), "no path of this machine in the data"
