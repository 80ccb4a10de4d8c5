"""`shards verify` looks as training does: whatever one refuses, the other refuses too."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_shards.writer import ShardWriter
from mmtrain import plugins
from mmtrain.data.codec import encode_sample
from mmtrain.data.shards import ShardFolder
from mmtrain.data.source import Source
from mmtrain.data.tar import Member, unpack_members
from mmtrain.data.verify import verify_folder
from mmtrain.errors import DataError
from mmtrain.models.interface import Example
from mmtrain.tasks.interface import ImageBytes, Sample
from tests.fuzz import examples
from tests.tar_bytes import END_MARK, pack

NUM_SAMPLES, BAD = 30, 7
KEY = f"{BAD:09d}"
SHARD = "shard-000000.tar"


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


IMAGE = _png(Image.effect_noise((24, 24), 90))


def _sample(number: int) -> Sample:
    return Sample(
        id=f"id-{number}",
        images=(ImageBytes("png", IMAGE),),
        question="Which one?",
        answers=("yes",),
        choices=("yes", "no"),
    )


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("healthy")
    writer = ShardWriter(folder)
    for number in range(NUM_SAMPLES):
        writer.add(_sample(number))
    writer.finish("scienceqa", "train", 0, None, {})
    return folder


@pytest.fixture
def folder(healthy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(healthy, tmp_path / "shards"))


def _pin(folder: Path, index: np.ndarray | bytes, **changes: Any) -> None:
    """Write an index, and a manifest that vouches for whatever lies in the folder."""
    if isinstance(index, bytes):
        (folder / "index.npy").write_bytes(index)
    else:
        np.save(folder / "index.npy", index)
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / SHARD).read_bytes()
    manifest["shards"][0] |= {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    manifest["index_sha256"] = sha256((folder / "index.npy").read_bytes()).hexdigest()
    manifest |= changes
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _replace(folder: Path, numbers: Sequence[int], members: Callable[[int], list[Member]]) -> None:
    """Other members for some samples; nothing but their content tells."""
    index = np.load(folder / "index.npy")
    data = (folder / SHARD).read_bytes()
    records = [data[int(row["offset"]) : int(row["offset"] + row["size"])] for row in index]
    for number in numbers:
        records[number] = pack(members(number))
        digest = sha256(len(records[number]).to_bytes(8, "little") + records[number]).digest()
        index["record_digest"][number] = np.frombuffer(digest[:16], dtype=np.uint8)
    sizes = [len(record) for record in records]
    index["size"], index["offset"] = sizes, np.cumsum([0, *sizes[:-1]])
    (folder / SHARD).write_bytes(b"".join(records) + END_MARK)
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    shards[0]["members"] = sum(len(unpack_members(record)) for record in records)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    _pin(folder, index)


def _train(folder: Path, template: str = "zhou2024") -> None:
    """Every sample as a run reads it, up to the family."""

    def example(sample_id: str, rendered: object, images: Sequence[Any]) -> Example:
        return Example(sample_id, 0, [1], [1])

    encoder: Any = SimpleNamespace(example=example)
    found = plugins.load("task", "scienceqa").templates[template]
    source = Source(ShardFolder.open(folder, "scienceqa"), found, encoder)
    for number in range(len(source)):
        source.example(number)


def _bomb() -> bytes:
    """A PNG of a few bytes that claims 169 million pixels."""
    header = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 0, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")):
        parts += [struct.pack(">I", len(body)), name, body]
        parts += [struct.pack(">I", zlib.crc32(name + body))]
    return b"".join(parts)


def _json(**changes: Any) -> Member:
    record = {"id": f"id-{BAD}", "question": "Which?", "answers": ["yes"], "choices": ["yes", "no"]}
    return f"{KEY}.json", json.dumps(record | changes).encode()


GOOD = (f"{KEY}.0.png", IMAGE)
FAULTS: dict[str, tuple[list[Member], str]] = {
    "library": ([GOOD, _json(), (f"{KEY}.pyd", b"MZ")], f"{KEY}.pyd' is not allowed"),
    "pickle": ([GOOD, _json(), (f"{KEY}.pkl", b"\x80")], f"{KEY}.pkl' is not allowed"),
    "weights": ([GOOD, _json(), (f"{KEY}.pth", b"PK")], f"{KEY}.pth' is not allowed"),
    "compressed": ([GOOD, _json(), (f"{KEY}.txt.gz", b"\x1f")], f"{KEY}.txt.gz' is not allowed"),
    "bomb": ([(f"{KEY}.0.png", _bomb()), _json()], f"id-{BAD}.*13000 x 13000 pixels"),
    "line": (
        [(f"{KEY}.0.png", _png(Image.new("1", (1, 20_000)))), _json()],
        f"id-{BAD}.*1 x 20000 pixels",
    ),
    "cut image": ([(f"{KEY}.0.png", IMAGE[:-40]), _json()], f"id-{BAD}.*cannot be decoded"),
    "no image": ([(f"{KEY}.0.png", b"GIF89a"), _json()], f"id-{BAD}.*cannot be decoded"),
    "cut JSON": ([GOOD, (f"{KEY}.json", b'{"id": ')], f"{KEY}.json' is not valid JSON"),
    "JSON list": ([GOOD, (f"{KEY}.json", b"[]")], f"{KEY}.json' holds no JSON object"),
    "no JSON": ([GOOD], f"{KEY}' has no JSON"),
    "two JSON": ([GOOD, _json(), (f"{KEY}.a.json", b"{}")], f"{KEY}' has two JSON"),
    "gap": ([(f"{KEY}.2.png", IMAGE), _json()], f"{KEY}' are not numbered"),
    "no answer": ([GOOD, _json(answers=[])], f"id-{BAD}' has no answer"),
    "outside": ([GOOD, _json(answers=["maybe"])], f"id-{BAD}'.*'maybe' is none of its 2 choices"),
    "number": ([GOOD, _json(question=5)], f"{KEY}': 'question' is 5"),
    "null": ([GOOD, _json(question=None)], f"{KEY}': 'question' is null"),
    "surrogate": ([GOOD, _json(question="\ud800")], f"{KEY}.json' holds half a surrogate"),
    "text": ([GOOD, _json(), (f"{KEY}.txt", b"\xff")], f"{KEY}.txt' is not UTF-8"),
    "template": ([GOOD, _json(meta={"answer_index": 9})], f"id-{BAD}' does not fit .*zhou2024"),
    "contradiction": ([GOOD, _json(meta={"answer_index": 1})], "zhou2024.*choice 1 is not the ans"),
    "many choices": ([GOOD, _json(choices=["yes", *"abcde"])], f"id-{BAD}' does not fit"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_verify_and_training_refuse_the_same(folder: Path, fault: str) -> None:
    members, expected = FAULTS[fault]
    _replace(folder, [BAD], lambda _: members)
    with pytest.raises(DataError, match=expected) as caught:
        _train(folder)
    (problem,) = verify_folder(folder)
    assert SHARD in problem
    assert caught.value.remedy and caught.value.remedy in problem
    # Training says before it where the sample lies.
    assert caught.value.fault.rpartition(f"{SHARD}': ")[2] in problem


def test_healthy_samples_pass_both(folder: Path) -> None:
    _replace(folder, [BAD], lambda _: encode_sample(_sample(BAD), KEY))
    _train(folder)
    assert verify_folder(folder) == []


def test_many_faults_are_counted_and_the_first_named(folder: Path) -> None:
    _replace(folder, range(25), lambda number: [(f"{number:09d}.json", b"{")])
    problems = verify_folder(folder)
    assert len(problems) == 21
    assert all(f"{number:09d}.json" in problems[number] for number in range(20))
    assert problems[-1] == "and 5 more samples."


def test_a_forbidden_member_beside_the_samples_is_found(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    end = int(
        np.load(folder / "index.npy")[-1]["offset"] + np.load(folder / "index.npy")[-1]["size"]
    )
    (folder / SHARD).write_bytes(data[:end] + pack([("evil.pyd", b"MZ")]) + END_MARK)
    _pin(folder, np.load(folder / "index.npy"))
    (problem,) = verify_folder(folder)
    assert SHARD in problem and f"{NUM_SAMPLES + 1} samples instead of {NUM_SAMPLES}" in problem


# --- ids and tasks ------------------------------------------------------------------------------


def test_duplicate_ids_are_known_when_training_opens(folder: Path) -> None:
    index = np.load(folder / "index.npy")
    index["id_key"][9] = index["id_key"][4]
    _pin(folder, index)
    with pytest.raises(DataError, match="1 ids stand for several samples, .* sample 4"):
        ShardFolder.open(folder)
    assert "several samples" in " ".join(verify_folder(folder))


def test_an_id_that_the_index_does_not_know_is_refused(folder: Path) -> None:
    _replace(folder, [BAD], lambda _: encode_sample(_sample(3), KEY))
    with pytest.raises(DataError, match="has the id 'id-3', the index another"):
        _train(folder)
    (problem,) = verify_folder(folder)
    assert "'id-3' is not what the index says" in problem


def test_shards_of_another_task_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="are of task 'scienceqa', data.task is 'digits'") as caught:
        ShardFolder.open(folder, "digits")
    assert "shards index" in caught.value.remedy
    _pin(folder, np.load(folder / "index.npy"), task="sciencqa")
    (problem,) = verify_folder(folder)
    assert "unknown task 'sciencqa'; did you mean 'scienceqa'?" in problem


# --- files that are none ------------------------------------------------------------------------


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to(path.with_name("pipe"))


def _link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", [_pipe, _link_to_pipe, _link_to_device, Path.mkdir])
@pytest.mark.parametrize("name", ["manifest.json", "index.npy", SHARD])
def test_pipes_devices_and_folders_are_refused_at_once(
    folder: Path, name: str, kind: Callable[[Path], None]
) -> None:
    opened = ShardFolder.open(folder)
    (folder / name).unlink()
    kind(folder / name)
    with pytest.raises(DataError, match=name):
        ShardFolder.open(folder)
    assert any(
        name in problem and "no regular file" in problem for problem in verify_folder(folder)
    )
    if name == SHARD:  # exchanged after opening
        with pytest.raises(DataError, match="no regular file"):
            opened.read(0)


def test_links_to_files_are_files(folder: Path) -> None:
    for name in ("manifest.json", "index.npy", SHARD):
        (folder / name).rename(folder / f"{name}.real")
        (folder / name).symlink_to(folder / f"{name}.real")
    _train(folder)
    assert verify_folder(folder) == []


# --- indexes that lie ---------------------------------------------------------------------------


def _npy(shape: tuple[int, ...], rows: bytes) -> bytes:
    file = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.load(io.BytesIO(rows)).dtype)
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


@pytest.mark.parametrize("shape", [(10**13,), (NUM_SAMPLES + 1,), (NUM_SAMPLES, 1), ()])
def test_an_index_that_claims_other_rows_is_damaged(folder: Path, shape: tuple[int, ...]) -> None:
    data = (folder / "index.npy").read_bytes()
    _pin(folder, _npy(shape, data) + data[-np.load(folder / "index.npy").nbytes :])
    with pytest.raises(DataError, match="index.npy' is damaged"):
        ShardFolder.open(folder)
    assert "is damaged" in " ".join(verify_folder(folder))


def test_numbers_that_no_folder_can_have_are_refused(folder: Path) -> None:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    huge = [shards[0] | {"samples": 10**13}]
    for changes in (
        {"samples": 10**13, "shards": huge},
        {"shards": [shards[0] | {"bytes": 10**30}]},
    ):
        manifest = json.loads((folder / "manifest.json").read_text()) | changes
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match="manifest.json'"):
            ShardFolder.open(folder)


def test_an_index_is_not_read_beyond_what_the_samples_need(folder: Path) -> None:
    with (folder / "index.npy").open("r+b") as file:
        file.truncate(2**40)  # takes no space: a hole
    with pytest.raises(DataError, match="has 1099511627776 bytes, at most"):
        ShardFolder.open(folder)


@settings(max_examples=examples(60), deadline=None)
@given(st.data())
def test_a_damaged_index_never_raises_anything_but_our_error(
    healthy: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = Path(shutil.copytree(healthy, tmp_path_factory.mktemp("fuzz") / "shards"))
    content = bytearray((folder / "index.npy").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # The header is where the danger lies: half of the changes go there.
        end = data.draw(st.sampled_from([200, len(content)]))
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    _pin(folder, bytes(content[: data.draw(st.integers(100, len(content)))]))
    try:
        _train(folder)
    except DataError:
        assert verify_folder(folder)
