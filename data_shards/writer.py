"""Samples into a shard folder, written by webdataset itself.

The same samples give the same bytes on any machine: no times, owners or host names in the headers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from data_shards.index import Inventory, take_inventory, write_manifest
from mmtrain.data.codec import encode_sample
from mmtrain.data.manifest import Manifest, sample_name, shard_name
from mmtrain.errors import DataError
from mmtrain.tasks.interface import Sample

DEFAULT_SAMPLES_PER_SHARD = 2000
_NAMED_AT_MOST = 5


class EmptySplit(DataError):
    """There is nothing of a split in the raw files."""


class ShardWriter:
    """Writes samples into a folder, behind the full shards that it may hold.

    `finish` adds the index and the manifest.
    """

    def __init__(
        self,
        folder: Path,
        samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD,
        first_shard: int = 0,
    ) -> None:
        self._folder = folder
        self._samples_per_shard = samples_per_shard
        self.samples = first_shard * samples_per_shard
        self._tar: _Tar | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._tar is not None:
            self._tar.abandon()

    def add(self, sample: Sample) -> Path | None:
        """Append a sample; the shard that is full with it. Faults show when it is read back."""
        if self._tar is None:
            number = self.samples // self._samples_per_shard
            self._tar = _Tar(self._folder / shard_name(number))
        self._tar.append(sample, sample_name(self.samples))
        self.samples += 1
        return self.close() if self.samples % self._samples_per_shard == 0 else None

    def close(self) -> Path | None:
        """End the shard that is not full yet, if there is one."""
        if self._tar is None:
            return None
        tar, self._tar = self._tar, None
        tar.close()
        return tar.path

    def finish(
        self,
        task: str,
        split: str,
        seed: int,
        limit: int | None,
        build_options: Mapping[str, object],
    ) -> Manifest:
        """Write what is left, look at all of it as training will, then pin it by the manifest."""
        self.close()
        refuse_empty(self.samples, task, split)
        inventory = take_inventory(self._folder, task)
        refuse_unsound(inventory, self._folder, self.samples)
        return write_manifest(self._folder, inventory, task, split, seed, limit, build_options)


def refuse_empty(samples: int, task: str, split: str) -> None:
    """An error where nothing was written."""
    if not samples:
        raise EmptySplit(
            f"task '{task}' yields no sample for split '{split}';",
            "check the raw folder and the build options.",
        )


def refuse_unsound(inventory: Inventory, folder: Path, samples: int) -> None:
    """An error that names the first samples that training would refuse."""
    if inventory.problems:
        # Shards by their names alone: the folder is gone when this is read.
        named = [text.replace(f"{folder}/", "") for text in inventory.problems[:_NAMED_AT_MOST]]
        more = len(inventory.problems) - len(named)
        raise DataError(
            f"{len(inventory.problems)} of {samples} samples cannot be trained on:",
            " ".join(named) + f" And {more} more." * (more > 0),
        )


class _Tar:
    """One shard being written."""

    def __init__(self, path: Path) -> None:
        # Imported here: it takes torch along, and reading shards needs neither.
        from webdataset import TarWriter

        self.path = path
        self._file = path.open("wb")
        # webdataset writes into memory: a full disk is then met by our own write alone, not once
        # more when Python clears its stream away.
        self._buffer = BytesIO()
        self._writer = TarWriter(
            self._buffer, user="", group="", mode=0o644, mtime=0, encoder=False
        )

    def append(self, sample: Sample, key: str) -> None:
        """Add all members of one sample."""
        members = {name.removeprefix(f"{key}."): data for name, data in encode_sample(sample, key)}
        self._writer.write({"__key__": key, **members})
        self._drain()

    def close(self) -> None:
        """End the tar and wait until it is on the disk."""
        self._writer.close()
        self._drain()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Let go of it, half written: what is wrong with the disk was told."""
        self._writer.close()
        with suppress(OSError):
            self._file.close()

    def _drain(self) -> None:
        self._file.write(self._buffer.getvalue())
        self._buffer.seek(0)
        self._buffer.truncate()
