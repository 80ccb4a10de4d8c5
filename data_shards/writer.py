"""Samples into a shard folder, written by webdataset itself.

The same samples give the same bytes on any machine: no times, owners or host names in the headers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

from data_shards.index import take_inventory, write_manifest
from mmtrain.data.codec import encode_sample
from mmtrain.data.manifest import Manifest, sample_name, shard_name
from mmtrain.errors import DataError
from mmtrain.tasks.interface import Sample

DEFAULT_SAMPLES_PER_SHARD = 2000
_NAMED_AT_MOST = 5


class EmptySplit(DataError):
    """There is nothing of a split in the raw files."""


class ShardWriter:
    """Writes samples into an existing empty folder; `finish` adds the index and the manifest."""

    def __init__(self, folder: Path, samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD) -> None:
        self._folder = folder
        self._samples_per_shard = samples_per_shard
        self._samples = 0
        self._tar: _Tar | None = None

    def add(self, sample: Sample) -> None:
        """Append a sample; what is wrong with it shows when `finish` reads it back."""
        if self._tar is None:
            number = self._samples // self._samples_per_shard
            self._tar = _Tar(self._folder / shard_name(number))
        self._tar.append(sample, sample_name(self._samples))
        self._samples += 1
        if self._samples % self._samples_per_shard == 0:
            self._close()

    def finish(
        self,
        task: str,
        split: str,
        seed: int,
        limit: int | None,
        build_options: Mapping[str, object],
    ) -> Manifest:
        """Write what is left, look at all of it as training will, then pin it by the manifest."""
        self._close()
        if not self._samples:
            raise EmptySplit(
                f"task '{task}' yields no sample for split '{split}';",
                "check the raw folder and the build options.",
            )
        inventory = take_inventory(self._folder, task)
        if inventory.problems:
            # Shards by their names alone: the folder is gone when this is read.
            named = [p.replace(f"{self._folder}/", "") for p in inventory.problems[:_NAMED_AT_MOST]]
            more = len(inventory.problems) - len(named)
            raise DataError(
                f"{len(inventory.problems)} of {self._samples} samples cannot be trained on:",
                " ".join(named) + f" And {more} more." * (more > 0),
            )
        return write_manifest(self._folder, inventory, task, split, seed, limit, build_options)

    def _close(self) -> None:
        if self._tar is not None:
            self._tar.close()
        self._tar = None


class _Tar:
    """One shard being written."""

    def __init__(self, path: Path) -> None:
        # Imported here: it takes torch along, and reading shards needs neither.
        from webdataset import TarWriter

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

    def _drain(self) -> None:
        self._file.write(self._buffer.getvalue())
        self._buffer.seek(0)
        self._buffer.truncate()
