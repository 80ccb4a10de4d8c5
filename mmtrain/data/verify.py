"""The full check of a shard folder: every byte against the manifest, every sample as it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import file_digest
from io import BufferedReader
from os import SEEK_END
from pathlib import Path

import numpy as np

from mmtrain import plugins
from mmtrain.data.cache import ShardCache
from mmtrain.data.codec import short_digest
from mmtrain.data.examine import examine_records
from mmtrain.data.manifest import (
    INDEX_AGAIN,
    Manifest,
    ShardInfo,
    read_index,
    read_manifest,
    surplus_shards,
)
from mmtrain.data.remote import Place, RemoteFolder
from mmtrain.data.shards import blob_of
from mmtrain.data.tar import list_members, runs
from mmtrain.errors import DataError, MmtrainError
from mmtrain.files import open_regular, read_at
from mmtrain.tasks.interface import Task

_NAMED_AT_MOST = 5
_LISTED_AT_MOST = 20

OnBytes = Callable[[int, int], None]  # bytes done, bytes in all


def verify_folder(
    folder: Place, progress: OnBytes = lambda bytes_done, bytes_in_all: None
) -> list[str]:
    """Every problem of a shard folder, each naming its file; an empty list if there is none.

    Of samples that training would refuse, the first are named and the others counted.
    """
    try:
        manifest, _ = read_manifest(folder)
        task = plugins.load("task", manifest.task)
    except MmtrainError as error:
        return [f"'{folder}': {error}"]
    problems = [
        f"'{folder / name}' is not in the manifest; remove it, or build the folder again."
        for name in surplus_shards(folder, manifest)
    ]
    index: np.ndarray | None = None
    try:
        index = read_index(folder, manifest)
    except DataError as error:
        problems.append(str(error))
    refused: list[str] = []
    for shard in _shards(folder, manifest, index):
        damage = _file_fault(shard)
        if damage is not None:
            problems.append(damage)
        for end, refusal in _looked_through(shard, task) if damage is None else ():
            refused += refusal
            progress(shard.start + end, manifest.num_bytes)
        progress(shard.start + shard.info.bytes, manifest.num_bytes)
    return problems + shortened(refused)


def shortened(problems: list[str]) -> list[str]:
    """The first of many problems, and how many more there are."""
    more = len(problems) - _LISTED_AT_MOST
    return [*problems[:_LISTED_AT_MOST], *([f"and {more} more samples."] if more > 0 else [])]


@dataclass(frozen=True)
class _Shard:
    """One shard with what manifest and index say of it."""

    path: Path | str
    open: Callable[[], int]
    number: int
    info: ShardInfo
    rows: np.ndarray | None  # None where the index cannot be read
    first_sample: int
    start: int  # bytes of the shards before it


def _shards(folder: Place, manifest: Manifest, index: np.ndarray | None) -> Iterator[_Shard]:
    first_sample = start = 0
    for number, info in enumerate(manifest.shards):
        rows = None if index is None else index[first_sample : first_sample + info.samples]
        place = (first_sample, start)
        yield _Shard(folder / info.name, _opener(folder, info), number, info, rows, *place)
        first_sample, start = first_sample + info.samples, start + info.bytes


def _opener(folder: Place, info: ShardInfo) -> Callable[[], int]:
    if isinstance(folder, RemoteFolder):
        return partial(ShardCache.at().open, blob_of(folder, info))
    return partial(open_regular, folder / info.name)


# --- samples ------------------------------------------------------------------------------------


def _looked_through(shard: _Shard, task: Task) -> Iterator[tuple[int, list[str]]]:
    """Of every sample of an intact shard: where it ends, and why training would refuse it."""
    if shard.rows is None:
        return
    extents = shard.rows[["offset", "size"]].tolist()
    with open(shard.open(), "rb") as file:
        looked = examine_records(file.fileno(), shard.number, extents, task)
        for row, (offset, size), found in zip(shard.rows, extents, looked, strict=True):
            refusal = []
            if isinstance(found, DataError):
                refusal = [f"'{shard.path}': {found}"]
            elif found.row != row.tobytes():
                refusal = [
                    f"'{shard.path}': sample {found.id!r} is not what the index says; {INDEX_AGAIN}"
                ]
            yield offset + size, refusal


# --- files --------------------------------------------------------------------------------------


def _file_fault(shard: _Shard) -> str | None:
    """What is wrong with one shard file, in one line."""
    try:
        with open(shard.open(), "rb") as file:
            faults = _content_faults(file, shard)
    except DataError as fault:
        return str(fault)
    except OSError as fault:
        return f"'{shard.path}' is not readable ({fault.strerror}); copy it again."
    if not faults:
        return None
    return f"'{shard.path}': {', '.join(faults)}; copy it again, or build the folder again."


def _content_faults(file: BufferedReader, shard: _Shard) -> list[str]:
    faults = []
    digest = file_digest(file, "sha256").hexdigest()
    num_bytes = file.seek(0, SEEK_END)
    if num_bytes != shard.info.bytes:
        faults.append(f"{num_bytes} bytes instead of {shard.info.bytes}")
    if digest != shard.info.sha256:
        faults.append("its sha256 is not the one in the manifest")
        faults += _damaged_samples(file, shard)
    return faults + _layout_faults(file, num_bytes, shard)


def _damaged_samples(file: BufferedReader, shard: _Shard) -> list[str]:
    """Which samples of a shard differ from what was built."""
    damaged = []
    for number, row in enumerate([] if shard.rows is None else shard.rows):
        record = read_at(file.fileno(), int(row["offset"]), int(row["size"]))
        if short_digest([record]) != row["record_digest"].tobytes():
            damaged.append(str(shard.first_sample + number))
    if not damaged:
        return []
    return [f"{len(damaged)} of {shard.info.samples} samples are damaged ({_listed(damaged)})"]


def _layout_faults(file: BufferedReader, num_bytes: int, shard: _Shard) -> list[str]:
    """Faults of the tar framing: lost, cut or interleaved members."""
    places, fault = list_members(file, num_bytes)
    faults = [fault] if fault else []
    if len(places) != shard.info.members:
        faults.append(f"{len(places)} members instead of {shard.info.members}")
    found = runs(places)
    if len(found) != len({run.key for run in found}):
        faults.append("the members of its samples are interleaved")
    elif len(found) != shard.info.samples:
        faults.append(f"{len(found)} samples instead of {shard.info.samples}")
    elif shard.rows is not None:
        extents = [(run.offset, run.end - run.offset) for run in found]
        if extents != shard.rows[["offset", "size"]].tolist():
            faults.append("its samples do not lie where the index says")
    return faults


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(names[:_NAMED_AT_MOST]) + more
