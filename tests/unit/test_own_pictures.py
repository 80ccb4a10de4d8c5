"""Pictures as people have them: what shards take, and what becomes of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mmtrain.data.codec import decode_image
from mmtrain.tasks import pictures
from mmtrain.tasks.interface import ImageBytes
from mmtrain.tasks.pictures import Unusable, encoded
from tests.unit.test_own_data import picture


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_what_shards_take_is_kept_to_the_byte(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"named-otherwise.{ending}.bmp"
    Image.new("RGB", (6, 4), "red").save(path, {"jpg": "JPEG"}.get(ending, ending))
    assert encoded(path) == ImageBytes(ending, path.read_bytes())


@pytest.mark.parametrize(("mode", "name"), [("RGB", "a.bmp"), ("P", "a.gif"), ("CMYK", "a.tiff")])
def test_other_formats_become_png_with_the_same_colours(
    tmp_path: Path, mode: str, name: str
) -> None:
    Image.new("RGB", (6, 4), (200, 30, 40)).convert(mode).save(tmp_path / name)
    made = encoded(tmp_path / name)
    assert made.extension == "png"
    with Image.open(tmp_path / name) as before:
        wanted = before.convert("RGB").getpixel((1, 1))
    assert decode_image(made.data, "a").getpixel((1, 1)) == wanted


def test_a_cameras_picture_is_kept_and_others_stand_upright(tmp_path: Path) -> None:
    """Two pictures in a JPEG are one to whoever reads a JPEG; a TIFF's rotation is done."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.new("RGB", (60, 30), "blue")
    photo.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[photo], exif=exif)
    with Image.open(tmp_path / "a.jpg") as opened:
        assert opened.format == "MPO"
    kept = encoded(tmp_path / "a.jpg")
    assert kept == ImageBytes("jpg", (tmp_path / "a.jpg").read_bytes())
    photo.save(tmp_path / "a.tiff", exif=exif)
    for made in (kept, encoded(tmp_path / "a.tiff")):
        assert decode_image(made.data, "a").size == (30, 60)


def test_sixteen_bits_keep_their_high_byte_and_fractions_are_no_colours(tmp_path: Path) -> None:
    Image.new("I;16", (6, 4), 100 * 256 + 7).save(tmp_path / "a.tiff")
    made = encoded(tmp_path / "a.tiff")
    assert decode_image(made.data, "a").getpixel((1, 1)) == (100, 100, 100)
    Image.new("F", (6, 4), 0.5).save(tmp_path / "f.tiff")
    with pytest.raises(Unusable, match="holds fractions"):
        encoded(tmp_path / "f.tiff")


def test_formats_that_start_other_programs_are_not_tried(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a.eps")
    with pytest.raises(Unusable, match="damaged, or none"):
        encoded(tmp_path / "a.eps")


def test_large_pictures_are_made_smaller_upright_and_only_if_asked(tmp_path: Path) -> None:
    large = Image.new("RGB", (600, 300), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    large.save(tmp_path / "a.jpg", exif=exif)
    kept, made = encoded(tmp_path / "a.jpg"), encoded(tmp_path / "a.jpg", max_side=100)
    assert decode_image(kept.data, "a").size == (300, 600)
    assert made.extension == "jpg" and decode_image(made.data, "a").size == (50, 100)
    assert encoded(tmp_path / "a.jpg", max_side=600) == kept


def test_a_bomb_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png", size=(100, 100))
    monkeypatch.setattr(pictures.Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Unusable, match="too large"):
        encoded(tmp_path / "a.png")
