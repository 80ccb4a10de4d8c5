"""Reading shards: every sample by number, and no fault passes in silence."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_shards.writer import ShardWriter
from mmtrain.data import shards as shards_module
from mmtrain.data.manifest import INDEX_DTYPE, Manifest
from mmtrain.data.shards import ShardFolder
from mmtrain.data.tar import unpack_members
from mmtrain.data.verify import verify_folder
from mmtrain.errors import DataError
from mmtrain.tasks.interface import ImageBytes, Sample
from tests.fuzz import examples
from tests.tar_bytes import pack

NUM_SAMPLES = 20
PER_SHARD = 10
SHARD = "shard-000001.tar"  # the one that the faults hit: not the first


def _image(number: int) -> ImageBytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 2 * number, 0)).save(file, "PNG")
    return ImageBytes("png", file.getvalue())


def _sample(number: int) -> Sample:
    return Sample(
        id=f"id/{number}.x",
        images=() if number == 3 else (_image(number), _image(number + 100)),
        question="ä question" + "?" * number,
        answers=("yes",),
        meta={"number": number},
    )


SAMPLES = [_sample(number) for number in range(NUM_SAMPLES)]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("healthy")
    writer = ShardWriter(folder, PER_SHARD)
    for sample in SAMPLES:
        writer.add(sample)
    writer.finish("digits", "train", 5, None, {"domain": "upright"})
    return folder


@pytest.fixture
def folder(healthy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(healthy, tmp_path / "shards"))


def _read_all(folder: Path) -> list[Sample]:
    opened = ShardFolder.open(folder)
    return [opened.read(i) for i in range(len(opened))]


# --- healthy ------------------------------------------------------------------------------------


def test_reads_what_was_written(healthy: Path) -> None:
    opened = ShardFolder.open(healthy)
    assert len(opened) == NUM_SAMPLES
    assert [opened.read(i) for i in reversed(range(NUM_SAMPLES))] == SAMPLES[::-1]
    assert verify_folder(healthy) == []
    assert opened.digest == sha256((healthy / "manifest.json").read_bytes()).hexdigest()
    assert opened.manifest.task == "digits" and opened.manifest.seed == 5


def test_index_tells_images_and_text_length_without_reading(healthy: Path) -> None:
    opened = ShardFolder.open(healthy)
    digests = [digest.tobytes() for digest in opened.index["image_digest"]]
    assert digests[3] == bytes(16) and len(set(digests)) == NUM_SAMPLES
    assert opened.index["characters"].tolist() == [
        len(sample.question) + len("yes") for sample in SAMPLES
    ]
    with pytest.raises(ValueError, match="read-only"):
        opened.index["size"][0] = 1


def test_index_out_of_range(healthy: Path) -> None:
    for number in (-1, NUM_SAMPLES):
        with pytest.raises(IndexError):
            ShardFolder.open(healthy).read(number)


def test_threads_share_one_folder(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (0, 1, 256):  # also when no or few files may stay open
        monkeypatch.setattr(shards_module, "_MAX_OPEN_SHARDS", limit)
        opened = ShardFolder.open(healthy)
        numbers = [i % NUM_SAMPLES for i in range(400)]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(opened.read, numbers)) == [SAMPLES[i] for i in numbers]


def test_progress_counts_all_bytes(healthy: Path) -> None:
    seen: list[tuple[int, int]] = []
    opened = ShardFolder.open(healthy)
    assert verify_folder(healthy, lambda done, total: seen.append((done, total))) == []
    assert seen == sorted(seen) and len(seen) >= NUM_SAMPLES, "it moves with every sample"
    assert seen[-1] == (opened.manifest.num_bytes, opened.manifest.num_bytes)


def test_stock_webdataset_and_tar_read_it(healthy: Path) -> None:
    import webdataset

    urls = sorted(str(path) for path in healthy.glob("*.tar"))
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [item["__key__"] for item in found] == [f"{i:09d}" for i in range(NUM_SAMPLES)]
    for sample, item in zip(SAMPLES, found, strict=True):
        assert item["json"]["id"] == sample.id
        assert len([name for name in item if name.endswith(".png")]) == len(sample.images)
    assert found[7]["0.png"].getpixel((0, 0)) == (7, 14, 0)
    with tarfile.open(urls[0]) as tar:
        assert len(tar.getmembers()) == 3 * PER_SHARD - 2


# --- faults in a shard --------------------------------------------------------------------------


def _record_start(folder: Path, sample: int) -> int:
    return int(ShardFolder.open(folder).index["offset"][sample])


def _cut(at: Callable[[Path], int]) -> Callable[[Path], None]:
    def fault(folder: Path) -> None:
        data = (folder / SHARD).read_bytes()
        (folder / SHARD).write_bytes(data[: at(folder)])

    return fault


def _patch(at: Callable[[Path], int], new: bytes) -> Callable[[Path], None]:
    def fault(folder: Path) -> None:
        position = at(folder)
        data = bytearray((folder / SHARD).read_bytes())
        assert data[position : position + len(new)] != new
        data[position : position + len(new)] = new
        (folder / SHARD).write_bytes(data)

    return fault


def _replace(content: bytes) -> Callable[[Path], None]:
    def fault(folder: Path) -> None:
        (folder / SHARD).write_bytes(content)

    return fault


def _interleave(folder: Path) -> None:
    """a.json b.json a.0.png b.0.png …: the same members and size, in another order."""
    rows = ShardFolder.open(folder).index[PER_SHARD:]
    end = int(rows["offset"][-1] + rows["size"][-1])
    data = (folder / SHARD).read_bytes()
    members = sorted(unpack_members(data[:end]), key=lambda member: member[0].partition(".")[2])
    (folder / SHARD).write_bytes(pack(members) + data[end:])


def _middle(folder: Path) -> int:
    return _record_start(folder, 15)


FAULTS: dict[str, Callable[[Path], None]] = {
    "cut at a member boundary": _cut(_middle),
    "cut inside a header": _cut(lambda folder: _middle(folder) + 200),
    "cut inside a payload": _cut(lambda folder: _middle(folder) + 512 + 30),
    "cut at the end mark": _cut(lambda folder: (folder / SHARD).stat().st_size - 1024),
    "one corrupted header byte": _patch(lambda folder: _middle(folder) + 3, b"\xff"),
    "a zeroed header": _patch(_middle, bytes(512)),
    "interleaved members": _interleave,
    "payload bytes flipped": _patch(lambda folder: _middle(folder) + 512 + 30, b"#!"),
    "empty file": _replace(b""),
    "HTML error page": _replace(b"<!DOCTYPE html><title>503</title>"),
    "missing shard": lambda folder: (folder / SHARD).unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found_by_verify(folder: Path, fault: str) -> None:
    FAULTS[fault](folder)
    problems = verify_folder(folder)
    assert len(problems) == 1, "one line for one damaged file"
    assert SHARD in problems[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found_by_reading(folder: Path, fault: str) -> None:
    FAULTS[fault](folder)
    with pytest.raises(DataError, match=SHARD):
        _read_all(folder)


@pytest.mark.parametrize("fault", ["one corrupted header byte", "payload bytes flipped"])
def test_undamaged_samples_stay_readable(folder: Path, fault: str) -> None:
    FAULTS[fault](folder)
    opened = ShardFolder.open(folder)
    intact = [i for i in range(NUM_SAMPLES) if i != 15]
    assert [opened.read(i) for i in intact] == [SAMPLES[i] for i in intact]
    with pytest.raises(DataError, match="sample 15 at byte .*checksum"):
        opened.read(15)
    assert "1 of 10 samples are damaged (15)" in verify_folder(folder)[0]


@pytest.mark.parametrize(
    ("fault", "diagnosis"),
    [
        ("cut at a member boundary", "5 samples instead of 10"),
        ("cut inside a payload", "is cut off"),
        ("one corrupted header byte", "no valid tar header"),
        ("a zeroed header", "a zeroed header"),
        ("interleaved members", "interleaved"),
        ("empty file", "0 bytes instead of"),
    ],
)
def test_verify_says_what_is_wrong(folder: Path, fault: str, diagnosis: str) -> None:
    FAULTS[fault](folder)
    (problem,) = verify_folder(folder)
    assert diagnosis in problem


def test_damage_after_opening_is_found_when_read(folder: Path) -> None:
    opened = ShardFolder.open(folder)
    FAULTS["payload bytes flipped"](folder)
    with pytest.raises(DataError, match="sample 15"):
        opened.read(15)
    with (folder / SHARD).open("r+b") as file:
        file.truncate(0)
    with pytest.raises(DataError, match="sample 19"):
        opened.read(19)


def _rewrite_manifest(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content.update(changes)
    (folder / "manifest.json").write_text(json.dumps(content))


def _swap_first_two(folder: Path) -> None:
    """Whole samples in another order: only the index tells."""
    sizes = [int(size) for size in ShardFolder.open(folder).index["size"][PER_SHARD:]]
    data = (folder / SHARD).read_bytes()
    both = sizes[0] + sizes[1]
    (folder / SHARD).write_bytes(data[sizes[0] : both] + data[: sizes[0]] + data[both:])


@pytest.mark.parametrize(
    ("fault", "diagnosis"),
    [(_interleave, "interleaved"), (_swap_first_two, "is not what the index says")],
)
def test_disorder_is_found_even_when_the_manifest_agrees(
    folder: Path, fault: Callable[[Path], None], diagnosis: str
) -> None:
    fault(folder)
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[1]["sha256"] = sha256((folder / SHARD).read_bytes()).hexdigest()
    _rewrite_manifest(folder, shards=shards)
    problems = verify_folder(folder)
    assert problems and all(SHARD in problem and diagnosis in problem for problem in problems)
    with pytest.raises(DataError, match="checksum"):
        _read_all(folder)


@settings(max_examples=examples(60), deadline=None)
@given(st.data())
def test_any_changed_byte_is_found(healthy: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["manifest.json", "index.npy", SHARD]))
    original = (healthy / name).read_bytes()
    damaged = bytearray(original)
    place = data.draw(st.integers(0, len(damaged) - 1))
    damaged[place] ^= data.draw(st.integers(1, 255))
    digest = ShardFolder.open(healthy).digest
    try:
        (healthy / name).write_bytes(damaged)
        if name != "manifest.json":
            assert any(name in problem for problem in verify_folder(healthy))
            return
        # The manifest is what pins the rest: a change shows in its digest at the latest.
        try:
            assert ShardFolder.open(healthy).digest != digest
        except DataError:
            pass
    finally:
        (healthy / name).write_bytes(original)


# --- faults beside the shards -------------------------------------------------------------------


def _open_and_verify(folder: Path, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        ShardFolder.open(folder)
    assert caught.value.remedy, "a remedy is always given"
    assert expected in " ".join(verify_folder(folder))


def test_missing_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    _open_and_verify(folder, "no readable manifest.json")


def test_missing_folder(tmp_path: Path) -> None:
    _open_and_verify(tmp_path / "none", "no shard folder")


def test_surplus_shard(folder: Path) -> None:
    shutil.copy(folder / SHARD, folder / "shard-000002.tar")
    _open_and_verify(folder, "not in the manifest")


def test_missing_index(folder: Path) -> None:
    (folder / "index.npy").unlink()
    _open_and_verify(folder, "index.npy")


def test_index_of_another_folder(folder: Path) -> None:
    np.save(folder / "index.npy", np.zeros(3, INDEX_DTYPE))
    _open_and_verify(folder, "not the one the manifest names")


@pytest.mark.parametrize(
    ("field", "value"), [("offset", 2**64 - 512), ("size", 2**63), ("shard", 9), ("offset", 7)]
)
def test_index_that_points_outside(folder: Path, field: str, value: int) -> None:
    index = np.load(folder / "index.npy", allow_pickle=False)
    index[field][4] = value
    np.save(folder / "index.npy", index)
    digest = sha256((folder / "index.npy").read_bytes()).hexdigest()
    _rewrite_manifest(folder, index_sha256=digest)
    _open_and_verify(folder, "does not fit the manifest")


def test_pickled_index_is_never_loaded(folder: Path) -> None:
    np.save(folder / "index.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    digest = sha256((folder / "index.npy").read_bytes()).hexdigest()
    _rewrite_manifest(folder, index_sha256=digest)
    _open_and_verify(folder, "index.npy' is damaged")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format_version": 99}, "format_version 99"),
        ({"samples": 19}, "contradicts itself"),
        ({"samples": "many"}, "samples"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_wrong_manifest(folder: Path, changes: dict[str, object], expected: str) -> None:
    _rewrite_manifest(folder, **changes)
    _open_and_verify(folder, expected)


def test_manifest_cannot_name_files_elsewhere(folder: Path) -> None:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[1]["name"] = "../shard-000001.tar"
    _rewrite_manifest(folder, shards=shards)
    _open_and_verify(folder, "name")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_manifest_that_is_no_manifest(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    _open_and_verify(folder, "manifest.json")


def test_manifest_text_is_stable(healthy: Path) -> None:
    text = (healthy / "manifest.json").read_text(encoding="utf-8")
    assert Manifest.model_validate_json(text).to_json() == text


def test_records_hold_whole_members(healthy: Path) -> None:
    opened = ShardFolder.open(healthy)
    row = opened.index[12]
    data = (healthy / SHARD).read_bytes()
    record = data[int(row["offset"]) : int(row["offset"]) + int(row["size"])]
    names = [name for name, _ in unpack_members(record)]
    assert names == ["000000012.0.png", "000000012.1.png", "000000012.json"]
