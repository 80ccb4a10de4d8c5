"""Files of remote shard folders on this host: fetched whole, checked, bounded, shared by runs.

A file is named by its sha256, so folders and runs that hold the same shard share it. Whoever
fetches one holds a lock on its part file; the others wait, and find it.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from math import inf
from pathlib import Path

from mmtrain.config.schema import DEFAULT_CACHE_GIB
from mmtrain.data.remote import RemoteFolder
from mmtrain.errors import DataError
from mmtrain.files import cache_folder, file_sha256, keep_in_cache, lock, open_regular, read_regular

GIB = 2**30
_NAME = re.compile(r"(?P<sha256>[0-9a-f]{64})\.(tar|npy|(?P<num_bytes>[0-9]+)\.part)")
_USE_NOTED_EVERY_S = 30.0


@dataclass(frozen=True)
class Blob:
    """A shard of a remote folder, as its manifest says it is."""

    folder: RemoteFolder
    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class _Entry:
    path: Path
    sha256: str
    num_bytes: int  # of what is on its way: that it will have
    used_s: float
    on_its_way: bool

    def remove(self) -> bool:
        """Whether it is gone: what somebody fetches stays, what a killed process left goes."""
        if not self.on_its_way:
            self.path.unlink(missing_ok=True)
            return True
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            abandoned = lock(descriptor)
            if abandoned:
                self.path.unlink(missing_ok=True)
            return abandoned
        finally:
            os.close(descriptor)


@dataclass(eq=False)
class ShardCache:
    """A folder of at most `max_bytes`, beside what is on its way.

    What was used least recently goes first, and what is `needed` last.
    """

    folder: Path
    max_bytes: int
    needed: frozenset[str] = field(default=frozenset())  # digests

    @classmethod
    def at(cls, folder: str | None = None, gib: float = DEFAULT_CACHE_GIB) -> ShardCache:
        """The cache in a folder; without one, in this user's own."""
        place = Path(folder).expanduser() if folder else cache_folder() / "shards"
        return _shared(place.absolute(), int(gib * GIB))

    def holds(self, sha256: str) -> bool:
        """Whether a shard need not be fetched."""
        return self._path(sha256).is_file()

    @property
    def held_bytes(self) -> int:
        """In the folder now, with what is on its way."""
        return sum(entry.num_bytes for entry in self._entries()) if self.folder.is_dir() else 0

    @property
    def free_bytes(self) -> int:
        """On the disk that the folder is, or will be, on."""
        places = (self.folder, *self.folder.parents)
        return shutil.disk_usage(next(place for place in places if place.exists())).free

    def open(self, blob: Blob) -> int:
        """A descriptor of the checked file, which is fetched where it is not there."""
        try:
            descriptor = self._found(blob)
            return self._fetched(blob) if descriptor is None else descriptor
        except OSError as fault:
            raise DataError(
                f"cannot keep '{blob.folder / blob.name}' in '{self.folder}': {fault.strerror};",
                "make room and rights there, lower data.cache_gib, or set data.cache_dir to"
                " another folder.",
            ) from fault

    def drop(self, blob: Blob) -> None:
        """Forget a file that turned out to be damaged."""
        with suppress(OSError):
            self._path(blob.sha256).unlink()

    def read(self, folder: RemoteFolder, name: str, max_bytes: int, digest: str) -> bytes:
        """A smaller file, which is kept, too, if it is what its digest says."""
        kept = self.folder / f"{digest}.npy"
        with suppress(OSError):
            data = read_regular(kept, max_bytes)
            if sha256(data).hexdigest() == digest:
                return data
        data = folder.read(name, max_bytes)
        if sha256(data).hexdigest() == digest:
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._make_room(len(data))
                keep_in_cache(kept, data)
        return data

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.tar"

    def _found(self, blob: Blob) -> int | None:
        """An open file of the right size. Bytes inside are checked as each sample is read."""
        try:
            descriptor = open_regular(self._path(blob.sha256))
        except FileNotFoundError:
            return None
        stat = os.fstat(descriptor)
        if stat.st_size != blob.num_bytes:
            os.close(descriptor)
            return None
        if time.time() - stat.st_atime > _USE_NOTED_EVERY_S:
            with suppress(OSError):  # of a cache that may only be read
                os.utime(descriptor, ns=(time.time_ns(), stat.st_mtime_ns))
        return descriptor

    def _fetched(self, blob: Blob) -> int:
        if blob.num_bytes > self.max_bytes:
            raise DataError(
                f"'{blob.folder / blob.name}' has {blob.num_bytes / GIB:.3g} GiB, more than the"
                f" cache of {self.max_bytes / GIB:.3g} GiB;",
                "raise data.cache_gib, or build smaller shards (--samples-per-shard).",
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{blob.sha256}.{blob.num_bytes}.part"
        with _alone_with(part):
            descriptor = self._found(blob)
            if descriptor is not None:  # somebody else fetched it meanwhile
                part.unlink(missing_ok=True)
                return descriptor
            try:
                self._make_room()
                _fetch_checked(blob, part)
                descriptor = open_regular(part)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            part.replace(self._path(blob.sha256))
            return descriptor

    def _make_room(self, num_bytes: int = 0) -> None:
        """Until the folder, with what is on its way into it and `num_bytes` more, fits."""
        with _held(self.folder):
            entries = list(self._entries())
            excess = sum(entry.num_bytes for entry in entries) + num_bytes - self.max_bytes
            for entry in sorted(entries, key=lambda one: (one.sha256 in self.needed, one.used_s)):
                if excess <= 0:
                    return
                with suppress(FileNotFoundError):
                    excess -= entry.num_bytes if entry.remove() else 0

    def _entries(self) -> Iterator[_Entry]:
        """Files of ours: whatever else lies in the folder is left alone."""
        for path in self.folder.iterdir():
            named = _NAME.fullmatch(path.name)
            with suppress(FileNotFoundError):
                if named is not None:
                    stat = path.stat()
                    coming = named["num_bytes"]
                    size = int(coming) if coming else stat.st_size
                    yield _Entry(path, named["sha256"], size, stat.st_atime, bool(coming))


# One object for all folders of a process: it knows what all of them need.
@lru_cache(maxsize=8)
def _shared(folder: Path, max_bytes: int) -> ShardCache:
    return ShardCache(folder, max_bytes)


def _fetch_checked(blob: Blob, part: Path) -> None:
    """Twice at most: what comes twice with another digest is another file."""
    for last in (False, True):
        blob.folder.fetch(blob.name, part, blob.num_bytes)
        found = file_sha256(part)
        if found == blob.sha256:
            return
        if last:
            raise DataError(
                f"'{blob.folder / blob.name}' is not the shard that its manifest names (sha256"
                f" {found[:12]}… instead of {blob.sha256[:12]}…);",
                "send the folder again: `mmtrain shards push DIR URL --overwrite`.",
            )


@contextmanager
def _alone_with(part: Path) -> Iterator[None]:
    """Hold the part file of a shard; waits for whoever has it."""
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            lock(descriptor, inf)
            if _is_still(part, descriptor):
                yield
                return
        finally:
            os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the name still means the open file: its last holder may have renamed it."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """One process at a time decides what goes."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        lock(descriptor, inf)
        yield
    finally:
        os.close(descriptor)
