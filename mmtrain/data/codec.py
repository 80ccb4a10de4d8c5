"""Samples to bytes and back, without trusting the bytes.

A sample is one JSON member `<key>.json` and its images `<key>.<i>.<ext>` (a single one may be
`<key>.<ext>`), as webdataset writes and reads them. Nothing here unpickles, decompresses a stream
of unknown size or runs a decoder outside the allow-list.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Sequence
from hashlib import sha256
from io import BytesIO
from typing import Annotated, Literal

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, Field, ValidationError

from mmtrain.data.tar import COPY_AGAIN, Member, split_name
from mmtrain.errors import DataError
from mmtrain.tasks.interface import ImageBytes, Sample, Turn

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
TEXT_EXTENSIONS = frozenset({"json", "txt"})
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_MEMBER_BYTES = 64 * 2**20
# Well below the size at which Pillow begins to warn; 24 bits per pixel make 192 MB of this.
MAX_PIXELS = 64_000_000
# What families make of an image is bounded as well: some scale the short side up to a size, some
# pad to a square, and a line of one pixel's width, a few bytes long, would become gigabytes.
MAX_ASPECT_RATIO = 200
MAX_SIDE_PIXELS = 8_000  # a square around it has MAX_PIXELS
DIGEST_BYTES = 16

# What Pillow's readers raise on bytes that are no intact image.
_BROKEN_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    MemoryError,
)


def short_digest(parts: Iterable[bytes]) -> bytes:
    """The first 16 bytes of a sha256 over parts whose lengths are hashed too."""
    digest = sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()[:DIGEST_BYTES]


def image_digest(sample: Sample) -> bytes:
    """Identity of a sample's encoded images; all zero bytes for a sample without one."""
    if not sample.images:
        return bytes(DIGEST_BYTES)
    return short_digest(image.data for image in sample.images)


def num_characters(sample: Sample) -> int:
    """Length of all text of a sample, hints in `meta` included: a first guess at its tokens."""
    texts = [sample.question, *sample.answers, *sample.choices]
    texts += [turn.text for turn in sample.turns]
    texts += [value for value in sample.meta.values() if isinstance(value, str)]
    return sum(len(text) for text in texts)


# --- sample <-> members -------------------------------------------------------------------------


def encode_sample(sample: Sample, key: str) -> list[Member]:
    """The named members of a sample: `<key>.json`, then its images."""
    record = {
        "id": sample.id,
        "num_images": len(sample.images),
        "question": sample.question,
        "answers": list(sample.answers),
        "choices": list(sample.choices),
        "turns": [
            [turn.role, turn.text, *([turn.images] if turn.images else [])] for turn in sample.turns
        ],
        "meta": dict(sample.meta),
    }
    try:
        text = json.dumps(record, ensure_ascii=False, sort_keys=True, allow_nan=False)
        members = [(f"{key}.json", text.encode())]
    except (TypeError, ValueError, RecursionError) as fault:
        raise DataError(
            f"sample {sample.id!r} does not fit in JSON: {fault};",
            "meta takes JSON values only, and text must be valid Unicode.",
        ) from fault
    for number, image in enumerate(sample.images):
        members.append((f"{key}.{number}.{image.extension}", image.data))
    for name, data in members:
        _check_member(name, len(data))
    return members


def decode_sample(members: Sequence[Member]) -> Sample:
    """The sample that one key's members hold. A `txt` member is an answer in plain text."""
    key = split_name(members[0][0])[0] if members else ""
    record: dict[str, object] | None = None
    captions: list[str] = []
    images: list[tuple[int, ImageBytes]] = []
    for name, data in members:
        own_key, suffix = _check_member(name, len(data))
        if own_key != key:
            raise DataError(f"member {name!r} lies where sample {key!r} is expected;", COPY_AGAIN)
        number, _, extension = suffix.rpartition(".")
        if extension in IMAGE_EXTENSIONS:
            images.append((_image_number(name, number), ImageBytes(extension, data)))
        elif extension == "txt":
            captions.append(_text(name, data))
        elif record is None:
            record = _json_object(name, data)
        else:
            raise DataError(f"sample {key!r} has two JSON members;", "merge them into one.")
    images.sort(key=lambda image: image[0])
    if [number for number, _ in images] != list(range(len(images))):
        raise DataError(f"the images of sample {key!r} are not numbered 0, 1, …;", _NAME_IMAGES)
    if record is None:
        raise DataError(f"sample {key!r} has no JSON member;", f"give it a {key}.json. {_SEE_DOCS}")
    return _sample(record, tuple(image for _, image in images), tuple(captions), key)


_NAME_IMAGES = "name them <key>.<i>.<ext>, or a single one <key>.<ext>."
_SEE_DOCS = "docs/shards.md says what a sample must hold."


def _check_member(name: str, num_bytes: int) -> tuple[str, str]:
    """Split a member name into key and suffix; refuse what is not on the allow-list."""
    key, suffix = split_name(name)
    extension = suffix.rpartition(".")[2]
    if extension not in IMAGE_EXTENSIONS | TEXT_EXTENSIONS or _leads_astray(key):
        allowed = ", ".join(sorted(IMAGE_EXTENSIONS | TEXT_EXTENSIONS))
        raise DataError(
            f"member {name!r} is not allowed in a shard;",
            f"leave it out or rename it: <key>.<type> with a type of {allowed}.",
        )
    if num_bytes > MAX_MEMBER_BYTES:
        raise DataError(
            f"member {name!r} has {num_bytes} bytes, more than {MAX_MEMBER_BYTES};",
            "make the image smaller before building the shards.",
        )
    return key, suffix


def _leads_astray(key: str) -> bool:
    """Whether a key names nothing, or would leave the folder that a shard is unpacked into."""
    parts = key.split("/")
    return not parts[-1] or key.startswith("/") or ".." in parts


def _image_number(name: str, number: str) -> int:
    if not number:
        return 0
    if not (number.isascii() and number.isdecimal() and len(number) <= 4):
        raise DataError(f"image {name!r} has no number in its name;", _NAME_IMAGES)
    return int(number)


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as fault:
        raise DataError(f"member {name!r} is not UTF-8: {fault.reason};", _WRITE_AGAIN) from fault


_WRITE_AGAIN = "correct it where the shard was made, then build or index the folder again."


def _json_object(name: str, data: bytes) -> dict[str, object]:
    try:
        record = json.loads(_text(name, data))
        # Escapes such as \ud800 stand for no character: no tokenizer takes them.
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as fault:
        raise DataError(
            f"member {name!r} holds half a surrogate pair, which is no text;", _WRITE_AGAIN
        ) from fault
    except (ValueError, RecursionError) as fault:
        raise DataError(f"member {name!r} is not valid JSON: {fault};", _WRITE_AGAIN) from fault
    if not isinstance(record, dict):
        raise DataError(f"member {name!r} holds no JSON object;", _WRITE_AGAIN)
    return record


_Role = Literal["user", "assistant"]
_Turn = tuple[_Role, str] | tuple[_Role, str, Annotated[int, Field(ge=0)]]


class _Record(BaseModel):
    """What the fields of a sample's JSON must be; others are nobody's and stay unread."""

    id: str = Field(min_length=1, description="a text")
    question: str = Field("", description="a text")
    answers: tuple[str, ...] = Field((), description="a list of texts")
    choices: tuple[str, ...] = Field((), description="a list of texts")
    turns: tuple[_Turn, ...] = Field(
        (), description="a list of [user or assistant, text], with images before a text [.., .., N]"
    )
    meta: dict[str, object] = Field({}, description="an object")


def _sample(
    record: dict[str, object], images: tuple[ImageBytes, ...], captions: tuple[str, ...], key: str
) -> Sample:
    """A checked Sample: JSON from a shard may hold anything."""
    record = {"id": key, **record}
    try:
        checked = _Record.model_validate(record)
    except ValidationError as fault:
        name = str(fault.errors()[0]["loc"][0])
        kind, shown = _Record.model_fields[name].description, json.dumps(record[name])
        raise DataError(
            f"sample {key!r}: '{name}' is {shown[:_SHOWN_CHARACTERS]}, not {kind};", _WRITE_AGAIN
        ) from fault
    expected = record.get("num_images", len(images))
    if expected != len(images):
        shown = json.dumps(expected)[:_SHOWN_CHARACTERS]
        raise DataError(f"sample {key!r} has {len(images)} images, {shown} expected;", COPY_AGAIN)
    turns = tuple(Turn(*turn) for turn in checked.turns)
    if sum(turn.images for turn in turns) > len(images):
        raise DataError(f"sample {key!r}: its turns have more images than it has;", _WRITE_AGAIN)
    sample = Sample(
        id=checked.id,
        images=images,
        turns=turns,
        question=checked.question,
        answers=checked.answers or captions,
        choices=checked.choices,
        meta=checked.meta,
    )
    return _answered(sample)


_SHOWN_CHARACTERS = 40


def _answered(sample: Sample) -> Sample:
    """A sample with something to learn, and to be scored against."""
    if not sample.answers and not sample.turns:
        raise DataError(f"sample {sample.id!r} has no answer;", f"fill 'answers'. {_SEE_DOCS}")
    if sample.choices and sample.answers and sample.answers[0] not in sample.choices:
        raise DataError(
            f"sample {sample.id!r}: its answer {sample.answers[0][:_SHOWN_CHARACTERS]!r} is none of"
            f" its {len(sample.choices)} choices;",
            "answers[0] must be one of them to the letter.",
        )
    return sample


# --- images -----------------------------------------------------------------------------------


def decode_image(data: bytes, sample_id: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as a person sees it, in RGB: EXIF rotation applied, transparency on white.

    The size in the header is checked before any pixel is decoded, and a truncated file is an
    error: a half-grey image would train silently.
    """
    # A global that other libraries switch on; here truncation must never pass.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as image:
            fault = _size_fault(*image.size, max_pixels)
            if not fault:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as bomb:
        raise DataError(f"sample {sample_id!r}: {bomb};", _MAKE_SMALLER) from bomb
    except _BROKEN_IMAGE as broken:
        unknown = isinstance(broken, UnidentifiedImageError)
        why = "of another format, or cut" if unknown else broken
        raise DataError(
            f"sample {sample_id!r}: an image of {len(data)} bytes cannot be decoded ({why});",
            "it must be an intact JPEG, PNG or WebP file.",
        ) from broken
    raise DataError(f"sample {sample_id!r}: {fault};", _MAKE_SMALLER)


def plain_image(image: Image.Image, sample_id: str) -> Image.Image:
    """An image that another program has opened, as `decode_image` would give it."""
    fault = _size_fault(*image.size, MAX_PIXELS)
    if fault:
        raise DataError(f"sample {sample_id!r}: {fault};", _MAKE_SMALLER)
    return _to_rgb(ImageOps.exif_transpose(image))


def image_size(data: bytes, sample_id: str) -> tuple[int, int]:
    """Width and height of the decoded image, from its header alone."""
    try:
        with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as image:
            (width, height), turned = image.size, image.getexif().get(ExifTags.Base.Orientation, 1)
    except _BROKEN_IMAGE:
        return decode_image(data, sample_id).size  # says what is wrong
    return (height, width) if turned > _UPRIGHT else (width, height)


_UPRIGHT = 4  # EXIF orientations up to it keep width and height


def _size_fault(width: int, height: int, max_pixels: int) -> str:
    size = f"an image of {width} x {height} pixels"
    short, long = sorted((width, height))
    if width * height > max_pixels:
        return f"{size} exceeds {max_pixels}"
    if long > MAX_SIDE_PIXELS:
        return f"{size} has a side of more than {MAX_SIDE_PIXELS}"
    if long > MAX_ASPECT_RATIO * short:
        return f"{size} is more than {MAX_ASPECT_RATIO} times as long as wide"
    return ""


_MAKE_SMALLER = "scale it down or crop it before building the shards."


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB from any mode. 16 bit keeps the high byte; Pillow would clip at 255 instead."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I"):
        high_byte = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255)
        return Image.fromarray(high_byte.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")
