"""Odd files in every data set: the same samples, the right colours, or what is left out by name."""

from __future__ import annotations

import shutil
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from mmtrain import plugins
from mmtrain.data.codec import decode_image
from mmtrain.data.examine import look_at
from mmtrain.errors import DataError
from mmtrain.tasks.interface import Dropped, Sample, Task

GOLDEN = Path(__file__).parents[1] / "golden" / "tasks"
RED, SIZE = (200, 30, 40), (24, 16)
BOMB_SIDE_PIXELS = 13_000
_TURN_RIGHT = 6


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _photo(mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", SIZE, RED).convert(mode)


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = _TURN_RIGHT
    return _saved(_photo(), "JPEG", exif=exif, quality=95)


# What is seen of each: size and colour.
GOOD = {
    "CMYK": (_saved(_photo("CMYK"), "JPEG", quality=95), SIZE, RED),
    "palette": (_saved(_photo("P"), "PNG"), SIZE, _photo("P").convert("RGB").getpixel((0, 0))),
    "16 bit": (_saved(Image.new("I;16", SIZE, 100 * 256 + 7), "PNG"), SIZE, (100, 100, 100)),
    "turned": (_turned(), SIZE[::-1], RED),
    "clear": (_saved(Image.new("RGBA", SIZE, (9, 9, 9, 0)), "PNG"), SIZE, (255, 255, 255)),
}
BAD = {
    "truncated": _saved(Image.effect_noise((64, 64), 90), "JPEG")[:-300],
    "bomb": _saved(Image.new("1", (BOMB_SIDE_PIXELS, BOMB_SIDE_PIXELS)), "PNG"),
    "empty": b"",
    "page": b"<html>404</html>",
}
NEAR = 3  # JPEG rounds colours


def _pictures(raw: Path) -> list[Path]:
    return sorted(path for path in raw.rglob("*") if path.suffix in (".jpg", ".png"))


WITH_PICTURES = [name for name in plugins.names("task") if _pictures(GOLDEN / name / "raw")]


def test_every_data_set_of_picture_files_is_tried() -> None:
    others = {name for name in plugins.names("task") if name not in WITH_PICTURES}
    assert others == {"digits", "vl_rewardbench"}, "drawn, and inside of a parquet file"
    assert len(BAD["bomb"]) < 30_000


def _looked_at(task: Task, raw: Path) -> tuple[list[Sample], set[str]]:
    """Samples of all splits that train, and the ids of those that do not."""
    good, left_out = [], set()
    for split in task.splits:
        for found in task.read(raw, split, task.build_options()):
            if isinstance(found, Dropped):
                left_out.add(found.id)
                continue
            try:
                look_at(found, task, set())
                good.append(found)
            except DataError as fault:
                assert repr(found.id) in str(fault)
                left_out.add(found.id)
    return good, left_out


@pytest.mark.parametrize("name", WITH_PICTURES)
def test_an_odd_picture_is_seen_as_a_person_sees_it(name: str, tmp_path: Path) -> None:
    task: Task = plugins.load("task", name)
    raw = Path(shutil.copytree(GOLDEN / name / "raw", tmp_path / "raw"))
    samples, left_out = _looked_at(task, raw)
    for kind, (data, size, colour) in GOOD.items():
        _replace_all(raw, data)
        found, others = _looked_at(task, raw)
        assert _said(found) == _said(samples) and len(others) == len(left_out), kind
        for image in (decode_image(one.data, kind) for sample in found for one in sample.images):
            seen = image.getpixel((size[0] // 2, size[1] // 2))
            assert image.size == size, kind
            assert all(abs(a - b) <= NEAR for a, b in zip(seen, colour, strict=True)), (kind, seen)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", WITH_PICTURES)
def test_what_is_no_picture_costs_its_samples_by_name_and_no_other(
    name: str, tmp_path: Path
) -> None:
    task: Task = plugins.load("task", name)
    raw = Path(shutil.copytree(GOLDEN / name / "raw", tmp_path / "raw"))
    _replace_all(raw, GOOD["palette"][0])
    samples, left_out = _looked_at(task, raw)
    path = next(path for path in _pictures(raw) if _shown(path, samples))
    others = [one for one in samples if one not in _shown(path, samples)]
    for kind, data in BAD.items():
        path.write_bytes(data)
        found, named = _looked_at(task, raw)
        assert _said(found) == _said(others) and len(named) > len(left_out), kind


def _replace_all(raw: Path, data: bytes) -> None:
    """All different still: equal pictures are of one split."""
    for number, path in enumerate(_pictures(raw)):
        path.write_bytes(data + b"%d" % number)


def _shown(path: Path, samples: Sequence[Sample]) -> list[Sample]:
    data = path.read_bytes()
    return [one for one in samples if data in (image.data for image in one.images)]


def _said(samples: Sequence[Sample]) -> Counter[tuple[object, ...]]:
    """Not by id: where data have no splits of their own, these go by what is in the files."""
    return Counter((one.question, one.turns, one.answers) for one in samples)


TEXTS = (".json", ".jsonl", ".txt")
WITH_TEXTS = [
    name
    for name in plugins.names("task")
    if any(path.suffix in TEXTS for path in (GOLDEN / name / "raw").rglob("*"))
]


@pytest.mark.parametrize("name", WITH_TEXTS)
def test_a_byte_order_mark_and_crlf_are_none_of_the_text(name: str, tmp_path: Path) -> None:
    task: Task = plugins.load("task", name)
    raw = Path(shutil.copytree(GOLDEN / name / "raw", tmp_path / "raw"))
    options = task.build_options()
    before = [one for split in task.splits for one in task.read(raw, split, options)]
    for path in raw.rglob("*"):
        if path.suffix in TEXTS:
            lines = path.read_bytes().removeprefix(BOM_UTF8).splitlines()
            path.write_bytes(BOM_UTF8 + b"\r\n".join([*lines, b""]))
    assert [one for split in task.splits for one in task.read(raw, split, options)] == before
