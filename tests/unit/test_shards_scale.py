"""`mmtrain shards build` on all cores, killed and gone on, with smaller pictures: equal bytes."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import webdataset  # noqa: F401 (it imports torch: once here, not in every fork)
from PIL import Image

from data_shards.build import build_split
from data_shards.index import take_inventory
from data_shards.journal import JOURNAL_NAME
from data_shards.lookers import Lookers
from data_shards.reading import Recipe, num_expected
from mmtrain.__main__ import main
from mmtrain.data.codec import decode_image
from mmtrain.data.shards import ShardFolder
from mmtrain.data.verify import verify_folder
from mmtrain.errors import DataError
from mmtrain.files import replaced_folder
from mmtrain.tasks.datasets import digits, jsonl
from mmtrain.tasks.own_data import Columns
from mmtrain.tasks.pictures import unread

NUM_ROWS, PER_SHARD = 60, 7
DAMAGED, MISSING = (3, 16, 17, 40), (5, 31)  # 16 and 17 are one picture


def _picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (20, 12), Random(number).randbytes(20 * 12 * 3)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two questions about each picture; some pictures are cut, some are not there."""
    folder = tmp_path_factory.mktemp("raw")
    rows = []
    for number in range(NUM_ROWS):
        data = _picture(number // 2)
        if number not in MISSING:
            cut = data[:-30] if number in DAMAGED else data
            (folder / f"{number}.png").write_bytes(cut)
        row = {"id": f"r{number}", "image": f"{number}.png", "question": "?", "answer": "yes"}
        rows.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(rows))
    options = Columns(val=0.0)
    raw = folder / "rows.jsonl"
    return Recipe("jsonl", "train", raw, options, samples_per_shard=PER_SHARD, droppable=0.2)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "train"
    build_split(recipe, folder)
    return _bytes(folder)


def _killed(recipe: Recipe, folder: Path, samples: int) -> None:
    """A build in a process of its own that ends by SIGKILL after so many samples."""

    def kill(written: int, looked_at: int, expected: int) -> None:
        if written >= samples:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            build_split(recipe, folder, progress=kill, say=lambda text: None)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


# --- killed and gone on -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "shards"), [(1, 0), (PER_SHARD - 1, 0), (PER_SHARD, 1), (40, 5), (54, 7)]
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_goes_on(
    recipe: Recipe,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    samples: int,
    shards: int,
    workers: int,
) -> None:
    folder, said = tmp_path / "train", list[str]()
    _killed(recipe, folder, samples)
    assert not folder.exists()
    build_split(recipe, folder, workers=workers, say=said.append)
    assert _bytes(folder) == undisturbed
    assert said == [f"{folder}: goes on behind {shards} finished shard(s)"] * bool(shards)
    assert list(tmp_path.iterdir()) == [folder]


def test_what_a_draw_and_a_rest_left_out_stay_right(recipe: Recipe, tmp_path: Path) -> None:
    drawn = replace(recipe, limit=30, seed=3)
    build_split(drawn, tmp_path / "whole")
    _killed(drawn, tmp_path / "train", 16)
    built = build_split(drawn, tmp_path / "train")
    assert _bytes(built.folder) == _bytes(tmp_path / "whole")
    assert [line.split(" ")[0] for line in built.left_out] == ["4", "2"]


def test_without_drop_a_draw_goes_on(tmp_path: Path) -> None:
    drawn = Recipe("digits", "val", None, digits.DigitsOptions(), 5, 40, samples_per_shard=9)
    build_split(drawn, tmp_path / "whole")
    _killed(drawn, tmp_path / "val", 30)
    said = list[str]()
    build_split(drawn, tmp_path / "val", say=said.append)
    assert _bytes(tmp_path / "val") == _bytes(tmp_path / "whole")
    assert "goes on behind 3 finished" in said[0]


def test_a_torn_journal_or_a_damaged_shard_is_no_ground_to_go_on_from(
    recipe: Recipe, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    for spoiled, shards in ((JOURNAL_NAME, 4), ("shard-000002.tar", 2)):
        folder, partial = tmp_path / spoiled, tmp_path / f".{spoiled}.partial"
        _killed(recipe, folder, 40)
        data = (partial / spoiled).read_bytes()
        (partial / spoiled).write_bytes(data[:-10])
        (partial / "shard-000099.tar").write_bytes(b"of nobody")
        said = list[str]()
        build_split(recipe, folder, say=said.append)
        assert said == [f"{folder}: goes on behind {shards} finished shard(s)"]
        assert _bytes(folder) == undisturbed


def test_another_recipe_begins_anew_and_says_so(
    recipe: Recipe, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    folder, said = tmp_path / "train", list[str]()
    _killed(replace(recipe, limit=50), folder, 20)
    build_split(recipe, folder, say=said.append)
    assert len(said) == 1 and "begins anew" in said[0]
    assert _bytes(folder) == undisturbed


def test_raw_files_that_read_otherwise_under_the_same_name_are_noticed(
    recipe: Recipe, tmp_path: Path
) -> None:
    raw = tmp_path / "rows.jsonl"
    raw.write_text('{"id": "a", "question": "?", "answer": "yes"}\n' * 20)
    times = (raw.stat().st_atime_ns, raw.stat().st_mtime_ns)
    mine = replace(recipe, raw=raw, droppable=0.0)
    _killed(mine, tmp_path / "out" / "train", 15)
    raw.write_text('{"id": "b", "question": "?", "answer": "yes"}\n' * 20)
    os.utime(raw, ns=times)
    with pytest.raises(DataError, match="read otherwise.*sample 14 is 'b-14', not 'a-14'"):
        build_split(mine, tmp_path / "out" / "train", say=lambda text: None)
    built = build_split(mine, tmp_path / "out" / "train")
    assert ShardFolder.open(built.folder).read(1).id == "b-2"


KILLED_BY_ITS_JOURNAL = """
import multiprocessing, os, signal, sys
from data_shards.journal import Journal
from mmtrain.__main__ import main

noted, note = [], Journal.note

def note_and_die(self, finished):
    note(self, finished)
    noted.append(finished)
    if len(noted) == 3:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

Journal.note = note_and_die
main(sys.argv[1:])
"""


def test_the_command_killed_among_its_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """What it had started ends with it; the same command goes on, on other workers."""
    command = ["shards", "build", "digits", "--split", "val", "--samples-per-shard", "20"]
    assert main([*command, "--out", str(tmp_path / "whole"), "--workers", "1"]) == 0
    command += ["--out", str(tmp_path / "out"), "--workers", "2"]
    program = [sys.executable, "-c", KILLED_BY_ITS_JOURNAL, *command]
    result = subprocess.run(program, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    workers = [int(pid) for pid in result.stdout.split()]
    assert workers
    while any(_runs(pid) for pid in workers):  # the suite's own limit ends what never ends
        time.sleep(0.05)
    capsys.readouterr()
    assert main(command) == 0
    assert "goes on behind 3 finished shard(s)" in capsys.readouterr().out
    assert _bytes(tmp_path / "out" / "val") == _bytes(tmp_path / "whole" / "val")


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_ctrl_c_leaves_what_is_finished(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    with pytest.raises(KeyboardInterrupt), replaced_folder(folder, goes_on=True) as partial:
        (partial / "done").write_text("1")
        raise KeyboardInterrupt
    with pytest.raises(OSError), replaced_folder(folder, goes_on=True) as partial:
        assert (partial / "done").read_text() == "1"
        raise OSError
    assert list(tmp_path.iterdir()) == []


# --- workers ------------------------------------------------------------------------------------


def test_workers_find_the_same_faults_in_the_same_order(recipe: Recipe, tmp_path: Path) -> None:
    rows = [row for row in recipe.raw.read_text().splitlines() if '"r5"' not in row]  # type: ignore
    raw = tmp_path / "rows.jsonl"
    raw.write_text("\n".join(row for row in rows if '"r31"' not in row))
    options = Columns(val=0.0, image_folder=recipe.raw.parent)  # type: ignore[union-attr]
    strict = replace(recipe, raw=raw, options=options, droppable=0.0)
    faults = []
    for workers in (1, 3):
        with pytest.raises(DataError, match="4 of 58 samples cannot be trained on") as caught:
            build_split(strict, tmp_path / "out" / "train", workers=workers)
        faults.append(str(caught.value))
    assert faults[0] == faults[1]
    assert [f"'r{number}'" in faults[0] for number in DAMAGED] == [True] * 4
    assert list((tmp_path / "out").iterdir()) == []


def test_a_worker_that_is_ended_is_told(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    shard = tmp_path / "shard-000000.tar"
    shard.write_bytes(undisturbed[shard.name])
    with pytest.raises(DataError, match="fewer --workers"), Lookers("jsonl", 2) as lookers:
        lookers.begin(shard)
        assert next(lookers.finished(wait=True)).info is not None
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join()
        lookers.begin(shard)
        list(lookers.finished(wait=True))


def test_ids_are_compared_across_shards(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(undisturbed["shard-000001.tar"])
    for workers in (1, 2):
        inventory = take_inventory(tmp_path, "jsonl", workers=workers)
        assert len(inventory.problems) == PER_SHARD
        assert "b.tar': two samples have the id 'r9', the first in a.tar;" in inventory.problems[0]


# --- counted beforehand -------------------------------------------------------------------------


def test_samples_are_counted_without_opening_a_picture(recipe: Recipe) -> None:
    with unread():
        found = list(jsonl.TASK.read(recipe.raw, "train", Columns(val=0.0)))
    assert {len(image.data) for one in found for image in getattr(one, "images", ())} == {0}
    assert num_expected(recipe) == NUM_ROWS - len(MISSING)


# --- smaller pictures ---------------------------------------------------------------------------


def _sizes(folder: Path) -> Iterator[tuple[int, int]]:
    shards = ShardFolder.open(folder)
    for number in range(len(shards)):
        sample = shards.read(number)
        yield decode_image(sample.images[0].data, sample.id).size


def test_pictures_are_made_smaller_and_the_manifest_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, turned = tmp_path / "out", Image.Exif()
    turned[0x0112] = 6  # lies on its side
    Image.new("RGB", (300, 200), "red").save(tmp_path / "a.jpg", exif=turned)
    Image.new("RGBA", (100, 400), "blue").save(tmp_path / "b.png")
    Image.new("RGB", (90, 500), "blue").save(tmp_path / "c.webp")
    Image.new("RGB", (100, 100), "blue").save(tmp_path / "d.png")
    rows = [
        {"id": name, "image": name, "question": "?", "answer": "yes"}
        for name in ("a.jpg", "b.png", "c.webp", "d.png")
    ]
    raw = tmp_path / "rows.jsonl"
    raw.write_text("\n".join(map(json.dumps, rows)))
    recipe = Recipe("jsonl", "train", raw, Columns(val=0.0), resize=96, samples_per_shard=3)
    built = build_split(recipe, out / "train", workers=2)
    assert list(_sizes(built.folder)) == [(96, 144), (96, 384), (90, 500), (96, 96)]
    assert verify_folder(built.folder) == []
    assert built.manifest.build_options["resize"] == 96
    kept = ShardFolder.open(built.folder).read(2)
    assert kept.images[0].data == (tmp_path / "c.webp").read_bytes(), "small enough as it is"
    command = ["shards", "build", "jsonl", "--raw", str(raw), "--out", str(out), "--set", "val=0"]
    assert main([*command, "--split", "train", "--resize", "96", "--samples-per-shard", "3"]) == 0
    assert "reused, nothing has changed" in capsys.readouterr().out
    build_split(recipe, out / "again")
    assert _bytes(out / "again") == _bytes(built.folder)
    with pytest.raises(DataError, match="other files or options"):
        build_split(replace(recipe, resize=None), out / "train")


def test_damaged_pictures_are_named_when_others_are_made_smaller(
    recipe: Recipe, tmp_path: Path
) -> None:
    built = build_split(replace(recipe, resize=6), tmp_path / "train")
    assert set(_sizes(built.folder)) == {(10, 6)}
    assert any("training would refuse it. r3 (" in line for line in built.left_out)
    with pytest.raises(DataError, match="raw samples cannot be built"):
        build_split(replace(recipe, resize=6, droppable=0.0), tmp_path / "strict")


# --- memory -------------------------------------------------------------------------------------

GROWTH = """
import resource, sys
from mmtrain.__main__ import main

peaks = []
for raw in sys.argv[1:]:
    command = ["shards", "build", "jsonl", "--raw", raw, "--out", raw + ".shards", "--workers", "1"]
    assert main(command) == 0
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[1] - peaks[0])
"""


@pytest.mark.soak
def test_a_row_costs_less_than_a_kibibyte_of_memory(tmp_path: Path) -> None:
    """So a million take less than one GiB beside what the libraries do."""
    for number, rows in enumerate((2_000, 52_000)):
        with open(tmp_path / f"{number}.jsonl", "w") as file:
            for row in range(rows):
                file.write(json.dumps({"question": f"What is {row}?" * 20, "answer": "It."}) + "\n")
    names = [str(tmp_path / f"{number}.jsonl") for number in range(2)]
    result = subprocess.run(
        [sys.executable, "-c", GROWTH, *names], capture_output=True, text=True, check=True
    )
    grown_kib = int(result.stdout.splitlines()[-1])
    assert grown_kib < 50_000, "a KiB for each of the rows that the second has more"
