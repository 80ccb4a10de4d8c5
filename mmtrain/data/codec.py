"""Samples to bytes and back, without trusting the bytes.

A sample is one JSON member `<key>.json` and its pictures `<key>.<i>.<ext>`, in plain tar framing,
so that stock webdataset reads it too. Nothing here unpickles, decompresses a stream of unknown
size, follows a link or runs a decoder outside the allow-list.
"""

from __future__ import annotations

import json
import struct
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from hashlib import sha256
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

from mmtrain.errors import DataError
from mmtrain.tasks.interface import ImageBytes, Sample, Turn

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
TEXT_EXTENSIONS = frozenset({"json", "txt"})
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
MAX_MEMBER_BYTES = 64 * 2**20
# Well below the size at which Pillow begins to warn; 24 bits per pixel make 192 MB of this.
MAX_PIXELS = 64_000_000
BLOCK_BYTES = 512
DIGEST_BYTES = 16

Member = tuple[str, bytes]

# What Pillow's readers raise on bytes that are no intact picture.
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
    """Identity of a sample's encoded pictures; all zero bytes for a sample without one."""
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
    """The named members of a sample: `<key>.json`, then its pictures."""
    record = {
        "id": sample.id,
        "num_images": len(sample.images),
        "question": sample.question,
        "answers": list(sample.answers),
        "choices": list(sample.choices),
        "turns": [[turn.role, turn.text] for turn in sample.turns],
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


def decode_sample(members: Sequence[Member], key: str) -> Sample:
    """The sample that a key's members hold. A `txt` member is an answer in plain text."""
    record: dict[str, Any] | None = None
    captions: list[str] = []
    images: list[tuple[int, ImageBytes]] = []
    for name, data in members:
        stem, suffix = _check_member(name, len(data))
        if stem != key:
            raise DataError(f"member {name!r} lies where sample {key!r} is expected;", _COPY_AGAIN)
        number, _, extension = suffix.rpartition(".")
        if extension in IMAGE_EXTENSIONS:
            images.append((_image_number(name, number), ImageBytes(extension, data)))
        elif extension == "txt":
            captions.append(_text(name, data))
        elif record is None:
            record = _json_object(name, data)
        else:
            raise DataError(f"sample {key!r} has two JSON members;", _COPY_AGAIN)
    if [number for number, _ in images] != list(range(len(images))):
        raise DataError(f"the pictures of sample {key!r} are not numbered 0, 1, …;", _COPY_AGAIN)
    if record is None:
        raise DataError(f"sample {key!r} has no JSON member;", _COPY_AGAIN)
    return _sample(record, tuple(image for _, image in images), tuple(captions), key)


_COPY_AGAIN = "the shard is damaged: copy or build it again."


def _check_member(name: str, num_bytes: int) -> tuple[str, str]:
    """Split a member name into key and suffix; refuse what is not on the allow-list."""
    key, _, suffix = name.partition(".")
    extension = suffix.rpartition(".")[2]
    if extension not in IMAGE_EXTENSIONS | TEXT_EXTENSIONS or not key or "/" in name:
        allowed = ", ".join(sorted(IMAGE_EXTENSIONS | TEXT_EXTENSIONS))
        raise DataError(f"member {name!r} is not allowed in a shard;", f"allowed types: {allowed}.")
    if num_bytes > MAX_MEMBER_BYTES:
        raise DataError(
            f"member {name!r} has {num_bytes} bytes, more than {MAX_MEMBER_BYTES};",
            "make the picture smaller before building the shards.",
        )
    return key, suffix


def _image_number(name: str, number: str) -> int:
    if not (number.isascii() and number.isdecimal() and len(number) <= 4):
        raise DataError(f"picture {name!r} has no number in its name;", "name it <key>.<i>.<ext>.")
    return int(number)


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as fault:
        raise DataError(f"member {name!r} is not UTF-8: {fault.reason};", _COPY_AGAIN) from fault


def _json_object(name: str, data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(_text(name, data))
    except (ValueError, RecursionError) as fault:
        raise DataError(f"member {name!r} is not valid JSON: {fault};", _COPY_AGAIN) from fault
    if not isinstance(record, dict):
        raise DataError(f"member {name!r} holds no JSON object;", _COPY_AGAIN)
    return record


def _sample(
    record: dict[str, Any], images: tuple[ImageBytes, ...], captions: tuple[str, ...], key: str
) -> Sample:
    """A checked Sample: JSON from a shard may hold anything."""
    texts = {name: record.get(name, []) for name in ("answers", "choices")}
    turns, meta = record.get("turns", []), record.get("meta", {})
    sample_id, question = record.get("id", key), record.get("question", "")
    well_formed = (
        isinstance(sample_id, str)
        and isinstance(question, str)
        and isinstance(meta, dict)
        and all(_is_text_list(value) for value in texts.values())
        and isinstance(turns, list)
        and all(_is_text_list(turn) and len(turn) == 2 for turn in turns)
    )
    if not well_formed:
        raise DataError(f"the JSON of sample {key!r} has a field of a wrong type;", _COPY_AGAIN)
    if record.get("num_images", len(images)) != len(images):
        raise DataError(
            f"sample {sample_id!r} has {len(images)} pictures, {record['num_images']} expected;",
            _COPY_AGAIN,
        )
    return Sample(
        id=sample_id,
        images=images,
        turns=tuple(Turn(role, text) for role, text in turns),
        question=question,
        answers=tuple(texts["answers"]) or captions,
        choices=tuple(texts["choices"]),
        meta=meta,
    )


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# --- members <-> tar bytes ----------------------------------------------------------------------


def pack_members(members: Sequence[Member]) -> bytes:
    """Tar bytes of members, with the same header for the same content on any machine."""
    parts = []
    for name, data in members:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        parts += [info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % BLOCK_BYTES)]
    return b"".join(parts)


def parse_header(block: bytes) -> tuple[str, int]:
    """Name and size of the regular file that a 512-byte tar header announces."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError, ValueError) as fault:
        raise DataError(f"no valid tar header ({fault});", _COPY_AGAIN) from fault
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.size < 0:
        raise DataError(f"member {info.name!r} is not a regular file;", _COPY_AGAIN)
    return info.name, info.size


def unpack_members(record: bytes) -> list[Member]:
    """The members in a stretch of tar bytes, which must hold whole members only."""
    members, position = [], 0
    while position < len(record):
        name, size = parse_header(record[position : position + BLOCK_BYTES])
        start = position + BLOCK_BYTES
        if start + size > len(record):
            raise DataError(f"member {name!r} is cut off;", _COPY_AGAIN)
        members.append((name, record[start : start + size]))
        position = start + size + -size % BLOCK_BYTES
    return members


# --- pictures -----------------------------------------------------------------------------------


def decode_image(data: bytes, sample_id: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture as a person sees it, in RGB: EXIF rotation applied, transparency on white.

    The size in the header is checked before any pixel is decoded, and a truncated file is an
    error: a half-grey picture would train silently.
    """
    # A global that other libraries switch on; here truncation must never pass.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height <= max_pixels:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as fault:
        raise DataError(f"sample {sample_id!r}: {fault};", _MAKE_SMALLER) from fault
    except _BROKEN_IMAGE as fault:
        raise DataError(
            f"sample {sample_id!r}: a picture of {len(data)} bytes cannot be decoded ({fault});",
            "it must be an intact JPEG, PNG or WebP file.",
        ) from fault
    raise DataError(
        f"sample {sample_id!r}: a picture of {width} x {height} pixels exceeds {max_pixels};",
        _MAKE_SMALLER,
    )


_MAKE_SMALLER = "scale it down before building the shards."


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
