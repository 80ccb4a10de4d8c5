"""The codec: round trips, refusals, and images that must not pass."""

from __future__ import annotations

import io
import json
import pickle
import string
import struct
import tarfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from mmtrain.data import codec
from mmtrain.data.codec import (
    MAX_MEMBER_BYTES,
    decode_image,
    decode_sample,
    encode_sample,
)
from mmtrain.data.tar import unpack_members
from mmtrain.errors import DataError
from mmtrain.tasks.interface import ImageBytes, Sample, Turn
from tests.fuzz import examples
from tests.tar_bytes import pack

KEY = "000000007"
_TEXT = st.text(max_size=20)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=5,
)
_ANSWERS = st.lists(_TEXT, min_size=1, max_size=3).map(tuple)
_SAMPLES = st.builds(
    Sample,
    id=st.text(min_size=1, max_size=20),
    images=st.lists(
        st.builds(
            ImageBytes, st.sampled_from(sorted(codec.IMAGE_EXTENSIONS)), st.binary(max_size=1500)
        ),
        max_size=3,
    ).map(tuple),
    turns=st.lists(st.builds(Turn, st.sampled_from(["user", "assistant"]), _TEXT)).map(tuple),
    question=_TEXT,
    answers=_ANSWERS,
    meta=st.dictionaries(_TEXT, _JSON, max_size=3),
).flatmap(
    lambda sample: st.lists(_TEXT, max_size=2).map(
        lambda others: replace(sample, choices=(*others, sample.answers[0]) if others else ())
    )
)


def _encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _noise(mode: str = "RGB", size: int = 48) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


# --- members ------------------------------------------------------------------------------------


@settings(max_examples=examples(60), deadline=None)
@given(_SAMPLES)
def test_every_sample_survives_the_round_trip(sample: Sample) -> None:
    record = pack(encode_sample(sample, KEY))
    assert len(record) % 512 == 0
    assert decode_sample(unpack_members(record)) == sample


@settings(max_examples=examples(150), deadline=None)
@given(_SAMPLES, st.data())
def test_damaged_bytes_never_raise_anything_but_our_error(
    sample: Sample, data: st.DataObject
) -> None:
    record = bytearray(pack(encode_sample(sample, KEY)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(record) - 1))
        record[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(record)))
    try:
        decode_sample(unpack_members(bytes(record[:cut])))
    except DataError:
        pass


@settings(max_examples=examples(100), deadline=None)
@given(_JSON)
def test_any_json_member_gives_a_sample_or_our_error(value: object) -> None:
    for text in (json.dumps(value), json.dumps({"id": value, "turns": value, "meta": value})):
        try:
            decode_sample([(f"{KEY}.json", text.encode())])
        except DataError:
            pass


@pytest.mark.parametrize(
    "name",
    ["x.pkl", "x.pyd", "x.pth", "x.txt.gz", "x.0.gif", "x", ".json", "/x.json", "a/../x.json"],
)
def test_members_off_the_allow_list_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="not allowed"):
        decode_sample([("x.json", b"{}"), (name, pickle.dumps(1))])


def test_paths_and_links_are_refused() -> None:
    with pytest.raises(DataError, match="not allowed"):
        decode_sample([("../x.json", b"{}")])
    link = tarfile.TarInfo("x.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with pytest.raises(DataError, match="not a regular file"):
        unpack_members(link.tobuf(tarfile.USTAR_FORMAT))


def test_foreign_keys_missing_and_doubled_members_are_refused() -> None:
    with pytest.raises(DataError, match="'other.json' lies where sample 'x' is expected"):
        decode_sample([("x.json", b"{}"), ("other.json", b"{}")])
    with pytest.raises(DataError, match="no JSON"):
        decode_sample([])
    with pytest.raises(DataError, match="no JSON"):
        decode_sample([(f"{KEY}.0.png", b"")])
    with pytest.raises(DataError, match="two JSON"):
        decode_sample([(f"{KEY}.json", b"{}")] * 2)
    with pytest.raises(DataError, match="numbered"):
        decode_sample([(f"{KEY}.json", b"{}"), (f"{KEY}.1.png", b"")])
    with pytest.raises(DataError, match="0 images, 1 expected"):
        decode_sample([(f"{KEY}.json", b'{"num_images": 1}')])
    with pytest.raises(DataError, match="not valid JSON"):
        decode_sample([(f"{KEY}.json", b"[" * 100_000)])


def test_caption_in_a_text_member_is_the_answer() -> None:
    members = [(f"{KEY}.json", b"{}"), (f"{KEY}.txt", b"a bird")]
    assert decode_sample(members).answers == ("a bird",)


def _decoded(**fields: object) -> Sample:
    content = json.dumps({"answers": ["yes"], **fields}).encode()
    return decode_sample([(f"{KEY}.json", content)])


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"question": 5}, "'question' is 5, not a text"),
        ({"question": None}, "'question' is null, not a text"),
        ({"id": 7}, "'id' is 7, not a text"),
        ({"id": ""}, "'id' is \"\", not a text"),
        ({"answers": "yes"}, "'answers' is \"yes\", not a list of texts"),
        ({"answers": []}, f"sample '{KEY}' has no answer"),
        ({"answers": ["no"], "choices": ["yes"]}, "'no' is none of its 1 choices"),
        ({"turns": [["robot", "hello"]]}, "'turns' is .* not a list of"),
        ({"meta": []}, "'meta' is"),
        ({"question": "\ud800"}, "half a surrogate pair"),
        ({"meta": {"hint": "\udfff"}}, "half a surrogate pair"),
        ({"num_images": "x" * 9999}, '0 images, "x{39} expected'),
    ],
)
def test_what_is_no_sample_is_named(fields: dict[str, object], fault: str) -> None:
    with pytest.raises(DataError, match=fault) as caught:
        _decoded(**fields)
    assert caught.value.remedy and len(str(caught.value)) < 300


def test_fields_of_others_are_left_alone() -> None:
    assert _decoded(url=5, score=None) == Sample(KEY, answers=("yes",))
    turns = [["user", "hello"], ["assistant", "hi"]]
    assert len(_decoded(answers=[], turns=turns).turns) == 2


def test_images_of_other_writers() -> None:
    content = ("a/b/7.json", b'{"answers": ["yes"]}')
    single = decode_sample([("a/b/7.JPG", b"1"), content])
    assert single.id == "a/b/7" and single.images == (ImageBytes("jpg", b"1"),)
    # Sorted by name, as webdataset writes them, 10 comes before 2.
    many = [(f"a/b/7.{number}.png", b"%d" % number) for number in range(12)]
    found = decode_sample([*sorted(many), content])
    assert [image.data for image in found.images] == [b"%d" % number for number in range(12)]
    for second in ("a/b/7.png", "a/b/7.0.png"):
        with pytest.raises(DataError, match="not numbered 0, 1"):
            decode_sample([("a/b/7.jpg", b"1"), (second, b"2"), content])


def test_members_over_the_byte_cap_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_MEMBER_BYTES < 2**30
    monkeypatch.setattr(codec, "MAX_MEMBER_BYTES", 100)
    with pytest.raises(DataError, match="101 bytes"):
        encode_sample(Sample("a", images=(ImageBytes("png", bytes(101)),)), KEY)


def test_values_that_json_cannot_hold_are_refused() -> None:
    for meta in ({"a": b"bytes"}, {"a": float("nan")}, {"a": "\ud800"}):
        with pytest.raises(DataError, match="sample 'a'"):
            encode_sample(Sample("a", meta=meta), KEY)


# --- images -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_truncated_images_are_refused(
    kind: str, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other libraries switch this on for the whole process; it must not reach us.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = _encoded(_noise(), kind, **options)
    assert decode_image(data, "s").size == (48, 48)
    for kept_bytes in range(0, len(data) - 24, 97):
        with pytest.raises(DataError, match="sample 's'"):
            decode_image(data[:kept_bytes], "s")


def _png_claiming(width: int, height: int) -> bytes:
    """A tiny PNG whose header claims a size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_000, 13_000, 40_000])
def test_size_is_checked_before_decoding(side: int) -> None:
    with pytest.raises(DataError, match="pixels.*scale it down"):
        decode_image(_png_claiming(side, side), "s")


@pytest.mark.parametrize(
    ("size", "fault"),
    [
        ((1, 201), "1 x 201 pixels is more than 200 times as long as wide"),
        ((20_000, 1), "20000 x 1 pixels has a side of more than 8000"),
        ((8_001, 100), "side of more than 8000"),
    ],
)
def test_lines_that_resizing_would_blow_up_are_refused(size: tuple[int, int], fault: str) -> None:
    with pytest.raises(DataError, match=f"sample 's': .*{fault}.*crop it"):
        decode_image(_encoded(Image.new("L", size)), "s")
    assert decode_image(_encoded(Image.new("L", (1, 200))), "s").size == (1, 200)


def test_pixel_limit_is_the_callers() -> None:
    data = _encoded(_noise())
    with pytest.raises(DataError, match="48 x 48 pixels exceeds 2000"):
        decode_image(data, "s", max_pixels=2000)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "EPS"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image(_encoded(_noise(), kind), "s")


def test_garbage_is_refused() -> None:
    for data in (b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n", bytes(1000)):
        with pytest.raises(DataError, match="sample 's'"):
            decode_image(data, "s")


def test_sixteen_bit_grey_keeps_its_range() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = np.asarray(decode_image(_encoded(Image.fromarray(values)), "s"))
    assert (image[..., 0] == (values >> 8)).all()


def test_transparency_shows_white() -> None:
    clear_red = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert decode_image(_encoded(clear_red), "s").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    assert decode_image(_encoded(palette), "s").getpixel((0, 0)) == (0, 0, 255)
    clear = _encoded(palette, transparency=1)
    assert decode_image(clear, "s").getpixel((0, 0)) == (255, 255, 255)
    keyed = _encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))
    assert decode_image(keyed, "s").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "RGB", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode_image(_encoded(_noise(mode), kind), "s").mode == "RGB"


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (40, 20), "white")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees
    assert decode_image(_encoded(image, "JPEG", exif=exif), "s").size == (20, 40)


@settings(max_examples=examples(150), deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.data())
def test_damaged_images_decode_or_raise_our_error(kind: str, data: st.DataObject) -> None:
    image = bytearray(_encoded(_noise("P" if kind == "PNG" else "RGB", 12), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode_image(bytes(image), "s").mode == "RGB"
    except DataError:
        pass


@settings(max_examples=examples(40), deadline=None)
@given(st.text(string.printable, max_size=200))
def test_text_is_no_image(text: str) -> None:
    with pytest.raises(DataError):
        decode_image(text.encode(), "s")
