"""Reading shards: any sample by its number in one `pread`, checked against what was built."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from errno import ENOENT
from pathlib import Path

import numpy as np

from mmtrain.data.cache import Blob, ShardCache
from mmtrain.data.codec import decode_sample, short_digest
from mmtrain.data.manifest import Manifest, ShardInfo, read_index, read_manifest, surplus_shards
from mmtrain.data.order import sample_key
from mmtrain.data.remote import Place, RemoteFolder, place_of_shards
from mmtrain.data.tar import unpack_members
from mmtrain.errors import DataError
from mmtrain.files import open_regular, read_at
from mmtrain.tasks.interface import Sample

# Far below the usual limit of 1024 open files, which sockets and libraries share.
_MAX_OPEN_SHARDS = 256
_NAMED_AT_MOST = 5


class _ShardFiles:
    """Open shard files, shared by threads: `pread` has no position of its own."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._descriptors)

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`; fewer only where the file ends."""
        descriptor = self._descriptors.get(shard)
        if descriptor is not None:
            return read_at(descriptor, offset, size)
        descriptor = open_regular(self._paths[shard])
        with self._lock:
            kept = shard not in self._descriptors and len(self._descriptors) < _MAX_OPEN_SHARDS
            if kept:
                self._descriptors[shard] = descriptor
        try:
            return read_at(descriptor, offset, size)
        finally:
            if not kept:
                os.close(descriptor)


class _RemoteFiles:
    """Shards of a remote folder, in the cache. None stays open: what is evicted frees its room."""

    def __init__(self, cache: ShardCache, blobs: Sequence[Blob]) -> None:
        self.cache = cache
        self.blobs = blobs

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """As of a file here; waits for a shard that is on its way."""
        descriptor = self.cache.open(self.blobs[shard])
        try:
            return read_at(descriptor, offset, size)
        finally:
            os.close(descriptor)


def _close_all(descriptors: dict[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


@dataclass(frozen=True, eq=False)
class ShardFolder:
    """One split in shards, opened for reading. `digest` names its whole content."""

    path: Place
    manifest: Manifest
    digest: str  # sha256 of manifest.json
    index: np.ndarray = field(repr=False)  # rows of INDEX_DTYPE, read-only
    _files: _ShardFiles | _RemoteFiles = field(repr=False)

    @classmethod
    def open(
        cls,
        path: str | Path | RemoteFolder,
        task: str | None = None,
        cache: ShardCache | None = None,
    ) -> ShardFolder:
        """Open a folder after the cheap checks: manifest, index, names and sizes of the shards.

        Shards of another task than `task` are refused. Those of a URL come through `cache`.
        """
        folder = place_of_shards(path)
        manifest, digest = read_manifest(folder, task)
        problems = _size_problems(folder, manifest)
        if problems:
            more = len(problems) - _NAMED_AT_MOST
            raise DataError(
                f"shard folder '{folder}': {'; '.join(problems[:_NAMED_AT_MOST])}"
                f"{f'; and {more} more' if more > 0 else ''};",
                f"copy or build it again; `mmtrain shards verify {folder}` lists everything.",
            )
        if isinstance(folder, RemoteFolder):
            cache = cache or ShardCache.at()
            remote = _RemoteFiles(cache, [blob_of(folder, shard) for shard in manifest.shards])
            return cls(folder, manifest, digest, read_index(folder, manifest, cache), remote)
        files = _ShardFiles([folder / shard.name for shard in manifest.shards])
        return cls(folder, manifest, digest, read_index(folder, manifest), files)

    @property
    def blobs(self) -> Sequence[Blob]:
        """The shards, where they must be fetched."""
        return self._files.blobs if isinstance(self._files, _RemoteFiles) else ()

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> Sample:
        """Sample number `i`, at the cost of one read wherever it lies. Safe from any thread."""
        if not 0 <= i < len(self.index):
            raise IndexError(f"sample {i} of {len(self.index)}")
        row = self.index[i]
        shard, offset, size = int(row["shard"]), int(row["offset"]), int(row["size"])
        name = self.manifest.shards[shard].name
        where = f"sample {i} at byte {offset} of '{self.path / name}'"
        try:
            record = self._record(shard, offset, size, row["record_digest"].tobytes())
        except OSError as fault:
            raise DataError(f"{where} is not readable: {fault.strerror};", self._remedy) from fault
        if record is None:
            raise DataError(f"{where} is not what was built (checksum differs);", self._remedy)
        try:
            sample = decode_sample(unpack_members(record))
        except DataError as fault:
            raise DataError(f"{where}: {fault.fault}", fault.remedy) from fault
        if sample_key(sample.id) != row["id_key"]:
            raise DataError(f"{where} has the id {sample.id!r}, the index another;", self._remedy)
        return sample

    def _record(self, shard: int, offset: int, size: int, digest: bytes) -> bytes | None:
        """All bytes of a sample. The digest covers headers, text and images: nothing altered gets
        past it. A damaged copy of a remote shard is fetched anew.
        """
        record = self._files.read(shard, offset, size)
        if short_digest([record]) == digest:
            return record
        if isinstance(self._files, _ShardFiles):
            return None
        self._files.cache.drop(self._files.blobs[shard])
        record = self._files.read(shard, offset, size)
        return record if short_digest([record]) == digest else None

    def find(self, sample_id: str) -> Sample:
        """The sample of this id."""
        found = np.flatnonzero(self.index["id_key"] == sample_key(sample_id))
        if len(found) != 1:
            raise DataError(
                f"'{self.path}' has no sample {sample_id!r};",
                "give the folder that was asked about as --data.",
            )
        return self.read(int(found[0]))

    @property
    def _remedy(self) -> str:
        return f"run `mmtrain shards verify {self.path}`, then copy or build it again."


def blob_of(folder: RemoteFolder, shard: ShardInfo) -> Blob:
    """A shard of a remote folder, as it is fetched."""
    return Blob(folder, shard.name, shard.bytes, shard.sha256)


def _size_problems(folder: Place, manifest: Manifest) -> list[str]:
    """What file names and sizes alone reveal: missing, cut or surplus shards."""
    listed = _listed(folder) if isinstance(folder, RemoteFolder) else None
    if listed == {}:
        return []
    problems = []
    for shard in manifest.shards:
        try:
            num_bytes = _num_bytes(folder, shard.name, listed)
        except OSError as fault:
            problems.append(f"{shard.name} is missing ({fault.strerror})")
            continue
        if num_bytes != shard.bytes:
            problems.append(f"{shard.name} has {num_bytes} bytes instead of {shard.bytes}")
    surplus = surplus_shards(folder, manifest)
    return problems + [f"{name} is not in the manifest" for name in surplus]


def _listed(folder: RemoteFolder) -> Mapping[str, int]:
    """Sizes by name; none where who may read may not list."""
    try:
        return folder.sizes()
    except DataError:
        return {}


def _num_bytes(folder: Place, name: str, listed: Mapping[str, int] | None) -> int:
    if listed is None:
        return (Path(str(folder)) / name).stat().st_size
    if name not in listed:
        raise FileNotFoundError(ENOENT, "it is not listed")
    return listed[name]
