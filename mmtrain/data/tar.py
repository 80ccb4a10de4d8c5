"""Tar framing, read without trusting it: plain files and folders, and nothing that leads elsewhere.

Tar readers stop without a word at a damaged header (an open CPython fault), so members are read
here, and their number is never taken from what a reader happens to return.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

from mmtrain.errors import DataError

BLOCK_BYTES = 512
COPY_AGAIN = "the shard is damaged: copy or build it again."
_WRITE_PLAIN = "write the shard with webdataset's TarWriter or `tar --format=ustar`."
_MAX_EXTENSION_BYTES = 64 * 2**10
_CHUNK_BYTES = 2**20

Member = tuple[str, bytes]


@dataclass(frozen=True)
class MemberPlace:
    """Where a file lies in a tar: from its first header to the end of its last block."""

    name: str
    offset: int
    data: int
    size: int
    end: int


@dataclass(frozen=True)
class Run:
    """Neighbouring members of one key: a whole sample in a healthy shard."""

    key: str
    offset: int
    end: int


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix of a member, cut as webdataset cuts them: at the file name's first dot."""
    folder, slash, file_name = name.rpartition("/")
    stem, _, suffix = file_name.partition(".")
    return folder + slash + stem, suffix.lower()


def list_members(file: BinaryIO, num_bytes: int) -> tuple[list[MemberPlace], str | None]:
    """All files by their headers, and what is wrong if their row does not end well."""
    places: list[MemberPlace] = []
    position = 0
    while position < num_bytes:
        if not any(_read(file, position, BLOCK_BYTES)):
            return places, _tail_fault(file, position)
        try:
            place, is_file = _next_place(file, position, num_bytes)
        except DataError as fault:
            return places, f"at byte {position}: {str(fault).rstrip('.')}"
        if is_file:
            places.append(place)
        position = place.end
    return places, f"no end mark at byte {num_bytes}"


def runs(places: Iterable[MemberPlace]) -> list[Run]:
    """Neighbours of one key joined: one run per sample in a healthy shard."""
    joined: list[Run] = []
    for place in places:
        key = split_name(place.name)[0]
        if joined and joined[-1].key == key:
            joined[-1] = Run(key, joined[-1].offset, place.end)
        else:
            joined.append(Run(key, place.offset, place.end))
    return joined


def unpack_members(record: bytes) -> list[Member]:
    """The files in a stretch of tar bytes, which must hold whole members only."""
    file, members, position = BytesIO(record), [], 0
    while position < len(record):
        place, is_file = _next_place(file, position, len(record))
        if is_file:
            members.append((place.name, record[place.data : place.data + place.size]))
        position = place.end
    return members


def _next_place(file: BinaryIO, position: int, num_bytes: int) -> tuple[MemberPlace, bool]:
    """The member whose header lies at `position`, and whether it is a file (else a folder)."""
    start, name = position, None
    header = _parse_header(_read(file, position, BLOCK_BYTES))
    if header.type == tarfile.XHDTYPE:  # Python's tarfile writes one for times in fractions
        size = min(header.size, _MAX_EXTENSION_BYTES)
        name = _extended_name(_read(file, position + BLOCK_BYTES, size))
        position += BLOCK_BYTES + header.size + -header.size % BLOCK_BYTES
        header = _parse_header(_read(file, position, BLOCK_BYTES))
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
        raise DataError(f"member {header.name!r} is not a regular file;", _WRITE_PLAIN)
    is_file = header.type != tarfile.DIRTYPE
    size = header.size if is_file else 0
    data = position + BLOCK_BYTES
    place = MemberPlace(name or header.name, start, data, size, data + size + -size % BLOCK_BYTES)
    if place.end > num_bytes:
        raise DataError(f"member {place.name!r} is cut off at byte {num_bytes};", COPY_AGAIN)
    return place, is_file


def _parse_header(block: bytes) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError, ValueError) as fault:
        raise DataError(f"no valid tar header ({fault});", COPY_AGAIN) from fault
    if info.size < 0:
        raise DataError(f"member {info.name!r} has a negative size;", COPY_AGAIN)
    return info


def _extended_name(data: bytes) -> str | None:
    """The name in an extended header; times and owners in it are of no use here."""
    name = None
    while data:
        length, _, rest = data.partition(b" ")
        num_bytes = int(length) if length.isdigit() and len(length) < 6 else 0
        keyword, equals, value = data[len(length) + 1 : num_bytes].partition(b"=")
        if not equals or not rest or num_bytes > len(data):
            raise DataError("an extended header that cannot be read;", COPY_AGAIN)
        if keyword in (b"size", b"linkpath") or keyword.startswith(b"GNU.sparse"):
            raise DataError(f"an extended header with {keyword!r};", _WRITE_PLAIN)
        if keyword == b"path":
            name = value.removesuffix(b"\n").decode("utf-8", "replace")
        data = data[num_bytes:]
    return name


def _tail_fault(file: BinaryIO, position: int) -> str | None:
    """After an end mark everything must be zero: a zeroed header looks like an end mark."""
    file.seek(position)
    while chunk := file.read(_CHUNK_BYTES):
        if any(chunk):
            return f"data follows the end mark at byte {position} (a zeroed header?)"
    return None


def _read(file: BinaryIO, position: int, num_bytes: int) -> bytes:
    file.seek(position)
    return file.read(num_bytes)
