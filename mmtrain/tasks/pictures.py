"""Pictures as people have them, as the encoded bytes that shards hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b, sha256
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageFile, ImageOps

from mmtrain.errors import MmtrainError
from mmtrain.safe_text import presentable
from mmtrain.tasks.interface import Dropped, ImageBytes

# Formats that shards hold as they are; whatever else Pillow opens becomes PNG, which loses nothing.
# What cameras write with a second picture inside, MPO, is a JPEG to all who read one.
_KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
# Nothing else is tried on bytes from outside: some of Pillow's readers start other programs.
_READ = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MOST_BYTES = 1 << 30
_JPEG_QUALITY = 95
_REMOTE = ("http://", "https://", "s3://", "gs://", "data:")
DIGEST_BYTES = 16
_MOST_DIGESTS = 2_000_000

Picture = Path | bytes
_unread: ContextVar[bool] = ContextVar("_unread", default=False)


class Unusable(MmtrainError):
    """Why a sample cannot be built from its raw files; the same text for all of a kind."""

    def __init__(self, fault: str, remedy: str, detail: str = "") -> None:
        super().__init__(fault, remedy)
        self.detail = presentable(detail)

    def dropped(self, sample_id: str) -> Dropped:
        """The sample that this is the end of."""
        return Dropped(sample_id, f"{self.fault}. {self.remedy}", self.detail)


def locate(name: str, folder: Path) -> Path:
    """A picture by the name that data give it: below its folder, and nowhere else."""
    if name.startswith(_REMOTE):
        raise Unusable("its picture is an address, not a file", "Download them first.", name)
    path = folder / name
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a name too long for any file
        is_file = False
    if "\0" in name or not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise Unusable(
            "its picture lies outside of the folder", "Give --images a folder above.", name
        )
    if not is_file:
        remedy = "Give --images the folder that names start from."
        raise Unusable("its picture is not there", remedy, name)
    return path


def picture_digest(picture: Picture) -> bytes:
    """What tells equal pictures, whatever they are called."""
    if isinstance(picture, bytes):
        return sha256(picture).digest()[:DIGEST_BYTES]
    stat = picture.stat()
    # Each split asks for all of them again. Paths themselves would fill the memory.
    named = f"{picture}\0{stat.st_size}\0{stat.st_mtime_ns}".encode("utf-8", "surrogateescape")
    key = int.from_bytes(blake2b(named, digest_size=8).digest(), "little")
    if key not in _digests:
        if len(_digests) >= _MOST_DIGESTS:
            _digests.clear()
        _digests[key] = sha256(picture.read_bytes()).digest()[:DIGEST_BYTES]
    return _digests[key]


_digests: dict[int, bytes] = {}


@contextmanager
def unread() -> Iterator[None]:
    """Within it tasks read rows only: pictures are empty, and damaged ones go unnoticed."""
    before = _unread.set(True)
    try:
        yield
    finally:
        _unread.reset(before)


def encoded(picture: Picture, max_side: int | None = None) -> ImageBytes:
    """A picture's own bytes where shards take them; what is longer than asked for, made smaller."""
    if _unread.get():
        return ImageBytes("png", b"")
    name = "" if isinstance(picture, bytes) else picture.name
    if not isinstance(picture, bytes) and picture.stat().st_size > _MOST_BYTES:
        raise Unusable("its picture is too large", "Make it smaller or leave it out.", name)
    data = picture if isinstance(picture, bytes) else picture.read_bytes()
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(BytesIO(data), formats=_READ) as image:
            kept = _KEPT.get(str(image.format))
            fits = max_side is None or max(image.size) <= max_side
            if kept and fits:
                return ImageBytes(kept, data)
            if max_side is not None and not fits:
                return _smaller(image, max_side)
            return _as_png(ImageOps.exif_transpose(image))
    except Exception as fault:  # of such bytes, Pillow's readers raise whatever they do
        if isinstance(fault, Unusable):
            raise
        kind = "too large" if isinstance(fault, Image.DecompressionBombError) else "damaged"
        raise Unusable(
            f"its picture is {kind}, or none", "Correct it or leave it out.", name
        ) from fault


def _smaller(image: Image.Image, max_side: int) -> ImageBytes:
    """Within a square of this side, upright; JPEG reads large files at a fraction of their size."""
    image.draft("RGB", (max_side, max_side))
    upright = ImageOps.exif_transpose(image)
    upright.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    if image.format != "JPEG" or upright.mode != "RGB":
        return _as_png(upright)
    file = BytesIO()
    upright.save(file, "JPEG", quality=_JPEG_QUALITY)
    return ImageBytes("jpg", file.getvalue())


def _as_png(image: Image.Image) -> ImageBytes:
    file = BytesIO()
    if image.mode == "F":
        raise Unusable("its picture holds fractions, no colours", "Convert it first.")
    if image.mode.startswith("I"):
        # The high byte, as of any 16 bits; Pillow's own conversion clips.
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    elif image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        image = image.convert("RGB")
    image.save(file, "PNG")
    return ImageBytes("png", file.getvalue())
