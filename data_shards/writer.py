"""Samples into a shard folder: tars, index and manifest, published by one rename.

The same samples give the same bytes on any machine: no times, owners or host names in the headers.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmtrain.data.codec import (
    BLOCK_BYTES,
    decode_image,
    encode_sample,
    image_digest,
    num_characters,
    pack_members,
    short_digest,
)
from mmtrain.data.manifest import (
    FORMAT_VERSION,
    INDEX_DTYPE,
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    ShardInfo,
    sample_name,
    shard_name,
)
from mmtrain.errors import DataError
from mmtrain.tasks.interface import Sample

DEFAULT_SAMPLES_PER_SHARD = 2000
_TAR_RECORD_BYTES = 10240  # tar pads a file to whole records of 20 blocks


class ShardWriter:
    """Writes samples into an existing empty folder; `finish` adds the index and the manifest."""

    def __init__(self, folder: Path, samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD) -> None:
        self._folder = folder
        self._samples_per_shard = samples_per_shard
        self._ids: set[str] = set()
        self._rows: list[tuple[Any, ...]] = []
        self._shards: list[ShardInfo] = []
        self._tar = _Tar(folder / shard_name(0))

    def add(self, sample: Sample) -> None:
        """Append a sample after decoding its pictures once: a broken one is noticed here."""
        if sample.id in self._ids:
            raise DataError(
                f"two samples have the id {sample.id!r};", "ids must be unique within a split."
            )
        for image in sample.images:
            decode_image(image.data, sample.id)
        self._ids.add(sample.id)
        members = encode_sample(sample, sample_name(len(self._rows)))
        record = pack_members(members)
        self._rows.append(
            (
                len(self._shards),
                self._tar.bytes,
                len(record),
                num_characters(sample),
                np.frombuffer(image_digest(sample), dtype=np.uint8),
                np.frombuffer(short_digest([record]), dtype=np.uint8),
            )
        )
        self._tar.append(record, num_members=len(members))
        if self._tar.samples == self._samples_per_shard:
            self._close_shard()

    def finish(
        self, task: str, split: str, seed: int, limit: int | None, build_options: Mapping[str, Any]
    ) -> Manifest:
        """Write what is left, then the index, then the manifest that pins all of it."""
        if self._tar.samples:
            self._close_shard()
        if not self._rows:
            raise DataError(
                f"task '{task}' yields no sample for split '{split}';",
                "check the raw folder and the build options.",
            )
        buffer = BytesIO()
        np.save(buffer, np.array(self._rows, dtype=INDEX_DTYPE), allow_pickle=False)
        write_synced(self._folder / INDEX_NAME, buffer.getvalue())
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            task=task,
            split=split,
            seed=seed,
            limit=limit,
            build_options=dict(build_options),
            samples=len(self._rows),
            shards=tuple(self._shards),
            index_sha256=sha256(buffer.getvalue()).hexdigest(),
        )
        write_synced(self._folder / MANIFEST_NAME, manifest.to_json().encode())
        return manifest

    def _close_shard(self) -> None:
        self._shards.append(self._tar.close())
        self._tar = _Tar(self._folder / shard_name(len(self._shards)))


class _Tar:
    """One shard being written; the file appears with its first sample."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._digest = sha256()
        self.bytes = 0
        self.samples = 0
        self._members = 0

    def append(self, record: bytes, num_members: int) -> None:
        """Add all members of one sample."""
        if self._file is None:
            self._file = self._path.open("wb")
        self._write(record)
        self.samples += 1
        self._members += num_members

    def close(self) -> ShardInfo:
        """End the tar, wait until it is on the disk, and say what it holds."""
        end_mark_bytes = 2 * BLOCK_BYTES
        self._write(bytes(end_mark_bytes + -(self.bytes + end_mark_bytes) % _TAR_RECORD_BYTES))
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return ShardInfo(
            name=self._path.name,
            samples=self.samples,
            members=self._members,
            bytes=self.bytes,
            sha256=self._digest.hexdigest(),
        )

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._digest.update(data)
        self.bytes += len(data)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries (new names, renames) are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def published(final: Path) -> Iterator[Path]:
    """A folder beside `final` that takes its name only if the block ends well.

    A killed build leaves a `.partial` folder that the next build removes; readers never see it.
    """
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        sync_folder(partial)
        _replace(partial, final)
    except OSError as fault:
        raise DataError(
            f"cannot write '{fault.filename or final}': {fault.strerror};",
            "free space or choose another --out; what was there before is unchanged.",
        ) from fault
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, final: Path) -> None:
    """Rename `partial` to `final`; what was there goes only after the new folder is in place."""
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    try:
        partial.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder alone, so that two builds never write into one place."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as fault:
        raise DataError(
            f"cannot use '{folder}': {fault.strerror};", "choose another --out."
        ) from fault
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as fault:
        raise DataError(
            f"another build is writing into '{folder}';", "wait for it, or choose another --out."
        ) from fault
