"""`mmtrain shards index`: tars of other programs train here, or their faults are named."""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from data_shards import command
from mmtrain.data.shards import ShardFolder
from mmtrain.data.tar import unpack_members
from mmtrain.data.verify import verify_folder
from mmtrain.errors import DataError
from mmtrain.tasks.interface import Sample
from tests.tar_bytes import END_MARK, pack

PAGE = Path(__file__).parents[2] / "docs" / "shards.md"
CHOICES = ["red", "green"]


def _index(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args(["index", *map(str, arguments)]))


def _jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "JPEG")
    return file.getvalue()


def _record(number: int, **changes: object) -> dict[str, object]:
    record = {"id": f"q{number}", "question": "Which colour?", "answers": ["red"]}
    return record | {"choices": CHOICES, "url": 5} | changes


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """Two shards as webdataset writes them, named as others name theirs; every third is text."""
    folder = tmp_path / "train"
    folder.mkdir()
    pattern = f"{folder}/train-%04d-of-0002.tar"
    with webdataset.ShardWriter(pattern, maxcount=5, verbose=0) as writer:
        for number in range(8):
            image = {"jpg": _jpeg()} if number % 3 else {}
            writer.write({"__key__": f"k{number:04d}", "json": _record(number), **image})
    return folder


def _samples(folder: Path) -> list[Sample]:
    opened = ShardFolder.open(folder, "scienceqa")
    return [opened.read(number) for number in range(len(opened))]


def test_a_stock_folder_trains(stock: Path, capsys: pytest.CaptureFixture) -> None:
    before = {path.name: path.read_bytes() for path in stock.iterdir()}
    assert _index(stock, "--task", "scienceqa") == 0
    assert "8 samples, 2 shard(s)" in capsys.readouterr().out
    samples = _samples(stock)
    assert [sample.id for sample in samples] == [f"q{number}" for number in range(8)]
    assert [len(sample.images) for sample in samples] == [0, 1, 1, 0, 1, 1, 0, 1]
    assert verify_folder(stock) == []
    assert all((stock / name).read_bytes() == data for name, data in before.items())
    names = [shard.name for shard in ShardFolder.open(stock).manifest.shards]
    assert names == sorted(before), "the names that they had"
    manifest = (stock / "manifest.json").read_bytes()
    with pytest.raises(DataError, match="has a manifest.*--overwrite"):
        _index(stock, "--task", "scienceqa")
    assert _index(stock, "--task", "digits", "--split", "test", "--overwrite") == 0
    assert _index(stock, "--task", "scienceqa", "--overwrite") == 0
    assert (stock / "manifest.json").read_bytes() == manifest, "the same tars, the same manifest"


def test_tars_of_python_and_gnu_tar_train(tmp_path: Path) -> None:
    """Folders, fractions of seconds and names that need an extended header."""
    raw, folder = tmp_path / "raw", tmp_path / "val"
    raw.mkdir()
    folder.mkdir()
    for name in ("one", "zwölf", "long" * 40):
        (raw / f"{name}.json").write_text(json.dumps(_record(0, id=name)))
        (raw / f"{name}.0.JPG").write_bytes(_jpeg())
    with tarfile.open(folder / "python.tar", "w") as tar:
        tar.add(raw, "raw", filter=lambda info: info if info.isdir() else None, recursive=False)
        for path in sorted(raw.iterdir()):
            tar.add(path, f"raw/{path.name}")
    assert b"mtime=" in (folder / "python.tar").read_bytes()
    for path in raw.iterdir():
        (
            path.write_text(json.dumps(_record(1, id=f"{path.stem} 2")))
            if "json" in path.name
            else None
        )
    options = ["--format=ustar", "--exclude=long*", "--sort=name"]
    subprocess.run(
        ["tar", *options, "-cf", folder / "tar.tar", "-C", tmp_path, "./raw"], check=True
    )
    assert _index(folder, "--task", "scienceqa") == 0
    samples = _samples(folder)
    assert {sample.id for sample in samples} >= {"one", "zwölf", "long" * 40, "one 2", "zwölf 2"}
    assert all(len(sample.images) == 1 for sample in samples)
    found = list(webdataset.WebDataset(str(folder / "python.tar"), shardshuffle=False))
    assert [item["__key__"] for item in found] == [
        f"raw/{n}" for n in ("long" * 40, "one", "zwölf")
    ]


def test_every_fault_is_named_at_once(stock: Path, capsys: pytest.CaptureFixture) -> None:
    faults = {
        "a": {"json": b"{"},
        "b": {"json": json.dumps(_record(1)).encode()},  # the id of k0001
        "c": {"json": json.dumps(_record(9, answers=["blue"])).encode()},
        "d": {"jpg": _jpeg()},
        "e": {"json": json.dumps(_record(10)).encode(), "jpg": _jpeg()[:99]},
        "f": {"json": json.dumps(_record(11)).encode(), "cls": b"1"},
        "g": {"json": json.dumps(_record(12, choices=["red", *"abcde"])).encode()},
    }
    with webdataset.TarWriter(str(stock / "z.tar"), encoder=False) as writer:
        for key, members in faults.items():
            writer.write({"__key__": key, **members})
    assert _index(stock, "--task", "scienceqa") != 0
    lines = capsys.readouterr().err.splitlines()
    expected = (
        "'a.json' is not valid JSON",
        "two samples have the id 'q1', the first in train-0000",
        "'blue' is none of its 2 choices",
        "'d' has no JSON member; give it a d.json",
        "'q10': an image of 99 bytes",
        "'f.cls' is not allowed in a shard; leave it out or rename it",
        "'q12' does not fit the task's template",
    )
    assert len(lines) == len(expected)
    for line, fault in zip(lines, expected, strict=True):
        assert line.startswith("error: ") and "z.tar'" in line and fault in line
    assert not (stock / "manifest.json").exists()


def _interleaved() -> bytes:
    record = json.dumps(_record(0)).encode()
    names = ("a.json", "b.json", "a.jpg", "b.jpg")
    return pack([(name, record if "json" in name else _jpeg()) for name in names]) + END_MARK


def _special(kind: bytes) -> bytes:
    info = tarfile.TarInfo("a.json")
    info.type, info.linkname = kind, "/etc/passwd"
    return info.tobuf(tarfile.USTAR_FORMAT) + END_MARK


def _extended(content: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(content)
    head = info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)
    return head + pack([("a.json", json.dumps(_record(0)).encode())]) + END_MARK


FRAMINGS = {
    "interleaved": (_interleaved(), "interleaved; put those of one key side by side"),
    "symbolic link": (_special(tarfile.SYMTYPE), "not a regular file; write the shard with"),
    "hard link": (_special(tarfile.LNKTYPE), "not a regular file"),
    "device": (_special(tarfile.CHRTYPE), "not a regular file"),
    "GNU long name": (_special(tarfile.GNUTYPE_LONGNAME), "not a regular file"),
    "global header": (_special(tarfile.XGLTYPE), "not a regular file"),
    "no samples": (END_MARK, "holds no samples; remove it"),
    "no tar": (b"<html>", "no valid tar header"),
    "no end mark": (pack([("a.json", b"{}")]), "no end mark"),
    "size override": (_extended(b"13 size=9999\n"), "extended header with b'size'"),
    "sparse": (_extended(b"22 GNU.sparse.major=1\n"), "extended header with b'GNU.sparse"),
    "broken extension": (_extended(b"99 path=a"), "extended header that cannot be read"),
    "endless extension": (_extended(b"0 path=a\n"), "extended header that cannot be read"),
}


@pytest.mark.parametrize("framing", FRAMINGS)
def test_what_is_no_plain_tar_is_refused(
    stock: Path, framing: str, capsys: pytest.CaptureFixture
) -> None:
    content, fault = FRAMINGS[framing]
    (stock / "z.tar").write_bytes(content)
    assert _index(stock, "--task", "scienceqa") != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "z.tar'" in line and fault in line


def test_an_extended_header_gives_the_name() -> None:
    data = _extended(b"15 path=b.json\n")[: -len(END_MARK)]
    assert [name for name, _ in unpack_members(data)] == ["b.json"]


def test_wrong_folders_and_splits(
    stock: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(DataError, match="holds no .tar"):
        _index(tmp_path, "--task", "scienceqa")
    with pytest.raises(DataError, match="holds no .tar"):
        _index(tmp_path / "nowhere", "--task", "scienceqa")
    with pytest.raises(DataError, match="no split 'dev'; give --split: train, val, test"):
        _index(stock, "--task", "scienceqa", "--split", "dev")
    for name in ("pipe.tar", "line\nbreak.tar"):
        (stock / name).symlink_to("/dev/zero")
    (stock / "gone.tar").symlink_to(stock / "nowhere")
    assert _index(stock, "--task", "scienceqa") != 0
    problems = capfd.readouterr().err
    assert "pipe.tar' is not readable (it is no regular file" in problems
    assert "gone.tar' is not readable (No such file" in problems
    assert "line\\nbreak.tar' has signs" in problems


def test_the_page_does_what_it_says(tmp_path: Path) -> None:
    """The example of docs/shards.md, as a reader would type it."""
    blocks = re.findall(r"^```(python|console)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert [language for language, _ in blocks] == ["python", "console"]
    for language, text in blocks:
        lines = [line[2:].split() for line in text.splitlines() if line.startswith("$ ")]
        for words in lines if language == "console" else [["-c", text]]:
            arguments = ["-m", *words] if language == "console" else words
            result = subprocess.run(
                [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True
            )
            assert result.returncode == 0, f"{words}\n{result.stdout}{result.stderr}"
    assert len(_samples(tmp_path / "colours" / "train")) == 100
